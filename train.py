"""The training loop: step, log, validate, sample, save.

Letters: B batch, K codebooks.
"""

import contextlib
import math
import signal
import statistics
import time
from collections.abc import Iterator

import numpy as np
import torch
from accelerate.utils import gather_object

from dataset import Batch
from errors import UserError, first_lines
from flags.run import Config
from musicgen.device import to_device
from musicgen.loss import token_counts
from training.evaluate import eval_mode, validate, write_samples
from training.output import RESUME, checkpoint_path, clear_weights, prune
from training.plan import train_batches
from training.report import train_line, valid_line
from training.session import Session
from training.start import start
from training.stop import StopSignals, handled_by, say


class NonFinite(UserError):
    """The loss or the gradient is NaN or infinite; the weights are still those of before."""


def train(config: Config) -> None:
    """Fine-tune as the flags say; writes only below `config.output_dir`.

    Errors: UserError for what the user can mend. Every way out (Ctrl-C, SIGTERM, any exception)
    leaves a resume state of the last whole step; a non-finite loss only if there is none yet.
    """
    run = start(config)
    first_step, failed = run.step, True
    stop = StopSignals(run.accelerator)
    rank = run.accelerator.process_index
    batches = train_batches(run.clips, run.plan, start=run.step, rank=rank, workers=run.workers)
    with handled_by(stop), contextlib.closing(batches):
        try:
            _loop(run, stop, batches)
            failed = False
        except BaseException as error:
            stop.is_saving = True
            if run.report and run.step > first_step:
                _save_what_there_is(run, error)
            if isinstance(error, KeyboardInterrupt) or stop.requested:
                if run.step == first_step:
                    say(run.accelerator, "stopped before a step was done: nothing new to save")
                raise SystemExit(128 + (stop.requested or signal.SIGINT)) from None
            raise
        finally:
            stop.is_saving = True
            if run.report:
                run.report.close(failed=failed)
    if run.report:
        print(f"done: {run.final}")
    run.accelerator.end_training()


def _save_what_there_is(run: Session, error: BaseException) -> None:
    """After an error: the resume state of the last whole step, if the weights are of one."""
    path = run.output / RESUME
    if not run.is_whole:
        say(run.accelerator, f"stopped while the weights were changing: {path} is left as it was")
    elif isinstance(error, NonFinite) and path.exists():
        say(run.accelerator, f"{path} is left as it was")  # the newer state may be bad already
    else:
        say(run.accelerator, f"stopped after step {run.step} of {run.total}; saving {path}")
        run.save_resume()
        say(run.accelerator, "saved: go on with the same flags and --resume=1 (not --overwrite)")


def _loop(run: Session, stop: StopSignals, batches: Iterator[Batch]) -> None:
    config, accelerator, lm, optimizer = run.config, run.accelerator, run.model.lm, run.optimizer
    device, rank = accelerator.device, accelerator.process_index
    parameters = list(run.trained.values())
    seconds: list[float] = []  # of each step
    lm.train()
    while True:
        _do_what_is_due(run, stop)
        if run.step == run.total:
            break
        began = time.perf_counter()
        # All that is random in a step follows from its number, so there is no state to save.
        torch.manual_seed(_seed(config.seed, run.step, rank))
        learning_rate = run.learning_rate()
        for group in optimizer.param_groups:
            if torch.is_tensor(group["lr"]):  # torchao's: another number would be compiled anew
                group["lr"].fill_(learning_rate)
            else:
                group["lr"] = learning_rate

        micro_batches = [next(batches) for _ in run.plan.batches(run.step, rank)]
        valid = [run.valid_frames(batch.valid_samples) for batch in micro_batches]
        # Tokens of each codebook in the whole step, all processes: [K]. Needed before the first
        # backward pass, so that micro-batches weigh by their tokens.
        counts = token_counts(lm, torch.cat(valid), run.frames)
        counts = accelerator.reduce(to_device(counts, device))
        losses = []  # [B, K] of each micro-batch
        for i, batch in enumerate(micro_batches):
            stop.check()
            codes = run.codes(batch)
            text, mask = run.text_encoder(batch.captions, device)
            waits = i + 1 < len(micro_batches)  # DDP sums gradients in the last backward pass only
            with accelerator.no_sync(run.module) if waits else contextlib.nullcontext():
                melody = None if batch.melody is None else to_device(batch.melody, device)
                loss = run.module(codes, to_device(valid[i], device), text, mask, melody)
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
            # adamw_8bit_bf16 rounds at random: alike in all processes, or their weights would part.
            torch.manual_seed(_seed(config.seed, run.step, 0, 1))
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if run.ema:
                run.ema.update()
        if run.report and config.overwrite and run.step == 1:
            clear_weights(run.output)  # the run works: now they may go

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
            run.report.log(row, train_line(row, run.total, eta))
        if stop_asked:
            raise KeyboardInterrupt


def _do_what_is_due(run: Session, stop: StopSignals) -> None:
    """Validate, sample and save after `run.step` steps, as the flags ask.

    A resumed run does again what was due at its step, to the same end.
    """
    config, step, last = run.config, run.step, run.step == run.total

    def is_due(every: int | None) -> bool:
        return every is not None and every > 0 and (last or step % every == 0)

    validates = bool(run.valid_clips.tracks) and is_due(run.valid_step)
    samples = run.report and is_due(config.sample_step)
    saves = run.report and config.save_step and step and step % config.save_step == 0
    if validates or samples or saves or last:
        with run.averaged(), eval_mode(run.model.lm):
            if validates:
                row = {"step": step, **validate(run, stop.check)}
                if run.report:
                    run.report.log(row, valid_line(row, run.total))
            if run.report and samples:
                for path, prompt in write_samples(run, stop.check):
                    run.report.log_sample(step, path, prompt)
            if saves:
                run.save_weights(checkpoint_path(run.final, step))
                prune(run.output, config.keep_checkpoints)
            if run.report and last:
                run.save_final()
    if saves or (run.report and last and config.save_step):
        run.save_resume(is_finished=last)
    elif run.report and last:  # of an earlier, interrupted part of this run
        (run.output / RESUME).unlink(missing_ok=True)


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
    or_exact = "" if run.config.optimizer == "adamw_8bit_bf16" else " or with --precision=fp32"
    names = list(dict.fromkeys(gather_object(names)))
    raise NonFinite(
        f"{what} not finite at step {run.step + 1} of {run.total}; stopped before the weights "
        f"were changed. The clips it came from:\n{first_lines(names)}\n"
        "Listen to them, and take out what is broken; if they are sound, go on with a lower --lr"
        + or_exact
    )


def _seed(*numbers: int) -> int:
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])
