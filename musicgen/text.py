"""Captions -> T5's hidden states.

Letters: B batch, L text tokens.
"""

from collections import OrderedDict
from collections.abc import Callable

import torch
from audiocraft.models.lm import LMModel
from audiocraft.modules.conditioners import T5Conditioner
from torch.nn import functional as F

from musicgen import placeholder
from musicgen.device import to_device
from recordings import captions, wording

CACHE_BYTES = 10**9  # 10,000 captions of 32 tokens, at the width of t5-base


def text_conditioner(lm: LMModel) -> T5Conditioner:
    """Return the text conditioner of a model that `load_model` has accepted; it has one."""
    conditioners = lm.condition_provider.conditioners.values()
    return next(c for c in conditioners if isinstance(c, T5Conditioner))


class TextEncoder:
    """Encodes captions with T5 in float32, each distinct one once as long as it is kept.

    Each caption is encoded by itself, so that its embedding doesn't depend on its batch. The
    empty caption is the null condition of classifier-free guidance: zeros, fully masked. (In half
    precision T5 turns a fully masked input into NaN, and NaN * 0 stays NaN.)

    Captions with the new word change with its vector, so they are encoded every time, with
    gradients if those are enabled.
    """

    def __init__(self, lm: LMModel, new_word: placeholder.NewWord | None = None) -> None:
        self.conditioner = text_conditioner(lm)
        self.new_word = new_word
        self._cached = _Cached(torch.no_grad()(self._encode), CACHE_BYTES)

    def _hidden(self, caption: str) -> torch.Tensor:
        if self.new_word and wording.has(self.new_word.word, caption):
            return self._encode(caption)
        return self._cached(caption)

    def _encode(self, caption: str) -> torch.Tensor:  # [L, width of T5], on the CPU
        conditioner = self.conditioner
        inputs = conditioner.t5_tokenizer(
            [caption], return_tensors="pt", truncation=True, max_length=captions.MAX_TOKENS
        ).to(conditioner.t5.device)
        hidden = conditioner.t5(
            input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]
        ).last_hidden_state[0]
        return hidden.float().cpu()

    def __call__(
        self, captions: list[str], device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return hidden states `[B, L, width of T5]`, zero-padded, and mask `[B, L]` (1 = text)."""
        null = torch.zeros(0, self.conditioner.dim)
        hidden = [self._hidden(caption) if caption else null for caption in captions]
        length = max(1, *(len(h) for h in hidden))
        padded = torch.stack([F.pad(h, (0, 0, 0, length - len(h))) for h in hidden])
        mask = torch.tensor([[float(i < len(h)) for i in range(length)] for h in hidden])
        text = to_device(padded, device)
        if self.new_word and torch.is_grad_enabled():
            # DDP waits for its gradient, so give it one of zero if no caption has the word.
            text = text + 0 * self.new_word.vector.sum()
        return text, to_device(mask, device)


class _Cached:
    """Keeps the results of `encode`, up to `limit` bytes; drops what was not used for longest."""

    def __init__(self, encode: Callable[[str], torch.Tensor], limit: int) -> None:
        self.encode, self.limit, self.nbytes = encode, limit, 0
        self.kept: OrderedDict[str, torch.Tensor] = OrderedDict()

    def __call__(self, caption: str) -> torch.Tensor:
        if caption in self.kept:
            self.kept.move_to_end(caption)
            return self.kept[caption]
        hidden = self.kept[caption] = self.encode(caption)
        self.nbytes += hidden.nbytes
        while self.nbytes > self.limit:
            self.nbytes -= self.kept.popitem(last=False)[1].nbytes
        return hidden
