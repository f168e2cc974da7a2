"""The facts that are printed before the first step."""

import statistics
from collections import Counter

from errors import count, few
from flags.run import Config
from musicgen.host import free_memory
from musicgen.melody import melody_conditioner
from recordings.track import Track
from training.report import format_seconds
from training.resume import copy_bytes
from training.room import gb
from training.session import Session
from training.writer import has_room


def facts_of(session: Session) -> dict[str, str]:
    """Return what a person wants to know before the first step, by name, a line each."""
    config, plan = session.config, session.plan
    tracks, held_out = session.clips.tracks, session.held_out.tracks
    epochs = session.total / plan.steps_per_epoch
    crops = f", {count(len(session.held_out), 'crop')}" if config.crops_by_length else ""
    facts = {
        "data": f"{count(len(tracks), 'file')}, {format_seconds(_seconds(tracks))} of audio, "
        f"{_crop_facts(session)}",
        "held out": f"{count(len(held_out), 'file')}, {format_seconds(_seconds(held_out))}{crops}, "
        f"every {count(session.valid_step, 'step')}"
        if held_out
        else "none (see --valid_split)",
        "captions": _condition_facts(session),
        "model": _model_facts(session),
        "device": f"{session.accelerator.device}, "
        + count(session.accelerator.num_processes, "process"),
        "precision": session.precision,
        "batch": f"{count(plan.sizes, 'clip')} a step: {config.batch_size} x {config.grad_acc} "
        f"accumulated x {count(plan.processes, 'process')}",
        "steps": f"{session.total}: {plan.steps_per_epoch} an epoch, "
        f"{count(f'{epochs:g}', 'epoch')}; warm-up {_warmup_facts(session)}",
        "output": str(session.output),
    }
    if early := [track.name for track in tracks + held_out if track.ends_early]:
        facts["warning"] = f"less than 1 s is missing at the end of {few(early)}: used as is"
    if saving := _saving_facts(session):
        facts["saving"] = saving
    return facts | ({"resumed": session.resumed} if session.resumed else {})


def _saving_facts(session: Session) -> str | None:
    config = session.config
    if config.save_step:
        needed, free = copy_bytes(config, *session.trained_size), free_memory()
        size = f"{gb(needed)} of the computer's memory"
        if has_room(needed):
            return f"while training goes on, from a copy that takes {size}"
        return f"training waits meanwhile: a copy would take {size}, {gb(free)} are free"
    if config.resume == "auto":
        return "only at the end, or when stopped: a kill loses all steps (see --save_step)"
    return None


def _crop_facts(session: Session) -> str:
    config, clips, tracks = session.config, session.clips, session.clips.tracks
    crop_sec = session.frames / session.model.frame_rate
    facts = f"crops of {crop_sec:g} s"
    counts = [track.crops(clips.samples, clips.sample_rate) for track in tracks]
    if config.crops_by_length:
        facts = f"{len(clips)} {facts} an epoch, in proportion to length"
    elif max(counts) > 10 * statistics.median(counts):
        facts += f", one an epoch from each file, though the longest has {max(counts)} (see "
        facts += "--crops_by_length)"
    if short := sum(track.duration_sec < crop_sec for track in tracks):
        facts += f"; {count(short, 'shorter file')} padded, the padding is not trained on"
    if tracks[0].codec:
        facts += "; taken from files of tokens, nothing is encoded"
        facts += " (--cache_tokens=1 adds nothing)" if config.cache_tokens else ""
    elif config.cache_tokens:
        facts += "; taken from the tokens of whole recordings"
    return facts


def _condition_facts(session: Session) -> str:
    config = session.config
    facts = _caption_facts(config, session.clips.tracks)
    if config.use_cfg:
        facts += f", dropped with probability {config.cfg_p:g}"
    if melody_conditioner(session.model.lm):
        has = f"the clips' own, dropped with probability {config.drop_melody:g}"
        facts += f"; melodies: {has if session.clips.melodies else 'none'}"
    if config.placeholder:
        facts += f"; {config.placeholder} goes in front of those without it"
    return facts


def _model_facts(session: Session) -> str:
    config, tuning = session.config, session.tuning
    everything = sum(p.numel() for p in session.model.lm.parameters())
    trained = tuning.describe(sum(p.numel() for p in session.trained.values()))
    facts = f"{config.model_id}, {everything / 1e6:.1f} M parameters, {trained}"
    if tuning.usual_lr and "lr" not in config.model_fields_set:
        facts += f"; the default --lr={config.lr:g} suits all weights, {tuning.usual_lr}"
    return facts


def _warmup_facts(session: Session) -> str:
    asked = session.config.warmup_steps
    if session.warmup < asked and session.resumed is None:
        steps = count(session.total, "step")
        return f"{session.warmup} (shortened from {asked}: the run has {steps})"
    return f"{session.warmup}"


def _caption_facts(config: Config, tracks: list[Track]) -> str:
    written = [track.written for track in tracks if track.written]
    if not written:
        return "none, as no_label=1"
    sources = Counter(caption.source for caption in written).most_common()
    counted = ", ".join(f"{count} from {source}" for source, count in sources)
    facts = counted if len(sources) > 1 else f"from {sources[0][0]}"
    with_fields = sum(bool(caption.fields) for caption in written)
    if with_fields and config.merge_text_p:
        facts += f"; {with_fields} with fields, merged with probability {config.merge_text_p:g}"
    return f"{facts}; {config.trigger} goes in front" if config.trigger else facts


def _seconds(tracks: list[Track]) -> float:
    return sum(track.duration_sec for track in tracks)
