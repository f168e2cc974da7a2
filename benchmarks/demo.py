"""Measure what fine-tuning does to the demo's model, over several seeds.

    python -m benchmarks.demo [--seeds=3]

Does what `make demo` does, with each seed for training and generation, and prints a table, before
and after: cross entropy on the held-out jigs, Fréchet distance of eight generated pieces from them,
and in how many of the eight a judge hears an ocarina. Run it in the project's root.
"""

import platform
import tempfile
from pathlib import Path

import fire
import torch

from demo.demo import GENERATE, TRAIN, changes, run


def main(seeds: int = 3) -> None:
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {platform.machine()}")
    print(f"{'seed':>4} {'cross entropy':>16} {'fall':>6} {'Fréchet distance':>18} {'ocarina':>14}")
    for seed in range(seeds):
        with tempfile.TemporaryDirectory() as name:
            models, before, after = (Path(name) / part for part in ("models", "before", "after"))
            pieces = {**GENERATE, "seed": seed}
            run("generate.py", {**pieces, "weights_path": None, "output_dir": before}, quiet=True)
            run("run.py", {**TRAIN, "output_dir": models, "seed": seed}, quiet=True)
            trained = {"weights_path": models / "lm_final.pt", "output_dir": after}
            run("generate.py", {**pieces, **trained}, quiet=True)
            found = changes(models, before, after)
        losses, far, heard = found.losses, found.distances, found.heard
        print(
            f"{seed:4} {losses[0]:7.2f} {losses[-1]:8.2f} {1 - losses[-1] / losses[0]:6.0%}"
            f" {far[0]:9.0f} {far[1]:8.0f} {heard[0]:5} {heard[1]:4}",
            flush=True,
        )


if __name__ == "__main__":
    fire.Fire(main)
