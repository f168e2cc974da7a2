"""What a person wants to know before the first step."""

from collections import Counter

from flags.run import Config
from musicgen.melody import melody_conditioner
from recordings.track import Track
from training.report import format_seconds
from training.session import Session


def facts_of(session: Session, precision: str) -> dict[str, str]:
    """What a person wants to know before the first step, a line each."""
    config, plan, tracks = session.config, session.plan, session.clips.tracks
    crop_sec = session.frames / session.model.frame_rate
    short = sum(track.duration_sec < crop_sec for track in tracks)
    lengths = f"crops of {crop_sec:g} s"
    if short:
        lengths += f"; {short} shorter files are padded, the padding is not trained on"
    if tracks[0].codec:
        lengths += "; taken from files of tokens, nothing is encoded"
        lengths += " (--cache_tokens=1 adds nothing)" if config.cache_tokens else ""
    elif config.cache_tokens:
        lengths += "; taken from the tokens of whole recordings"
    warmup = f"{session.warmup}"
    if session.warmup < config.warmup_steps:
        warmup += f" (shortened from {config.warmup_steps}: the run has {session.total} steps)"
    trained = sum(p.numel() for p in session.trained.values())
    everything = sum(p.numel() for p in session.model.lm.parameters())
    held_out = session.valid_clips.tracks
    captions = _caption_facts(config, tracks)
    if config.use_cfg:
        captions += f", dropped with probability {config.cfg_p:g}"
    if melody_conditioner(session.model.lm):
        has = f"the clips' own, dropped with probability {config.drop_melody:g}"
        captions += f"; melodies: {has if session.clips.melodies else 'none'}"
    adapters = ""
    if config.lora_rank:
        adapters = f" as LoRA of rank {config.lora_rank}"
        if "lr" not in config.model_fields_set:
            adapters += f"; --lr={config.lr:g} is for all weights, LoRA usually takes 1e-4"
    learning = f"{trained / 1e6:.1f} M trained{adapters}"
    if session.new_word:
        captions += f"; {session.new_word.word} goes in front of those without it"
        learning = f"{trained} numbers trained, the vector of {session.new_word.word}"
        if "lr" not in config.model_fields_set:
            learning += f"; --lr={config.lr:g} is for all weights, this usually takes "
            learning += f"{session.new_word.usual_lr():.0e}"
    facts = {
        "data": f"{len(tracks)} files, {format_seconds(_seconds(tracks))} of audio, {lengths}",
        "held out": f"{len(held_out)} files, {format_seconds(_seconds(held_out))}, every "
        f"{session.valid_step} steps"
        if held_out
        else "none (see --valid_split)",
        "captions": captions,
        "model": f"{config.model_id}, {everything / 1e6:.1f} M parameters, {learning}",
        "device": f"{session.accelerator.device}, {session.accelerator.num_processes} process(es)",
        "precision": precision,
        "batch": f"{plan.clips_per_step} clips a step: {config.batch_size} x {config.grad_acc} "
        f"accumulated x {plan.processes} process(es)",
        "steps": f"{session.total}: {plan.steps_per_epoch} an epoch, "
        f"{session.total / plan.steps_per_epoch:g} epochs; warm-up {warmup}",
        "output": str(session.output),
    }
    return facts


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
