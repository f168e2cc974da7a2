"""Config -> Session: model, data, plan and optimizer of one run; saved and restored.

Letters: K codebooks, T token frames.
"""

import contextlib
import math
import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from torch import nn

import checkpoint
import dataset
import lora
import musicgen
import placeholder
from captions import PLAIN, Merging, in_front
from config import Config
from dataset import Batch, Clips, Track
from ema import EMA
from flags import UserError
from musicgen import Melodies, MusicGen, TextEncoder, TokenLoss, to_device
from plan import Plan
from report import Report, format_seconds, start_wandb
from tokens import Tokens

if TYPE_CHECKING:  # slow to import, and only for LoRA
    from peft import PeftModel

BETAS = (0.9, 0.95)
# What may differ when a run is resumed (batch_size and grad_acc: if their product is the same);
# every other flag shapes the training.
FREE_TO_CHANGE = {
    *("dataset_path", "batch_size", "grad_acc", "epochs", "max_steps", "output_dir", "resume"),
    *("lr", "precision", "max_grad_norm"),  # the cures of a loss that is not finite
    *("overwrite", "device", "grad_checkpointing", "num_workers", "valid_path", "valid_split"),
    *("dry_run", "valid_step", "sample_step", "sample_prompts", "sample_duration", "save_step"),
    *("keep_checkpoints", "save_dtype", "use_wandb", "wandb_project", "wandb_name"),
}


@dataclass
class Session:
    """Everything that the training loop works with. `step` optimizer steps are done.

    `module` is the TokenLoss as Accelerate wraps it; `trained` are the parameters that learn.
    `report` is None in all but the first process.
    """

    config: Config
    accelerator: Accelerator
    model: MusicGen
    adapter: "PeftModel | None"  # model.lm with LoRA
    new_word: placeholder.NewWord | None  # with --placeholder
    text_encoder: TextEncoder
    module: nn.Module
    trained: dict[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    ema: EMA | None
    clips: Clips
    valid_clips: Clips
    plan: Plan
    frames: int  # T
    warmup: int
    prompts: list[str]
    step: int = 0
    is_whole: bool = True  # False inside an update: the weights are of no step then
    report: Report | None = None
    wandb_id: str | None = None

    @contextlib.contextmanager
    def update(self) -> Iterator[None]:
        """Around the change of the weights; counts the step."""
        self.is_whole = False
        yield
        self.step += 1
        self.is_whole = True

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """The weights that are saved and judged: the EMA's inside the block, if there is one."""
        if self.ema is None:
            yield
            return
        self.is_whole = False
        self.ema.swap()
        try:
            yield
        finally:
            self.ema.swap()
            self.is_whole = True

    @property
    def output(self) -> Path:
        return Path(self.config.output_dir)

    @property
    def final(self) -> Path:
        """The file that a finished run leaves."""
        return self.output / (checkpoint.EMBEDDING if self.new_word else checkpoint.FINAL)

    @property
    def total(self) -> int:
        return self.plan.total_steps

    @property
    def valid_step(self) -> int:
        return self.config.valid_step or max(1, self.total // 10)

    @property
    def workers(self) -> int:
        if self.config.num_workers is not None:
            return self.config.num_workers
        return min(4, os.cpu_count() or 1, len(self.clips))

    def valid_frames(self, valid_samples: torch.Tensor) -> torch.Tensor:
        """Whole frames in so many samples; a frame that is part padding is not trained on."""
        return valid_samples * round(self.model.frame_rate) // self.model.sample_rate

    def codes(self, batch: Batch) -> torch.Tensor:
        """A batch's codes `[B, K, T]` on the device: kept ones, or encoded now."""
        device = self.accelerator.device
        if batch.codes is not None:
            return to_device(batch.codes, device).long()
        assert batch.wav is not None
        return musicgen.encode_audio(self.model, to_device(batch.wav, device))

    def learning_rate(self) -> float:
        """Of the coming step: linear warm-up, then as lr_scheduler says."""
        config, step = self.config, self.step
        if step < self.warmup:
            return config.lr * (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.total - self.warmup)  # 0 <= done < 1
        factor = {
            "constant": 1.0,
            "linear": 1 - done,
            "cosine": 0.5 * (1 + math.cos(math.pi * done)),
        }
        return config.lr * factor[config.lr_scheduler]

    def save_resume(self, *, is_finished: bool = False) -> None:
        """Write what `--resume=1` needs. Random states are none: they follow from the step."""
        scaler = self.accelerator.scaler
        state = {
            "step": self.step,
            "is_finished": is_finished,  # the final file is of this step
            "config": self.config.model_dump(),
            "clips_per_step": self.plan.clips_per_step,
            "tracks": checkpoint.fingerprint(self.clips.tracks),
            "weights": {name: p.detach() for name, p in self.trained.items()},
            "optimizer": self.optimizer.state_dict(),
            "ema": self.ema.state_dict() if self.ema else None,
            "scaler": scaler.state_dict() if scaler else None,
            "wandb_id": self.report.wandb_id if self.report else None,
        }
        checkpoint.save(self.output / checkpoint.RESUME, state)

    def save_weights(self, path: Path) -> None:
        """Write the language model's weights, an adapter merged into those that it was put on.

        With --placeholder they are as they were: then only the word's vector.
        """
        if self.new_word:
            model_id = musicgen.portable_id(self.config.model_id)
            placeholder.save(path, self.new_word, self.config.save_dtype, model_id)
            return
        state = self.model.lm.state_dict()
        if layers_are_frozen(self.config):  # they are in another number format than on disk
            state = musicgen.read_lm_state(self.config.model_id)
        if self.adapter:
            lora.merge(state, lora.parts(self.adapter))
        elif self.config.tune_text:
            state |= self.trained
        checkpoint.save(path, checkpoint.portable(state, self.config.save_dtype))

    def save_final(self) -> None:
        self.save_weights(self.final)
        if self.adapter:
            lora.save(self.adapter, self.output / checkpoint.LORA)

    def restore(self, state: dict[str, Any]) -> None:
        """Take over a resume state. Errors: UserError if it is of another run than the flags'."""
        old = Config.model_construct(**state["config"])
        changes = [
            f"--{name}={getattr(self.config, name)}, was {getattr(old, name)}"
            for name in Config.model_fields
            if name not in FREE_TO_CHANGE and getattr(self.config, name) != getattr(old, name)
        ]
        if state["clips_per_step"] != self.plan.clips_per_step:
            changes.append(
                f"{self.plan.clips_per_step} clips in a step (batch_size x grad_acc x processes), "
                f"were {state['clips_per_step']}"
            )
        if changes:
            raise UserError(
                "--resume=1 goes on with the run in "
                f"{self.output}, but this has changed: {'; '.join(changes)}.\nPut it back, or "
                "start anew with another --output_dir or --overwrite=1"
            )
        if state["step"] > self.total or (state["step"] == self.total and state["is_finished"]):
            raise UserError(
                f"the run in {self.output} is finished ({state['step']} of {self.total} steps): "
                "raise --epochs or --max_steps to train on"
            )
        with torch.no_grad():
            for name, parameter in self.trained.items():
                parameter.copy_(state["weights"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.ema:
            self.ema.load_state_dict(state["ema"])
        if self.accelerator.scaler and state["scaler"]:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.step = state["step"]
        self.wandb_id = state["wandb_id"]


def start(config: Config) -> Session:
    """Load and check all that a run needs, in the order of what fails soonest, and say so."""
    output = Path(config.output_dir)
    tracks, held_out = scan(config)
    checkpoint.check_output(output, resume=config.resume, overwrite=config.overwrite)
    state = checkpoint.load_resume(output) if config.resume else None

    accelerator, precision, why_precision = _start_accelerator(config)
    model = musicgen.load(
        config.model_id,
        accelerator.device,
        layers_dtype=layers_dtype(config, checkpoint.DTYPES[precision]),
    )
    lm = model.lm
    musicgen.move(model, "decoder", "cpu")  # only samples need it, see write_samples
    tokens = _tokens(config, model, tracks + held_out, accelerator)
    melodies = _melodies(config, model, tracks + held_out, accelerator)
    adapter = set_up_training(config, lm)
    trained = {name: p for name, p in lm.named_parameters() if p.requires_grad}
    loss_module = TokenLoss(lm)
    new_word = _make_word(config, model) if config.placeholder else None
    if new_word:
        trained["placeholder"] = new_word.vector
        # Its gradient comes with the text, from outside; DDP sums those of its own parameters.
        loss_module.register_parameter("placeholder", new_word.vector)
    module, optimizer = accelerator.prepare(loss_module, _make_optimizer(config, trained))
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
        clips=_make_clips(config, model, tracks, frames, tokens, melodies, training=True),
        valid_clips=_make_clips(config, model, held_out, frames, tokens, melodies, training=False),
        plan=plan,
        frames=frames,
        warmup=config.warmup_steps if config.warmup_steps < total else total // 10,
        prompts=config.sample_prompts or list(dict.fromkeys(t.caption for t in tracks))[:2],
    )
    if state is not None:
        session.restore(state)
    checkpoint.check_space(
        output, _space_needed(session), replacing=config.resume or config.overwrite
    )
    accelerator.wait_for_everyone()  # all have looked at output_dir before the first changes it
    if accelerator.is_main_process:
        facts = _facts(session, f"{precision} ({why_precision})")
        if state is not None:
            facts |= _changes(session, state)
        wandb_run = start_wandb(config, facts, session.wandb_id) if config.use_wandb else None
        print("\n".join(f"{name:<11}{fact}" for name, fact in facts.items()), flush=True)
        checkpoint.remove_temporary(output)
        if not config.resume:
            checkpoint.clear_samples(output)  # an earlier run's weights go after the first step
        model_id = musicgen.portable_id(config.model_id)
        checkpoint.write_json(
            output / checkpoint.RUN,
            {"model_id": model_id, "flags": config.model_dump(), "facts": facts},
        )
        session.report = Report(output, session.step if state else None, wandb_run)
    return session


def _changes(session: Session, state: dict[str, Any]) -> dict[str, str]:
    """What a resumed run says of itself: from where it goes on, and what is not as it was."""
    old, new = state["config"], session.config.model_dump()
    changed = [
        f"--{name} is {new[name]}, was {old[name]}"
        for name in ("lr", "precision", "max_grad_norm", "epochs", "max_steps")
        if new[name] != old[name]
    ]
    if state["tracks"] != checkpoint.fingerprint(session.clips.tracks):
        changed.append("the dataset has changed since")
    return {"resumed": "; ".join([f"after step {session.step}", *changed])}


def _start_accelerator(config: Config) -> tuple[Accelerator, str, str]:
    """The Accelerator for --device and --precision, the precision, and why that one."""
    device = musicgen.choose_device(config.device).type
    has_bf16 = device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    precision, why = config.precision, "as asked for"
    if precision == "auto" and device == "cuda":
        precision = "bf16" if has_bf16 else "fp16"
        why = "this GPU has it" if has_bf16 else "this GPU has no bf16"
    elif precision == "auto":
        precision, why = "fp32", f"on {device}, slow but exact"
    not_on_mps = {
        f"--optimizer={config.optimizer}": config.optimizer != "adamw",
        "--lora_dropout": config.lora_dropout > 0,  # recomputed parts would drop other inputs
    }
    for flag, is_asked in not_on_mps.items():
        if is_asked and device == "mps":
            raise UserError(f"{flag}: does not work on mps; leave it out")
    if precision == "fp16" and device != "cuda":
        raise UserError(f"--precision=fp16 needs a CUDA GPU, this is {device}: use fp32 or bf16")
    if precision == "bf16" and device == "cuda" and not has_bf16:
        raise UserError("--precision=bf16: this GPU has none: use auto, fp16 or fp32")
    if config.optimizer == "adamw_8bit_bf16" and precision != "bf16":
        raise UserError(
            f"--optimizer=adamw_8bit_bf16 needs bf16, and --precision=auto is {precision} here "
            f"({why}): give --precision=bf16 if the device has it, or use --optimizer=adamw_8bit"
        )
    mixed = "no" if precision == "fp32" else precision
    # While the first process generates samples or writes checkpoints, the others wait.
    patience = InitProcessGroupKwargs(timeout=timedelta(hours=12))
    accelerator = Accelerator(
        cpu=device == "cpu", mixed_precision=mixed, kwargs_handlers=[patience]
    )
    return accelerator, precision, why


def scan(config: Config) -> tuple[list[Track], list[Track]]:
    """What is trained on, and what is held out. Errors: UserError that names what is unusable."""
    tracks = _scan(config, config.dataset_path)
    held_out: list[Track] = []
    if config.valid_path:
        held_out = _scan(config, config.valid_path)
    elif config.valid_split:
        tracks, held_out = dataset.split(tracks, config.valid_split, config.seed)
    kinds = {bool(track.codec): track for track in tracks + held_out}
    if len(kinds) > 1:
        raise UserError(
            f"{kinds[True].place} is a file of tokens, {kinds[False].place} is audio: train on "
            "one kind, held-out recordings too; prepare.py encode makes tokens of audio"
        )
    return tracks, held_out


def _scan(config: Config, folder: str) -> list[Track]:
    tracks = dataset.scan(
        folder,
        with_captions=not config.no_label,
        caption=config.caption,
        from_tags=config.caption_from == "tags",
    )
    if config.no_label or not (config.trigger or config.placeholder):
        return tracks
    return [replace(t, caption=_in_front(config)(t.caption)) for t in tracks]


def _in_front(config: Config) -> Callable[[str], str]:
    return partial(in_front, config.trigger, config.placeholder)


def layers_dtype(config: Config, dtype: torch.dtype) -> torch.dtype:
    """Of the transformer's matrices, `dtype` being the forward pass's.

    What is frozen gives the same in the format that autocast would bring it to, in half the room.
    """
    is_half = layers_are_frozen(config) or config.optimizer == "adamw_8bit_bf16"
    return dtype if is_half else torch.float32


def layers_are_frozen(config: Config) -> bool:
    return bool(config.lora_rank or config.placeholder or config.tune_text)


def make_plan(config: Config, files: int, processes: int) -> Plan:
    return Plan(
        files=files,
        batch_size=config.batch_size,
        grad_acc=config.grad_acc,
        epochs=config.epochs,
        max_steps=config.max_steps,
        seed=config.seed,
        processes=processes,
    )


def set_up_training(config: Config, lm: Any) -> "PeftModel | None":
    """Freeze what the flags don't train, put adapters on; returns the model with them, if any."""
    if config.grad_checkpointing:
        lm.transformer.checkpointing = "torch"
    lm.requires_grad_(not config.tune_text)
    musicgen.text_conditioner(lm).requires_grad_(True)
    if config.placeholder:
        lm.requires_grad_(False)  # the word is in the text encoder
    if not config.lora_rank:
        return None
    torch.manual_seed(config.seed)
    return lora.attach(
        lm,
        rank=config.lora_rank,
        alpha=config.lora_alpha or 2 * config.lora_rank,
        dropout=config.lora_dropout,
        rslora=config.lora_rslora,
        ends=config.lora_embeddings,
        base=musicgen.portable_id(config.model_id),
    )


def _make_word(config: Config, model: MusicGen) -> placeholder.NewWord:
    conditioner = musicgen.text_conditioner(model.lm)
    vector = placeholder.mean_vector(conditioner, config.placeholder_init)
    assert config.placeholder
    return placeholder.add(
        conditioner, config.placeholder, vector, f"--placeholder={config.placeholder}"
    )


def _make_optimizer(config: Config, trained: dict[str, nn.Parameter]) -> torch.optim.Optimizer:
    """AdamW without decay on biases and norms (all that are vectors)."""
    groups: list[dict[str, Any]] = [
        {"params": [p for p in trained.values() if p.ndim >= 2]},
        {"params": [p for p in trained.values() if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    how: dict[str, Any] = {
        "lr": config.lr,
        "betas": BETAS,
        "weight_decay": config.weight_decay,
    }
    if config.optimizer == "adamw_8bit":
        try:
            from bitsandbytes.optim import AdamW8bit
        except ImportError as error:
            raise UserError(
                f"--optimizer=adamw_8bit needs bitsandbytes, which can't be imported ({error}): "
                "pip install bitsandbytes, or use --optimizer=adamw"
            ) from None
        return AdamW8bit(groups, **how)
    if config.optimizer == "adamw_8bit_bf16":
        return _stochastically_rounding(groups, how)
    return torch.optim.AdamW(groups, **how, fused=True)  # for CUDA, MPS and the CPU


def _stochastically_rounding(
    groups: list[dict[str, Any]], how: dict[str, Any]
) -> torch.optim.Optimizer:
    """AdamW with 8 bit moments whose updates reach bf16 weights: small ones now and then."""
    try:
        from torchao.optim import AdamW8bit
    except ImportError as error:
        raise UserError(
            f"--optimizer=adamw_8bit_bf16 needs torchao, which can't be imported ({error}): "
            "pip install torchao, or use --optimizer=adamw_8bit"
        ) from None

    from torch._dynamo.exc import TorchDynamoException

    on_cpu = groups[0]["params"][0].device.type == "cpu"  # compiling takes a minute there

    class Optimizer(AdamW8bit):
        def step(self, closure: Any = None) -> Any:
            try:
                with torch.compiler.set_stance("force_eager" if on_cpu else "default"):
                    return super().step(closure)
            except TorchDynamoException as error:
                raise UserError(
                    "--optimizer=adamw_8bit_bf16 is compiled, and that does not work here "
                    f"({' '.join(str(error).split())[:300]}): install triton and a C "
                    "compiler, or use --optimizer=adamw_8bit"
                ) from error

    return Optimizer(groups, **how, bf16_stochastic_round=True)


def crop_frames(config: Config, window_sec: float, frame_rate: float, tracks: list[Track]) -> int:
    """T: --duration in token frames, but no more than the longest file has. Errors: UserError."""
    if config.duration > window_sec:
        raise UserError(
            f"--duration={config.duration:g}: {config.model_id} knows pieces of up to "
            f"{window_sec:g} s; give at most that"
        )
    longest = max(track.duration_sec for track in tracks)
    return min(round(config.duration * frame_rate), math.ceil(longest * frame_rate))


def moments_bytes(config: Config, parameters: int) -> int:
    """What the optimizer keeps of so many parameters."""
    if config.optimizer != "adamw":
        return 2 * parameters + parameters // 32  # and two scales in float32 for each 256
    return 8 * parameters


def _melodies(
    config: Config, model: MusicGen, tracks: list[Track], accelerator: Accelerator
) -> Melodies | None:
    """Those of all tracks, of which each process finds its share; None if none are wanted."""
    conditioner = musicgen.melody_conditioner(model.lm)
    check_melody(config, conditioner is not None, tracks)
    if conditioner is None or config.drop_melody == 1:
        return None
    melodies = Melodies(conditioner)
    _in_shares(partial(melodies.prepare, conditioner, tracks), accelerator)
    return melodies


def check_melody(config: Config, has_melody: bool, tracks: list[Track]) -> None:
    """Errors: UserError if the model takes no melodies, or the tracks are tokens and have none."""
    if has_melody and config.drop_melody < 1 and tracks[0].codec:
        raise UserError(
            f"{tracks[0].place}: melodies can't be found in tokens: train on the recordings, or on "
            "captions alone with --drop_melody=1"
        )
    if "drop_melody" in config.model_fields_set and not has_melody:
        raise UserError(
            f"--drop_melody does nothing with --model_id={config.model_id}, which takes no "
            "melodies: leave it out, or give a melody model"
        )


def _tokens(
    config: Config, model: MusicGen, tracks: list[Track], accelerator: Accelerator
) -> Tokens | None:
    """Those of all tracks, read or encoded, each process its share; None to encode the crops."""
    if not (config.cache_tokens or tracks[0].codec):
        return None
    tokens = Tokens(model)
    if tracks[0].codec:
        tokens.check(tracks, config.model_id)
    else:
        _in_shares(partial(tokens.prepare, model, tracks, config.batch_size), accelerator)
    musicgen.move(model, "encoder", "cpu")  # not needed any more
    return tokens


def _in_shares(prepare: Callable[..., None], accelerator: Accelerator) -> None:
    """Each process prepares its share; then each machine what its own cache still lacks."""
    prepare(rank=accelerator.process_index, processes=accelerator.num_processes)
    accelerator.wait_for_everyone()
    prepare()


def _make_clips(
    config: Config,
    model: MusicGen,
    tracks: list[Track],
    frames: int,
    tokens: Tokens | None,
    melodies: Melodies | None,
    *,
    training: bool,
) -> Clips:
    return Clips(
        tracks,
        sample_rate=model.sample_rate,
        channels=model.audio_channels,
        samples=frames * round(model.sample_rate / model.frame_rate),
        seed=config.seed,
        drop_caption=config.cfg_p if training and config.use_cfg else 0.0,
        merging=Merging(config.merge_text_p, config.drop_desc_p, config.drop_other_p)
        if training
        else PLAIN,
        in_front=_in_front(config),
        drop_word=config.word_dropout if training else 0.0,
        tokens=tokens,
        melodies=melodies,
        drop_melody=config.drop_melody if training else 0.0,
    )


def _space_needed(session: Session) -> int:
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


def _facts(session: Session, precision: str) -> dict[str, str]:
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
    if musicgen.melody_conditioner(session.model.lm):
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
