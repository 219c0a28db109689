"""The one error that a user can cause; every command turns it into exit status 2."""


class InputError(ValueError):
    """Something that a user gave cannot be used.

    The message is one or two lines: where, what was found, what was expected, what to do. Commands print it and exit
    with status 2; library callers catch it as a ValueError.
    """
