"""The training loop: step, log, validate, sample, save.

Letters: B batch, K codebooks.
"""

import contextlib
import math
import signal
import statistics
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object

from dataset import Batch
from errors import LostProcess, UserError, end_after_loss, first_lines, show_any_text
from flags.run import Config
from musicgen.device import to_device
from musicgen.loss import token_counts
from musicgen.weights import save_tensors
from training import output
from training.checkpoint import save_checkpoint, save_last
from training.evaluate import eval_mode, validate, write_samples
from training.optimizer import learning_rate, set_learning_rate
from training.plan import train_batches
from training.report import train_line, valid_line
from training.resume import resume_state
from training.session import Session
from training.start import announce, start
from training.stop import StopSignals, handled_by, say
from training.tracks import Tracks

GRACE_SEC = 10.0


class NonFinite(UserError):
    """The loss or the gradient is NaN or infinite; the weights have not been changed."""


def train(config: Config, scanned: Tracks | None = None) -> None:
    """Fine-tune as the flags say; write only below `config.output_dir`.

    `scanned` is what `first_checks` returned, if they were made already.
    Ctrl-C, SIGTERM and any exception leave a resume state of the last whole step; after a
    non-finite loss, an existing one is kept.
    Raises: UserError for what the user can fix; Finished if --resume=auto finds nothing to do.
    """
    show_any_text()
    with contextlib.ExitStack() as held:
        _train(start(config, held, scanned))


def _train(run: Session) -> None:
    processes = run.processes
    with processes.together():
        if processes.is_first:
            announce(run)
    first_step, failed = run.step, True
    stop, rank = StopSignals(processes), processes.rank
    batches = train_batches(run.clips, run.plan, start=run.step, rank=rank, workers=run.workers)
    processes.watch(lambda: _end_if_stuck(run, stop, first_step))
    with handled_by(stop), contextlib.closing(batches):
        try:
            _loop(run, stop, batches)
            processes.leave()
            failed = False
        except BaseException as error:
            stop.is_saving = True
            run.lock.acquire()  # and keep it: one thread saves, then the process ends
            run.writer.wait()
            if run.report and run.step > first_step:
                _save_after_error(run, error)
            if isinstance(error, KeyboardInterrupt) or stop.requested:
                if run.step == first_step:
                    say(processes, "stopped before a step was done: nothing new to save")
                raise SystemExit(128 + (stop.requested or signal.SIGINT)) from None
            raise
        finally:
            stop.is_saving = True
            if run.report:
                run.report.close(failed=failed)
            if failed:
                processes.fail()
    if run.report:
        print(f"done: {run.final}")
    run.accelerator.end_training()


def _end_if_stuck(run: Session, stop: StopSignals, first_step: int) -> None:
    """Save and end this process, a while after another one has ended.

    gloo raises an error in the main thread, which then does so; NCCL would wait for minutes.
    """
    lost = LostProcess("its connection was lost")
    time.sleep(GRACE_SEC)
    run.saving.acquire()  # wait for what the main thread writes: it isn't stuck then
    has_lock = run.lock.acquire(timeout=GRACE_SEC)
    if not has_lock and stop.is_saving:
        return
    try:
        if has_lock:
            with contextlib.suppress(UserError):
                run.writer.wait()
            if run.report and run.step > first_step:
                with _beside_waiting_work(run.accelerator.device):
                    _save_after_error(run, lost)
    except Exception as error:  # whatever it is, this process must end
        say(run.processes, f"could not be saved: {error}")
    finally:
        end_after_loss(lost)


def _beside_waiting_work(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Copy from the GPU without waiting for its main stream, which may wait for NCCL for ever.

    The last update of the weights came before that in the stream, so it is done.
    """
    if device.type != "cuda":
        return contextlib.nullcontext()
    return torch.cuda.stream(torch.cuda.Stream(device))


def _save_after_error(run: Session, error: BaseException) -> None:
    """Save the resume state of the last whole step after an error, if that is possible."""
    path = run.output / output.RESUME
    if not run.is_whole:
        say(run.processes, f"stopped while the weights were changing: {path} is left as it was")
    elif path.exists() and (isinstance(error, NonFinite) or run.writer.has_failed):
        # A newer state may already be bad, or would pass over the checkpoint that wasn't written.
        say(run.processes, f"{path} is left as it was")
    else:
        say(run.processes, f"stopped after step {run.step} of {run.total}; saving {path}")
        save_tensors(path, resume_state(run))
        say(run.processes, "saved: continue with the same flags and --resume=1 (not --overwrite)")


def _loop(run: Session, stop: StopSignals, batches: Iterator[Batch]) -> None:
    """Do what is due, take a step, log it."""
    seconds: list[float] = []  # of each step
    run.model.lm.train()
    while True:
        run.writer.check()
        _do_what_is_due(run, stop)
        if run.step == run.total:
            break
        began = time.perf_counter()
        row, stop_asked = _step(run, stop, batches)
        if run.report and run.config.overwrite and run.step == 1:
            output.clear_weights(run.output)  # now that the run works

        seconds.append(time.perf_counter() - began)
        if run.report:
            row["ms"] = seconds[-1] * 1000
            row["clips_per_sec"] = len(run.plan.step(run.step - 1)) / seconds[-1]
            eta = statistics.median(seconds[-50:]) * (run.total - run.step)
            run.report.log(row, train_line(row, run.total, eta))
        if stop_asked:
            raise KeyboardInterrupt


def _step(run: Session, stop: StopSignals, batches: Iterator[Batch]) -> tuple[dict[str, Any], bool]:
    """Take one optimizer step; return its row for the log, and whether to stop after it.

    Raises: NonFinite, before the weights change.
    """
    config, accelerator, rank = run.config, run.accelerator, run.accelerator.process_index
    # Everything random in a step follows from its number, so there is no state to save.
    torch.manual_seed(_seed(config.seed, run.step, rank))
    rate = learning_rate(config, run.step, run.total, run.warmup)
    set_learning_rate(run.optimizer, rate)

    micro_batches = [next(batches) for _ in run.plan.batches(run.step, rank)]
    # Tokens of each codebook in the whole step and all processes, [K]: needed before the first
    # backward pass, because micro-batches are weighted by their tokens.
    lengths = torch.cat([run.lengths(batch) for batch in micro_batches])
    counts = token_counts(run.model.lm, lengths, run.frames)
    counts = accelerator.reduce(to_device(counts, accelerator.device))
    losses = []  # [B, K] of each micro-batch
    for i, batch in enumerate(micro_batches):
        stop.check_alone()
        losses.append(_backward(run, batch, counts, is_last=i + 1 == len(micro_batches)))
    parameters = list(run.trained.values())
    grad_norm = accelerator.clip_grad_norm_(parameters, config.max_grad_norm or math.inf)

    local = torch.cat(losses).sum(0)
    shared = accelerator.reduce(torch.cat([local, local.new_tensor([float(stop.requested)])]))
    # note: the loop's one CPU-GPU sync point; the finite check and the log need the numbers.
    *codebooks, stop_asked, norm = torch.cat(
        [shared[:-1] / counts, shared[-1:], grad_norm.reshape(1)]
    ).tolist()
    _check_finite(codebooks, norm, losses, micro_batches, run)

    with run.update():
        # adamw_8bit_bf16 rounds at random: the same way in all processes, or weights would diverge.
        torch.manual_seed(_seed(config.seed, run.step, 0, 1))
        run.optimizer.step()
        # Several processes keep the gradients in DDP's buckets; dropped, they would be there twice.
        run.optimizer.zero_grad(set_to_none=run.processes.count == 1)
        if run.ema:
            run.ema.update()
    row = {
        "step": run.step,
        "loss": statistics.fmean(codebooks),
        "loss_codebooks": codebooks,
        "lr": rate,
        "grad_norm": norm if math.isfinite(norm) else None,  # fp16: a skipped update
    }
    return row, bool(stop_asked)


def _backward(run: Session, batch: Batch, counts: torch.Tensor, *, is_last: bool) -> torch.Tensor:
    """Add a micro-batch's gradients; return its losses `[B, K]`. `counts` are the step's tokens.

    DDP sums the gradients of all processes only in the last backward pass of a step.
    """
    accelerator = run.accelerator
    inputs = run.inputs(batch)
    with contextlib.nullcontext() if is_last else accelerator.no_sync(run.module):
        loss = run.module(*inputs)
        # Mean over tokens, then codebooks; DDP will divide by the number of processes.
        mean = (loss.sum(0) / counts).mean() * accelerator.num_processes
        accelerator.backward(mean)
    return loss.detach()


def _do_what_is_due(run: Session, stop: StopSignals) -> None:
    """Validate, sample and save after `run.step` steps, as the flags ask.

    A resumed run repeats what was due at its step, with the same result.
    """
    config, step, last = run.config, run.step, run.step == run.total

    def is_due(every: int | None) -> bool:
        return every is not None and every > 0 and (last or step % every == 0)

    validates = bool(run.held_out.tracks) and is_due(run.valid_step)
    samples = is_due(config.sample_step)
    saves = config.save_step and step and step % config.save_step == 0
    if validates or samples:
        with run.averaged(), eval_mode(run.model.lm):
            if validates:
                row = {"step": step, **validate(run, stop.check)}
                if run.report:
                    run.report.log(row, valid_line(row, run.total))
            if run.report and samples:
                for path, prompt in write_samples(run, stop.check):
                    run.report.log_sample(step, path, prompt)
    if run.report and last:
        save_last(run)
    elif run.report and saves:
        save_checkpoint(run)
    if samples or saves:  # by the first process
        run.processes.wait()


def _check_finite(
    codebooks: list[float],
    grad_norm: float,
    losses: list[torch.Tensor],
    micro_batches: list[Batch],
    run: Session,
) -> None:
    """Raise NonFinite that names the clips, the same in every process."""
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
    or_exact = "" if run.config.optimizer == "adamw_8bit_bf16" else " or with --precision=fp32"
    names = list(dict.fromkeys(gather_object(names)))
    raise NonFinite(
        f"{what} not finite at step {run.step + 1} of {run.total}; stopped before the weights "
        f"were changed. The clips it came from:\n{first_lines(names)}\n"
        "Listen to them, and remove any that are broken; if none are, continue with a lower --lr"
        + or_exact
    )


def _seed(*numbers: int) -> int:
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])
