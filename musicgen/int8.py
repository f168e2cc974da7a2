"""Matrix products with weights of 8 bits: less accurate, and faster on the CPU.

A weight is stored as whole numbers from -127 to 127, times one scale for each output. Each row of
the input is rounded likewise, with a scale of its own, so that it doesn't depend on the others.
"""

import warnings
from typing import Any

import torch
from torch import nn

from musicgen.projection import Projection, parameters

ENGINES = ("x86", "fbgemm")  # torch's quantized engines that read weights of 8 bits fast


def is_available() -> bool:
    """Whether torch has the products on this machine: with an Intel or AMD processor."""
    return any(engine in torch.backends.quantized.supported_engines for engine in ENGINES)


def int8(layers: Any, rows: slice = slice(None), activation: Any = None) -> Projection:
    """Return what `projection.packed` returns, computed with 8 bits. The bias stays float32."""
    if not isinstance(layers, nn.ModuleList):
        layers = [layers]
    found = [parameters(layer, rows) for layer in layers]
    weight = torch.cat([weight.detach() for weight, _ in found]).float()
    biases = [bias.detach().float() for _, bias in found if bias is not None]
    bias = torch.cat(biases) if biases else None
    packed = _packed(weight)
    largest = _largest()
    middle = largest + 1  # stands for 0: inputs are unsigned
    product = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32.default

    def project(x: torch.Tensor) -> torch.Tensor:
        scales = x.abs().amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
        out = product(x / scales, 1 / largest, middle, packed) * scales
        if bias is not None:
            out = out + bias
        return activation(out) if activation else out

    return project


def _largest() -> int:
    """Return the largest whole number of an input.

    Without VNNI, processors add two products in 16 bits, where those of 8-bit inputs overflow.
    """
    return 127 if torch.cpu._is_vnni_supported() else 63


def _packed(weight: torch.Tensor) -> Any:
    """Round a weight `[out, in]`, and put it in the order in which it is read fastest."""
    scales = weight.abs().amax(dim=1).clamp(min=torch.finfo(torch.float32).tiny) / 127
    whole = (weight / scales[:, None]).round().to(torch.int8)
    zeros = torch.zeros(len(weight), dtype=torch.long)
    previous = torch.backends.quantized.engine
    torch.backends.quantized.engine = next(
        engine for engine in ENGINES if engine in torch.backends.quantized.supported_engines
    )
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*[qQ]uantiz")
            tensor = torch._make_per_channel_quantized_tensor(whole, scales.double(), zeros, 0)
            return torch.ops.quantized.linear_prepack(tensor, None)
    finally:
        torch.backends.quantized.engine = previous
