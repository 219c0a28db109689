"""Settings from the command line: a dataclass tree, a YAML file and dotted overrides. Imports no torch.

Keys are checked here, before any value is typed: an unknown or repeated key is an error that names the nearest one.
jsonargparse then types each scalar from its text, so `1e-4` is a number wherever a number is wanted and `no` is text
wherever text is wanted. Every failure is an InputError of one line.
"""

from __future__ import annotations

import dataclasses
import difflib
import errno
import functools
import math
import os
import sys
import traceback
import types
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar, Union, get_args, get_origin

from encoderkit.kernels.errors import InputError
from encoderkit.pretrain.host_memory import tune_host_memory
from encoderkit.pretrain.redaction import without_secrets
from encoderkit.pretrain.settings_fields import Field, describe, fields_of, help_text, without_none
from encoderkit.pretrain.settings_yaml import Entry, Plain, dump_yaml, read_inline, read_yaml, settings_to_dict
from encoderkit.pretrain.stopping import Stopped, stop_signals

__all__ = [
    "dispatch",
    "dump_yaml",
    "found_beside",
    "parse_settings",
    "read_settings",
    "run_command",
    "settings_from_entries",
    "settings_to_dict",
]

T = TypeVar("T")
Commands = Mapping[str, tuple[str, Callable[[list[str]], None]]]  # name -> what it does in one line, and the doing
NULLS = ("null", "Null", "NULL", "~", "")  # YAML's
BOOLEANS = ("true", "false", "yes", "no", "on", "off", "null")  # that may stand behind an option of true or false


def parse_settings(
    cls: type[T],
    argv: Sequence[str],
    *,
    prog: str,
    description: str = "",
    examples: str | Iterable[str] = (),
    positional: str | None = None,
    base: Path | None = None,
    beside: Collection[str] = (),
    more_options: Mapping[str, str] | None = None,
    writes_out: bool = True,
) -> T:
    """Settings of type cls from argv: --config FILE.yaml, --key value, --key=value; later ones win, keys over files.

    positional: the key that takes bare arguments. base: a config.yaml that is read before everything else. beside: keys
    whose values, where FILE.yaml sets them, are looked for beside it first.
    more_options: option -> help text, of options that the caller has already taken out of argv. writes_out: whether
    the key out, where there is one, has to be a place where something can be written.
    --help and --print-config print and leave with status 0. Raises InputError naming the key and what it may be.
    """
    fields = fields_of(cls)
    if any(argument in ("-h", "--help") for argument in argv):
        print(help_text(cls, prog, description, examples, positional, more_options or {}))
        raise SystemExit(0)
    chosen: dict[str, Any] = {}
    if base is not None:
        _assign_all(fields, chosen, read_yaml(base))
    print_config = False
    for entry in sorted(_entries(fields, argv, positional), key=lambda entry: entry.key != "config"):
        if entry.key == "config":
            read = read_yaml(Path(entry.value))
            _assign_all(fields, chosen, (found_beside(e, Path(entry.value)) if e.key in beside else e for e in read))
        elif entry.key == "print_config":
            print_config = True
        else:
            _assign_all(fields, chosen, [entry])
    settings = _build(cls, chosen)
    out = getattr(settings, "out", None)
    if out is not None and writes_out:
        check_place(str(out))
    if print_config:
        print(dump_yaml(settings), end="")
        raise SystemExit(0)
    return settings


def check_place(out: str) -> None:
    """Raise InputError where nothing can be written at out; nothing is made there yet."""
    if "://" in out:  # a folder of that name would be made here, passwords and all
        raise InputError(f"out is the URL {out}; expected a path on this machine")
    if not out:
        raise InputError("out is empty; expected a path")
    path = Path(out).absolute()
    try:
        place = next(folder for folder in (path, *path.parents) if folder.exists())
    except OSError as error:
        raise InputError(f"out {out} cannot be looked at: {error.strerror}; choose another out") from error
    if place != path and not place.is_dir():
        raise InputError(f"out {out} lies below {place}, which is a file; choose another out")
    if not os.access(place, os.W_OK):
        raise InputError(f"out {out} cannot be written: {place} is read-only here; choose another out")


def read_settings(cls: type[T], path: Path) -> T:
    """Settings of type cls from a YAML file, such as a run folder's config.yaml."""
    return settings_from_entries(cls, read_yaml(path))


def settings_from_entries(cls: type[T], entries: Iterable[Entry]) -> T:
    """Settings of type cls from dotted keys with values; later ones win."""
    chosen: dict[str, Any] = {}
    _assign_all(fields_of(cls), chosen, entries)
    return _build(cls, chosen)


def run_command(main: Callable[[], None]) -> int:
    """Run main and return the exit status: 0, or 2 after an InputError or on a full disk.

    143 after SIGTERM or SIGUSR1, 130 after Ctrl-C; 1 where training diverged or lost a process, or after a defect of
    ours, which has its traceback. Other errors have none; under torchrun the first process of each machine prints
    them, so that one mistake is told once, and any process what went wrong in it alone.
    """
    tune_host_memory()
    speaks = os.environ.get("LOCAL_RANK", os.environ.get("RANK", "0")) == "0"
    try:
        with stop_signals.handled():
            main()
            sys.stdout.flush()
    except (InputError, FloatingPointError, ChildProcessError) as error:
        of_one_rank = isinstance(error.__cause__, RuntimeError) and not speaks  # memory, a worker: not told by others
        if speaks or of_one_rank:
            rank = f"rank {os.environ.get('RANK')}: " if of_one_rank else ""
            print(f"error: {rank}{without_secrets(str(error))}", file=sys.stderr)
        return 2 if isinstance(error, InputError) else 1
    except Stopped as stopped:
        if speaks:
            print(stopped, file=sys.stderr)
        return int(stopped.code or 0)
    except BrokenPipeError:  # the reader of a pipe has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if _is_full_disk(error):
            print(
                f"error: no room on the disk: {without_secrets(str(error))}; free some, and run it again",
                file=sys.stderr,
            )
            return 2
        # A defect of ours: told whole, but for secrets that messages of libraries may hold.
        print(without_secrets(traceback.format_exc()), end="", file=sys.stderr)
        return 1
    return 0


def _is_full_disk(error: Exception) -> bool:
    """Whether a file could not grow; safetensors tells the number in words only."""
    numbers = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    if isinstance(error, OSError):
        return error.errno in numbers
    return any(f"(os error {number})" in str(error) for number in numbers)


def dispatch(prog: str, commands: Commands, argv: Sequence[str]) -> None:
    """Run the command that argv names, or print what there is; prog is encoderkit-PACKAGE or python -m MODULE."""
    if not argv or argv[0] in ("-h", "--help"):
        print(f"usage: {prog} COMMAND [--help] ...\n\ncommands:")
        print("\n".join(f"  {name:<15}{about}" for name, (about, _) in commands.items()))
        same = "" if " " in prog else f" The same as python -m {prog.replace('-', '.')}."
        print(f"\n{prog} COMMAND --help lists the settings of a command.{same}")
    elif argv[0] == "--version":
        print(f"encoderkit {metadata.version('encoderkit')}")
    elif argv[0] in commands:
        commands[argv[0]][1](list(argv[1:]))
    else:
        unknown_key(argv[0], commands, kind="command")


def unknown_key(key: str, known: Iterable[str], where: str = "", kind: str = "key") -> NoReturn:
    """Raise an InputError that names the known key nearest to key, if one is near."""
    names = list(known)
    near = difflib.get_close_matches(key, names, 1)
    if not near:
        last = {name.rpartition(".")[2]: name for name in reversed(names)}
        near = [last[name] for name in difflib.get_close_matches(key.rpartition(".")[2], list(last), 1, 0.75)]
    hint = f"did you mean {near[0]}?" if near else f"--help lists every {kind}"
    raise InputError(f"{where}unknown {kind} {key}; {hint}")


def _entries(fields: dict[str, Field], argv: Sequence[str], positional: str | None) -> Iterable[Entry]:
    """The settings in argv, in order; bare arguments are gathered under the positional key."""
    left, bare = list(argv), []
    while left:
        token = left.pop(0)
        if token == "--":
            bare += left
            break
        if not token.startswith("--"):
            bare.append(token)
            continue
        name, equals, text = token[2:].partition("=")
        key = name.replace("-", "_")
        if key == "print_config":
            yield Entry(key, "", "")
            continue
        field = fields.get(key) or _dict_parent(fields, key)
        if field is None and key != "config":
            unknown_key(name, ["config", "print-config", *fields])
        kind = without_none(field.hint) if field else str
        many = field is not None and key == field.key and get_origin(kind) in (list, tuple)
        if equals:
            words = [text]
        elif kind is bool and not (left and left[0].lower() in BOOLEANS):
            words = ["true"]
        else:
            stop = next((i for i, word in enumerate(left) if word.startswith("--")), len(left))
            words, left = left[: stop if many else min(stop, 1)], left[stop if many else min(stop, 1) :]
        if not words:
            raise InputError(f"--{name} has no value; write --{name} VALUE")
        if key == "config":
            yield Entry(key, words[0], "")
        else:
            yield Entry(key, _from_words(words, many, get_origin(kind) is dict and key == field.key), "")  # type: ignore[union-attr]
    if bare and positional is None:
        raise InputError(f"unexpected argument {bare[0]!r}; settings are written --key value")
    if bare:
        many = get_origin(without_none(fields[str(positional)].hint)) is list
        if len(bare) > 1 and not many:
            raise InputError(f"unexpected argument {bare[1]!r}; {positional} is {bare[0]!r} already")
        yield Entry(str(positional), list(bare) if many else bare[0], "")


def found_beside(entry: Entry, file: Path) -> Entry:
    """The entry with its path taken from the folder of file, where it is one that lies there."""
    path = file.parent / str(entry.value)
    return entry._replace(value=str(path)) if not _is_null(entry.value) and path.exists() else entry


def _from_words(words: list[str], many: bool, mapping: bool) -> Any:
    """What the words after an option say: text for a scalar, a list for a list; [a, b] and {a: b} are read as YAML."""
    if len(words) == 1 and ((many and words[0].startswith("[")) or mapping or words[0] == "null"):
        return read_inline(words[0])
    texts = [Plain(word) if word else word for word in words]
    return texts if many else texts[0]


def _assign_all(fields: dict[str, Field], chosen: dict[str, Any], entries: Iterable[Entry]) -> None:
    """Type each entry and put it into chosen, which maps keys to values (a whole optional section may be None)."""
    for key, raw, where in entries:
        field = fields.get(key)
        parent = None if field else _dict_parent(fields, key)
        if field is None and parent is None:
            unknown_key(key, fields, where)
        for section in (key[:i] for i, letter in enumerate(key) if letter == "."):
            if chosen.get(section, ...) is None:
                del chosen[section]
        if parent is not None:
            value_hint = get_args(without_none(parent.hint))[1]
            held = {**(parent.default or {}), **(chosen.get(parent.key) or {})}
            chosen[parent.key] = {**held, key[len(parent.key) + 1 :]: typed(value_hint, raw, where + key)}
        elif field is not None and field.section is not None:
            if not _is_null(raw):
                names = ", ".join(item.name for item in dataclasses.fields(field.section))
                raise InputError(f"{where}{key} is {_show(raw)}; expected a section with the keys {names}")
            if field.optional:
                for name in [name for name in chosen if name.startswith(f"{key}.")]:
                    del chosen[name]
                chosen[key] = None
        elif field is not None:
            chosen[key] = typed(field.hint, raw, where + key)


def typed(hint: Any, raw: Any, key: str) -> Any:
    """The value of type hint that raw says: text (Plain where it was not quoted), a plain value, or lists and dicts."""
    bare = without_none(hint)
    origin = get_origin(bare)
    if origin in (list, tuple) and isinstance(raw, (list, tuple)):
        kinds = get_args(bare)
        if origin is tuple and not (len(kinds) == 2 and kinds[1] is ...):
            if len(raw) != len(kinds):
                raise InputError(f"{key} has {len(raw)} values; expected {describe(hint)}")
            return tuple(typed(kind, item, f"{key}[{i}]") for i, (kind, item) in enumerate(zip(kinds, raw)))
        return origin(typed(kinds[0], item, f"{key}[{i}]") for i, item in enumerate(raw))
    if origin is dict and isinstance(raw, Mapping):
        return {str(name): typed(get_args(bare)[1], item, f"{key}.{name}") for name, item in raw.items()}
    if raw is None or isinstance(raw, (bool, int, float)):
        raw = Plain(_text(raw))
    try:
        if isinstance(raw, str):
            return _scalar(hint, raw)
    except ValueError:
        pass
    raise InputError(f"{key} is {_show(raw)}; expected {describe(hint)}")


def _scalar(hint: Any, text: str) -> Any:
    """Type one scalar from its text; ValueError where it does not fit."""
    members = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    for member in members:
        if get_origin(member) is Literal and text in map(str, get_args(member)):
            return next(value for value in get_args(member) if str(value) == text)
    if _is_null(text):
        if type(None) in members:
            return None
        raise ValueError
    members = tuple(member for member in members if member is not type(None) and get_origin(member) is not Literal)
    others = tuple(member for member in members if member not in (str, Path))
    if others and (isinstance(text, Plain) or len(others) == len(members)):
        value = _typer(Union[others]).parse_args([f"--value={text}"]).value  # noqa: UP007 - built at run time
        if not (isinstance(value, float) and math.isnan(value)):
            return value
    if str in members:
        return str(text)
    if Path in members:
        return Path(text)
    raise ValueError


@functools.cache
def _typer(hint: Any) -> Any:
    import jsonargparse

    class Typer(jsonargparse.ArgumentParser):
        def error(self, message: str, ex: Exception | None = None) -> NoReturn:
            raise ValueError(message)

    parser = Typer(exit_on_error=False)
    parser.add_argument("--value", type=hint)
    return parser


def _build(cls: type[T], chosen: Mapping[str, Any], prefix: str = "", default: Any = None) -> T:
    """An instance of cls: the chosen keys under prefix, the rest from default; its own checks may raise InputError."""
    given: dict[str, Any] = {}
    for key, field in fields_of(cls).items():
        if "." in key:
            continue
        name = prefix + key
        fallback = field.default if default is None else getattr(default, key)
        if name in chosen:
            given[key] = chosen[name]
        elif field.section is not None and (
            fallback is dataclasses.MISSING or any(other.startswith(f"{name}.") for other in chosen)
        ):
            held = fallback if isinstance(fallback, field.section) else None
            given[key] = _build(field.section, chosen, f"{name}.", held)
        elif fallback is dataclasses.MISSING:
            raise InputError(f"{name} is missing; set it with --{name} or in the config file")
        else:
            given[key] = fallback
    return cls(**given)


def _dict_parent(fields: dict[str, Field], key: str) -> Field | None:
    """The dict-typed field that key names an item of; an item's name may have dots."""
    sections = (fields.get(key[:i]) for i, letter in enumerate(key) if letter == ".")
    return next((field for field in sections if field and get_origin(without_none(field.hint)) is dict), None)


def _is_null(raw: Any) -> bool:
    return raw is None or (isinstance(raw, Plain) and raw in NULLS)


def _text(value: bool | float | None) -> str:
    """A plain value as YAML writes it."""
    if isinstance(value, float) and math.isinf(value):
        return ".inf" if value > 0 else "-.inf"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)


def _show(raw: Any) -> str:
    text = "null" if _is_null(raw) else repr(str(raw)) if isinstance(raw, str) else str(raw)
    return text if len(text) <= 80 else f"{text[:77]}..."
