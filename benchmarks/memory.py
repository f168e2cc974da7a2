"""Compare the memory that training really takes with what --dry_run says.

    python -m benchmarks.memory measure     # the true small
    python -m benchmarks.memory table       # computes the README's table
    python -m benchmarks.memory samples     # what samples add to run.py's peak: half an hour

Run it in the project's root. For each line of `measure`, a fresh process builds a language model of
the true size with random weights and takes two steps on random codes of 30 s, on the CPU in bf16.
Measured is the peak of the process (ru_maxrss) minus what it held before it built the model. Both
numbers leave out text encoder and EnCodec.
"""

import multiprocessing
import os
import platform
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import fire
import numpy as np
import psutil
import soundfile as sf
import torch

from benchmarks.step import peak_rss
from demo.tiny import build_musicgen
from flags.run import Config
from musicgen.config import configs
from musicgen.loss import TokenLoss
from training import memory
from training.optimizer import make_optimizer

MEASURED: list[dict[str, Any]] = [
    {},
    {"grad_checkpointing": 1},
    {"optimizer": "adamw_8bit"},
    {"optimizer": "adamw_8bit_bf16"},
    {"lora_rank": 16},
    {"lora_rank": 16, "grad_checkpointing": 1},
    {"batch_size": 4},
    {"batch_size": 4, "grad_checkpointing": 1},
    {"batch_size": 4, "grad_checkpointing": 1, "grad_acc": 2},
    {"batch_size": 4, "lora_rank": 16},
    {"batch_size": 4, "lora_rank": 16, "grad_checkpointing": 1},
]
SMALL: dict[str, Any] = {"dim": 1024, "num_heads": 16, "num_layers": 24, "card": 2048}
SMALL |= {"n_filters": 64, "codec_dim": 128, "t5_dim": 768}
SAMPLED = {"LoRA": ["--lora_rank=16"], "all weights": []}
FRAMES, DTYPE = 1500, torch.bfloat16
MB = 1e6


def flags(**changes: Any) -> Config:
    given = {"dataset_path": ".", "batch_size": 1, "grad_acc": 1, **changes}
    return Config(**given)


def measure() -> None:
    """Measure each of MEASURED at the true size of small, and compare the estimate."""
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"  # else glibc keeps freed tensors under 32 MB
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {platform.machine()}")
    print(f"{'measured':>10} {'computed':>10} {'ratio':>6}  flags")
    model = configs("small")
    for changes in MEASURED:
        config = flags(**changes)
        need = memory.estimate(config, model, FRAMES, DTYPE)
        computed = need.language_model_peak
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            measured = pool.apply(peak_of_two_steps, (config,))
        words = " ".join(
            f"--{name}={int(v) if isinstance(v, bool) else v}" for name, v in changes.items()
        )
        print(
            f"{measured / MB:7.0f} MB {computed / MB:7.0f} MB {computed / measured:6.2f}  {words}",
            flush=True,
        )


def peak_of_two_steps(config: Config) -> int:
    """Return how many bytes this process takes at its peak; needs a fresh process."""
    warm_up(config)
    before = psutil.Process().memory_info().rss
    trainer = Trainer(config)
    for _ in range(2):
        trainer.step()
    return peak_rss() - before


class Trainer:
    """A language model of true size and random weights, on random codes of `frames` frames."""

    def __init__(
        self,
        config: Config,
        frames: int = FRAMES,
        device: torch.device = memory.CPU,
        dtype: torch.dtype = DTYPE,
    ) -> None:
        model = configs(config.model_id)
        self.config, self.width = config, model[2].d_model
        self.frames, self.device, self.dtype = frames, device, dtype
        self.lm = memory.language_model(config, model, model[0].transformer_lm.num_layers, dtype)
        fill_at_random(self.lm, device)
        self.trained = {name: p for name, p in self.lm.named_parameters() if p.requires_grad}
        self.optimizer = make_optimizer(config, self.trained)

    def step(self) -> None:
        """Take a step as train.py does after EnCodec and T5."""
        B = self.config.batch_size
        for _ in range(self.config.grad_acc):
            with self.device:
                codes = torch.randint(self.lm.card, (B, self.lm.num_codebooks, self.frames))
                text = torch.randn(B, memory.CAPTION_TOKENS, self.width)
                lengths, mask = torch.full((B,), self.frames), torch.ones(text.shape[:2])
            with torch.autocast(self.device.type, self.dtype):
                loss = TokenLoss(self.lm)(codes, lengths, text, mask).mean()
            loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained.values(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def fill_at_random(lm: torch.nn.Module, device: torch.device) -> None:
    """Move a model from the meta device to a real one, with random weights."""
    lm.to_empty(device=device)
    with torch.no_grad():
        for parameter in lm.parameters():
            parameter.normal_(std=0.02)


def warm_up(config: Config) -> None:
    """Load what torch's libraries and the imports take once, whatever the model's size."""
    memory.language_model(config, configs("small"), 2, DTYPE)
    with torch.autocast("cpu", DTYPE):
        layer = torch.nn.Linear(64, 64)
        layer(torch.randn(8, 64)).sum().backward()


def table() -> None:
    """Print the peak in GB at 30 s in bf16, by what is trained and batch size."""
    sizes = (1, 4, 8)
    ways: dict[str, dict[str, Any]] = {
        "all weights": {"optimizer": "adamw_8bit"},
        "all weights, in bf16": {"optimizer": "adamw_8bit_bf16"},
        "LoRA": {"lora_rank": 16},
    }
    print(f"| | {' | '.join(ways)} |\n{'|---' * (1 + len(ways))}|")
    for name in ("small", "medium", "large", "stereo-large"):
        model = configs(name)
        cells = []
        for changes in ways.values():
            config = flags(grad_checkpointing=True, **changes)
            by_size = (config.model_copy(update={"batch_size": size}) for size in sizes)
            needs = (memory.estimate(each, model, FRAMES, DTYPE) for each in by_size)
            cells.append(", ".join(f"{need.peak / 1e9:.1f}" for need in needs))
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


def samples(prompts: int = 4, steps: int = 2, ways: str = "", model: str | None = None) -> None:
    """Print the peak in GB of run.py at the size of small, without and with samples.

    Clips of 30 s, batch 1, float32 on the CPU. Samples of the default length are made before the
    first step and after each. `ways` is "LoRA" or "all weights", else both; `model` is a folder to
    keep the made-up model in, or that has it.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        small = Path(model) if model else folder / "small"
        if not (small / "compression_state_dict.bin").exists():
            build_musicgen(small, **SMALL)
        (folder / "data").mkdir()
        noise = np.random.default_rng(0).normal(0, 0.1, 30 * 32_000)
        sf.write(folder / "data" / "noise.wav", noise, 32_000)
        (folder / "data" / "noise.txt").write_text("noise")
        texts = [f"piece number {number}" for number in range(prompts)]
        run = [sys.executable, "run.py", f"--model_id={small}", f"--max_steps={steps}"]
        run += [f"--dataset_path={folder / 'data'}", f"--output_dir={folder / 'models'}"]
        run += ["--overwrite=1", "--device=cpu", "--duration=30", "--num_workers=0"]
        run += ["--batch_size=1", "--grad_acc=1"]
        for way in [ways] if ways else SAMPLED:
            print(f"{way:12}", end="", flush=True)
            for sampling in ([], ["--sample_step=1", f"--sample_prompts={texts}"]):
                with multiprocessing.get_context("spawn").Pool(1) as pool:
                    peak = pool.apply(_peak_of_child, ([*run, *SAMPLED[way], *sampling],))
                words = f"with {prompts} samples" if sampling else "without samples"
                print(f" {peak / 1e9:6.2f} GB {words}", end="", flush=True)
            print()


def _peak_of_child(command: list[str]) -> int:
    """Return the peak of a command; needs a process that has had no other child."""
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024  # on Linux


if __name__ == "__main__":
    fire.Fire({"measure": measure, "table": table, "samples": samples})
