"""Config -> Session: load and check all that a run needs.

Letters: T token frames.
"""

from pathlib import Path
from typing import Any

import files
from flags.run import Config
from musicgen import load
from musicgen.codec import move
from musicgen.hub import portable_id
from musicgen.loss import TokenLoss
from musicgen.text import TextEncoder
from musicgen.weights import DTYPES
from training.accelerator import start_accelerator
from training.data import crop_frames, find_melodies, find_tokens, make_clips, scan_dataset
from training.ema import EMA
from training.facts import facts_of
from training.optimizer import make_optimizer, moments_bytes
from training.output import (
    RUN,
    check_output,
    check_space,
    clear_samples,
    remove_temporary,
)
from training.plan import make_plan
from training.report import Report, start_wandb
from training.resume import fingerprint, load_resume
from training.session import Session
from training.tuning import layers_dtype, make_word, set_up_training


def start(config: Config) -> Session:
    """Load and check all that a run needs, in the order of what fails soonest, and say so."""
    output = Path(config.output_dir)
    tracks, held_out = scan_dataset(config)
    check_output(output, resume=config.resume, overwrite=config.overwrite)
    state = load_resume(output) if config.resume else None

    accelerator, precision, why_precision = start_accelerator(config)
    model = load.load_model(
        config.model_id,
        accelerator.device,
        layers_dtype=layers_dtype(config, DTYPES[precision]),
    )
    lm = model.lm
    move(model, "decoder", "cpu")  # only samples need it, see write_samples
    tokens = find_tokens(config, model, tracks + held_out, accelerator)
    melodies = find_melodies(config, model, tracks + held_out, accelerator)
    adapter = set_up_training(config, lm)
    trained = {name: p for name, p in lm.named_parameters() if p.requires_grad}
    loss_module = TokenLoss(lm)
    new_word = make_word(config, model) if config.placeholder else None
    if new_word:
        trained["placeholder"] = new_word.vector
        # Its gradient comes with the text, from outside; DDP sums those of its own parameters.
        loss_module.register_parameter("placeholder", new_word.vector)
    module, optimizer = accelerator.prepare(loss_module, make_optimizer(config, trained))
    frames = crop_frames(config, model.max_duration, model.frame_rate, tracks)
    plan = make_plan(config, len(tracks), accelerator.num_processes)
    total = plan.total_steps
    session = Session(
        config=config,
        accelerator=accelerator,
        model=model,
        adapter=adapter,
        new_word=new_word,
        text_encoder=TextEncoder(lm, new_word=new_word),
        module=module,
        trained=trained,
        optimizer=optimizer,
        ema=EMA(list(trained.values()), config.ema_decay) if config.ema_decay else None,
        clips=make_clips(config, model, tracks, frames, tokens, melodies, training=True),
        valid_clips=make_clips(config, model, held_out, frames, tokens, melodies, training=False),
        plan=plan,
        frames=frames,
        warmup=config.warmup_steps if config.warmup_steps < total else total // 10,
        prompts=config.sample_prompts or list(dict.fromkeys(t.caption for t in tracks))[:2],
    )
    if state is not None:
        session.restore(state)
    check_space(output, space_needed(session), replacing=config.resume or config.overwrite)
    accelerator.wait_for_everyone()  # all have looked at output_dir before the first changes it
    if accelerator.is_main_process:
        facts = facts_of(session, f"{precision} ({why_precision})")
        if state is not None:
            facts |= changes(session, state)
        wandb_run = start_wandb(config, facts, session.wandb_id) if config.use_wandb else None
        print("\n".join(f"{name:<11}{fact}" for name, fact in facts.items()), flush=True)
        remove_temporary(output)
        if not config.resume:
            clear_samples(output)  # an earlier run's weights go after the first step
        model_id = portable_id(config.model_id)
        files.write_json(
            output / RUN,
            {"model_id": model_id, "flags": config.model_dump(), "facts": facts},
        )
        session.report = Report(output, session.step if state else None, wandb_run)
    return session


def changes(session: Session, state: dict[str, Any]) -> dict[str, str]:
    """What a resumed run says of itself: from where it goes on, and what is not as it was."""
    old, new = state["config"], session.config.model_dump()
    changed = [
        f"--{name} is {new[name]}, was {old[name]}"
        for name in ("lr", "precision", "max_grad_norm", "epochs", "max_steps")
        if new[name] != old[name]
    ]
    if state["tracks"] != fingerprint(session.clips.tracks):
        changed.append("the dataset has changed since")
    return {"resumed": "; ".join([f"after step {session.step}", *changed])}


def space_needed(session: Session) -> int:
    """Bytes on disk at the worst moment: checkpoints, and an old and a new resume state."""
    config, total = session.config, session.total
    weights = sum(p.numel() for p in session.trained.values())
    resume = sum(p.nbytes for p in session.trained.values()) * (1 + bool(session.ema))
    resume += moments_bytes(config, weights)
    lm = sum(t.numel() for t in session.model.lm.state_dict().values())
    if session.new_word:
        lm = weights
    lm *= 4 if config.save_dtype == "fp32" else 2
    if not config.save_step:
        return lm + resume
    kept = total // config.save_step
    if config.keep_checkpoints:
        kept = min(kept, config.keep_checkpoints + 1)
    return lm * (1 + kept) + 2 * resume
