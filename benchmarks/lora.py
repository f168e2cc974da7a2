"""Compare LoRA with training all weights: what it learns, and how long a step takes.

    python -m benchmarks.lora learn     # the demo's model and data, held-out cross entropy
    python -m benchmarks.lora step      # the true size of small, in bf16: 12 GB

Run it in the project's root; it uses the CPU. `learn` trains as `make demo` does, except for the
flags that it prints. `step` takes turns: a full step on one model, a LoRA step on another, both
with random weights, on random codes of 30 s, batch 1.
"""

import platform
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import fire
import torch

from benchmarks.memory import Trainer, flags
from demo.demo import TRAIN, run
from training.report import read_rows

WAYS: dict[str, dict[str, Any]] = {
    "full": {},
    "LoRA 16": {"lora_rank": 16, "lr": 1e-2},
    "LoRA 64": {"lora_rank": 64, "lr": 5e-3},
    "LoRA 16, embeddings too": {"lora_rank": 16, "lr": 1e-2, "lora_embeddings": 1},
}


def learn(seeds: int = 3, ways: dict[str, dict[str, Any]] = WAYS) -> None:
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {platform.machine()}")
    print(f"{'seed':>4} {'cross entropy':>16} {'fall':>6} {'of full':>8}  flags")
    for seed in range(seeds):
        full = None
        for name, changes in ways.items():
            with tempfile.TemporaryDirectory() as folder:
                run("run.py", {**TRAIN, **changes, "output_dir": folder, "seed": seed}, quiet=True)
                rows = read_rows(Path(folder) / "metrics.jsonl")
            losses = [row["valid_loss"] for row in rows if "valid_loss" in row]
            fall = losses[0] - losses[-1]
            full = full or fall
            words = " ".join(f"--{flag}={value}" for flag, value in changes.items())
            print(
                f"{seed:4} {losses[0]:7.3f} {losses[-1]:8.3f} {fall:6.3f} {fall / full:8.0%}  "
                f"{words or name}",
                flush=True,
            )


def step(rank: int = 16, repeats: int = 5) -> None:
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {platform.machine()}")
    trainers = {"full": Trainer(flags()), f"LoRA {rank}": Trainer(flags(lora_rank=rank))}
    seconds: dict[str, list[float]] = {name: [] for name in trainers}
    for turn in range(repeats + 1):
        for name, trainer in trainers.items():
            began = time.perf_counter()
            trainer.step()
            if turn:  # the first ones warm up
                seconds[name].append(time.perf_counter() - began)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    for name, median in medians.items():
        print(f"{name:>8} {median:6.2f} s  {median / medians['full']:.2f} of full")


if __name__ == "__main__":
    fire.Fire({"learn": learn, "step": step})
