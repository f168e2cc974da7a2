"""A folder of recordings and captions -> clips: `wav [C, samples]`, valid samples, caption.

Letters: B batch, C channels, K codebooks, T token frames, F chroma frames, P pitch classes.
Everything random here is a function of (seed, epoch, file), so that a run can be stopped, resumed
and split over processes without a change in what it sees.
"""

import contextlib
import gc
import hashlib
import os
import posixpath
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

import audio
import shards
import token_files
from audio import SUFFIXES, Source
from captions import PLAIN, Caption, Captions, Merging
from flags import UserError, first_lines
from index import Index
from shards import Member

if TYPE_CHECKING:  # it imports this file
    from melody import Melodies
    from tokens import Tokens


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
        return _as_wav(self.member.name if self.member else self.name)

    def stamp(self) -> list[str | int]:
        """What is another when the recording has changed. Errors: OSError."""
        status = self.path.stat()
        stamp: list[str | int] = [status.st_size, status.st_mtime_ns]
        return [*stamp, self.member.name, self.member.offset] if self.member else stamp


@dataclass(frozen=True)
class Pick:
    """Which crop to take: of which file in which epoch.

    A pick without weight only fills up a process's share, to keep the processes in step.
    """

    epoch: int
    index: int
    weight: bool = True


@dataclass(frozen=True)
class Clip:
    """A crop: wav `[C, samples]` at the model's rate, zero after the first `valid_samples`.

    From tokens its codes `[K, T]` instead.

    A reading error travels as a value: an exception from a worker process loses its plain text.
    """

    wav: torch.Tensor | None
    valid_samples: int
    caption: str
    name: str
    codes: torch.Tensor | None = None
    melody: torch.Tensor | None = None  # [F, P], for melody models
    error: str | None = None


class Batch(NamedTuple):
    """wav `[B, C, samples]`, valid samples `[B]`, the clips' captions, names and melodies."""

    wav: torch.Tensor | None
    valid_samples: torch.Tensor
    captions: list[str]
    names: list[str]
    codes: torch.Tensor | None = None  # [B, K, T], instead of wav
    melody: torch.Tensor | None = None  # [B, F, P]
    error: str | None = None


def scan(
    folder: str,
    *,
    with_captions: bool = True,
    caption: str | None = None,
    from_tags: bool = False,
) -> list[Track]:
    """Find and check the recordings of a dataset, decoding none but those that may hold NaN.

    Those that an earlier scan has checked are not opened again; see index.py.
    `caption` is for all, `from_tags` takes the files' own tags; else see captions.py.
    Errors: a UserError that names every file which can't be used, and why.
    """
    tracks, problems = find(
        folder,
        with_captions=with_captions,
        caption=caption,
        from_tags=from_tags,
        index=Index(folder),
    )
    if problems:
        raise UserError(
            f"{folder}: {len(problems)} of {len(tracks) + len(problems)} recordings can't be "
            f"trained on; mend them or move them out of the folder:\n{first_lines(problems)}"
        )
    return tracks


@contextlib.contextmanager
def _no_garbage() -> Iterator[None]:
    """Nothing is looked for that could be freed: among many new objects that takes long."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@_no_garbage()
def find(
    folder: str,
    *,
    with_captions: bool = True,
    caption: str | None = None,
    from_tags: bool = False,
    index: Index | None = None,
) -> tuple[list[Track], list[str]]:
    """The recordings that can be used, and for each that can't its name and why.

    All are opened, but for those that `index` knows.
    Errors: UserError if there is none of either.
    """
    files, problems = _files(folder)
    names = sorted(
        (name for name in files if _is_recording(name)),
        # Twins are trained in the same order, and what is in a folder together.
        key=lambda name: (_as_wav(name).replace("/", "\0"), name),
    )
    if not names and not problems:
        raise UserError(
            f"{folder}: no recordings in this folder ({' '.join(SUFFIXES)}); put each there as "
            "NAME.wav beside its caption NAME.txt"
        )
    captions = Captions(files, one=caption, from_tags=from_tags)
    tracks, seen = [], dict[str, str]()
    for name in names:
        try:
            _check_name(name)
            twin = seen.setdefault(name[: name.rindex(".")], name)
            if twin != name:  # mostly one recording twice, and then counted twice
                raise ValueError(f"has the same name as {twin}, and so its caption: keep one")
            written = captions.of(name) if with_captions else None
            _check_text(written)
            source = files[name]
            sample_rate, frames, codec = _check(name, source, index)
        except (OSError, ValueError) as error:  # soundfile's errors are both, here, and ours
            problems.append(f"{name}: {error}")
        except UserError as error:  # of a table, and so of many recordings
            if str(error) not in problems:
                problems.append(str(error))
        else:
            text = written.plain if written else ""
            member = source if isinstance(source, Member) else None
            tracks.append(Track(folder, name, member, text, sample_rate, frames, written, codec))
    if index:
        index.save(names)
    return tracks, problems


def _check(name: str, source: Source, index: Index | None) -> tuple[int, int, str | None]:
    """(sample rate in Hz, frames, what its tokens are of) of what can be trained on."""
    if source.suffix.lower() == token_files.SUFFIX:
        header = token_files.read_header(source)
        return header.facts.sample_rate, header.facts.frames, header.codec
    return *(index.check(name, source) if index else audio.check(source)), None


class _Files(Mapping[str, Source]):
    """All files of a dataset by name: on disk below `root`, or in its shards."""

    def __init__(self, root: str) -> None:
        self.root = root
        self.names: set[str] = set()  # on disk
        self.members: dict[str, Member] = {}

    def __getitem__(self, name: str) -> Source:
        if name in self.names:
            return Path(self.root, name)
        return self.members[name]

    def __contains__(self, name: object) -> bool:
        return name in self.names or name in self.members

    def __iter__(self) -> Iterator[str]:
        yield from self.names
        yield from self.members

    def __len__(self) -> int:
        return len(self.names) + len(self.members)


def _files(dataset_path: str) -> tuple[_Files, list[str]]:
    """What is in a folder, or in the shards that a path with braces names; and bad shards."""
    files, problems = _Files(dataset_path), []
    if shards.is_shards(dataset_path):
        tars = shards.find(dataset_path)
    else:
        files.names.update(_walk(Path(dataset_path)))
        tars = {n: Path(dataset_path, n) for n in files.names if _is_tar(n)}
    for name, tar in sorted(tars.items()):
        members, wrong = shards.members(tar)
        files.members.update((f"{name}/{member.name}", member) for member in members.values())
        again = f"; delete {tar} to have it downloaded again" if "://" in name else ""
        problems += [f"{name}: {what}{again}" for what in wrong]
    return files, problems


def _is_recording(name: str) -> bool:
    is_one = name.lower().endswith((*SUFFIXES, token_files.SUFFIX))
    return is_one and not posixpath.basename(name).startswith(".")


def _is_tar(name: str) -> bool:
    return name.lower().endswith(".tar") and not posixpath.basename(name).startswith(".")


def _as_wav(name: str) -> str:
    """A recording's name with its suffix replaced by .wav."""
    return f"{name[: name.rindex('.')]}.wav"


def _walk(root: Path) -> Iterator[str]:
    """Names of all files below a folder, through links too, but into each folder once."""
    seen = set()
    for folder, folders, names in os.walk(root, onerror=_refuse, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders.sort()  # of a folder that is linked too, the same name everywhere
        below = Path(folder).relative_to(root).as_posix()
        prefix = "" if below == "." else f"{below}/"
        yield from (prefix + name for name in names)


def _refuse(error: OSError) -> None:
    raise UserError(
        f"{error.filename}: can't be opened ({error.strerror}): make it readable, or take it out"
    )


def _check_text(caption: Caption | None) -> None:
    try:
        " ".join([caption.description, *caption.fields] if caption else []).encode()
    except UnicodeEncodeError:
        raise ValueError("its caption has half a character in it (a lone surrogate)") from None


def _check_name(name: str) -> None:
    try:
        name.encode()
    except UnicodeEncodeError:
        raise ValueError("its name is not UTF-8: rename it") from None


class Clips(Dataset[Clip]):
    """Crops of tracks at the model's rate. Indexed by `Pick`; the same pick is the same clip.

    Args:
        sample_rate: of the model, in Hz.
        channels: of the model, C.
        samples: length of every crop; a shorter track is taken whole and zero-padded.
        drop_caption: probability of an empty caption.
        merging: how the other fields that some captions have get into the text.
        in_front: puts the words that are on every caption on such a text.
        drop_word: probability of leaving out each word of a caption.
        tokens: of the tracks, to take the crops from instead of the files.
        melodies: of the tracks, for models that take them.
        drop_melody: probability of no melody. Where the whole caption is dropped it always is.
    """

    def __init__(
        self,
        tracks: list[Track],
        *,
        sample_rate: int,
        channels: int,
        samples: int,
        seed: int,
        drop_caption: float = 0.0,
        merging: Merging = PLAIN,
        in_front: Callable[[str], str] = str,
        drop_word: float = 0.0,
        tokens: "Tokens | None" = None,
        melodies: "Melodies | None" = None,
        drop_melody: float = 0.0,
    ) -> None:
        self.tracks = tracks
        self.sample_rate = sample_rate
        self.channels = channels
        self.samples = samples
        self.seed = seed
        self.drop_caption = drop_caption
        self.merging = merging
        self.in_front = in_front
        self.drop_word = drop_word
        self.tokens = tokens
        self.melodies = melodies
        self.drop_melody = drop_melody

    def __len__(self) -> int:
        return len(self.tracks)

    def __getitem__(self, pick: Pick) -> Clip:
        track = self.tracks[pick.index]
        rng = np.random.default_rng([self.seed, pick.epoch, _stable_hash(track.key)])
        frames = min(track.frames, -(-self.samples * track.sample_rate // self.sample_rate))
        start = int(rng.integers(track.frames - frames + 1))
        unconditional = rng.random() < self.drop_caption  # for classifier-free guidance
        caption = "" if unconditional else self._drop_words(self._caption(track, rng), rng)
        wav = codes = melody = problem = None
        valid = 0
        if self.tokens:
            codes = np.zeros((self.tokens.codebooks, self.samples // self.tokens.hop), np.int16)
        else:
            wav = np.zeros((self.channels, self.samples), np.float32)
        try:
            if pick.weight and self.tokens and codes is not None:
                part = self.tokens.crop(track, start, codes.shape[1])
                codes[:, : part.shape[1]] = part
                valid = part.shape[1] * self.tokens.hop
            elif pick.weight and wav is not None:
                crop = audio.read_crop(track.source, start, frames, self.sample_rate, self.channels)
                valid = min(crop.shape[1], self.samples)
                wav[:, :valid] = crop[:, :valid]
            if self.melodies:
                melody = self.melodies.none
                if pick.weight and not unconditional and rng.random() >= self.drop_melody:
                    melody = self.melodies.crop(track, start, frames)
        except ValueError as error:
            problem = f"{track.place}: {error}; mend it or move it out of the folder"
        except OSError as error:  # of the cache
            problem = f"{track.place}: {error}"
        return Clip(
            wav=None if wav is None else torch.from_numpy(wav),
            valid_samples=valid,
            caption=caption,
            name=track.name,
            codes=None if codes is None else torch.from_numpy(codes),
            melody=melody,
            error=problem,
        )

    def _caption(self, track: Track, rng: np.random.Generator) -> str:
        if not self.merging.merge_text_p or not track.written or not track.written.fields:
            return track.caption  # and nothing is drawn
        return self.in_front(self.merging.text(track.written, rng))

    def _drop_words(self, caption: str, rng: np.random.Generator) -> str:
        if not self.drop_word:
            return caption
        words = caption.split()
        keep = rng.random(len(words)) >= self.drop_word
        return " ".join(word for word, kept in zip(words, keep, strict=True) if kept)


def _stable_hash(name: str) -> int:
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def collate(clips: list[Clip]) -> Batch:
    """Clips -> one Batch, which carries the first error, if any."""
    return Batch(
        wav=_stack([clip.wav for clip in clips]),
        valid_samples=torch.tensor([clip.valid_samples for clip in clips]),
        captions=[clip.caption for clip in clips],
        names=[clip.name for clip in clips],
        codes=_stack([clip.codes for clip in clips]),
        melody=_stack([clip.melody for clip in clips]),
        error=next((clip.error for clip in clips if clip.error), None),
    )


def _stack(tensors: list[torch.Tensor | None]) -> torch.Tensor | None:
    there = [tensor for tensor in tensors if tensor is not None]
    return torch.stack(there) if len(there) == len(tensors) else None


def split(tracks: list[Track], share: float, seed: int) -> tuple[list[Track], list[Track]]:
    """(training, held out): `share` of the tracks, at least one, chosen by seed and name."""
    held = max(1, round(len(tracks) * share))
    if held >= len(tracks):
        raise UserError(
            f"--valid_split={share} of {len(tracks)} files leaves none to train on: "
            "add files, or lower it"
        )
    ranked = sorted(tracks, key=lambda track: _stable_hash(f"{seed} {track.key}"))
    chosen = {track.name for track in ranked[:held]}
    return (
        [track for track in tracks if track.name not in chosen],
        [track for track in tracks if track.name in chosen],
    )
