"""The forward pass of training: codes and conditions -> loss.

Letters: B batch, K codebooks, T token frames, S pattern steps, L text tokens, F chroma frames,
P pitch classes, D model width, card = codebook size.
"""

import torch
from audiocraft.models.lm import LMModel
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint as recomputed

from musicgen.melody import melody_conditioner
from musicgen.text import text_conditioner


class TokenLoss(nn.Module):
    """The forward pass of training, and the one module for DDP, FSDP or torch.compile to wrap.

    The result is that of audiocraft's `LMModel.compute_predictions` and a masked cross entropy per
    codebook, but computed in pattern space and one codebook at a time, so that no [B, card, K, T]
    logits are gathered and scattered. Padded frames are special tokens, as with
    `padding_with_special_token` in audiocraft's solver.
    """

    def __init__(self, lm: LMModel) -> None:
        super().__init__()
        self.lm = lm

    def forward(
        self,
        codes: torch.Tensor,  # [B, K, T]
        lengths: torch.Tensor,  # [B]
        text: torch.Tensor,  # [B, L, width of T5]
        text_mask: torch.Tensor,  # [B, L]
        melody: torch.Tensor | None = None,  # [B, F, P], for melody models; None = no melody
    ) -> torch.Tensor:
        """Return cross entropies (nats) summed over each clip's unpadded tokens, `[B, K]`."""
        padding = torch.arange(codes.shape[-1], device=codes.device) >= lengths[:, None]
        codes = codes.masked_fill(padding[:, None], self.lm.special_token_id)  # padding: [B, T]
        sequence = _interleave(self.lm, codes, self.lm.special_token_id)  # [B, K, T] -> [B, K, S]
        return self.of_sequence(sequence, text, text_mask, melody)

    def of_sequence(
        self,
        sequence: torch.Tensor,
        text: torch.Tensor,
        text_mask: torch.Tensor,
        melody: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the same for codes `[B, K, S]` in the order in which the model reads them."""
        lm = self.lm
        inputs, targets = sequence[..., :-1], sequence[..., 1:]

        x = sum(embed(inputs[:, k]) for k, embed in enumerate(lm.emb))  # [B, S - 1, D]
        condition = text_conditioner(lm).output_proj(text) * text_mask[..., None]  # [B, L, D]
        if conditioner := melody_conditioner(lm):
            if melody is None:
                melody = conditioner.none().expand(len(x), -1, -1)
            melody = conditioner.output_proj(melody)  # [B, F, D]
            x, steps = _after_prefix(torch.cat([melody, condition], dim=1), text_mask, x)
            x = lm.transformer(x)
            x = x.gather(1, steps.expand(-1, -1, x.shape[-1]))
        else:
            x = lm.transformer(x, cross_attention_src=(condition, text_mask))
        if lm.out_norm is not None:
            x = lm.out_norm(x)

        # The backward pass computes the logits again: kept in float32, those of small would take
        # 49 MB for each clip of 30 s.
        losses = [
            recomputed(self._codebook_loss, head, x, targets[:, k], use_reentrant=False)
            for k, head in enumerate(lm.linears)
        ]
        return torch.stack(losses, dim=1)

    def _codebook_loss(
        self, head: nn.Module, x: torch.Tensor, targets: torch.Tensor
    ) -> torch.Tensor:
        """Return the loss `[B]` of x [B, S - 1, D] on targets [B, S - 1]."""
        losses = F.cross_entropy(
            head(x).flatten(0, 1),  # [B * (S - 1), card]
            targets.flatten(),
            ignore_index=self.lm.special_token_id,
            reduction="none",
        )
        return losses.view(len(x), -1).sum(1)


def _after_prefix(
    prefix: torch.Tensor,  # [B, F + L, D]: melody and text
    text_mask: torch.Tensor,  # [B, L]
    x: torch.Tensor,  # [B, S, D]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return each clip's prefix followed by x `[B, F + L + S, D]`, and where x is `[B, S, 1]`.

    The padding of short captions goes after x, where causal attention doesn't see it. So each clip
    gets the result it would get alone, as in generation. No caption is one vector of zeros.
    """
    padding = text_mask.shape[1] - text_mask.sum(1, keepdim=True).long().clamp(min=1)  # [B, 1]
    start = prefix.shape[1] - padding  # of x in each clip
    both = torch.cat([prefix, x], dim=1)
    to = torch.arange(both.shape[1], device=x.device).expand(len(x), -1)  # [B, F + L + S]
    source = (to + padding * (to >= start)).clamp(max=both.shape[1] - 1)
    steps = torch.arange(x.shape[1], device=x.device)
    return both.gather(1, source[..., None].expand_as(both)), (start + steps)[..., None]


def token_counts(lm: LMModel, lengths: torch.Tensor, frames: int) -> torch.Tensor:
    """Count the tokens of each codebook that are trained on, `[K]`, in clips of `frames` frames.

    The last frames of delayed codebooks lie outside the pattern's valid steps.
    Example: T = 4, delays [0, 1], no padding: [4, 3].
    """
    index = torch.arange(frames).expand(1, lm.num_codebooks, frames).contiguous()
    sequence = _interleave(lm, index, frames)  # [1, K, S], of frame numbers
    return (sequence < lengths.cpu()[:, None, None]).sum((0, 2))


def _interleave(lm: LMModel, codes: torch.Tensor, special: int) -> torch.Tensor:
    pattern = lm.pattern_provider.get_pattern(codes.shape[-1])
    return pattern.build_pattern_sequence(codes, special, keep_only_valid_steps=True)[0]
