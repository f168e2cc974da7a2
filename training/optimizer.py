"""AdamW with moments of 32 or 8 bits, and its learning rate."""

import math
from typing import Any

import torch
from torch import nn

from errors import UserError
from flags.run import Config

BETAS = (0.9, 0.95)


def make_optimizer(config: Config, trained: dict[str, nn.Parameter]) -> torch.optim.Optimizer:
    """Return AdamW without weight decay on vectors: biases and norms."""
    groups: list[dict[str, Any]] = [
        {"params": [p for p in trained.values() if p.ndim >= 2]},
        {"params": [p for p in trained.values() if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    how: dict[str, Any] = {
        "lr": config.lr,
        "betas": BETAS,
        "weight_decay": config.weight_decay,
    }
    if config.optimizer == "adamw_8bit":
        try:
            from bitsandbytes.optim import AdamW8bit
        except ImportError as error:
            raise UserError(
                f"--optimizer=adamw_8bit needs bitsandbytes, which can't be imported ({error}): "
                "pip install bitsandbytes, or use --optimizer=adamw"
            ) from None
        return AdamW8bit(groups, **how)
    if config.optimizer == "adamw_8bit_bf16":
        return _stochastically_rounding(groups, how)
    return torch.optim.AdamW(groups, **how, fused=True)  # for CUDA, MPS and the CPU


def _stochastically_rounding(
    groups: list[dict[str, Any]], how: dict[str, Any]
) -> torch.optim.Optimizer:
    """Return AdamW with 8-bit moments that rounds at random, so that bf16 weights can move."""
    try:
        from torchao.optim import AdamW8bit
    except ImportError as error:
        raise UserError(
            f"--optimizer=adamw_8bit_bf16 needs torchao, which can't be imported ({error}): "
            "pip install torchao, or use --optimizer=adamw_8bit"
        ) from None

    from torch._dynamo.exc import TorchDynamoException

    on_cpu = groups[0]["params"][0].device.type == "cpu"  # compiling takes a minute there

    class Optimizer(AdamW8bit):
        def step(self, closure: Any = None) -> Any:
            try:
                with torch.compiler.set_stance("force_eager" if on_cpu else "default"):
                    return super().step(closure)
            except TorchDynamoException as error:
                raise UserError(
                    "--optimizer=adamw_8bit_bf16 has to be compiled, which fails here "
                    f"({' '.join(str(error).split())[:300]}): install triton and a C "
                    "compiler, or use --optimizer=adamw_8bit"
                ) from error

    return Optimizer(groups, **how, bf16_stochastic_round=True)


def warmup_steps(config: Config, total: int) -> int:
    """Return the warm-up of a run of `total` steps; a tenth of them if it would not fit."""
    return config.warmup_steps if config.warmup_steps < total else total // 10


def learning_rate(config: Config, step: int, total: int, warmup: int) -> float:
    """Return step `step`'s rate (from 0): linear warm-up, then as --lr_scheduler says."""
    if step < warmup:
        return config.lr * (step + 1) / warmup
    done = (step - warmup) / max(1, total - warmup)  # 0 <= done < 1
    factor = {
        "constant": 1.0,
        "cosine": 0.5 * (1 + math.cos(math.pi * done)),
    }
    return config.lr * factor[config.lr_scheduler]


def set_learning_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    for group in optimizer.param_groups:
        if torch.is_tensor(group["lr"]):  # torchao's: a new number would make it compile again
            group["lr"].fill_(value)
        else:
            group["lr"] = value


def moments_bytes(config: Config, parameters: int) -> int:
    """Return the bytes that the optimizer keeps for so many parameters."""
    if config.optimizer != "adamw":
        return 2 * parameters + parameters // 32  # plus two float32 scales for each 256
    return 8 * parameters
