"""Read a command line into a checked, frozen object."""

import contextlib
import difflib
import inspect
import shlex
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any, ClassVar, TypeVar, get_args

import fire
from fire.decorators import SetParseFn
from pydantic import (
    BaseModel,
    ConfigDict,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from errors import UserError

FlagsT = TypeVar("FlagsT", bound="Flags")


class Flags(BaseModel):
    """The flags of a command: each field is a flag, its description the flag's help."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    POSITIONAL: ClassVar[tuple[str, ...]] = ()  # may be given without their names, in this order
    ALIASES: ClassVar[dict[str, str]] = {}  # another name -> the flag
    REMOVED: ClassVar[dict[str, str]] = {}  # a flag of earlier versions -> what replaces it
    GROUPS: ClassVar[dict[str, tuple[str, ...]]] = {}  # heading -> flags, for --help

    @field_validator("*", mode="before")
    @classmethod
    def _plain_value(cls, value: Any, info: ValidationInfo) -> Any:
        """Convert a command line's words: `None`, `1e3` for an integer, a flag without a value."""
        annotation = cls.model_fields[str(info.field_name)].annotation
        if value in (None, "None"):
            return None
        if bool in (annotation, *get_args(annotation)):
            return value
        if value is True or value in ("True", ""):
            raise ValueError("needs a value")
        if isinstance(value, str) and "e" in value.lower() and annotation in (int, int | None):
            with contextlib.suppress(ValueError):
                return float(value)  # 1e3; pydantic takes 1000.0 for an integer, not 0.5
        return value

    @model_validator(mode="after")
    def _fit_together(self) -> "Flags":
        if problems := self._problems():
            raise ValueError("\n".join(problems))
        return self

    def _problems(self) -> list[str]:
        """Return what is wrong with the flags taken together, a line each."""
        return []

    def _excluded(self, name: str, *others: str) -> list[str]:
        """Return a problem for each of `others` that is given although `name` is on."""
        return [
            f"--{other} and --{name} exclude each other: give one of them"
            for other in others
            if getattr(self, name) and other in self.model_fields_set and getattr(self, other)
        ]

    def _idle(self, needs: dict[str, tuple[bool, str]]) -> list[str]:
        """Return a problem for each given flag that lacks what it needs.

        `needs`: flag -> (whether its need is met, what it needs).
        """
        return [
            f"--{name} does nothing without {need}: add it, or leave out --{name}"
            for name, (has_it, need) in needs.items()
            if name in self.model_fields_set and not has_it
        ]

    @classmethod
    def groups(cls) -> dict[str, tuple[str, ...]]:
        """Return the flags by heading; without GROUPS a class's own come before its base's."""
        own = [name for name in cls.model_fields if name in cls.__annotations__]
        rest = [name for name in cls.model_fields if name not in own]
        return cls.GROUPS or {"Flags": (*own, *rest)}

    @classmethod
    def default_text(cls, name: str) -> str:
        """Return a flag's default as it is typed, or "required"."""
        field = cls.model_fields[name]
        if field.is_required():
            return "required"
        is_switch = isinstance(field.default, bool)
        return str(int(field.default) if is_switch else field.default)


def build(cls: type[FlagsT], values: dict[str, Any], words: tuple[str, ...] = ()) -> FlagsT:
    """Return `cls(**values)`. Raises: UserError with a line for each mistake."""
    problems = [f"{word}: not a flag; write --flag=value" for word in words]
    needed = [name for name, field in cls.model_fields.items() if field.is_required()]
    is_meant = len(words) == len(needed) == 1 and needed[0] not in values
    if is_meant:
        values = {**values, needed[0]: words[0]}
        problems = [f"{words[0]}: write it as --{needed[0]}={_quoted(words[0])}"]
    try:
        flags = cls(**values)
    except ValidationError as error:
        problems += [_describe(cls, item) for item in error.errors()]
    if problems:
        help_line = [] if is_meant and len(problems) == 1 else ["See --help for every flag."]
        raise UserError("\n".join(problems + help_line))
    return flags


def _quoted(word: str) -> str:
    """Return a word as it is typed; Windows' command line knows no single quotes."""
    return subprocess.list2cmdline([word]) if sys.platform == "win32" else shlex.quote(word)


def parse(cls: type[FlagsT]) -> FlagsT:
    """Read this process's command line with google-fire; exit after `--help`.

    Fire passes every word on as typed (a folder called 2024 stays a string); pydantic then checks
    the types and ranges of all flags at once.
    """
    if {"--help", "-h"} & set(sys.argv[1:]):
        print(help_text(cls), flush=True)
        sys.exit()
    given: dict[str, Any] = {}
    stray: tuple[str, ...] = ()

    def command(*words: str, **values: str) -> None:
        nonlocal stray
        stray = words[len(cls.POSITIONAL) :]
        given.update(zip(cls.POSITIONAL, words, strict=False))
        given.update({name: value for name, value in values.items() if value is not None})
        for alias, name in cls.ALIASES.items():
            if alias in given and name not in given:  # if both, `alias` is reported as unknown
                given[name] = given.pop(alias)

    # Everything is accepted here, so that all mistakes are reported together. Fire must know the
    # names, or it reads --no_label as "_label is off".
    kinds = inspect.Parameter
    command.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [
            kinds("words", kinds.VAR_POSITIONAL),
            *(kinds(name, kinds.KEYWORD_ONLY, default=None) for name in cls.model_fields),
            kinds("values", kinds.VAR_KEYWORD),
        ]
    )
    SetParseFn(str)(command)
    fire.Fire(command, name=Path(sys.argv[0]).name)
    return build(cls, given, stray)


def help_text(cls: type[Flags]) -> str:
    """Return what --help prints: what the command does, and each flag with its default."""
    width = min(100, shutil.get_terminal_size().columns)
    lines = [inspect.cleandoc(cls.__doc__ or "")]
    for heading, names in cls.groups().items():
        lines += ["", heading]
        for name in names:
            default = cls.default_text(name)
            lines.append(
                f"  --{name}" + (" (required)" if default == "required" else f"={default}")
            )
            lines += textwrap.wrap(
                str(cls.model_fields[name].description),
                width,
                initial_indent=" " * 6,
                subsequent_indent=" " * 6,
                break_on_hyphens=False,
            )
    if cls.POSITIONAL:
        names_text = " and ".join(cls.POSITIONAL)
        lines += ["", f"Without its name, in this order: {names_text}."]
    if cls.ALIASES:
        other = ", ".join(f"--{alias} for --{name}" for alias, name in cls.ALIASES.items())
        lines += ["", f"Other names: {other}."]
    return "\n".join(lines)


def _describe(cls: type[Flags], problem: Any) -> str:
    """Turn one of pydantic's error records into a line with flag, value and remedy."""
    name = str(problem["loc"][0]) if problem["loc"] else ""
    if not name:
        return str(problem["msg"]).removeprefix("Value error, ")
    if name in cls.REMOVED:
        return f"--{name}: no longer a flag: {cls.REMOVED[name]}"
    if problem["type"] == "extra_forbidden":
        close = difflib.get_close_matches(name, cls.model_fields, n=1)
        return f"--{name}: no such flag" + (f"; did you mean --{close[0]}?" if close else "")
    field = cls.model_fields[name]
    if problem["type"] == "missing":
        return f"--{name} is missing: {field.description}"
    what = str(problem["msg"]).removeprefix("Value error, ")
    for subject in ("Input ", "String ", "List ", "Value "):
        what = what.removeprefix(subject)
    if problem["type"] == "value_error" and what != "needs a value":  # ours, which say it all
        return f"--{name}={problem['input']}: {what}"
    value = "" if what == "needs a value" else f"={problem['input']}"
    default = "" if field.is_required() else f" (default {cls.default_text(name)})"
    return f"--{name}{value}: {what}. --{name}: {field.description}{default}"
