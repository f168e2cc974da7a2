"""What fine-tuning does to the demo's model, over several seeds.

    python -m benchmarks.demo [--seeds=3]

Does what `make demo` does with each seed, of training and of generation, and prints a table:
cross entropy on the held-out jigs, Fréchet distance of eight generated pieces from them, and in
how many of those a judge hears an ocarina, before and after. From the project's root.
"""

import json
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

import fire
import torch

from demo import measure
from demo.demo import DATASET, GENERATE, TRAIN


def main(seeds: int = 3) -> None:
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {platform.machine()}")
    print(f"{'seed':>4} {'cross entropy':>16} {'fall':>6} {'Fréchet distance':>18} {'ocarina':>14}")
    held_out = [measure.read(path) for path in sorted((DATASET / "valid").glob("*.wav"))]
    for seed in range(seeds):
        with tempfile.TemporaryDirectory() as folder:
            before = generate(Path(folder) / "before", None, seed)
            _run("run.py", {**TRAIN, "output_dir": folder, "seed": seed})
            rows = map(json.loads, (Path(folder) / "metrics.jsonl").read_text().splitlines())
            losses = [row["valid_loss"] for row in rows if "valid_loss" in row]
            after = generate(Path(folder) / "after", Path(folder) / "lm_final.pt", seed)
        far = [measure.frechet_distance(wavs, held_out) for wavs in (before, after)]
        judge = measure.Judge()
        heard = [sum(judge.verdict(wav) == "ocarina" for wav in wavs) for wavs in (before, after)]
        print(
            f"{seed:4} {losses[0]:7.2f} {losses[-1]:8.2f} {1 - losses[-1] / losses[0]:6.0%}"
            f" {far[0]:9.0f} {far[1]:8.0f} {heard[0]:5} {heard[1]:4}",
            flush=True,
        )


def generate(output: Path, weights: Path | None, seed: int) -> list[measure.Audio]:
    """The demo's pieces with these weights (None = the model as it was)."""
    _run("generate.py", {**GENERATE, "weights_path": weights, "output": output, "seed": seed})
    return [measure.read(path) for path in sorted(output.glob("*.wav"))]


def _run(script: str, flags: dict[str, object]) -> None:
    words = [f"--{name}={value}" for name, value in flags.items()]
    subprocess.run(
        [sys.executable, script, *words],
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


if __name__ == "__main__":
    fire.Fire(main)
