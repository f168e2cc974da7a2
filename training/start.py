"""Flags -> a Session: load and check everything that a run needs, then announce it.

Letters: T token frames.
"""

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import files
from flags.run import Config
from musicgen import codec, load
from musicgen.hub import portable_id
from musicgen.loss import TokenLoss
from musicgen.text import TextEncoder
from musicgen.weights import DTYPES
from recordings.track import Track
from training import output
from training.accelerator import share_gradients, start_accelerator
from training.data import crop_frames, find_melodies, find_tokens, make_clips
from training.ema import EMA
from training.facts import facts_of
from training.optimizer import make_optimizer, warmup_steps
from training.plan import make_plan
from training.processes import Processes
from training.report import Report, start_wandb
from training.resume import fingerprint, load_resume, restore, resume_bytes
from training.room import check_room
from training.session import Session
from training.tracks import Tracks, scan_dataset
from training.tuning import tuning_of

# Flags that may differ between the machines of a run.
OWN = {"dataset_path", "valid_path", "output_dir", "model_id", "device", "num_workers"}


def start(config: Config, held: ExitStack, scanned: Tracks | None = None) -> Session:
    """Load and check everything that a run needs, quick checks first.

    `scanned` is what `first_checks` returned; without it, the dataset is scanned here.
    Only the first process touches the output folder, locked until `held` is closed.
    Deletes nothing, and prints nothing but the progress of encoding, and that memory is short.
    Raises: UserError for what the user can fix; Finished if --resume=auto finds nothing to do. If
    one process does, all do.
    """
    folder, state = Path(config.output_dir), None
    accelerator, precision, why = start_accelerator(config)
    processes = Processes(accelerator)
    with processes.together():
        tracks, held_out = scanned or scan_dataset(config)
        if processes.is_first:
            held.enter_context(files.locked_folder(folder, "--output_dir"))
            resumes = output.check_output(folder, resume=config.resume, overwrite=config.overwrite)
            state = load_resume(folder) if resumes else None
    if processes.count > 1:
        processes.check_same(_common(config, precision, tracks + held_out))
    check_room(config, tracks, precision, accelerator.device, processes)
    with processes.together():
        tuning = tuning_of(config)
        layers_dtype = tuning.layers_dtype(DTYPES[precision])
        model = load.load_model(config.model_id, accelerator.device, layers_dtype=layers_dtype)
        codec.move(model, "decoder", "cpu")  # only samples need it, see write_samples
        frames = crop_frames(config, model.max_duration, model.frame_rate, tracks)
    tokens = find_tokens(config, model, tracks + held_out, processes)
    melodies = find_melodies(config, model, tracks + held_out, processes)

    with processes.together():
        tuning.prepare(model.lm)
        trained = tuning.trained(model.lm)
        optimizer = make_optimizer(config, trained)
    loss = TokenLoss(model.lm)
    if tuning.new_word:
        # Its gradient comes through the text, from outside, but DDP sums only its own parameters'.
        loss.register_parameter("placeholder", tuning.new_word.vector)
    if processes.count > 1:
        share_gradients(trained.values())
    module, optimizer = accelerator.prepare(loss, optimizer)
    clips = make_clips(config, model, tracks, frames, tokens, melodies, training=True)
    plan = make_plan(config, len(clips), processes.count)
    session = Session(
        config=config,
        accelerator=accelerator,
        processes=processes,
        precision=f"{precision} ({why})",
        model=model,
        tuning=tuning,
        text_encoder=TextEncoder(model.lm, new_word=tuning.new_word),
        module=module,
        trained=trained,
        optimizer=optimizer,
        ema=EMA(list(trained.values()), config.ema_decay) if config.ema_decay else None,
        clips=clips,
        held_out=make_clips(config, model, held_out, frames, tokens, melodies, training=False),
        plan=plan,
        frames=frames,
        warmup=warmup_steps(config, plan.total_steps),
        prompts=config.sample_prompts or list(dict.fromkeys(t.caption for t in tracks))[:2],
    )
    state = processes.broadcast(state)
    with processes.together():
        if state is not None:
            restore(session, state)
        if processes.is_first:
            replacing = config.overwrite or state is not None
            output.check_space(folder, _space_needed(session), replacing=replacing)
    return session


def _common(config: Config, precision: str, tracks: list[Track]) -> dict[str, Any]:
    """Return what must be the same in all processes, by a name to tell."""
    flags = config.model_dump(exclude=OWN)
    common = {f"--{name}": value for name, value in flags.items()}
    common["the number format"] = precision
    common["the recordings or captions"] = fingerprint(tracks)
    return common


def announce(session: Session) -> None:
    """Print what the run will do, and open its report; for the first process.

    Removes half-written files, and the samples of an earlier run; its weights are removed after
    the first step.
    Raises: UserError if wandb can't start.
    """
    config, folder = session.config, session.output
    facts = facts_of(session)
    wandb_run = start_wandb(config, facts, session.wandb_id) if config.use_wandb else None
    print("\n".join(f"{name:<11}{fact}" for name, fact in facts.items()), flush=True)
    output.remove_temporaries(folder)
    if session.resumed is None:
        output.clear_samples(folder)
    about = {"model_id": portable_id(config.model_id), "flags": config.model_dump()}
    files.write_json(folder / output.RUN, {**about, "facts": facts})
    session.report = Report(folder, session.step if session.resumed else None, wandb_run)


def _space_needed(session: Session) -> int:
    """Return the bytes needed on disk: checkpoints, and an old and a new resume state."""
    config = session.config
    resume = resume_bytes(config, *session.trained_size)
    weights = session.tuning.saved_numbers(session.model.lm)
    weights *= 4 if config.save_dtype == "fp32" else 2
    if not config.save_step:
        return weights + resume
    kept = session.total // config.save_step
    if config.keep_checkpoints:
        kept = min(kept, config.keep_checkpoints + 1)
    return weights * (1 + kept) + 2 * resume
