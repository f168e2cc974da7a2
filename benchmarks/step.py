"""Compare the cost of a training step with plain audiocraft's, and measure what the loop adds.

    python -m benchmarks.step                                          # 4 layers, batch 4
    python -m benchmarks.step --size=small --repeats=3 --loop_steps=0  # the true small: 9 GB
    python -m benchmarks.step --size=small --repeats=0 --cache_tokens=1  # only its loop, on tokens

Run it in the project's root. The model has random weights and is trained on random codes of 30 s,
on the CPU in float32. The plain way is `LMModel.compute_predictions` and the loss of audiocraft's
solver with torch's AdamW. The two ways take turns on one model, each with its own optimizer. Memory
is the peak of a separate process for each way (ru_maxrss), minus what it held before the first of
two steps: gradients, Adam's moments and activations.

Letters: B batch, K codebooks, T token frames.
"""

import contextlib
import io
import multiprocessing
import os
import platform
import resource
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import fire
import psutil
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn
from torch.nn import functional as F

import musicgen  # noqa: F401  (stands in for the xformers that audiocraft imports)

# isort: split
from audiocraft.modules.conditioners import ConditioningAttributes

import train
from dataset import Batch
from demo import music, tiny
from flags.parse import build
from flags.run import Config
from musicgen import codec, load
from musicgen.loss import TokenLoss, token_counts
from musicgen.text import TextEncoder
from training import report
from training.optimizer import make_optimizer
from training.plan import train_batches

SIZES: dict[str, dict[str, Any]] = {
    "bench": {"dim": 256, "num_heads": 4, "num_layers": 4},
    "small": {"dim": 1024, "num_heads": 16, "num_layers": 24, "t5_dim": 768},
}
BATCH = {"bench": 4, "small": 1}
CAPTIONS = ["slow piano waltz", "fast techno, 140 bpm", "a calm flute with soft drums", "loop"]
CPU = torch.device("cpu")
CORE = ["forward", "backward", "clip", "optimizer"]  # pieces of a step that any loop has
# A forward pass, which returns the loss and what else is kept for the backward pass; an optimizer.
Way = tuple[Callable[[], tuple[torch.Tensor, ...]], torch.optim.Optimizer]


def our_way(model: load.Model, codes: torch.Tensor, config: Config) -> Way:
    """Return the way of train.py, after EnCodec."""
    lm, (B, _, T) = model.lm, codes.shape
    module, text_encoder = TokenLoss(lm), TextEncoder(lm)
    lengths = torch.full((B,), T)

    def forward() -> tuple[torch.Tensor, ...]:
        counts = token_counts(lm, lengths, T)
        loss = module(codes, lengths, *text_encoder(CAPTIONS[:B], CPU))
        return ((loss.sum(0) / counts).mean(),)

    return forward, make_optimizer(config, dict(lm.named_parameters()))


def plain_way(model: load.Model, codes: torch.Tensor, config: Config) -> Way:
    """Return the way of audiocraft's solver, after EnCodec: solvers/musicgen.py, run_step."""
    lm, (B, K, T) = model.lm, codes.shape
    attributes = [ConditioningAttributes(text={"description": c}) for c in CAPTIONS[:B]]
    padding_mask = torch.ones(B, K, T, dtype=torch.bool)

    def forward() -> tuple[torch.Tensor, ...]:
        conditions = lm.condition_provider(lm.condition_provider.tokenize(attributes))
        output = lm.compute_predictions(codes, [], conditions)
        logits, mask = output.logits, padding_mask & output.mask
        loss = torch.zeros([])
        for k in range(K):
            logits_k = logits[:, k].contiguous().view(-1, logits.size(-1))  # [B * T, card]
            targets_k = codes[:, k].contiguous().view(-1)
            mask_k = mask[:, k].contiguous().view(-1)
            loss += F.cross_entropy(logits_k[mask_k], targets_k[mask_k])
        return loss / K, logits

    return forward, torch.optim.AdamW(lm.parameters(), lr=config.lr)


WAYS = {"ours": our_way, "plain": plain_way}


def prepare(folder: Path, batch: int, ways: list[str]) -> tuple[nn.Module, list[Way]]:
    """Load one model for all ways, each with its own optimizer: more would not fit in memory."""
    model = load.load_model(str(folder), CPU)
    model.lm.train()
    shape = (batch, model.lm.num_codebooks, round(30 * model.frame_rate))
    codes = torch.randint(model.lm.card, shape, generator=torch.Generator().manual_seed(0))
    config = build(Config, {"dataset_path": str(folder)})
    return model.lm, [WAYS[way](model, codes, config) for way in ways]


def timed_step(lm: nn.Module, way: Way) -> dict[str, float]:
    """Take one step -> seconds of each phase, of the step, and of CPU time."""
    forward, optimizer = way
    cpu, marks = time.process_time(), [time.perf_counter()]
    outputs = forward()
    marks.append(time.perf_counter())
    outputs[0].backward()
    marks.append(time.perf_counter())
    torch.nn.utils.clip_grad_norm_(lm.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    marks.append(time.perf_counter())
    phases = [end - start for start, end in pairwise(marks)]
    seconds = dict(zip(("forward", "backward", "clip, optimizer"), phases, strict=True))
    return {**seconds, "step": sum(phases), "step, CPU": time.process_time() - cpu}


def peak_memory_mb(folder: Path, batch: int, way: str) -> float:
    """Measure the peak of two steps; needs a fresh process."""
    lm, ways = prepare(folder, batch, [way])
    held = psutil.Process().memory_info().rss
    before = peak_rss()
    for _ in range(2):
        timed_step(lm, *ways)
    peak = peak_rss()
    assert peak > before, "loading took more memory than training, so the peak tells nothing"
    return (peak - held) / 1e6


def peak_rss() -> int:
    """Return the most bytes that this process has held so far."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def compare(folder: Path, batch: int, repeats: int) -> None:
    memory = []
    # For the children: make glibc return freed memory at once, or its holes are measured too.
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"
    for way in WAYS:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            memory.append(pool.apply(peak_memory_mb, (folder, batch, way)))
    lm, ways = prepare(folder, batch, list(WAYS))
    losses = [forward()[0].item() for forward, _ in ways]  # audiocraft's padding differs
    runs = [[timed_step(lm, way) for way in ways] for _ in range(repeats + 1)][1:]
    print(f"{'median seconds':22}{'ours':>10}{'plain':>10}{'ratio':>8}  ratios of neighbours")
    for name in runs[0][0]:
        ours, plain = (statistics.median(run[i][name] for run in runs) for i in range(2))
        ratios = [run[0][name] / run[1][name] for run in runs]
        print(f"{name:22}{ours:10.3f}{plain:10.3f}{ours / plain:8.3f}", end="  ")
        print(f"{min(ratios):.3f} to {max(ratios):.3f}, median {statistics.median(ratios):.3f}")
    for name, (ours, plain) in {"peak memory, MB": memory, "loss at first": losses}.items():
        print(f"{name:22}{ours:10.5g}{plain:10.5g}{ours / plain:8.3f}", flush=True)


def loop_overhead(folder: Path, batch: int, steps: int, cache_tokens: bool) -> None:
    """Run the real training with timers around its pieces; all but the core is the loop."""
    data = music.build_dataset(folder / "data", clips=2 * batch)
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
    rows = _time_training_pieces()
    config = {
        "dataset_path": str(data),
        "model_id": str(folder),
        "output_dir": str(folder / "out"),
        "batch_size": batch,
        "grad_acc": 1,
        "max_steps": steps + 1,
        "cache_tokens": cache_tokens,
    }
    with contextlib.redirect_stdout(io.StringIO()):
        train.train(build(Config, config))

    rows = rows[1:]  # the first starts the workers, encodes the captions, loads matplotlib
    for row in rows:
        row["other"] = row["step"] - sum(s for name, s in row.items() if name != "step")
        row["core"] = sum(row[name] for name in CORE)
        row["loop"] = row["step"] - row["core"] - row.get("EnCodec", 0.0)
    total = sum(row["core"] for row in rows)
    print(f"\n{'the loop, each step':22}{'median ms':>10}{'max ms':>10}{'sum / core':>11}")
    for name in rows[0]:
        times = [1000 * row[name] for row in rows]
        share = sum(times) / total / 1000
        print(f"{name:22}{statistics.median(times):10.1f}{max(times):10.1f}{share:11.2%}")
    print(f"core: {', '.join(CORE)}; loop: the rest, except EnCodec; {steps} steps")


def _time_training_pieces() -> list[dict[str, float]]:
    """Patch timers into the training -> a list that gets a row of seconds after each step."""
    spent: dict[str, float] = defaultdict(float)  # seconds of each piece in the current step
    rows: list[dict[str, float]] = []
    marks: list[float] = []

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed_function(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            result = function(*args, **kwargs)
            spent[name] += time.perf_counter() - start
            return result

        return timed_function

    def between_steps(*args: Any) -> None:
        marks.append(time.perf_counter())
        if len(marks) > 1:
            rows.append({"step": marks[-1] - marks[-2], **spent})
        spent.clear()
        do_what_is_due(*args)  # does nothing before the end, which is not timed

    def timed_batches(*args: Any, **kwargs: Any) -> Iterator[Batch]:
        with contextlib.closing(train_batches(*args, **kwargs)) as batches:
            yield from iter(timed("waiting for data", batches.__next__), None)

    do_what_is_due = train._do_what_is_due
    patches: list[tuple[Any, str, Callable[..., Any]]] = [
        (train, "_do_what_is_due", between_steps),
        (train, "train_batches", timed_batches),
    ]
    for piece, owner, name in (
        ("forward", TokenLoss, "forward"),
        ("backward", Accelerator, "backward"),
        ("clip", Accelerator, "clip_grad_norm_"),
        ("optimizer", AcceleratedOptimizer, "step"),
        ("EnCodec", codec, "encode_audio"),
        ("token counts", train, "token_counts"),
        ("captions", TextEncoder, "__call__"),
        ("log and picture", report.Report, "log"),
    ):
        patches.append((owner, name, timed(piece, getattr(owner, name))))
    for owner, name, replacement in patches:
        setattr(owner, name, replacement)
    return rows


def main(
    size: str = "bench", repeats: int = 9, loop_steps: int = 12, cache_tokens: bool = False
) -> None:
    """Compare the two ways, then run the loop.

    Args:
        size: bench (dim 256, 4 layers, batch 4) or small (the published small, batch 1).
        repeats: timed steps of each way; 0 = none.
        loop_steps: steps of the real training to time; 0 = none.
        cache_tokens: train those on cached tokens, so that EnCodec does not run.
    """
    sizes, batch = SIZES[size], BATCH[size]
    threads = torch.get_num_threads()
    print(f"{size}: {sizes}, card 2048, batch {batch}, 30 s; float32")
    print(f"{platform.platform()}, {os.cpu_count()} cores, {threads} threads", end=", ")
    print(f"torch {torch.__version__}, Python {platform.python_version()}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        model = tiny.build_musicgen(Path(folder), card=2048, **sizes)
        if repeats:
            compare(model, batch, repeats)
        if loop_steps:
            loop_overhead(model, batch, loop_steps, bool(cache_tokens))


if __name__ == "__main__":
    fire.Fire(main)
