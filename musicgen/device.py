"""The device that a model runs on."""

import torch

from errors import UserError


def choose_device(name: str) -> torch.device:
    """What --device asks for; auto = CUDA, else MPS, else the CPU. Errors: UserError."""
    has = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if name == "auto":
        name = next(kind for kind in has if has[kind])
    if not has[name]:
        raise UserError(
            f"--device={name}: torch sees no such device on this machine; leave the flag out, or "
            "install the torch that fits its driver"
        )
    return torch.device(name)


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Without waiting for CUDA. MPS may read a temporary after it is freed, so there it waits."""
    return tensor.to(device, non_blocking=device.type == "cuda")
