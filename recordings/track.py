"""A recording: where it is, how long it is, and its caption."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from recordings.audio import Source
from recordings.captions import Caption
from recordings.shards import Member


@dataclass(frozen=True, slots=True)
class Track:
    """One recording, its length in its own frames, and its caption.

    It is the file `name` in the folder `root`, or a member of a shard.
    `written` is the caption as found, None without captions. A file of tokens has `codec`, the
    codec's name, and the rate and length of the recording that was encoded. `ends_early`: the end
    that its header promises is missing.
    """

    root: str
    name: str
    member: Member | None
    caption: str
    sample_rate: int
    frames: int
    written: Caption | None = None
    codec: str | None = None
    ends_early: bool = False

    @property
    def source(self) -> Source:
        """The file or tar member to read."""
        return self.member or self.path

    @property
    def path(self) -> Path:
        """The file on disk: its own, or its shard."""
        return self.member.tar if self.member else Path(self.root, self.name)

    @property
    def place(self) -> str:
        """The path to show to the user."""
        return f"{self.path}/{self.member.name}" if self.member else str(self.path)

    @property
    def duration_sec(self) -> float:
        return self.frames / self.sample_rate

    def crops(self, length: int, rate: int) -> int:
        """Return how many whole crops of `length` at `rate` a second it holds, at least one."""
        return max(1, self.frames * rate // (length * self.sample_rate))

    @property
    def key(self) -> str:
        """The name that seeds its crops: a flac, or one in a shard, gets the crops of the wav."""
        return as_wav(self.member.name if self.member else self.name)

    def stamp(self) -> list[str | int]:
        """Return size, mtime and place in the tar: new when the file changes. Raises: OSError."""
        status = self.path.stat()
        stamp: list[str | int] = [status.st_size, status.st_mtime_ns]
        return [*stamp, self.member.name, self.member.offset] if self.member else stamp


def stable_hash(name: str) -> int:
    """Return the same number for a name in every process, to seed with."""
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def as_wav(name: str) -> str:
    """Return a recording's name with the suffix .wav."""
    return f"{name[: name.rindex('.')]}.wav"
