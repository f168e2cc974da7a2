"""WebDataset shards: tars of recordings and captions, read in place and never unpacked.

A plain tar allows reads at any offset, so a clip in a shard is read like one in a folder.
"""

import contextlib
import hashlib
import io
import os
import re
import tarfile
import unicodedata
import urllib.request
from collections.abc import Iterator
from functools import partial
from http.client import HTTPException, HTTPResponse
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NamedTuple

from braceexpand import UnbalancedBracesError, braceexpand  # type: ignore[attr-defined]
from filelock import FileLock

import files
from errors import Problem, UserError

COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7z": "xz", b"\x28\xb5": "zstd"}
ABOUT_NEXT = (b"x", b"X", b"g", b"L", b"K")  # types of headers that describe the next member
DIRECTIONS = ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")
MAX_HEADER_BYTES = 2**20
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
        """Open it as a binary file. Raises: OSError."""
        with self.tar.open("rb", buffering=0) as file:
            yield io.BufferedReader(_Part(file, self.offset, self.size))

    def read_bytes(self) -> bytes:
        with self.open() as file:
            return file.read()


class _Part(io.RawIOBase):
    """The `size` bytes of a file from `start` on, as a file."""

    def __init__(self, file: io.FileIO, start: int, size: int) -> None:
        self.file, self.start, self.size = file, start, size
        self.at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self.at, os.SEEK_END: self.size}
        self.at = max(0, base[whence] + offset)
        return self.at

    def readinto(self, buffer: Any) -> int:
        self.file.seek(self.start + self.at)
        count = self.file.readinto(memoryview(buffer)[: max(0, self.size - self.at)])
        self.at += count
        return count


def is_shards(dataset_path: str) -> bool:
    """Return whether it names tars, such as shards/train-{000..099}.tar, not a folder."""
    is_tar = dataset_path.endswith(".tar") and not os.path.isdir(dataset_path)  # noqa: PTH112
    return "://" in dataset_path or is_tar


def find(dataset_path: str) -> dict[str, Path]:
    """Return {name: file} of the shards of a path or URL with braces. Raises: UserError."""
    try:
        is_one = os.path.isfile(dataset_path)  # noqa: PTH113  (Path fails on a long list)
        names = [dataset_path] if is_one else list(braceexpand(dataset_path, escape=False))
    except UnbalancedBracesError:
        raise UserError(f"{dataset_path}: unbalanced brace; write train-{{000..099}}.tar") from None
    shards = {name: _download(name) if "://" in name else Path(name) for name in names}
    missing = [name for name, path in shards.items() if not path.is_file()]
    if missing:
        raise UserError(
            f"{dataset_path}: no such file: {', '.join(missing[:20])}; give a folder of shards, "
            "or names such as train-{000..099}.tar"
        )
    return shards


def members(tar: Path) -> tuple[dict[str, Member], list[Problem]]:
    """Return the files in a tar by name, and its problems: of a member, or without a name.

    The tar may be hostile: nothing is written, and links are not followed.
    """
    found: dict[str, Member] = {}
    problems: list[Problem] = []
    if not tar.is_file():
        return {}, [Problem("", "is not a plain file")]
    try:
        with tar.open("rb") as file:
            for info in _headers(file, tar.stat().st_size):
                name = PurePosixPath(info.name).as_posix()  # ./a.wav is a.wav
                problem = "occurs twice" if name in found else _problem(info)
                if problem:
                    problems.append(Problem(name, problem))
                elif not info.isdir():
                    found[name] = Member(tar, name, info.offset_data, info.size)
    except (tarfile.TarError, OSError, ValueError) as error:
        reason = f"truncated or damaged ({_reason(tar, error)}): copy it or make it again"
        problems.append(Problem("", reason))
    return found, problems


def _headers(file: BinaryIO, end: int) -> Iterator[tarfile.TarInfo]:
    """Yield the members of a tar of `end` bytes. Raises: TarError, OSError.

    A hostile header can make tarfile itself loop for ever, or take hours.
    """
    path: str | None = None
    size: int | None = None
    if end > 2**20 and not file.read(2**20).strip(b"\0"):
        raise tarfile.ReadError("it begins with zeros, as an unfinished download does")
    file.seek(0)
    while (block := file.read(512)) != bytes(512):
        if len(block) < 512:
            raise tarfile.ReadError("its end is missing")
        info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        info.offset_data = file.tell()
        is_about_next = info.type in ABOUT_NEXT
        if not is_about_next:
            info.name = info.name if path is None else path
            info.size = info.size if size is None else size
            path = size = None
        has_data = is_about_next or info.isreg() or info.type not in tarfile.SUPPORTED_TYPES
        length = info.size if has_data else 0
        if length < 0 or info.type == tarfile.GNUTYPE_SPARSE:
            raise tarfile.ReadError(f"{info.name} is sparse, or its size is invalid")
        if info.offset_data + length > end:
            raise tarfile.ReadError(f"it ends within {info.name}")
        if not is_about_next:
            yield info
        elif length > MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header of {length} bytes")
        elif info.type == tarfile.GNUTYPE_LONGNAME:
            path = _decoded(file.read(length).partition(b"\0")[0])
        elif info.type in (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE):
            fields = _pax(file.read(length))
            path = fields.get("path", path)
            if any(key.startswith("GNU.sparse.") for key in fields):
                raise tarfile.ReadError(f"the file after {info.name} is sparse")
            if "size" in fields:
                size = int(fields["size"][:20])
        file.seek(info.offset_data + -(-length // 512) * 512)
    if file.read(2**20).strip(b"\0"):
        raise tarfile.ReadError("data follows its end, as in concatenated tars")


def _pax(records: bytes) -> dict[str, str]:
    """Parse the records "LENGTH KEY=VALUE\n" of an extended header. Raises: ReadError."""
    fields, at = {}, 0
    while at < len(records):
        digits = records[at : at + 20].partition(b" ")[0]
        length = int(digits) if digits.isdigit() else 0
        key, equals, value = records[at + len(digits) + 1 : at + length].partition(b"=")
        if not equals or not value.endswith(b"\n") or at + length > len(records):
            raise tarfile.ReadError("an extended header is invalid")
        fields[_decoded(key)] = _decoded(value[:-1])
        at += length
    return fields


def _decoded(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")


def is_control(character: str) -> bool:
    """Return whether a name may not hold it: controls, half characters, changes of direction."""
    is_forbidden = unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp")
    return is_forbidden or unicodedata.bidirectional(character) in DIRECTIONS


def _problem(info: tarfile.TarInfo) -> str | None:
    """Return why a member is refused, or None."""
    path = PurePosixPath(info.name)
    if any(map(is_control, info.name)):
        return "its name has control characters or is not UTF-8: rename it"
    if path.is_absolute() or ".." in path.parts or re.match(r"[A-Za-z]:|.*\\", info.name):
        return "its name leads out of the folder"
    if not info.isdir() and info.type not in (tarfile.REGTYPE, tarfile.AREGTYPE):
        return "is a link or a device, not a plain file"
    return None


def _reason(tar: Path, error: Exception) -> str:
    with contextlib.suppress(OSError), tar.open("rb") as file:
        start = file.read(3)
        for magic, name in COMPRESSED.items():
            if start.startswith(magic):
                return f"it is compressed with {name}, which can't be read in parts"
    return str(error)


def _download(url: str) -> Path:
    """Download a shard into the user's cache folder, once. Raises: UserError."""
    folder = files.cache_folder("shards")
    name = PurePosixPath(url.partition("?")[0]).name[-100:]  # a signed URL may be long
    path = folder / f"{hashlib.sha256(url.encode()).hexdigest()[:16]}-{name}"
    if not url.startswith(("http://", "https://")):
        raise UserError(f"{url}: give an http or https URL, or a path")
    files.check_writable(folder, "XDG_CACHE_HOME")
    with FileLock(path.with_name(f".{path.name}.lock")):  # one process downloads it for all
        if path.exists():
            return path
        try:
            with urllib.request.urlopen(url, timeout=TIMEOUT_SEC) as answer:
                files.write(path, partial(_copy, answer))
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
