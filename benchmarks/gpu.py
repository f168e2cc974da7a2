"""Measure training and generation on a GPU: time, throughput and memory, as tables in markdown.

    python -m benchmarks.gpu                                     # small, medium, large
    python -m benchmarks.gpu --models=small --steps=50 --batch_size=4

Run it in the project's root. It downloads nothing: the models have their true size and random
weights. Each row runs in a process of its own, and one that fails says why. Without a GPU the tiny
demo model shows that everything runs, and its figures mean nothing.

A step is EnCodec on random audio of the model's whole window, then forward pass, backward pass and
optimizer on random codes; T5 is only held in memory. Its time is the median. EnCodec's share is
timed apart. MFU (model FLOPs utilization) is the language model's FLOPs over what the card could do
in the step's time; what is computed a second time does not count, and attention counts as without a
mask. "peak" is the most that torch's tensors took, "computed" what --dry_run says, "card" all that
is taken on the card at the end, by other programs too. In the table of generation, a step makes a
frame of each piece of the batch; decoding is included; "costs" are the three kernels that take
longest, for one piece below ten times real time. Beside other libraries: benchmarks/generate.py.

Letters: B batch, K codebooks.
"""

import re
import statistics
import subprocess
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import Any

import fire
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import T5EncoderModel

import musicgen  # noqa: F401  (stands in for the xformers that audiocraft imports)

# isort: split
from audiocraft.models import builders
from omegaconf import OmegaConf

from benchmarks.memory import Trainer, fill_at_random, flags
from errors import is_out_of_memory
from flags.run import Config
from musicgen import codec, generation, load, sampling
from musicgen.config import configs
from musicgen.device import choose_device
from musicgen.loss import TokenLoss
from musicgen.skeleton import build_skeleton, frame_rate
from musicgen.text import text_conditioner
from training import memory

MODES: dict[str, dict[str, Any]] = {
    "adamw": {},
    "adamw_8bit": {"optimizer": "adamw_8bit"},
    "adamw_8bit_bf16": {"optimizer": "adamw_8bit_bf16"},
    "LoRA": {"lora_rank": 16, "optimizer": "adamw_8bit"},
}
WARM_UP = 3  # steps that are not timed: they compile, and choose kernels
PIECES = (1, 2, 4, 8, 16, 32)  # generated at once
SLOW = 10  # times real time, below which one piece is profiled
# TFLOPS in bf16, or fp16 where there is no bf16, with sums in fp32 and without sparsity. Source:
# NVIDIA's data sheets, and for the RTX cards its whitepapers on GA102 and Ada.
TFLOPS = {
    "H200|H100.*HBM3": 989,
    "H100 PCIe": 756,
    "A100": 312,
    "L40S": 362,
    "L4": 121,
    "A10G?": 125,
    "RTX 4090": 165,
    "RTX 3090": 71,
    "V100-SXM2": 125,
    "T4": 65,
}


def peak_flops(name: str) -> float | None:
    """Return how many FLOPs a second a card could do; None if it is not in the table."""
    if re.search("Laptop|MIG", name):  # less than the whole card
        return None
    return next((1e12 * t for card, t in TFLOPS.items() if re.search(rf"\b({card})\b", name)), None)


def model_flops(config: Config, model: memory.Configs, frames: int) -> float:
    """Count the language model's FLOPs of a step: forward and backward pass, nothing twice.

    Two and three layers are counted, as in training/memory.py.
    """
    config = config.model_copy(update={"grad_checkpointing": False, "optimizer": "adamw"})
    B, counts = config.batch_size, []
    for layers in memory.FEW_LAYERS:
        lm = memory.language_model(config, model, layers, torch.float32)
        with torch.device("meta"), FlopCounterMode(display=False) as counter:
            sequence = torch.empty(B, lm.num_codebooks, frames + 1, dtype=torch.long)
            text = torch.empty(B, memory.CAPTION_TOKENS, model[2].d_model)
            TokenLoss(lm).of_sequence(sequence, text, torch.empty(text.shape[:2])).sum().backward()
        counts.append(counter.get_total_flops())
    few, more = counts
    return few + (model[0].transformer_lm.num_layers - memory.FEW_LAYERS[0]) * (more - few)


def with_codec(lm: Any, model: memory.Configs, device: torch.device) -> load.Model:
    """Return a language model with an EnCodec of true size and random weights."""
    here: Any = OmegaConf.merge(model[1], {"device": str(device)})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compression_model = builders.get_compression_model(here)
    lm.cfg = model[0]
    return load.Model("random", compression_model.requires_grad_(False), lm)


def timed(run: Callable[[], object], device: torch.device) -> float:
    """Return the seconds that `run` takes, until the GPU has finished."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def measure_training(config: Config, steps: int) -> list[str]:
    """Return the cells of a row: milliseconds, clips a second, MFU, EnCodec's share, memory."""
    model, device = configs(config.model_id), choose_device("auto")
    dtype = torch.bfloat16
    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        dtype = torch.float16
    frames = round(model[0].dataset.segment_duration * frame_rate(model[1]))
    computed = memory.estimate(config, model, frames, dtype).peak

    trainer = Trainer(config, frames, device, dtype)
    whole = with_codec(trainer.lm, model, device)
    codec.move(whole, "decoder", "cpu")  # as in a run
    t5: Any = T5EncoderModel(model[2])
    t5.to(device)
    trainer.lm.train()
    samples = frames * round(whole.sample_rate / whole.frame_rate)
    wav = torch.randn(config.batch_size, whole.audio_channels, samples, device=device)

    def encode() -> None:
        codec.encode_audio(whole, wav)

    def step() -> None:
        encode()
        trainer.step()

    taken = [timed(step, device) for _ in range(WARM_UP + steps)][WARM_UP:]
    seconds = statistics.median(taken)
    encoding = statistics.median(timed(encode, device) for _ in range(steps))
    del t5
    mfu = peak = card = "-"
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info()
        peak, card = gb(torch.cuda.max_memory_allocated()), gb(total - free)
        if possible := peak_flops(torch.cuda.get_device_name()):
            mfu = f"{model_flops(config, model, frames) / seconds / possible:.1%}"
    rate = f"{config.batch_size / seconds:.2f}"
    share = f"{encoding / seconds:.0%}"
    return [f"{1000 * seconds:.0f}", rate, mfu, share, peak, gb(computed), card]


def random_model(model_id: str, device: torch.device, dtype: torch.dtype) -> load.Model:
    """Return a model of true size with random weights, whose captions need no T5."""
    model = configs(model_id)
    lm = build_skeleton(model[0], model[2], model[0].transformer_lm.num_layers, dtype).to(dtype)
    fill_at_random(lm, device)
    conditioner = text_conditioner(lm)

    def embed(count: int) -> tuple[torch.Tensor, torch.Tensor]:  # in place of T5
        text = torch.randn(count, memory.CAPTION_TOKENS, model[2].d_model, device=device)
        return conditioner.output_proj(text.to(dtype)), torch.ones(text.shape[:2], device=device)

    conditioner.tokenize, conditioner.forward = len, embed  # type: ignore[assignment]
    return with_codec(lm.eval(), model, device)


def measure_generation(model_id: str, pieces: int, duration_sec: float) -> list[str]:
    """Return the cells of a row: steps a second, times real time, memory, and what takes long."""
    device = choose_device("auto")
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    whole = random_model(model_id, device, dtype)
    options = sampling.Sampling(top_k=min(250, whole.lm.card))

    def generate(seconds: float) -> None:
        overlap = generation.default_overlap_sec(whole)
        how: dict[str, Any] = {"overlap_sec": overlap, "seed": 0, "sampling": options}
        generation.generate(whole, ["music"], duration_sec=seconds, variations=pieces, **how)

    timed(lambda: generate(duration_sec / 10), device)  # warms up
    seconds = timed(lambda: generate(duration_sec), device)
    peak = gb(torch.cuda.max_memory_allocated()) if device.type == "cuda" else "-"
    rate = pieces * duration_sec / seconds
    costs = ""
    if device.type == "cuda" and pieces == 1 and rate < SLOW:
        costs = largest_costs(lambda: generate(duration_sec / 10))
    return [f"{rate * whole.frame_rate / pieces:.0f}", f"{rate:.1f}", peak, costs]


def largest_costs(run: Callable[[], object]) -> str:
    """Return the three kernels that take longest, each with its share of the GPU's work."""
    with torch.profiler.profile() as profile:
        run()
    kernels = {e.key: e.self_device_time_total for e in profile.key_averages()}
    most = sorted(kernels, key=kernels.__getitem__, reverse=True)[:3]
    return ", ".join(f"{key[:60]} {kernels[key] / sum(kernels.values()):.0%}" for key in most)


def attempt(measure: Callable[..., list[str]], *arguments: Any) -> list[str]:
    """Return a row's cells, or why there are none."""
    try:
        return measure(*arguments)
    except Exception as error:  # whatever it is, the other rows are worth having
        if is_out_of_memory(error):
            return ["out of memory"]
        return [f"{type(error).__name__}: {' '.join(str(error).split())[:100]}"]


def in_new_process(measure: Callable[..., list[str]], *arguments: Any) -> list[str]:
    """Return a row's cells; memory is as it is in a fresh process."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        try:
            return pool.submit(attempt, measure, *arguments).result()
        except BrokenProcessPool:
            return ["killed: perhaps the computer's own memory was full"]


def about() -> str:
    """Return the card's name, its driver, and torch's version."""
    torch_is = f"torch {torch.__version__}"
    if not torch.cuda.is_available():
        return f"no GPU: the demo model on the CPU, {torch_is}"
    try:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        driver = "unknown"
    memory_is = gb(torch.cuda.get_device_properties(0).total_memory)
    name = f"{torch.cuda.get_device_name()}, {memory_is} GB"
    return f"{name}, driver {driver}, CUDA {torch.version.cuda}, {torch_is}"


def gb(count: float) -> str:
    return f"{count / 1e9:.1f}"


def print_row(cells: list[str], columns: int) -> None:
    print(f"| {' | '.join(cells + [''] * (columns - len(cells)))} |", flush=True)


def print_head(*names: str) -> None:
    print(f"\n| {' | '.join(names)} |\n{'|---' * len(names)}|", flush=True)


def main(
    models: str | tuple[str, ...] | None = None,
    steps: int = 20,
    batch_size: int = 1,
    duration: float = 10.0,
) -> None:
    """Print a table of training and one of generation.

    Args:
        models: names, with commas; small,medium,large, or demo without a GPU.
        steps: timed steps of each row.
        batch_size: clips in a step.
        duration: seconds to generate.
    """
    if models is None:
        models = "small,medium,large" if torch.cuda.is_available() else "demo"
    names = models.split(",") if isinstance(models, str) else models
    print(about())
    print_head(
        *("model", "mode", "checkpointing", "step, ms", "clips/s", "MFU", "EnCodec"),
        *("peak, GB", "computed, GB", "card, GB"),
    )
    for name in names:
        for mode, changes in MODES.items():
            for checkpointing in (0, 1):
                more = {"model_id": name, "batch_size": batch_size, **changes}
                config = flags(grad_checkpointing=checkpointing, **more)
                cells = in_new_process(measure_training, config, steps)
                print_row([name, mode, "yes" if checkpointing else "no", *cells], 10)
    print_head("model", "pieces at once", "steps/s", "x real time", "peak, GB", "costs")
    for name in names:
        for pieces in PIECES:
            cells = in_new_process(measure_generation, name, pieces, duration)
            print_row([name, str(pieces), *cells], 6)


if __name__ == "__main__":
    fire.Fire(main)
