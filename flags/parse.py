"""From a command line to a checked, frozen object."""

import contextlib
import difflib
import inspect
import os
import sys
from pathlib import Path
from typing import Any, TypeVar

import fire
from fire.decorators import SetParseFn
from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, field_validator

from errors import UserError

FlagsT = TypeVar("FlagsT", bound="Flags")


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
