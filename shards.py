"""WebDataset shards: tars of recordings and captions. Only looked into, never unpacked.

A plain tar can be read from anywhere in it, so a clip in a shard is read as one in a folder is.
"""

import contextlib
import hashlib
import os
import tarfile
import urllib.request
from collections.abc import Iterator
from functools import partial
from http.client import HTTPException, HTTPResponse
from pathlib import Path, PurePosixPath
from typing import BinaryIO, NamedTuple

from braceexpand import UnbalancedBracesError, braceexpand  # type: ignore[attr-defined]
from filelock import FileLock

import checkpoint
from flags import UserError

COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7z": "xz", b"\x28\xb5": "zstd"}
TIMEOUT_SEC = 60


class Member(NamedTuple):
    """A file inside a tar; read like a `Path`."""

    tar: Path
    name: str
    offset: int
    size: int

    @property
    def suffix(self) -> str:
        return PurePosixPath(self.name).suffix

    @contextlib.contextmanager
    def open(self) -> Iterator[BinaryIO]:
        """Errors: OSError."""
        try:
            with tarfile.open(self.tar, "r:") as archive:
                info = tarfile.TarInfo(self.name)
                info.offset_data, info.size = self.offset, self.size
                file = archive.extractfile(info)
                assert file is not None  # as it is a regular one
                with file:
                    yield file  # type: ignore[misc]  # tarfile's IO[bytes]
        except tarfile.TarError as error:
            raise OSError(f"{self.tar} is no longer a tar ({error})") from None

    def read_bytes(self) -> bytes:
        with self.open() as file:
            return file.read()


def is_shards(dataset_path: str) -> bool:
    """Whether it names tars, such as shards/train-{000..099}.tar, and not a folder."""
    return "://" in dataset_path or dataset_path.endswith(".tar")


def find(dataset_path: str) -> dict[str, Path]:
    """The shards that a path or URL with braces names: name -> file. Errors: UserError."""
    try:
        names = list(braceexpand(dataset_path))
    except UnbalancedBracesError:
        raise UserError(f"{dataset_path}: a brace is open; write train-{{000..099}}.tar") from None
    shards = {name: _download(name) if "://" in name else Path(name) for name in names}
    missing = [name for name, path in shards.items() if not path.is_file()]
    if missing:
        raise UserError(f"{dataset_path}: no such file: {', '.join(missing[:20])}")
    return shards


def members(tar: Path) -> tuple[dict[str, Member], list[str]]:
    """The files in a tar by name, and what is wrong with it or with some of them.

    Whoever made it may mean harm: nothing is written, links are not followed.
    """
    found: dict[str, Member] = {}
    problems: list[str] = []
    end = tar.stat().st_size
    last = -1
    try:
        with tarfile.open(tar, "r:") as archive:
            while info := archive.next():
                archive.members.clear()  # type: ignore[attr-defined]  # else it keeps all
                if info.size < 0 or info.offset <= last:
                    raise tarfile.ReadError("its headers go in a circle")
                last = info.offset
                if info.isdir():
                    continue
                name = PurePosixPath(info.name).as_posix()  # ./a.wav is a.wav
                problem = _problem(info, found)
                if problem:
                    problems.append(f"{name}: {problem}")
                elif info.offset_data + info.size > end:
                    raise tarfile.ReadError(f"it ends within {name}")
                else:
                    found[name] = Member(tar, name, info.offset_data, info.size)
            archive.fileobj.seek(archive.offset)
            if archive.fileobj.read(512) != bytes(512):
                raise tarfile.ReadError("its end is missing")
    # What tarfile raises for headers that make no sense is not only its own.
    except (tarfile.TarError, OSError, ValueError, OverflowError, RecursionError) as error:
        problems.append(f"truncated or damaged ({_reason(tar, error)}): copy or make it anew")
    return found, problems


def _problem(info: tarfile.TarInfo, found: dict[str, Member]) -> str | None:
    path = PurePosixPath(info.name)
    if not info.name.isprintable():
        return "its name has characters that can't be printed"
    if path.is_absolute() or not {"..", "\\", ":"}.isdisjoint([*path.parts, *info.name]):
        return "its name leads out of the folder"
    if not info.isreg() or info.issparse():
        return "is a link, a device or sparse, not a plain file"
    if path.as_posix() in found:
        return "is there twice"
    return None


def _reason(tar: Path, error: Exception) -> str:
    with tar.open("rb") as file:
        start = file.read(3)
    for magic, name in COMPRESSED.items():
        if start.startswith(magic):
            return f"it is compressed with {name}, which can't be read in parts"
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _download(url: str) -> Path:
    """A shard of the network, kept in the user's cache folder. Errors: UserError."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(base) / "musicgen-trainer" / "shards"
    path = folder / f"{hashlib.sha256(url.encode()).hexdigest()[:16]}-{PurePosixPath(url).name}"
    if not url.startswith(("http://", "https://")):
        raise UserError(f"{url}: give an http or https URL, or a path")
    checkpoint.check_writable(folder, "XDG_CACHE_HOME")
    with FileLock(path.with_name(f".{path.name}.lock")):  # one process fetches it for all
        if path.exists():
            return path
        try:
            with urllib.request.urlopen(url, timeout=TIMEOUT_SEC) as answer:
                checkpoint.write(path, partial(_copy, answer))
        except (OSError, HTTPException, ValueError) as error:
            raise UserError(f"{url}: can't be downloaded ({error})") from None
    return path


def _copy(answer: HTTPResponse, file: BinaryIO) -> None:
    try:
        while block := answer.read(2**20):
            file.write(block)
    except (ConnectionError, TimeoutError) as error:
        raise ValueError(error) from None  # an OSError here would be the disk's
    if answer.length:
        raise ValueError(f"{answer.length} bytes are missing")
