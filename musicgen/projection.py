"""Matrix products of a language model for generation, a few rows at a time.

Letters: R rows, r rank of an adapter.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from musicgen.attention import unwrapped

Projection = Callable[[torch.Tensor], torch.Tensor]  # [..., in] -> [..., out]
Projector = Callable[..., Projection]  # (layer, rows of its weight)

# oneDNN reads packed weights faster for four rows than for two: of 16 MB, at 32 instead of 24 GB/s
# on a processor with AVX-512. Small ones are in the processor's cache.
MIN_ROWS, LARGE_BYTES = 4, 2**20


def plain(layers: Any, rows: slice = slice(None), activation: Any = None) -> Projection:
    """Return the product with `rows` of a layer's weight as it is, and with its LoRA adapters.

    Args:
        layers: one, or several whose results are put together. A layer is linear, or an attention,
            whose fused projection is meant; peft may have wrapped either. The weights are shared,
            not copied, and keep their number format.
        activation: applied to the result.
    """
    if isinstance(layers, nn.ModuleList):
        parts = [plain(layer) for layer in layers]
        return lambda x: torch.cat([part(x) for part in parts], dim=-1)
    weight, bias = parameters(layers, rows)
    adapters = []
    if hasattr(layers, "lora_A"):
        adapters = [
            (layers.lora_A[name].weight, layers.lora_B[name].weight[rows], layers.scaling[name])
            for name in layers.active_adapters
        ]

    def project(x: torch.Tensor) -> torch.Tensor:
        out = F.linear(x.to(weight.dtype), weight, bias)
        for inner, outer, scaling in adapters:
            added = scaling * F.linear(F.linear(x.to(inner.dtype), inner), outer)
            out = out + added.to(out.dtype)  # adapters are float32, the caches as the layers
        return activation(out) if activation else out

    return project


def packed(layers: Any, rows: slice = slice(None), activation: Any = None) -> Projection:
    """Return the same from a copy of the weight in the order in which oneDNN reads it fastest.

    On the CPU that is two to four times as fast, and a row's result doesn't depend on the others.
    For float32 without adapters.
    """
    if not isinstance(layers, nn.ModuleList):
        layers = [layers]
    found = [parameters(layer, rows) for layer in layers]
    weight = torch.cat([weight.detach() for weight, _ in found])
    biases = [bias.detach() for _, bias in found if bias is not None]
    bias = torch.cat(biases) if biases else None
    is_large = weight.nbytes >= LARGE_BYTES
    product = torch.ops.mkldnn._linear_pointwise.default
    copy = torch.ops.mkldnn._reorder_linear_weight(weight, MIN_ROWS)
    is_gelu = activation is F.gelu
    how: Any = ("gelu", [], "none") if is_gelu else ("none", [], "")

    def project(x: torch.Tensor) -> torch.Tensor:
        if is_large and x.shape[0] < MIN_ROWS and x.shape[1] == 1:
            out = product(F.pad(x, (0, 0, 0, 0, 0, MIN_ROWS - len(x))), copy, bias, *how)[: len(x)]
        else:
            out = product(x, copy, bias, *how)
        return activation(out) if activation and not is_gelu else out

    return project


def parameters(layer: Any, rows: slice) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return `rows` of a layer's weight and of its bias, in the weight's number format."""
    base = unwrapped(layer)
    is_fused = hasattr(base, "in_proj_weight")
    weight = (base.in_proj_weight if is_fused else base.weight)[rows]
    bias = base.in_proj_bias if is_fused else base.bias
    return weight, None if bias is None else bias[rows].to(weight.dtype)


def fastest(device: torch.device) -> Projector:
    """Return the way to use when nothing else needs the weights: packed on the CPU, else plain."""
    has_packed = device.type == "cpu" and torch.backends.mkldnn.is_available()
    return packed if has_packed else plain
