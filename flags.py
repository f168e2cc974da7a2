"""From a command line to a checked, frozen object; and how a user's mistake is told."""

import contextlib
import difflib
import inspect
import io
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import fire
from fire.decorators import SetParseFn
from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, field_validator

FlagsT = TypeVar("FlagsT", bound="Flags")


class UserError(Exception):
    """Something that the user can put right: what, where and how, in a few plain lines."""


class Flags(BaseModel):
    """Base of the flag sets: each field is a flag, its description the flag's help."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _plain_value(cls, value: Any, info: ValidationInfo) -> Any:
        """The command line's words as values: `None`, `1e3` for an integer, a flag left bare."""
        annotation = cls.model_fields[str(info.field_name)].annotation
        if value in (None, "None"):
            return None
        if annotation is bool:
            return value
        if value is True or value in ("True", ""):
            raise ValueError("needs a value")
        if isinstance(value, str) and "e" in value.lower() and annotation in (int, int | None):
            with contextlib.suppress(ValueError):
                return float(value)  # 1e3; pydantic takes 1000.0 for an integer, not 0.5
        return value


def build(cls: type[FlagsT], values: dict[str, Any], words: tuple[str, ...] = ()) -> FlagsT:
    """`cls(**values)`, or a UserError with a line for each thing that is wrong."""
    problems = [f"{word}: not a flag; write --flag=value" for word in words]
    try:
        flags = cls(**values)
    except ValidationError as error:
        problems += [_describe(cls, item) for item in error.errors()]
    if problems:
        raise UserError("\n".join([*problems, "See --help for every flag."]))
    return flags


def parse(
    cls: type[FlagsT], aliases: dict[str, str] | None = None, positional: tuple[str, ...] = ()
) -> FlagsT:
    """Read this process's command line with google-fire; exits after `--help`.

    Fire hands over every word as it was typed (a folder called 2024 stays a string), and
    pydantic then checks types and ranges of all flags at once. The flags in `positional` may also
    be given without their names, in that order.
    """
    wants_help = bool({"--help", "-h"} & set(sys.argv[1:]))
    fields = cls.model_fields
    parameters = [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if field.is_required() else field.default,
            annotation=field.annotation
            if field.annotation in (int, float, str, bool)
            else inspect.Parameter.empty,
        )
        for name, field in fields.items()
    ]
    given: dict[str, Any] = {}
    stray: tuple[str, ...] = ()

    def command(*words: str, **values: str) -> None:
        nonlocal stray
        stray = words[len(positional) :]
        given.update(zip(positional, words, strict=False))
        given.update({name: value for name, value in values.items() if value is not None})
        for alias, name in (aliases or {}).items():
            if alias in given and name not in given:  # both: `alias` is told as no flag
                given[name] = given.pop(alias)

    if not wants_help:  # everything is let through here, so that all mistakes are told together
        parameters = [
            inspect.Parameter("words", inspect.Parameter.VAR_POSITIONAL),
            *(p.replace(default=None) for p in parameters),
            inspect.Parameter("values", inspect.Parameter.VAR_KEYWORD),
        ]
        SetParseFn(str)(command)
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__doc__ = "\n".join(
        [inspect.cleandoc(cls.__doc__ or ""), "", "Args:"]
        + [f"    {name}: {field.description}" for name, field in fields.items()]
    )
    os.environ.setdefault("PAGER", "more" if os.name == "nt" else "cat")
    with contextlib.redirect_stderr(sys.stdout if wants_help else sys.stderr):
        fire.Fire(command, name=Path(sys.argv[0]).name)
    for name in [name for name in given if len(name) == 1]:  # Fire's help shows -d for some
        matches = [field for field in fields if field.startswith(name)]
        if len(matches) == 1:
            given[matches[0]] = given.pop(name)
    return build(cls, given, stray)


@contextlib.contextmanager
def plain_errors(advice_out_of_memory: str) -> Iterator[None]:
    """End the process with a plain message, without a traceback, where the user can help it."""
    logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)  # torchao's, on each start
    for stream in (sys.stdout, sys.stderr):  # a caption that a console can't show is no error
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        yield
    except UserError as error:
        _exit(str(error))
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        _exit(f"out of memory: {str(error).splitlines()[0]}\n{advice_out_of_memory}")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that the device, or the machine, has no memory left."""
    text = str(error)
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "out of memory" in text
        or "can't allocate memory" in text
        or "not enough memory" in text
        or "CUBLAS_STATUS_ALLOC_FAILED" in text
    )


def _exit(message: str) -> None:
    print(f"error: {_printable(message)}", file=sys.stderr)
    sys.exit(1)


def _describe(cls: type[Flags], problem: Any) -> str:
    """One of pydantic's error records -> a line with flag, value and remedy."""
    name = str(problem["loc"][0]) if problem["loc"] else ""
    if not name:
        return str(problem["msg"]).removeprefix("Value error, ")
    if problem["type"] == "extra_forbidden":
        close = difflib.get_close_matches(name, cls.model_fields, n=1)
        return f"--{name}: no such flag" + (f"; did you mean --{close[0]}?" if close else "")
    field = cls.model_fields[name]
    if problem["type"] == "missing":
        return f"--{name} is missing: {field.description}"
    what = str(problem["msg"]).removeprefix("Value error, ")
    for subject in ("Input ", "String ", "List ", "Value "):
        what = what.removeprefix(subject)
    value = "" if what == "needs a value" else f"={problem['input']}"
    default = "" if field.is_required() else f" (default {field.default})"
    return f"--{name}{value}: {what}. --{name}: {field.description}{default}"


def first_lines(lines: list[str], limit: int = 20) -> str:
    """Up to a screenful of lines, then how many more there are.

    Names and captions may hold what would steer the terminal.
    """
    shown = ["  " + _printable(line.replace("\n", "\\n")) for line in lines[:limit]]
    if len(lines) > limit:
        shown.append(f"  ... and {len(lines) - limit} more")
    return "\n".join(shown)


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)
