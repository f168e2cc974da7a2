"""Files that are whole or absent: each is written under a temporary name, then renamed."""

import contextlib
import json
import os
import re
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from filelock import FileLock, Timeout

from errors import UserError

LOCK = ".lock"  # in a folder that is being written to


def write(path: Path, fill: Callable[[BinaryIO], object]) -> None:
    """Let `fill` write a temporary file, flush it to disk, then rename it to `path`.

    Several processes may write the same file.
    Raises: UserError if the disk is full; an earlier file of that name is kept.
    """
    temporary = _hidden(path, f".{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            fill(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "inline_container" not in str(error):
            raise  # "inline_container" is torch.save's way of saying that the disk is full
        raise UserError(f"{path}: can't be written ({error}); any earlier file is kept") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _hidden(path: Path, end: str) -> Path:
    """Return the path of a hidden file beside another one, named after it."""
    name = path.name.encode()[-200:].decode(errors="ignore")  # the whole name could be too long
    return path.with_name(f".{name}{end}")


def write_bytes(path: Path, content: bytes) -> None:
    write(path, lambda file: file.write(content))


def write_json(path: Path, content: Any, indent: int | None = 2) -> None:
    """Write JSON; without `indent` on one line, which takes far less time and memory."""
    write_bytes(path, json.dumps(content, indent=indent).encode() + b"\n")


def read_json(path: Path) -> Any:
    with contextlib.suppress(OSError, ValueError):
        return json.loads(path.read_text(encoding="utf-8"))
    return None


def check_writable(folder: Path, flag: str) -> None:
    """Make a folder if it is missing. Raises: UserError if it can't be made or written to."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{flag}={folder}: is a file; give a folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"{flag}={folder}: can't be written to ({error.strerror})") from None


@contextlib.contextmanager
def locked(output: Path, flag: str) -> Iterator[None]:
    """Keep other processes from writing to `output`, the value of `flag`, inside the block.

    `output` is a folder that exists, or a file, which need not exist yet. The lock ends with its
    process, even if that is killed. Where the file system has no locks, there is only a warning.
    Raises: UserError that names the process that has the lock.
    """
    path = output / LOCK if output.is_dir() else _hidden(output, LOCK)
    lock = FileLock(path, timeout=0, fallback_to_soft=False)
    try:
        lock.acquire()
    except Timeout:
        holder = ""
        with contextlib.suppress(OSError):  # Windows doesn't let a locked file be read
            holder = path.read_text(errors="replace")
        raise UserError(
            f"{flag}={output}: another run is writing there ({holder or 'just started'}): wait "
            "until it has ended, or give another place"
        ) from None
    except OSError as error:
        print(f"warning: {path}: no lock ({error}); start no other run there", file=sys.stderr)
    else:
        started = time.strftime("%Y-%m-%d %H:%M:%S")
        with contextlib.suppress(OSError):  # a full disk is told by what matters
            path.write_text(f"process {os.getpid()} on {socket.gethostname()}, started {started}")
    try:
        yield
    finally:
        if lock.is_locked:
            with contextlib.suppress(OSError):  # Windows doesn't let an open file be removed
                path.unlink()  # while it is locked: one who waits for this file sees it is gone
            lock.release()


@contextlib.contextmanager
def locked_folder(folder: Path, flag: str) -> Iterator[None]:
    """Make a folder if it is missing, and keep other processes from writing to it in the block.

    Raises: UserError if it can't be made or written to, or that names the process that has it.
    """
    check_writable(folder, flag)
    with locked(folder, flag):
        yield


def check_outside(path: Path, folder: str, flag: str) -> None:
    """Raise UserError if `path`, the value of `flag`, is in the input folder."""
    root = Path(folder).resolve()
    if root in (path.resolve(), *path.resolve().parents):
        raise UserError(f"{flag}={path}: is in the input folder; give one outside it")


def temporaries(folder: Path, names: str, *, within: bool = False) -> list[Path]:
    """Return the temporary files that a killed `write` left of files named `names`.

    `names` is a regex; `within` includes subfolders.
    """
    temporary = re.compile(rf"\.({names})\.\d+\.tmp")
    found = (folder.rglob if within else folder.glob)(".*.tmp")
    return [path for path in found if temporary.fullmatch(path.name)]


def cache_folder(kind: str) -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "musicgen-trainer" / kind
