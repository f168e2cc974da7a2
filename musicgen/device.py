"""The device that a model runs on."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from errors import UserError


def choose_device(name: str) -> torch.device:
    """Return the device for --device; auto = CUDA, else MPS, else the CPU. Raises: UserError."""
    has = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if name == "auto":
        name = next(kind for kind in has if has[kind])
    if not has[name]:
        raise UserError(
            f"--device={name}: torch finds no such device on this machine; leave the flag out, or "
            "install a torch that fits the driver"
        )
    return torch.device(name)


def codec_device(device: torch.device | str) -> torch.device:
    """Return the device on which EnCodec and demucs run, beside a model on `device`.

    With MPS that is the CPU: before macOS 15.1, torch refuses convolutions on MPS whose output is
    longer than 65,536 samples, which are 2 s.
    """
    device = torch.device(device)
    return torch.device("cpu") if device.type == "mps" else device


@contextlib.contextmanager
def without_tf32() -> Iterator[None]:
    """Make cuDNN compute in full float32 inside the block; by default it may use TF32.

    TF32 has 10 bits of fraction instead of 23, so codes and melodies that are nearly tied would
    differ from those of the CPU.
    """
    cudnn: Any = torch.backends.cudnn
    parts = (cudnn.conv, cudnn.rnn)
    before = [part.fp32_precision for part in parts]
    try:
        for part in parts:
            part.fp32_precision = "ieee"
        yield
    finally:
        for part, precision in zip(parts, before, strict=True):
            part.fp32_precision = precision


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Move without waiting for CUDA. MPS may read a freed temporary, so wait for that."""
    return tensor.to(device, non_blocking=device.type == "cuda")
