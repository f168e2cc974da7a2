"""The training loop: step, log, validate, sample, save.

Letters: B batch, K codebooks.
"""

import contextlib
import math
import signal
import statistics
import sys
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object

import checkpoint
import musicgen
import session
from config import Config
from dataset import Batch
from evaluate import eval_mode, validate, write_samples
from flags import UserError, first_lines
from plan import train_batches
from report import format_seconds
from session import Session


class NonFinite(UserError):
    """The loss or the gradient is NaN or infinite; the weights are still those of before."""


class StopSignals:
    """Ctrl-C and SIGTERM ask for a stop; a second one stops at once."""

    def __init__(self, alone: bool) -> None:
        self.alone = alone  # the only process
        self.requested = 0  # the signal's number

    def __call__(self, number: int, frame: object) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = number

    def check(self) -> None:
        """Stop here, if that leaves no other process waiting."""
        if self.requested and self.alone:
            raise KeyboardInterrupt


def train(config: Config) -> None:
    """Fine-tune as the flags say; writes only below `config.output_dir`.

    Errors: UserError for what the user can mend. Every way out but a non-finite loss (Ctrl-C,
    SIGTERM, any exception) leaves a resume state of the last whole step.
    """
    run = session.start(config)
    first_step, failed = run.step, True
    stop = StopSignals(alone=run.accelerator.num_processes == 1)
    try:
        with _handled_by(stop):
            _loop(run, stop)
        failed = False
    except BaseException as error:
        is_main = run.accelerator.is_main_process
        if is_main and run.step > first_step and run.is_whole and not isinstance(error, NonFinite):
            run.save_resume()
            print(
                f"stopped after step {run.step} of {run.total}; saved "
                f"{run.output / checkpoint.RESUME}: go on with the same flags and --resume=1",
                file=sys.stderr,
            )
        if isinstance(error, KeyboardInterrupt):
            raise SystemExit(128 + (stop.requested or signal.SIGINT)) from None
        raise
    finally:
        if run.report:
            run.report.close(failed=failed)
    if run.report:
        print(f"done: {run.output / checkpoint.FINAL}")
    run.accelerator.end_training()


def _loop(run: Session, stop: StopSignals) -> None:
    config, accelerator, lm, optimizer = run.config, run.accelerator, run.model.lm, run.optimizer
    device, rank = accelerator.device, accelerator.process_index
    parameters = list(run.trained.values())
    batches = train_batches(run.clips, run.plan, start=run.step, rank=rank, workers=run.workers)
    seconds: list[float] = []  # of each step
    while True:
        _do_what_is_due(run, stop)
        if run.step == run.total:
            break
        began = time.perf_counter()
        # All that is random in a step follows from its number, so there is no state to save.
        torch.manual_seed(_seed(config.seed, run.step, rank))
        learning_rate = run.learning_rate()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate

        micro_batches = [next(batches) for _ in run.plan.batches(run.step, rank)]
        valid = [run.valid_frames(batch.valid_samples) for batch in micro_batches]
        # Tokens of each codebook in the whole step, all processes: [K]. Needed before the first
        # backward pass, so that micro-batches weigh by their tokens.
        counts = musicgen.token_counts(lm, torch.cat(valid), run.frames).to(device)
        counts = accelerator.reduce(counts)
        losses = []  # [B, K] of each micro-batch
        for i, batch in enumerate(micro_batches):
            stop.check()
            codes = musicgen.encode_audio(run.model, batch.wav.to(device, non_blocking=True))
            text, mask = run.text_encoder(batch.captions, device)
            waits = i + 1 < len(micro_batches)  # DDP sums gradients in the last backward pass only
            with accelerator.no_sync(run.module) if waits else contextlib.nullcontext():
                loss = run.module(codes, valid[i].to(device), text, mask)
                # Mean over tokens, then codebooks; DDP will divide by the number of processes.
                mean = (loss.sum(0) / counts).mean() * accelerator.num_processes
                accelerator.backward(mean)
            losses.append(loss.detach())
        grad_norm = accelerator.clip_grad_norm_(parameters, config.max_grad_norm or math.inf)

        local = torch.cat(losses).sum(0)
        shared = accelerator.reduce(torch.cat([local, local.new_tensor([float(stop.requested)])]))
        # note: the loop's one CPU-GPU sync point; the finite check and the log need the numbers.
        *codebooks, stop_asked, norm = torch.cat(
            [shared[:-1] / counts, shared[-1:], grad_norm.reshape(1)]
        ).tolist()
        _check_finite(codebooks, norm, losses, micro_batches, run)

        with run.update():
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if run.ema:
                run.ema.update()

        seconds.append(time.perf_counter() - began)
        if run.report:
            row = {
                "step": run.step,
                "loss": statistics.fmean(codebooks),
                "loss_codebooks": codebooks,
                "lr": learning_rate,
                "grad_norm": norm if math.isfinite(norm) else None,  # fp16: a skipped update
                "ms": seconds[-1] * 1000,
                "clips_per_sec": len(run.plan.step(run.step - 1)) / seconds[-1],
            }
            eta = statistics.median(seconds[-50:]) * (run.total - run.step)
            run.report.log(row, _train_line(row, run.total, eta))
        if stop_asked:
            raise KeyboardInterrupt


def _do_what_is_due(run: Session, stop: StopSignals) -> None:
    """Validate, sample and save after `run.step` steps, as the flags ask.

    A resumed run does again what was due at its step, to the same end.
    """
    config, step, last = run.config, run.step, run.step == run.total
    averaged = run.ema.applied() if run.ema else contextlib.nullcontext()
    with averaged, eval_mode(run.model.lm):
        if run.valid_clips.tracks and (step % run.valid_step == 0 or last):
            row = {"step": step, **validate(run, stop.check)}
            if run.report:
                run.report.log(row, _valid_line(row, run.total))
        if not run.report:
            return
        if config.sample_step and (step % config.sample_step == 0 or last):
            for path, prompt in write_samples(run, stop.check):
                run.report.log_sample(step, path, prompt)
        if config.save_step and step and step % config.save_step == 0:
            run.save_lm(checkpoint.checkpoint_path(run.output, step))
            checkpoint.prune(run.output, config.keep_checkpoints)
        if last:
            run.save_lm(run.output / checkpoint.FINAL)
    if config.save_step and step and (step % config.save_step == 0 or last):
        run.save_resume()
    elif last:  # of an earlier, interrupted part of this run
        (run.output / checkpoint.RESUME).unlink(missing_ok=True)


def _check_finite(
    codebooks: list[float],
    grad_norm: float,
    losses: list[torch.Tensor],
    micro_batches: list[Batch],
    run: Session,
) -> None:
    """Errors: NonFinite that names the clips, in every process alike."""
    is_finite = all(map(math.isfinite, codebooks))
    if is_finite and math.isfinite(grad_norm):
        return
    scaler = run.accelerator.scaler
    if is_finite and scaler and scaler.get_scale() >= 1:
        return  # fp16: the scaler skips this update and lowers its scale
    names = [
        name
        for loss, batch in zip(losses, micro_batches, strict=True)
        for name, clip_loss in zip(batch.names, loss, strict=True)
        if is_finite or not clip_loss.isfinite().all()
    ]
    what = "the gradient is" if is_finite else "the loss is"
    raise NonFinite(
        f"{what} not finite at step {run.step + 1} of {run.total}; stopped before the weights were "
        f"changed, and saved nothing. The clips it came from:\n{first_lines(_gather(names))}\n"
        "Listen to them; if they are sound, lower --lr or use --precision=fp32"
    )


def _gather(names: list[str]) -> list[str]:
    return list(dict.fromkeys(gather_object(names)))


def _seed(*numbers: int) -> int:
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


@contextlib.contextmanager
def _handled_by(handler: StopSignals) -> Iterator[None]:
    numbers = (signal.SIGINT, signal.SIGTERM)
    try:
        before = {number: signal.signal(number, handler) for number in numbers}
    except ValueError:  # not in the main thread: the embedding program has the signals
        before = {}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def _train_line(row: dict[str, Any], total: int, eta_sec: float) -> str:
    norm = "skipped" if row["grad_norm"] is None else f"{row['grad_norm']:.2f}"
    return (
        f"step {row['step']}/{total}  loss {row['loss']:.4f}  lr {row['lr']:.2e}  grad {norm}  "
        f"{row['ms']:.0f} ms  {row['clips_per_sec']:.2f} clips/s  eta {format_seconds(eta_sec)}"
    )


def _valid_line(row: dict[str, Any], total: int) -> str:
    codebooks = " ".join(f"{loss:.3f}" for loss in row["valid_loss_codebooks"])
    return (
        f"step {row['step']}/{total}  held-out loss {row['valid_loss']:.4f}  perplexity "
        f"{row['valid_perplexity']:.1f}  codebooks {codebooks}"
    )
