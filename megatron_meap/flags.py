"""Flags declared once, as fields of a frozen dataclass next to the component that they control.

    @dataclass(frozen=True)
    class ProbeSettings(Settings):
        probe_interval: int | None = flag(None, "take the probe every N steps", metavar="N")

declares `--meap-probe-interval`, stored in `args.meap_probe_interval`. The field determines how the flag is parsed,
shown in `--help`, recorded in a checkpoint and compared on resume.
"""

import argparse
import dataclasses
import difflib
import shlex
import sys
import types
from argparse import BooleanOptionalAction, Namespace
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, NoReturn, Self, get_args, get_origin, get_type_hints

from megatron_meap.errors import UsageError, refusing


def flag(
    default: Any,
    help: str,
    *,
    metavar: str | None = None,
    choices: Sequence[str] | None = None,
    name: str | None = None,
    decides: bool = False,
) -> Any:
    """A field of a `Settings` class that is a command-line flag.

    Args:
        default: value if the flag is not given; None may mean a default that depends on other flags.
        help: one sentence for `--help`; `%(default)s` is replaced by the default.
        metavar: name of the value in `--help`.
        choices: the values allowed.
        name: the whole flag, if it is not `--meap-` and the field's name.
        decides: whether the result of the run depends on it, so that a resumed run must repeat it.
    """
    return dataclasses.field(
        default=default,
        metadata={"help": help, "metavar": metavar, "choices": choices, "name": name, "decides": decides},
    )


def derived(default: Any, described: str) -> Any:
    """A field without a flag, derived from other settings and recorded with them; messages call it `described`."""
    return dataclasses.field(default=default, metadata={"described": described, "decides": True})


@dataclasses.dataclass(frozen=True)
class Settings:
    """Base of the dataclasses that declare flags; in Megatron's arguments the fields' names begin with `PREFIX`."""

    PREFIX: ClassVar[str] = "meap_"

    @classmethod
    def add_arguments(cls, group: Any) -> None:
        """Add one flag per field to an `argparse` group."""
        types_of = get_type_hints(cls)
        for field in _flags(cls):
            kind = _plain(types_of[field.name])
            options: dict[str, Any] = {"dest": cls.PREFIX + field.name, "help": field.metadata["help"]}
            if get_origin(kind) is tuple:
                kind = get_args(kind)[0]
                options["nargs"] = "+"
            if kind is bool:
                options["action"] = "store_true" if field.default is False else BooleanOptionalAction
            else:
                options |= {"type": kind, "metavar": field.metadata["metavar"], "choices": field.metadata["choices"]}
            group.add_argument(cls.flag_of(field.name), default=field.default, **options)

    @classmethod
    def flag_of(cls, name: str) -> str:
        """What a field is called in messages: its flag, or its description if no flag sets it."""
        metadata = cls.__dataclass_fields__[name].metadata
        return metadata.get("described") or metadata["name"] or "--" + (cls.PREFIX + name).replace("_", "-")

    @classmethod
    def of(cls, args: Namespace) -> Self:
        """The settings in Megatron's arguments; a field that older arguments lack gets its default."""
        return cls(
            **{field.name: getattr(args, cls.PREFIX + field.name, field.default) for field in dataclasses.fields(cls)}
        )

    @classmethod
    def names(cls) -> list[str]:
        """Names of the fields that are flags."""
        return [field.name for field in _flags(cls)]

    @classmethod
    def given(cls, args: Namespace) -> Iterator[str]:
        """The flags whose value is not their default."""
        for field in _flags(cls):
            if getattr(args, cls.PREFIX + field.name) != field.default:
                yield cls.flag_of(field.name)

    @classmethod
    def deciding(cls, args: Namespace) -> dict[str, Any]:
        """Settings that determine the result of a run, by name, without those that older arguments lack."""
        names = [field.name for field in dataclasses.fields(cls) if field.metadata["decides"]]
        return {
            cls.flag_of(name): getattr(args, cls.PREFIX + name) for name in names if hasattr(args, cls.PREFIX + name)
        }


def add_group(parser: argparse.ArgumentParser, title: str, description: str | None, *settings: type[Settings]) -> None:
    """Add the flags of several components under one title."""
    group = parser.add_argument_group(title, description)
    for each in settings:
        each.add_arguments(group)


class Parser(argparse.ArgumentParser):
    """Parser of a tool's command line, whose errors are a `UsageError` instead of a list of all flags.

    The description, usually the module's docstring, is shown as it is written.
    """

    def __init__(self, description: str | None = None, **options: Any) -> None:
        super().__init__(description=description, formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As in argparse."""
        self._words = list(sys.argv[1:] if args is None else args)
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """Raise it; unknown flags come before missing ones, which they may be misspellings of."""
        missing = message.removeprefix("the following arguments are required: ")
        if missing != message:
            flags = (word.partition("=")[0] for word in self._words if word.startswith("--"))
            unknown = "".join(
                f"{name}: no such flag{_similar(name, self)}; " for name in flags if not _is_known(name, self)
            )
            raise UsageError(f"{unknown}{missing}: missing; --help lists the flags")
        _refuse(self, message)


def refuse_in_one_line(parser: argparse.ArgumentParser) -> None:
    """Let a parser of another library raise a `UsageError` for a command line that it refuses."""
    parser.error = lambda message: _refuse(parser, message)  # type: ignore[method-assign]


def _refuse(parser: argparse.ArgumentParser, message: str) -> NoReturn:
    """Raise argparse's message in our own form."""
    unknown = message.removeprefix("unrecognized arguments: ")
    if unknown == message:
        raise UsageError(message.removeprefix("argument "))
    flags = [word.partition("=")[0] for word in unknown.split() if word.startswith("-")]
    if "--" in sys.argv:
        raise UsageError("--: the words after it would belong to no flag; drop it")
    if not flags:
        raise UsageError(f"{unknown}: does not belong to any flag; quote a value that contains spaces")
    raise UsageError("; ".join(f"{name}: no such flag{_similar(name, parser)}" for name in flags))


def with_files(command_line: Sequence[str]) -> list[str]:
    """A command line in which each `@FILE` is replaced by the flags in the file, split as a shell does.

    Lines that begin with `#` are comments.

    Raises:
        UsageError: a file cannot be read; or the shell was made to insert it, which does not interpret its quotes.
    """
    words: list[str] = []
    for word in command_line:
        if word.startswith("@"):
            with refusing(f"{word}: cannot be read as flags", OSError, ValueError):
                lines = Path(word[1:]).read_text().splitlines()
                words += shlex.split("\n".join(line for line in lines if not line.lstrip().startswith("#")))
        elif word.startswith("'"):
            raise UsageError(f"{word}: contains a quote from a file; write @FILE instead of $(cat FILE)")
        else:
            words.append(word)
    return words


def _is_known(name: str, parser: argparse.ArgumentParser) -> bool:
    """Whether a flag has this name, or begins with it."""
    return any(flag.startswith(name) for flag in parser._option_string_actions)


def _similar(name: str, parser: argparse.ArgumentParser) -> str:
    found = difflib.get_close_matches(name, parser._option_string_actions, 1, 0.7)
    return f"; did you mean {found[0]}?" if found else ""


def _flags(settings: type[Settings]) -> Iterator[dataclasses.Field]:
    """Fields that are flags."""
    return (field for field in dataclasses.fields(settings) if "help" in field.metadata)


def _plain(hint: Any) -> type:
    """`float` of `float | None`."""
    if isinstance(hint, types.UnionType):
        return next(each for each in get_args(hint) if each is not types.NoneType)
    return hint
