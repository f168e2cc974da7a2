"""A folder of recordings and captions -> clips: `wav [C, samples]`, valid samples, caption.

Letters: B batch, C channels, K codebooks, T token frames, F chroma frames, P pitch classes.
Everything random here is a function of (seed, epoch, file), so that a run can be stopped, resumed
and split over processes without a change in what it sees.
"""

import hashlib
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import soundfile as sf
import soxr
import torch
from torch.utils.data import Dataset

import m4a
from captions import PLAIN, Caption, Captions, Merging
from flags import UserError, first_lines

if TYPE_CHECKING:  # it imports this file
    from melody import Melodies
    from tokens import Tokens

SUFFIXES = (".wav", ".flac", ".mp3", ".ogg", ".opus", ".aif", ".aiff", ".m4a")
MIN_CLIP_SEC = 0.5
SAMPLE_RATES_HZ = (4_000, 768_000)  # outside of these a header is damaged, not unusual
MAX_CHANNELS = 32
STREAMED_BYTES = 0x7FFF0000  # a data size from here on is a streaming writer's "not known yet"
TRUNCATED = re.compile(r"(?:data|SSND) : (\d+) \(should be (\d+)\)")  # from libsndfile's header log
SCAN_BLOCK_SEC = 60
OGG_PAGE = 2**18  # more frames than a page of Vorbis usually has: 255 packets of 1024


@dataclass(frozen=True)
class Track:
    """One recording on disk, its length in its own frames, and its caption.

    `written` is the caption as it was found, None without captions.
    """

    path: Path
    name: str
    caption: str
    sample_rate: int
    frames: int
    written: Caption | None = None

    @property
    def duration_sec(self) -> float:
        return self.frames / self.sample_rate

    @property
    def key(self) -> str:
        """What its crops are drawn by: an album's flac twin has those of the wav."""
        return _as_wav(self.name)


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


def scan(
    folder: str,
    *,
    with_captions: bool = True,
    caption: str | None = None,
    from_tags: bool = False,
) -> list[Track]:
    """Find and check the recordings below a folder, decoding none but those that may hold NaN.

    `caption` is for all, `from_tags` takes the files' own tags; else see captions.py.
    Errors: a UserError that names every file which can't be used, and why.
    """
    tracks, problems = find(
        folder, with_captions=with_captions, caption=caption, from_tags=from_tags
    )
    if problems:
        raise UserError(
            f"{folder}: {len(problems)} of {len(tracks) + len(problems)} recordings can't be "
            f"trained on; mend them or move them out of the folder:\n{first_lines(problems)}"
        )
    return tracks


def find(
    folder: str,
    *,
    with_captions: bool = True,
    caption: str | None = None,
    from_tags: bool = False,
) -> tuple[list[Track], list[str]]:
    """The recordings that can be used, and for each that can't its name and why.

    Errors: UserError if there is none of either.
    """
    root = Path(folder)
    paths = sorted(
        (
            path
            for path in _walk(root)
            if path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and path.is_file()
        ),
        key=lambda path: Path(_as_wav(str(path))),  # twins are trained in the same order
    )
    if not paths:
        raise UserError(
            f"{folder}: no recordings in this folder ({' '.join(SUFFIXES)}); put each there as "
            "NAME.wav beside its caption NAME.txt"
        )
    captions = Captions(root, one=caption, from_tags=from_tags)
    tracks, problems, seen = [], [], dict[Path, str]()
    for path in paths:
        name = path.relative_to(root).as_posix()
        try:
            _check_name(name)
            twin = seen.setdefault(path.with_suffix(""), name)
            if twin != name:  # mostly one recording twice, and then counted twice
                raise ValueError(f"has the same name as {twin}, and so its caption: keep one")
            written = captions.of(path) if with_captions else None
            sample_rate, frames = _check_audio(path)
        except (OSError, ValueError) as error:  # soundfile's errors are both, here, and ours
            problems.append(f"{name}: {error}")
        else:
            text = written.plain if written else ""
            tracks.append(Track(path, name, text, sample_rate, frames, written))
    return tracks, problems


def _as_wav(name: str) -> str:
    """A recording's name with another suffix replaced by .wav; a .WAV stays as it is."""
    path = Path(name)
    return name if path.suffix.lower() == ".wav" else path.with_suffix(".wav").as_posix()


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


def _check_audio(path: Path) -> tuple[int, int]:
    """(sample rate in Hz, frames) of what can be trained on, or a ValueError why not."""
    if path.stat().st_size == 0:
        raise ValueError("the file is empty (0 bytes)")
    if path.suffix.lower() == ".m4a":
        rate, channels, frames = m4a.check(path)
        _check_facts(rate, channels, frames)
        return rate, frames
    try:
        with sf.SoundFile(path) as file:
            _check_header(file)
            try:
                has_end = len(_read(file, file.frames - 1, 1)) == 1
            except sf.SoundFileError:  # flac
                has_end = False
            if not has_end:
                raise ValueError(
                    f"truncated or damaged: its header says {file.frames / file.samplerate:.2f} s "
                    "of audio, and the end can't be read"
                )
            if file.subtype in ("FLOAT", "DOUBLE"):  # only these can hold NaN
                file.seek(0)
                for block in file.blocks(SCAN_BLOCK_SEC * file.samplerate, dtype="float32"):
                    if not np.isfinite(block).all():
                        raise ValueError("holds samples that are not finite (NaN or infinity)")
            return file.samplerate, file.frames
    except sf.SoundFileError as error:
        raise ValueError(f"can't be read as audio ({_reason(error)})") from None


def _read(file: sf.SoundFile, start: int, frames: int) -> np.ndarray:  # [frames, channels]
    """Decode `frames` frames from `start` on.

    They are those of the whole decoded file; of Opus at low rates to 0.003, as its decoder takes
    long to settle after a seek.
    """
    first = start
    if file.format == "OGG":  # libsndfile seeks to a wrong place within the last page
        first = min(start, max(0, file.frames - OGG_PAGE))
    file.seek(first)
    return file.read(start - first + frames, dtype="float32", always_2d=True)[start - first :]


def length(path: Path) -> tuple[int, int]:
    """(sample rate in Hz, frames) of a recording. Errors: ValueError."""
    if path.suffix.lower() == ".m4a":
        rate, _, frames = m4a.check(path)
        return rate, frames
    try:
        info = sf.info(path)
    except sf.SoundFileError as error:
        raise ValueError(str(error)) from None
    return info.samplerate, info.frames


def _check_header(file: sf.SoundFile) -> None:
    sizes = TRUNCATED.search(file.extra_info)
    declared, found = map(int, sizes.groups()) if sizes else (0, 0)
    if found < declared < STREAMED_BYTES:
        raise ValueError(f"truncated: its header says {declared} bytes of audio, {found} are there")
    _check_facts(file.samplerate, file.channels, file.frames)


def _check_facts(sample_rate: int, channels: int, frames: int) -> None:
    low, high = SAMPLE_RATES_HZ
    if not low <= sample_rate <= high or channels > MAX_CHANNELS:
        raise ValueError(
            f"its header says {sample_rate} Hz and {channels} channels, which can't be "
            "right: it is damaged"
        )
    if frames == 0:
        raise ValueError("its header says that it holds no audio (zero length)")
    if frames < MIN_CLIP_SEC * sample_rate:
        raise ValueError(f"too short: {frames / sample_rate:.2f} s; at least {MIN_CLIP_SEC} s")


def _reason(error: sf.SoundFileError) -> str:
    return str(getattr(error, "error_string", error)).rstrip(".") or "it is damaged"


def read_crop(
    path: Path, start: int, frames: int, sample_rate: int, channels: int
) -> np.ndarray:  # [C, samples]
    """Decode and resample `frames` frames of a file from frame `start` on, and nothing else.

    Mono models get the mean of all channels, stereo ones the first two, or the one twice.
    Errors: ValueError that says what is wrong with the file.
    """
    try:
        if path.suffix.lower() == ".m4a":
            wav, source_rate = m4a.read(path, start, frames)  # [frames, channels]
        else:
            with sf.SoundFile(path) as file:
                wav, source_rate = _read(file, start, frames), file.samplerate
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
