"""Recordings and captions -> clips: `wav [C, samples]`, length, caption.

Letters: B batch, C channels, K codebooks, T token frames, F chroma frames, P pitch classes.
Everything random is a function of (seed, epoch, file) and of which of the file's clips it is, so a
run sees the same clips however it is stopped, resumed or split over processes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from recordings import audio
from recordings.melodies import Melodies
from recordings.tokens import Tokens
from recordings.track import Track, stable_hash
from recordings.wording import merged


@dataclass(frozen=True)
class Pick:
    """The crop to take: which of an epoch's clips, in which epoch.

    A filler gives an empty clip that pads a process's share, to keep the processes in step.
    """

    epoch: int
    index: int
    is_filler: bool = False


@dataclass(frozen=True)
class Clip:
    """A crop: wav `[C, samples]` at the model's rate, zero after `length` samples.

    A crop of tokens has codes `[K, T]` instead.
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
    """Clips: wav `[B, C, samples]`, lengths `[B]` in samples, captions, names and melodies."""

    wav: torch.Tensor | None
    lengths: torch.Tensor
    captions: list[str]
    names: list[str]
    codes: torch.Tensor | None = None  # [B, K, T], instead of wav
    melody: torch.Tensor | None = None  # [B, F, P]
    error: str | None = None


class Clips(Dataset[Clip]):
    """Crops of tracks at the model's rate, indexed by `Pick`; the same pick gives the same clip.

    Args:
        sample_rate: the model's, in Hz.
        channels: the model's, C.
        samples: length of each crop; a shorter track is taken whole and zero-padded.
        by_length: a track gives a clip for each full crop, at least one; False = one.
        drop_caption: probability of an empty caption.
        merge_text_p: probability of merging a caption's other fields into it.
        in_front: adds to a merged caption the words that each caption starts with.
        drop_word: probability of dropping each word of a caption.
        tokens: the tracks' tokens, to crop instead of their audio.
        melodies: the tracks' melodies, for melody models.
        drop_melody: probability of dropping the melody; it is always dropped with the caption.
    """

    def __init__(
        self,
        tracks: list[Track],
        *,
        sample_rate: int,
        channels: int,
        samples: int,
        seed: int,
        by_length: bool = False,
        drop_caption: float = 0.0,
        merge_text_p: float = 0.0,
        in_front: Callable[[str], str] = str,
        drop_word: float = 0.0,
        tokens: Tokens | None = None,
        melodies: Melodies | None = None,
        drop_melody: float = 0.0,
    ) -> None:
        self.tracks = tracks
        counts = clip_counts(tracks, samples, sample_rate, by_length=by_length)
        self.firsts = np.cumsum([0, *counts])  # each track's first clip, and the number of all
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
        return int(self.firsts[-1])

    def __getitem__(self, pick: Pick) -> Clip:
        track, number, count = self._clip_of(pick.index)
        seeds = [self.seed, pick.epoch, stable_hash(track.key)]
        rng = np.random.default_rng(seeds)
        frames = min(track.frames, -(-self.samples * track.sample_rate // self.sample_rate))
        starts = track.frames - frames + 1
        # A track's clips of one epoch begin equally far apart, at most a crop: no gaps.
        start = (number * starts + int(rng.integers(starts))) // count
        if number:
            rng = np.random.default_rng([*seeds, number])
        unconditional = rng.random() < self.drop_caption  # for classifier-free guidance
        caption = "" if unconditional else self._drop_words(self._caption(track, rng), rng)
        wav = codes = melody = problem = None
        length = 0
        if self.tokens:
            codes = np.zeros((self.tokens.codebooks, self.samples // self.tokens.hop), np.int16)
        else:
            wav = np.zeros((self.channels, self.samples), np.float32)
        try:
            if self.tokens and codes is not None and not pick.is_filler:
                part = self.tokens.crop(track, start, codes.shape[1])
                codes[:, : part.shape[1]] = part
                length = part.shape[1] * self.tokens.hop
            elif wav is not None and not pick.is_filler:
                crop = audio.read_crop(track.source, start, frames, self.sample_rate, self.channels)
                length = min(crop.shape[1], self.samples)
                wav[:, :length] = crop[:, :length]
            if self.melodies:
                melody = torch.from_numpy(self.melodies.none)
                if not pick.is_filler and not unconditional and rng.random() >= self.drop_melody:
                    melody = torch.from_numpy(self.melodies.crop(track, start, frames))
        except ValueError as error:
            problem = f"{track.place}: {error}; fix it or move it out of the folder"
        except OSError as error:  # from the cache
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

    def _clip_of(self, index: int) -> tuple[Track, int, int]:
        """Return a clip's track, its number among the track's clips (from 0), and their count."""
        place = int(np.searchsorted(self.firsts, index, side="right")) - 1
        first, end = self.firsts[place : place + 2].tolist()
        return self.tracks[place], index - first, end - first

    def _caption(self, track: Track, rng: np.random.Generator) -> str:
        if not self.merge_text_p or not track.written or not track.written.fields:
            return track.caption  # without drawing from rng
        return self.in_front(merged(track.written, self.merge_text_p, rng))

    def _drop_words(self, caption: str, rng: np.random.Generator) -> str:
        if not self.drop_word:
            return caption
        words = caption.split()
        keep = rng.random(len(words)) >= self.drop_word
        return " ".join(word for word, kept in zip(words, keep, strict=True) if kept)


def clip_counts(tracks: list[Track], length: int, rate: int, *, by_length: bool) -> list[int]:
    """Return how many clips of `length` at `rate` a second each track gives in an epoch."""
    return [track.crops(length, rate) if by_length else 1 for track in tracks]


def collate(clips: list[Clip]) -> Batch:
    """Stack clips into a Batch, which carries the first error, if any."""
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
    present = [tensor for tensor in tensors if tensor is not None]
    return torch.stack(present) if len(present) == len(tensors) else None
