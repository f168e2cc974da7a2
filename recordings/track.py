"""A recording: where it is, how long it is, and its caption."""

from dataclasses import dataclass
from pathlib import Path

from recordings.audio import Source
from recordings.captions import Caption
from recordings.shards import Member


@dataclass(frozen=True, slots=True)
class Track:
    """One recording, its length in its own frames, and its caption.

    It is the file `name` in the folder `root`, or a member of a shard.
    `written` is the caption as it was found, None without captions; `codec` is what the tokens
    are of, if it is a file of tokens, with rate and length of the recording that it is made from.
    """

    root: str
    name: str
    member: Member | None
    caption: str
    sample_rate: int
    frames: int
    written: Caption | None = None
    codec: str | None = None

    @property
    def source(self) -> Source:
        """Where to read it."""
        return self.member or self.path

    @property
    def path(self) -> Path:
        """The file on disk that it is in."""
        return self.member.tar if self.member else Path(self.root, self.name)

    @property
    def place(self) -> str:
        """What it is called to the user."""
        return f"{self.path}/{self.member.name}" if self.member else str(self.path)

    @property
    def duration_sec(self) -> float:
        return self.frames / self.sample_rate

    @property
    def key(self) -> str:
        """What its crops are drawn by: those of a flac, or in a shard, are those of the wav."""
        return as_wav(self.member.name if self.member else self.name)

    def stamp(self) -> list[str | int]:
        """What is another when the recording has changed. Errors: OSError."""
        status = self.path.stat()
        stamp: list[str | int] = [status.st_size, status.st_mtime_ns]
        return [*stamp, self.member.name, self.member.offset] if self.member else stamp


def as_wav(name: str) -> str:
    """A recording's name with its suffix replaced by .wav."""
    return f"{name[: name.rindex('.')]}.wav"
