"""Compare the memory that a run needs with what the card has free; find flags that need less."""

from collections.abc import Callable, Iterator

import torch

from errors import UserError
from flags.run import Config
from musicgen.config import configs
from musicgen.skeleton import frame_rate
from musicgen.weights import DTYPES
from recordings.track import Track
from training.data import crop_frames
from training.memory import Need, estimate
from training.processes import Processes
from training.stop import say

# Runs on the CPU took up to 5 % more than was computed (docs/memory.md). What else a GPU takes is
# not measured, so this is a guess: the kernels and workspaces of libraries, which are loaded later,
# and holes between tensors. CUDA's own context is in memory already when we ask what is free.
SPREAD = 1.05
LIBRARIES = 500 * 10**6


def check_room(
    config: Config, tracks: list[Track], precision: str, device: torch.device, processes: Processes
) -> None:
    """Say, before the weights are loaded, if a run does not fit or hardly fits into its card.

    Every process has its own card; the fullest one counts. Nothing is said on other devices than
    CUDA.
    Raises: UserError if not even weights, gradients and optimizer state fit.
    """
    free = free_bytes(device)
    if free is None:
        return
    free = min(processes.gather(free))
    config = config.model_copy(update={"precision": precision})  # rules out remedies it lacks
    model = configs(config.model_id)
    frames = crop_frames(config, model[0].dataset.segment_duration, frame_rate(model[1]), tracks)

    def need_of(config: Config) -> Need:
        dtype, encodes = DTYPES[precision], not tracks[0].codec
        return estimate(config, model, frames, dtype, encodes=encodes, processes=processes.count)

    for line in compare(config, free, need_of):
        say(processes, line)


def free_bytes(device: torch.device) -> int | None:
    """Return what is free on a CUDA card; None for a device that has no memory of its own."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None


def compare(config: Config, free: int, need_of: Callable[[Config], Need]) -> Iterator[str]:
    """Yield two lines if a run does not fit or hardly fits into `free` bytes.

    The first says how much it needs; the second, which takes some seconds, the least harmful flags
    with which it fits.
    Raises: UserError instead of the second if not even weights, gradients and optimizer state fit.
    """
    need = need_of(config)
    if _fits(need, free):
        return
    what = "will run out of memory" if need.peak > free else "may run out of memory"
    yield (
        f"memory: this run needs about {gb(need.peak)} at its peak, and the GPU has {gb(free)} "
        f"free: it {what}"
    )
    remedy = "no flag for memory is enough: use a shorter --duration or a smaller --model_id"
    flags: dict[str, str] = {}
    for words, changed in thriftier(config):
        flags |= dict(word.split("=", 1) for word in words.split())
        if _fits(lower := need_of(changed), free):
            remedy = " ".join(f"{name}={value}" for name, value in flags.items())
            remedy = f"with {remedy} it needs {gb(lower.peak)}; --dry_run=1 shows what else helps"
            break
    held = need.weights + need.gradients + need.optimizer
    if held > free:
        alone = f"weights, gradients and optimizer state alone take {gb(held)}"
        raise UserError(f"the run can't fit: {alone}\n{remedy}")
    yield remedy


def _fits(need: Need, free: int) -> bool:
    return SPREAD * need.peak + LIBRARIES <= free


def thriftier(config: Config) -> Iterator[tuple[str, Config]]:
    """Yield flags that lower the peak, and the config with them and all before."""
    if not config.grad_checkpointing:
        config = config.model_copy(update={"grad_checkpointing": True})
        yield "--grad_checkpointing=1", config
    if config.batch_size > 1:
        grad_acc = config.batch_size * config.grad_acc
        config = config.model_copy(update={"batch_size": 1, "grad_acc": grad_acc})
        yield f"--batch_size=1 --grad_acc={grad_acc}", config
    if config.optimizer == "adamw" and not config.placeholder:
        config = config.model_copy(update={"optimizer": "adamw_8bit"})
        yield "--optimizer=adamw_8bit", config
    if not (config.lora_rank or config.tune_text or config.placeholder):
        takes_bf16 = config.precision in ("auto", "bf16") and not config.ema_decay
        if config.optimizer == "adamw_8bit" and takes_bf16:
            config = config.model_copy(update={"optimizer": "adamw_8bit_bf16"})
            yield "--optimizer=adamw_8bit_bf16", config
        flags = "--lora_rank=16 --lr=1e-4"
        if config.optimizer == "adamw_8bit_bf16":
            flags += " --optimizer=adamw_8bit"
        config = config.model_copy(update={"lora_rank": 16, "optimizer": "adamw_8bit"})
        yield flags, config


def gb(count: int) -> str:
    return f"{count / 1e9:.1f} GB"
