"""The device and the precision of a run."""

import contextlib
import os
import socket
from collections.abc import Iterable

import psutil
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import (
    DistributedDataParallelKwargs,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    KwargsHandler,
)
from torch import nn

from errors import UserError
from flags.run import Config
from musicgen.device import choose_device
from training.launch import check_launch, local_process_count, process_count
from training.meeting import init_method


def start_accelerator(config: Config) -> tuple[Accelerator, str, str]:
    """Return the Accelerator for --device and --precision, the precision, and the reason for it.

    Raises: UserError if the device or the launch doesn't go with the flags.
    """
    check_launch()
    device = choose_device(config.device).type
    has_bf16 = device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    precision, why = config.precision, "as asked for"
    if precision == "auto" and device == "cuda":
        precision = "bf16" if has_bf16 else "fp16"
        why = "this GPU has it" if has_bf16 else "this GPU has no bf16"
    elif precision == "auto":
        precision, why = "fp32", f"on {device}, slow but exact"
    not_on_mps = {
        f"--optimizer={config.optimizer}": config.optimizer != "adamw",
        "--lora_dropout": config.lora_dropout > 0,  # recomputing would drop other inputs
    }
    for flag, is_asked in not_on_mps.items():
        if is_asked and device == "mps":
            raise UserError(f"{flag}: does not work on mps; leave it out")
    if precision == "fp16" and device != "cuda":
        raise UserError(
            f"--precision=fp16 needs a CUDA GPU, but this is {device}: use fp32 or bf16"
        )
    if precision == "bf16" and device == "cuda" and not has_bf16:
        raise UserError("--precision=bf16: this GPU does not have it: use auto, fp16 or fp32")
    if config.optimizer == "adamw_8bit_bf16" and precision != "bf16":
        raise UserError(
            f"--optimizer=adamw_8bit_bf16 needs bf16, but --precision=auto is {precision} here "
            f"({why}): give --precision=bf16 if the device has it, or use --optimizer=adamw_8bit"
        )
    mixed = "no" if precision == "fp32" else precision
    # A run before this one in the same program may have had another device or precision.
    AcceleratorState._reset_state(reset_partial_state=True)
    _choose_interface()
    kwargs: list[KwargsHandler] = [DistributedDataParallelKwargs(gradient_as_bucket_view=True)]
    if process_count() > 1:
        kwargs.append(InitProcessGroupKwargs(init_method=init_method()))
    # All that a saved Accelerate config could change is given here.
    accelerator = Accelerator(
        cpu=device == "cpu",
        mixed_precision=mixed,
        dynamo_backend="no",
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        kwargs_handlers=kwargs,
    )
    if accelerator.device.type != device:
        raise UserError(
            f"Accelerate would train on {accelerator.device}, not on {device}: give "
            f"--device={accelerator.device.type}, or launch without what asks for it (--cpu, "
            "ACCELERATE_USE_CPU, ACCELERATE_TORCH_DEVICE)"
        )
    if accelerator.num_processes != process_count():
        raise UserError(
            f"{process_count()} processes can't train together on {device}: use GPUs with CUDA, "
            "--device=cpu, or one process"
        )
    return accelerator, precision, why


def share_gradients(trained: Iterable[nn.Parameter]) -> None:
    """Let DistributedDataParallel keep the gradients in its buckets from the first step on.

    Its constructor moves gradients that are there already. Without them, the first step's would
    be held twice, and so would each step's if they were not zeroed but dropped.
    """
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)


def _choose_interface() -> None:
    """Let gloo use the network interface that leads to the first machine.

    By itself it takes the address of this machine's name, which often is 127.0.0.1.
    """
    if "GLOO_SOCKET_IFNAME" in os.environ or local_process_count() == process_count():
        return
    with (
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe,
        contextlib.suppress(OSError, KeyError),
    ):
        probe.connect((os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])))  # sends nothing
        own = probe.getsockname()[0]
        for name, addresses in psutil.net_if_addrs().items():
            if own in [a.address for a in addresses] and not own.startswith("127."):
                os.environ["GLOO_SOCKET_IFNAME"] = name
