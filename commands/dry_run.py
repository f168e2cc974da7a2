"""Estimate the device memory that a run needs, and what would lower it."""

import os
from collections.abc import Iterator

import torch

from errors import count
from flags.run import Config
from musicgen.config import configs
from musicgen.skeleton import frame_rate
from musicgen.weights import DTYPES
from recordings.track import Track
from training.data import check_melody, crop_frames
from training.memory import estimate
from training.plan import make_plan


def dry_run(config: Config, tracks: list[Track]) -> str:
    """Return the output of --dry_run=1: model, steps, memory by part, and what would lower it.

    Raises: UserError, as a real run does.
    """
    model = configs(config.model_id)
    check_melody(config, "self_wav" in model[0].conditioners, tracks)
    encodes = not tracks[0].codec
    codec_cfg = model[1]
    rate = frame_rate(codec_cfg)
    frames = crop_frames(config, model[0].dataset.segment_duration, rate, tracks)
    clips = [track.crops(frames, round(rate)) if config.crops_by_length else 1 for track in tracks]
    plan = make_plan(config, sum(clips), processes=int(os.environ.get("WORLD_SIZE", 1)))
    share = f"; {plan.clips} an epoch, in proportion to length" if config.crops_by_length else ""
    dtype, why = torch.bfloat16, "as on a GPU that has it"
    if config.precision != "auto":
        dtype, why = DTYPES[config.precision], "as asked for"
    need = estimate(config, model, frames, dtype, encodes=encodes)
    parts = ["weights", "gradients", "optimizer", "activations", "encoders", "encoding"]
    when = "encoding comes before the activations"
    if not encodes:
        parts.remove("encoding")
        when = "nothing is encoded"
    elif config.cache_tokens:
        parts.remove("encoding")
        before = need.weights + need.encoders + need.beforehand
        when = f"{_gb(before)} while recordings are encoded"
    memory = ", ".join(f"{name} {_gb(getattr(need, name))}" for name in parts)
    trained = f"{need.trained}" if config.placeholder else f"{need.trained / 1e6:.1f} M"
    rows = [
        f"model      {config.model_id}, {need.parameters / 1e6:.1f} M parameters, "
        f"{trained} trained",
        f"steps      {plan.total_steps}: {plan.steps_per_epoch} an epoch, of "
        f"{count(plan.sizes, 'clip')} of {frames / rate:g} s{share}",
        f"precision  {str(dtype).removeprefix('torch.')} ({why})",
        f"memory     {memory}",
        f"           at the peak {_gb(need.peak)} ({when}), plus what CUDA itself takes",
    ]
    if torch.cuda.is_available():
        rows.append(f"           this GPU has {_gb(torch.cuda.mem_get_info()[1])}")
    rows.append(
        "to use less memory, least harmful first; each line adds to those above, and a later "
        "--optimizer replaces an earlier one:"
    )
    for flags, changed in _thriftier(config):
        lower = estimate(changed, model, frames, dtype, encodes=encodes)
        rows.append(f"  {_gb(lower.peak):>8}  with {flags}")
    return "\n".join(rows)


def _thriftier(config: Config) -> Iterator[tuple[str, Config]]:
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


def _gb(count: int) -> str:
    return f"{count / 1e9:.1f} GB"
