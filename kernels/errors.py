"""The one error that a user can cause, which every command turns into exit status 2; and messages in one line."""


class InputError(ValueError):
    """Something that a user gave cannot be used.

    The message is one or two lines: where, what was found, what was expected, what to do. Commands print it and exit
    with status 2; library callers catch it as a ValueError.
    """


def first_line(error: BaseException) -> str:
    """The first line of an error's message, at most 200 characters of it, or its kind where there is none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
