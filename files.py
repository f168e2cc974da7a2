"""A file is whole or not there: it is written under a temporary name, then renamed."""

import contextlib
import json
import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from errors import UserError


def write(path: Path, fill: Callable[[BinaryIO], object]) -> None:
    """Let `fill` write a file under a temporary name; rename it when it is whole and on disk.

    Several processes may write the same file.
    Errors: UserError when the disk is full; what had that name before is still there then.
    """
    end = path.name.encode()[-200:].decode(errors="ignore")  # with more the name gets too long
    temporary = path.with_name(f".{end}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            fill(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "inline_container" not in str(error):
            raise  # else: how torch.save says that the disk is full
        raise UserError(f"{path} could not be written ({error}); what was there is kept") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_bytes(path: Path, content: bytes) -> None:
    write(path, lambda file: file.write(content))


def write_json(path: Path, content: Any, indent: int | None = 2) -> None:
    """Without `indent` on one line, which takes far less time and memory."""
    write_bytes(path, json.dumps(content, indent=indent).encode() + b"\n")


def read_json(path: Path) -> Any:
    with contextlib.suppress(OSError, ValueError):
        return json.loads(path.read_text(encoding="utf-8"))
    return None


def check_writable(folder: Path, flag: str) -> None:
    """Make a folder if it is missing. Errors: UserError if it can't be made or written to."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{flag}={folder}: is a file; name a folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"{flag}={folder}: can't be written to ({error.strerror})") from None


def check_outside(path: Path, folder: str, flag: str) -> None:
    """Errors: UserError if what `flag` names is in the folder that is read."""
    root = Path(folder).resolve()
    if root in (path.resolve(), *path.resolve().parents):
        raise UserError(f"{flag}={path}: is in the folder that is read; name one outside")


def temporaries(folder: Path, names: str, *, within: bool = False) -> list[Path]:
    """What `write`, when it was killed, has left half written of files that were to be `names`.

    `names` is a regex; `within`: in folders within, too.
    """
    half_written = re.compile(rf"\.({names})\.\d+\.tmp")
    found = (folder.rglob if within else folder.glob)(".*.tmp")
    return [path for path in found if half_written.fullmatch(path.name)]


def cache_folder(kind: str) -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "musicgen-trainer" / kind
