"""What each piece is conditioned on while it is generated.

Letters: h rows of a piece (with its conditions, and without them for guidance), L condition
vectors, P0 vectors before the music, D model width.
"""

import functools
from typing import Any, NamedTuple

import torch
from audiocraft.modules.conditioners import (
    ClassifierFreeGuidanceDropout,
    ConditioningAttributes,
    WavCondition,
)

from musicgen.load import Model
from musicgen.text import text_conditioner


class Condition(NamedTuple):
    """One piece's: what comes before the music `[h, P0, D]`, for cross-attention `[h, L, D]`.

    A model uses one of them; the other has no vectors.
    """

    prefix: torch.Tensor
    cross: torch.Tensor


class Conditions:
    """Computes conditions as audiocraft does for a piece alone, each text and melody once.

    Args:
        melody: recording `[1, samples]` at the model's rate, repeated if it is too short; None = no
            melody, or another model.
        guided: whether each piece has a row without conditions too.
    """

    def __init__(self, model: Model, melody: torch.Tensor | None, guided: bool) -> None:
        self.model, self.melody, self.guided = model, melody, guided
        self._text = functools.cache(self._encode)
        self._wav = functools.lru_cache(32)(self._encode_melody)  # ten minutes of windows

    def at(self, prompt: str, frame: int) -> Condition:
        """Return the condition of the window that begins at a token frame."""
        lm: Any = self.model.lm
        provider = lm.condition_provider
        (text,) = provider.text_conditions
        found = {text: self._text(prompt)}
        found |= {name: self._wav(name, frame) for name in provider.wav_conditions}
        rows = len(found[text][0])
        nothing = torch.zeros(rows, 0, lm.dim, device=self.model.device)
        prefix, cross = lm.fuser(nothing, found)
        return Condition(prefix.float(), nothing if cross is None else cross.float())

    def _encode(self, prompt: str) -> tuple[torch.Tensor, torch.Tensor]:
        conditioner = text_conditioner(self.model.lm)
        rows: list[str | None] = [prompt, None] if self.guided else [prompt]
        return conditioner(conditioner.tokenize(rows))

    def _encode_melody(self, name: str, frame: int) -> tuple[torch.Tensor, torch.Tensor]:
        model, melody = self.model, self.melody
        wav, length = torch.zeros(1, 1, 1), 0  # how audiocraft writes "no melody"
        if melody is not None:
            length = round(model.max_duration * model.sample_rate)
            start = round(frame / model.frame_rate * model.sample_rate)
            wav = melody[None, :, torch.arange(start, start + length) % melody.shape[-1]]
        condition = WavCondition(
            wav.to(model.device),
            torch.tensor([length], device=model.device),
            [model.sample_rate],
            [None],
            [0.0],
        )
        rows = [ConditioningAttributes(wav={name: condition})]
        if self.guided:
            rows += ClassifierFreeGuidanceDropout(p=1.0)(rows)
        provider: Any = model.lm.condition_provider
        conditioner = provider.conditioners[name]
        return conditioner(conditioner.tokenize(provider._collate_wavs(rows)[name]))
