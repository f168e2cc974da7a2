"""The device that a model runs on."""

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


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Move without waiting for CUDA. MPS may read a freed temporary, so wait for that."""
    return tensor.to(device, non_blocking=device.type == "cuda")
