"""A folder of recordings and captions -> clips: `wav [C, samples]`, length, caption.

Letters: B batch, C channels, K codebooks, T token frames, F chroma frames, P pitch classes.
Everything random here is a function of (seed, epoch, file), so that a run can be stopped, resumed
and split over processes without a change in what it sees.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from errors import UserError
from recordings import audio
from recordings.melodies import Melodies
from recordings.tokens import Tokens
from recordings.track import Track
from recordings.wording import merged


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
    """A crop: wav `[C, samples]` at the model's rate, zero after its `length` in samples.

    From tokens its codes `[K, T]` instead.

    A reading error travels as a value: an exception from a worker process loses its plain text.
    """

    wav: torch.Tensor | None
    length: int
    caption: str
    name: str
    codes: torch.Tensor | None = None
    melody: torch.Tensor | None = None  # [F, P], for melody models
    error: str | None = None


class Batch(NamedTuple):
    """wav `[B, C, samples]`, lengths `[B]` in samples, the clips' captions, names and melodies."""

    wav: torch.Tensor | None
    lengths: torch.Tensor
    captions: list[str]
    names: list[str]
    codes: torch.Tensor | None = None  # [B, K, T], instead of wav
    melody: torch.Tensor | None = None  # [B, F, P]
    error: str | None = None


class Clips(Dataset[Clip]):
    """Crops of tracks at the model's rate. Indexed by `Pick`; the same pick is the same clip.

    Args:
        sample_rate: of the model, in Hz.
        channels: of the model, C.
        samples: length of every crop; a shorter track is taken whole and zero-padded.
        drop_caption: probability of an empty caption.
        merge_text_p: probability of merging the other fields that some captions have into them.
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
        merge_text_p: float = 0.0,
        in_front: Callable[[str], str] = str,
        drop_word: float = 0.0,
        tokens: Tokens | None = None,
        melodies: Melodies | None = None,
        drop_melody: float = 0.0,
    ) -> None:
        self.tracks = tracks
        self.sample_rate = sample_rate
        self.channels = channels
        self.samples = samples
        self.seed = seed
        self.drop_caption = drop_caption
        self.merge_text_p = merge_text_p
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
        length = 0
        if self.tokens:
            codes = np.zeros((self.tokens.codebooks, self.samples // self.tokens.hop), np.int16)
        else:
            wav = np.zeros((self.channels, self.samples), np.float32)
        try:
            if pick.weight and self.tokens and codes is not None:
                part = self.tokens.crop(track, start, codes.shape[1])
                codes[:, : part.shape[1]] = part
                length = part.shape[1] * self.tokens.hop
            elif pick.weight and wav is not None:
                crop = audio.read_crop(track.source, start, frames, self.sample_rate, self.channels)
                length = min(crop.shape[1], self.samples)
                wav[:, :length] = crop[:, :length]
            if self.melodies:
                melody = torch.from_numpy(self.melodies.none)
                if pick.weight and not unconditional and rng.random() >= self.drop_melody:
                    melody = torch.from_numpy(self.melodies.crop(track, start, frames))
        except ValueError as error:
            problem = f"{track.place}: {error}; mend it or move it out of the folder"
        except OSError as error:  # of the cache
            problem = f"{track.place}: {error}"
        return Clip(
            wav=None if wav is None else torch.from_numpy(wav),
            length=length,
            caption=caption,
            name=track.name,
            codes=None if codes is None else torch.from_numpy(codes),
            melody=melody,
            error=problem,
        )

    def _caption(self, track: Track, rng: np.random.Generator) -> str:
        if not self.merge_text_p or not track.written or not track.written.fields:
            return track.caption  # and nothing is drawn
        return self.in_front(merged(track.written, self.merge_text_p, rng))

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
        lengths=torch.tensor([clip.length for clip in clips]),
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
