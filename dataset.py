"""A folder of recordings and captions -> clips: `wav [C, samples]`, valid samples, caption.

Letters: B batch, C channels, K codebooks, T token frames, F chroma frames, P pitch classes.
Everything random here is a function of (seed, epoch, file), so that a run can be stopped, resumed
and split over processes without a change in what it sees.
"""

import hashlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import soundfile as sf
import soxr
import torch
from torch.utils.data import Dataset

from flags import UserError, first_lines

if TYPE_CHECKING:  # it imports this file
    from melody import Melodies
    from tokens import Tokens

MIN_CLIP_SEC = 0.5
SAMPLE_RATES_HZ = (4_000, 768_000)  # outside of these a header is damaged, not unusual
MAX_CHANNELS = 32
STREAMED_BYTES = 0x7FFF0000  # a data size from here on is a streaming writer's "not known yet"
TRUNCATED = re.compile(r"data : (\d+) \(should be (\d+)\)")  # from libsndfile's header log
SCAN_BLOCK_SEC = 60


@dataclass(frozen=True)
class Track:
    """One recording on disk, its length in its own frames, and its caption."""

    path: Path
    name: str
    caption: str
    sample_rate: int
    frames: int

    @property
    def duration_sec(self) -> float:
        return self.frames / self.sample_rate


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

    With --cache_tokens its codes `[K, T]` instead.

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


def scan(folder: str, *, with_captions: bool = True) -> list[Track]:
    """Find and check the .wav + .txt pairs below a folder, without decoding integer audio.

    Errors: a UserError that names every file which can't be used, and why.
    """
    tracks, problems = find(folder, with_captions=with_captions)
    if problems:
        raise UserError(
            f"{folder}: {len(problems)} of {len(tracks) + len(problems)} .wav files can't be "
            f"trained on; mend them or move them out of the folder:\n{first_lines(problems)}"
        )
    return tracks


def find(folder: str, *, with_captions: bool = True) -> tuple[list[Track], list[str]]:
    """The pairs that can be used, and for each that can't its name and why.

    Errors: UserError if there is none of either.
    """
    root = Path(folder)
    paths = sorted(
        path
        for path in _walk(root)
        if path.suffix.lower() == ".wav" and not path.name.startswith(".") and path.is_file()
    )
    if not paths:
        raise UserError(
            f"{folder}: no .wav files in this folder; put each recording there as NAME.wav "
            "beside its caption NAME.txt"
        )
    tracks, problems = [], []
    for path in paths:
        name = path.relative_to(root).as_posix()
        try:
            _check_name(name)
            caption = _read_caption(path) if with_captions else ""
            sample_rate, frames = _check_wav(path)
        except (OSError, ValueError) as error:  # soundfile's errors are both, here, and ours
            problems.append(f"{name}: {error}")
        else:
            tracks.append(Track(path, name, caption, sample_rate, frames))
    return tracks, problems


def _walk(root: Path) -> Iterator[Path]:
    """All files below a folder, through links too, but into each folder once."""
    seen = set()
    for folder, folders, names in os.walk(root, followlinks=True):
        real = Path(folder).resolve()
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        yield from (Path(folder) / name for name in names)


def _check_name(name: str) -> None:
    try:
        name.encode()
    except UnicodeEncodeError:
        raise ValueError("its name is not UTF-8: rename it") from None


def _read_caption(wav: Path) -> str:
    path = next((p for suffix in (".txt", ".TXT") if (p := wav.with_suffix(suffix)).exists()), None)
    if path is None:
        raise ValueError(
            f"no caption beside it: write {wav.with_suffix('.txt').name}, or train without "
            "captions with --no_label=1"
        )
    try:
        caption = " ".join(path.read_text(encoding="utf-8-sig").split())
    except UnicodeDecodeError:
        raise ValueError(f"its caption {path.name} is not UTF-8 text: save it as UTF-8") from None
    if not caption:
        raise ValueError(f"its caption {path.name} is empty: write what is heard in it")
    return caption


def _check_wav(path: Path) -> tuple[int, int]:
    """(sample rate in Hz, frames) of a wav that can be trained on, or a ValueError why not."""
    if path.stat().st_size == 0:
        raise ValueError("the file is empty (0 bytes)")
    try:
        with sf.SoundFile(path) as file:
            _check_header(file)
            file.seek(file.frames - 1)
            file.read(1)
            if file.subtype in ("FLOAT", "DOUBLE"):  # only these can hold NaN
                file.seek(0)
                for block in file.blocks(SCAN_BLOCK_SEC * file.samplerate, dtype="float32"):
                    if not np.isfinite(block).all():
                        raise ValueError("holds samples that are not finite (NaN or infinity)")
            return file.samplerate, file.frames
    except sf.SoundFileError as error:
        raise ValueError(f"can't be read as audio ({_reason(error)})") from None


def _check_header(file: sf.SoundFile) -> None:
    low, high = SAMPLE_RATES_HZ
    if not low <= file.samplerate <= high or file.channels > MAX_CHANNELS:
        raise ValueError(
            f"its header says {file.samplerate} Hz and {file.channels} channels, which can't be "
            "right: it is damaged"
        )
    sizes = TRUNCATED.search(file.extra_info)
    declared, found = map(int, sizes.groups()) if sizes else (0, 0)
    if found < declared < STREAMED_BYTES:
        raise ValueError(f"truncated: its header says {declared} bytes of audio, {found} are there")
    if file.frames == 0:
        raise ValueError("its header says that it holds no audio (zero length)")
    if file.frames < MIN_CLIP_SEC * file.samplerate:
        raise ValueError(
            f"too short: {file.frames / file.samplerate:.2f} s; at least {MIN_CLIP_SEC} s"
        )


def _reason(error: sf.SoundFileError) -> str:
    return str(getattr(error, "error_string", error)).rstrip(".")


def read_crop(
    path: Path, start: int, frames: int, sample_rate: int, channels: int
) -> np.ndarray:  # [C, samples]
    """Decode and resample `frames` frames of a file from frame `start` on, and nothing else.

    Mono models get the mean of all channels, stereo ones the first two, or the one twice.
    Errors: ValueError that says what is wrong with the file.
    """
    try:
        with sf.SoundFile(path) as file:
            file.seek(start)
            wav = file.read(frames, dtype="float32", always_2d=True)  # [frames, channels]
            source_rate = file.samplerate
    except (sf.SoundFileError, OSError) as error:
        raise ValueError(f"can't be read ({_reason(error)})") from None
    if len(wav) < frames:
        raise ValueError(f"ends after {start + len(wav)} frames; it has changed since the start")
    if not np.isfinite(wav).all():
        raise ValueError("holds samples that are not finite (NaN or infinity)")
    if channels == 1:
        wav = wav.mean(axis=1, keepdims=True)
    elif wav.shape[1] != channels:
        wav = wav[:, :channels] if wav.shape[1] > channels else np.repeat(wav, channels, axis=1)
    if source_rate != sample_rate:
        wav = soxr.resample(wav, source_rate, sample_rate)
    return np.ascontiguousarray(wav.T)


class Clips(Dataset[Clip]):
    """Crops of tracks at the model's rate. Indexed by `Pick`; the same pick is the same clip.

    Args:
        sample_rate: of the model, in Hz.
        channels: of the model, C.
        samples: length of every crop; a shorter track is taken whole and zero-padded.
        drop_caption: probability of an empty caption.
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
        self.drop_word = drop_word
        self.tokens = tokens
        self.melodies = melodies
        self.drop_melody = drop_melody

    def __len__(self) -> int:
        return len(self.tracks)

    def __getitem__(self, pick: Pick) -> Clip:
        track = self.tracks[pick.index]
        rng = np.random.default_rng([self.seed, pick.epoch, _stable_hash(track.name)])
        frames = min(track.frames, -(-self.samples * track.sample_rate // self.sample_rate))
        start = int(rng.integers(track.frames - frames + 1))
        unconditional = rng.random() < self.drop_caption  # for classifier-free guidance
        caption = "" if unconditional else self._drop_words(track.caption, rng)
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
                crop = read_crop(track.path, start, frames, self.sample_rate, self.channels)
                valid = min(crop.shape[1], self.samples)
                wav[:, :valid] = crop[:, :valid]
            if self.melodies:
                melody = self.melodies.none
                if pick.weight and not unconditional and rng.random() >= self.drop_melody:
                    melody = self.melodies.crop(track, start, frames)
        except ValueError as error:
            problem = f"{track.path}: {error}; mend it or move it out of the folder"
        except OSError as error:  # of the cache
            problem = f"{track.path}: {error}"
        return Clip(
            wav=None if wav is None else torch.from_numpy(wav),
            valid_samples=valid,
            caption=caption,
            name=track.name,
            codes=None if codes is None else torch.from_numpy(codes),
            melody=melody,
            error=problem,
        )

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
    ranked = sorted(tracks, key=lambda track: _stable_hash(f"{seed} {track.name}"))
    chosen = {track.name for track in ranked[:held]}
    return (
        [track for track in tracks if track.name not in chosen],
        [track for track in tracks if track.name in chosen],
    )
