"""Compare the memory that training really takes with what --dry_run says.

    python -m benchmarks.memory measure     # the true small
    python -m benchmarks.memory table       # computes the README's table

Run it in the project's root. For each line, a fresh process builds a language model of the true
size with random weights and takes two steps on random codes of 30 s, on the CPU in bf16. Measured
is the peak of the process (ru_maxrss) minus what it held before it built the model. Both numbers
leave out text encoder and EnCodec.
"""

import multiprocessing
import os
import platform
from typing import Any

import fire
import psutil
import torch

from benchmarks.step import peak_rss
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


if __name__ == "__main__":
    fire.Fire({"measure": measure, "table": table})
