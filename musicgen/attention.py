"""audiocraft's attention with two changes.

A caption's padding gets no weight in training, and LoRA's adapters on the fused projection of
queries, keys and values cost no more than they have to.

Letters: B batch, S pattern steps, L text tokens, D model width.
"""

from typing import Any

import torch
from audiocraft.models.lm import LMModel
from audiocraft.modules.transformer import StreamingTransformerLayer
from torch.nn import functional as F


class Layer(StreamingTransformerLayer):
    """audiocraft's transformer layer with this attention. Adds no state of its own."""

    def _sa_block(  # type: ignore[override]
        self, x: torch.Tensor, attn_mask: None = None, key_padding_mask: None = None
    ) -> torch.Tensor:
        """Compute causal self-attention; x and the result are [B, S, D]."""
        attention = self.self_attn
        if unwrapped(attention) is attention:
            return super()._sa_block(x, attn_mask, key_padding_mask)
        q, k, v = _project(attention, x).chunk(3, dim=-1)
        # A single step has no later ones to hide; audiocraft passes several only at the start.
        return self.dropout1(_attend(self, attention, q, k, v, is_causal=x.shape[1] > 1))

    def _cross_attention_block(
        self,
        x: torch.Tensor,  # [B, S, D]
        source: torch.Tensor | tuple[torch.Tensor, torch.Tensor],  # [B, L, D], or with mask [B, L]
    ) -> torch.Tensor:
        """Compute cross-attention in which a caption's padding has no weight.

        audiocraft attends to the zero vectors that pad shorter captions, so a clip's loss depends
        on the other captions in its batch; generating from one prompt involves no padding. The
        null caption keeps its one zero vector.
        """
        attention = self.cross_attention
        if isinstance(source, torch.Tensor):
            if unwrapped(attention) is attention:
                return super()._cross_attention_block(x, source)
            source = source, torch.ones(source.shape[:2], device=source.device)
        text, mask = source
        D = x.shape[-1]
        q = _project(attention, x, slice(0, D))
        k, v = _project(attention, text, slice(D, None)).chunk(2, dim=-1)
        mask = mask.bool()
        first = torch.arange(mask.shape[1], device=mask.device) == 0
        mask = (mask | first)[:, None, None]
        return self.dropout_cross(_attend(self, attention, q, k, v, attn_mask=mask))


def put_into(lm: LMModel) -> None:
    """Give a language model's layers this attention; audiocraft's builder knows only its own."""
    for layer in lm.transformer.layers:
        layer.__class__ = Layer


def _project(attention: Any, x: torch.Tensor, rows: slice = slice(None)) -> torch.Tensor:
    """Apply `rows` of the fused projection of queries, keys and values [3 * D, D] and its adapters.

    peft would add B A to the weight, keep the sum for the backward pass and compute the gradient
    of the whole weight to get those of A and B. Here x goes through A and B separately.
    """
    base = unwrapped(attention)
    bias = base.in_proj_bias
    out = F.linear(x, base.in_proj_weight[rows], None if bias is None else bias[rows])
    return out if base is attention else _add_adapters(attention, x, out, rows)


def adapted_linear(layer: Any, x: torch.Tensor) -> torch.Tensor:
    """Return what peft's forward of an adapted nn.Linear does, in fewer passes over the output."""
    return _add_adapters(layer, x, layer.base_layer(x))


def _add_adapters(
    layer: Any, x: torch.Tensor, out: torch.Tensor, rows: slice = slice(None)
) -> torch.Tensor:
    for name in layer.active_adapters:
        inner = layer.scaling[name] * layer.lora_A[name](layer.lora_dropout[name](x))
        out = out + F.linear(inner, layer.lora_B[name].weight[rows])
    return out


def _attend(
    layer: Any, attention: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **how: Any
) -> torch.Tensor:
    base = unwrapped(attention)
    q, k, v = (t.unflatten(-1, (base.num_heads, -1)).transpose(1, 2) for t in (q, k, v))
    k, v = base._complete_kv(k, v)  # while streaming, prepend those of earlier steps
    dropout = base.dropout if layer.training else 0.0
    x = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, **how)
    return base.out_proj(x.transpose(1, 2).flatten(2))


def unwrapped(attention: Any) -> Any:
    """Return audiocraft's own module, without peft's wrapper if it has one."""
    return attention.get_base_layer() if hasattr(attention, "lora_A") else attention
