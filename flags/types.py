"""The kinds of values that flags take, each with its check."""

import ast
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, TypeAdapter, ValidationError


def _existing_folder(value: str) -> str:
    path = Path(value).expanduser()
    if not path.exists():
        raise ValueError("no such folder")
    if not path.is_dir():
        raise ValueError("is a file, not a folder")
    return str(path)


def _dataset(value: str) -> str:
    """Check a folder; shards, such as shards/train-{000..099}.tar, are looked for later."""
    is_shards = "://" in value or value.endswith(".tar")
    if "://" in value:
        return value
    return _expanded(value) if is_shards else _existing_folder(value)


def _existing_file(value: str) -> str:
    path = Path(value).expanduser()
    if not path.is_file():
        raise ValueError("no such file")
    return str(path)


def one_word(value: str) -> str:
    if len(value.split()) != 1 or value != value.strip():
        raise ValueError("must be one word, without spaces")
    return value


def _expanded(value: str) -> str:
    """Expand ~ to the home folder, as a shell doesn't after --flag=."""
    return str(Path(value).expanduser())


def _one_or_list(value: Any) -> Any:
    """Read a value, or a list written ["one", "two"], into a list."""
    if not isinstance(value, str):
        return value
    if not value.startswith("["):
        return [value]
    try:
        values = [str(item) for item in ast.literal_eval(value)]
    except (SyntaxError, ValueError):
        values = []
    if not values:
        raise ValueError('is not a list like ["one", "two"]')
    return values


def _prompts(value: Any) -> Any:
    """Read a prompt, a list of them, or a .txt file with one per line, into a list."""
    if isinstance(value, str) and value.endswith(".txt"):
        try:
            lines = Path(value).expanduser().read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"can't be read ({error})") from None
        return [line.strip() for line in lines if line.strip()]
    return _one_or_list(value)


def _switch_or_auto(value: Any) -> bool | str:
    if value == "auto":
        return "auto"
    try:
        return TypeAdapter(bool).validate_python(value)
    except ValidationError:
        raise ValueError("is not 0, 1 or auto") from None


def _some_words(value: str) -> str:
    words = " ".join(value.split())
    if not words:
        raise ValueError("needs a value")
    return words


Words = Annotated[str, AfterValidator(_some_words)]
Folder = Annotated[str, AfterValidator(_existing_folder)]
Dataset = Annotated[str, AfterValidator(_dataset)]
AnyPath = Annotated[str, Field(min_length=1), AfterValidator(_expanded)]
Prompts = Annotated[list[str], BeforeValidator(_prompts), Field(min_length=1)]
Files = Annotated[
    list[Annotated[str, AfterValidator(_existing_file)]],
    BeforeValidator(_one_or_list),
    Field(min_length=1),
]
Folders = Annotated[list[Folder], BeforeValidator(_one_or_list), Field(min_length=1)]
Scales = Annotated[
    list[float],
    BeforeValidator(_one_or_list),
    Field(
        min_length=1,
        description="how strongly: 0 = not at all, 1 = as trained; or [0.7, 0.3], one per adapter",
    ),
]
SwitchOrAuto = Annotated[bool | Literal["auto"], BeforeValidator(_switch_or_auto)]
SaveDtype = Literal["fp32", "bf16", "fp16"]
Device = Literal["auto", "cpu", "cuda", "mps"]
CaptionFrom = Literal["auto", "tags"]
