"""Estimate the device memory that a run needs, and what would lower it."""

import torch

from dataset import clip_counts
from errors import count
from flags.run import Config
from musicgen.config import configs
from musicgen.skeleton import frame_rate
from musicgen.weights import DTYPES
from recordings.track import Track
from training.data import check_melody, crop_frames
from training.launch import process_count
from training.memory import estimate
from training.plan import make_plan
from training.resume import copy_bytes
from training.room import gb, thriftier


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
    clips = clip_counts(tracks, frames, round(rate), by_length=config.crops_by_length)
    processes = process_count()
    plan = make_plan(config, sum(clips), processes)
    share = f"; {plan.clips} an epoch, in proportion to length" if config.crops_by_length else ""
    dtype, why = torch.bfloat16, "as on a GPU that has it"
    if config.precision != "auto":
        dtype, why = DTYPES[config.precision], "as asked for"
    need = estimate(config, model, frames, dtype, encodes=encodes, processes=processes)
    parts = ["weights", "gradients", "optimizer", "activations", "encoders", "encoding"]
    when = "encoding comes before the activations"
    if not encodes:
        parts.remove("encoding")
        when = "nothing is encoded"
    elif config.cache_tokens:
        parts.remove("encoding")
        before = need.weights + need.encoders + need.beforehand
        when = f"{gb(before)} while recordings are encoded"
    memory = ", ".join(f"{name} {gb(getattr(need, name))}" for name in parts)
    trained = f"{need.trained}" if config.placeholder else f"{need.trained / 1e6:.1f} M"
    each = " on each GPU" if processes > 1 else ""
    rows = [
        f"model      {config.model_id}, {need.parameters / 1e6:.1f} M parameters, "
        f"{trained} trained",
        f"steps      {plan.total_steps}: {plan.steps_per_epoch} an epoch, of "
        f"{count(plan.sizes, 'clip')} of {frames / rate:g} s{share}",
        f"precision  {str(dtype).removeprefix('torch.')} ({why})",
        f"memory     {memory}",
        f"           at the peak {gb(need.peak)}{each} ({when}), plus what CUDA itself takes",
    ]
    if config.save_step:
        copy = copy_bytes(config, need.trained, need.gradients)
        rows.append(
            f"           computer's memory: {gb(copy)} for a copy of what --save_step writes"
        )
    if torch.cuda.is_available():
        rows.append(f"           this GPU has {gb(torch.cuda.mem_get_info()[1])}")
    rows.append(
        "to use less memory, least harmful first; each line adds to those above, and a later "
        "--optimizer replaces an earlier one:"
    )
    for flags, changed in thriftier(config):
        lower = estimate(changed, model, frames, dtype, encodes=encodes, processes=processes)
        rows.append(f"  {gb(lower.peak):>8}  with {flags}")
    return "\n".join(rows)
