"""Judge a model: validation loss, and samples to listen to."""

import contextlib
import math
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from musicgen import generation
from musicgen.codec import move
from musicgen.generation import Piece
from musicgen.loss import TokenLoss, token_counts
from training.output import SAMPLES
from training.plan import held_out_batches
from training.session import Session


@contextlib.contextmanager
def eval_mode(module: nn.Module) -> Iterator[None]:
    """Turn off dropout and gradients inside the block; set training mode after it."""
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        module.train()


def validate(session: Session, on_batch: Callable[[], None]) -> dict[str, Any]:
    """Return cross entropy and perplexity over all tokens of the held-out clips.

    `on_batch` is called before each batch, and may raise to stop.
    """
    accelerator, lm = session.accelerator, session.model.lm
    loss_module = TokenLoss(lm)
    sums = torch.zeros(2, lm.num_codebooks, device=accelerator.device)  # losses, tokens
    batches = held_out_batches(
        session.held_out,
        session.config.batch_size,
        rank=accelerator.process_index,
        processes=accelerator.num_processes,
        workers=session.workers,
    )
    with contextlib.closing(batches):
        for batch in batches:
            on_batch()
            inputs = session.inputs(batch)
            with accelerator.autocast():
                losses = loss_module(*inputs)
            sums[0] += losses.sum(0)
            counts = token_counts(lm, session.lengths(batch), session.frames)
            sums[1] += counts.to(accelerator.device)
    sums = accelerator.reduce(sums)
    codebooks = (sums[0] / sums[1]).tolist()
    loss = statistics.fmean(codebooks)
    return {
        "valid_loss": loss,
        "valid_perplexity": _perplexity(loss),
        "valid_loss_codebooks": codebooks,
        "valid_perplexity_codebooks": [_perplexity(value) for value in codebooks],
    }


def _perplexity(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf


def write_samples(session: Session, on_frame: Callable[[], None]) -> Iterator[tuple[Path, str]]:
    """Generate all prompts with the fixed seed; yield each wav file's path and prompt.

    `on_frame` is called after each frame, and may raise to stop.
    """
    config, model, prompts = session.config, session.model, session.prompts
    numbers = range(1, len(prompts) + 1)
    stem = session.output / SAMPLES / f"step_{session.step:06d}"
    paths = [stem.with_name(f"{stem.name}_{number}.wav") for number in numbers]
    move(model, "decoder", model.device)
    try:
        blocks = generation.generate_blocks(
            model,
            [Piece(prompt) for prompt in prompts],
            duration_sec=config.sample_duration,
            overlap_sec=generation.default_overlap_sec(model),
            seed=config.seed,
            on_frames=lambda pieces: on_frame(),
        )
        for number in generation.write(model, blocks, paths):
            yield paths[number], prompts[number]
    finally:
        move(model, "decoder", "cpu")
