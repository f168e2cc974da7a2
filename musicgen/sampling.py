"""The choice of the next code, on the device and from random numbers that are given.

Letters: card = codebook size.
"""

from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class Sampling:
    """How the next code is chosen. The defaults are audiocraft's.

    `top_k` and `top_p` 0 = off, `temperature` 0 = the most likely code, `cfg_coef` 1 = no guidance.
    """

    top_k: int = 250
    top_p: float = 0.0
    temperature: float = 1.0
    cfg_coef: float = 3.0


def choose(logits: torch.Tensor, noise: torch.Tensor, options: Sampling) -> torch.Tensor:
    """Choose codes `[...]` by logits `[..., card]` and random numbers `[...]` in [0, 1).

    A number picks the code in whose share of the sum of probabilities, in the order of the codes,
    it falls. Unlike the order of probabilities, that of the codes isn't changed by rounding.
    Where the logits have a NaN, the result is `card`, which is no code.
    """
    if options.temperature == 0:
        return logits.argmax(-1).where(~logits.isnan().any(-1), logits.shape[-1])
    probs = torch.softmax(logits / options.temperature, dim=-1)
    if options.top_p > 0:
        ordered, codes = probs.sort(dim=-1, descending=True)
        beyond = ordered.cumsum(-1) - ordered > options.top_p
        probs = probs.scatter(-1, codes, ordered.masked_fill(beyond, 0))
    elif 0 < options.top_k < logits.shape[-1]:
        largest = probs.topk(options.top_k, dim=-1, sorted=False).values
        probs = probs * (probs >= largest.amin(-1, keepdim=True))
    sums = probs.cumsum(-1)
    return torch.searchsorted(sums, noise[..., None] * sums[..., -1:], right=True)[..., 0]


def stream(seed: int, prompt: str, variation: int) -> np.random.Generator:
    """Return the random stream of a piece: its own, whatever else is generated with it."""
    numbers = np.random.SeedSequence([seed, variation, *prompt.encode()])
    return np.random.Generator(np.random.PCG64(numbers))


def draw(streams: list[np.random.Generator], steps: int, *, codebooks: int) -> torch.Tensor:
    """Draw numbers in [0, 1), `[steps, B, codebooks]`, from the streams of B pieces."""
    drawn = [stream.random((steps, codebooks), np.float32) for stream in streams]
    # A number closest to 1, times a total, could be rounded up to the total, beyond all codes.
    return torch.from_numpy(np.stack(drawn, axis=1)).clamp_(max=1 - 2**-23)
