"""Generate music with a fine-tuned MusicGen."""

import collections
import contextlib
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from tqdm import tqdm

import files
from errors import UserError
from flags.generate import GenerateConfig
from musicgen import codec, generation, int8, load, lora, placeholder
from musicgen.device import choose_device
from musicgen.generation import Piece
from musicgen.load import Model
from musicgen.melody import melody_conditioner
from musicgen.network import Network
from musicgen.placeholder import Embedding
from musicgen.projection import Projector, fastest
from musicgen.sampling import Sampling
from musicgen.text import text_conditioner
from musicgen.weights import load_weights
from recordings import audio, wording
from recordings.growing import longest_sec, part_path
from training.output import RUN


def generate(config: GenerateConfig, paths: list[list[Path]]) -> list[Path]:
    """Write a wav for each prompt and variation; return their paths.

    `paths` are those of each prompt, from commands/pieces.py.

    Raises: UserError for what the user can fix.
    """
    adapters = [lora.read(folder) for folder in config.lora or []]
    embeddings = [placeholder.read(path) for path in config.embedding or []]
    files.check_writable(paths[0][0].parent, "--output_dir")
    device = choose_device(config.device)
    project = _projector(config, device)
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    model = load.load_model(_model_id(config, adapters, embeddings), device, dtype)
    if config.full_weights:
        load_weights(model.lm, config.full_weights)
    for adapter, scale in zip(adapters, config.scales, strict=True):
        lora.merge(model.lm.state_dict(), adapter, scale, in_place=True)
    for file, (word, vector, _) in zip(config.embedding or [], embeddings, strict=True):
        placeholder.add(text_conditioner(model.lm), word, vector, f"--embedding={file}")
        if not any(wording.has(word, prompt) for prompt in config.prompt):
            print(f"note: no prompt has {word}, the word of {file}", file=sys.stderr)
    overlap_sec = config.overlap or generation.default_overlap_sec(model)
    _check_lengths(config, model, overlap_sec)
    pieces = [Piece(prompt, n) for prompt in config.prompt for n in range(config.variations)]
    names = [path for group in paths for path in group]
    opening, melody = _opening(config, model, overlap_sec), _melody(config, model)
    network = Network(model.lm, project)
    total_sec = generation.to_frames(model, config.duration) / model.frame_rate * len(pieces)
    for part in map(part_path, names):
        part.unlink(missing_ok=True)
    try:
        with _progress(total_sec) as advance, _sigterm_as_exit():
            blocks = generation.generate_blocks(
                model,
                pieces,
                duration_sec=config.duration,
                overlap_sec=overlap_sec,
                seed=config.seed,
                opening=opening,
                melody=melody,
                sampling=Sampling(config.top_k, config.top_p, config.temperature, config.cfg_coef),
                network=network,
                on_frames=lambda count: advance(count / model.frame_rate),
            )
            collections.deque(generation.write(model, blocks, names), maxlen=0)
    except BaseException as error:
        parts = [part for part in map(part_path, names) if part.exists()]
        for part in parts:
            print(f"stopped: {part} has the music made so far", file=sys.stderr)
        if not parts and isinstance(error, (KeyboardInterrupt, SystemExit)):
            print(
                "stopped: no window of these pieces was done, so nothing of them is kept",
                file=sys.stderr,
            )
        raise
    for path in names:
        print(path)
    return names


def _projector(config: GenerateConfig, device: torch.device) -> Projector:
    """Return how to multiply with the weights. Raises: UserError if --int8 can't be had."""
    if not config.int8:
        return fastest(device)
    if device.type != "cpu":
        raise UserError("--int8=1: works on the CPU alone; leave it out, or give --device=cpu")
    if not int8.is_available():
        raise UserError("--int8=1: needs an Intel or AMD processor; leave it out")
    return int8.int8


@contextlib.contextmanager
def _sigterm_as_exit() -> Iterator[None]:
    """Let SIGTERM raise SystemExit, as Ctrl-C raises KeyboardInterrupt."""

    def end(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _check_lengths(config: GenerateConfig, model: Model, overlap_sec: float) -> None:
    """Raise UserError if the model's window is too short for the overlap, or a wav for a piece."""
    if generation.to_frames(model, overlap_sec) >= generation.to_frames(model, model.max_duration):
        raise UserError(
            f"--overlap={overlap_sec:g}: must be less than the model's window of "
            f"{model.max_duration:g} s"
        )
    longest = longest_sec(model.sample_rate, model.audio_channels)
    if config.duration + overlap_sec > longest:
        raise UserError(
            f"--duration={config.duration:g}: a wav file holds {longest / 3600:.1f} hours of this "
            "model's music; generate less, and continue it with --prompt_audio"
        )


@contextlib.contextmanager
def _progress(total_sec: float) -> Iterator[Callable[[float], None]]:
    """Show the seconds of music made, and how many are made in one second."""
    form = "{desc}: {percentage:3.0f}%|{bar}| {n:.1f}/{total:.1f} s of music "
    form += "[{elapsed}<{remaining}{postfix}]"
    began = time.perf_counter()
    with tqdm(total=total_sec, desc="generating", mininterval=1, bar_format=form) as bar:

        def advance(seconds: float) -> None:
            speed = (bar.n + seconds) / (time.perf_counter() - began)
            bar.set_postfix_str(f"{speed:.2g} x real time", refresh=False)
            bar.update(min(seconds, total_sec - bar.n))

        yield advance


def _model_id(
    config: GenerateConfig, adapters: list[lora.Adapter], embeddings: list[Embedding]
) -> str:
    """Return --model_id; else what run.py noted with the weights, adapter or word; else small."""
    noted = None
    if config.full_weights:
        noted = (files.read_json(Path(config.full_weights).parent / RUN) or {}).get("model_id")
    elif adapters:
        noted = adapters[0].config.base_model_name_or_path
    elif embeddings:
        noted = embeddings[0].model_id
    return config.model_id or noted or "small"


def _opening(config: GenerateConfig, model: Model, overlap_sec: float) -> torch.Tensor | None:
    """Return the codes `[1, K, T]` of the last `overlap_sec` of --prompt_audio."""
    if not config.prompt_audio:
        return None
    wav = _read("--prompt_audio", config.prompt_audio, model, model.audio_channels, overlap_sec)
    codes = codec.encode_audio(model, wav[None].to(model.device))
    return codes[..., -generation.to_frames(model, overlap_sec) :]


def _melody(config: GenerateConfig, model: Model) -> torch.Tensor | None:
    """Read the recording of --melody, `[1, samples]`. Raises: UserError."""
    if not config.melody:
        return None
    if not melody_conditioner(model.lm):
        raise UserError(
            f"--melody={config.melody}: this model takes no melody; give --model_id=melody, or "
            "another melody model, and weights that were tuned from it"
        )
    return _read("--melody", config.melody, model, channels=1)


def _read(
    flag: str, path: str, model: Model, channels: int, last_sec: float | None = None
) -> torch.Tensor:
    """Read a recording or its end, `[C, samples]` at the model's rate. Raises: UserError."""
    try:
        facts = audio.probe(Path(path))
        whole = facts.frames
        if whole == 0:
            raise ValueError("holds no audio")
        frames = min(whole, round(last_sec * facts.sample_rate)) if last_sec else whole
        start = whole - frames
        wav = audio.read_crop(Path(path), start, frames, model.sample_rate, channels)
    except ValueError as error:
        raise UserError(f"{flag}={path}: {error}") from None
    return torch.from_numpy(wav)
