"""Generate music with a fine-tuned MusicGen."""

import sys
from pathlib import Path

import torch
from tqdm import tqdm

import files
from errors import UserError
from flags.generate import GenerateConfig
from musicgen import codec, load, lora, placeholder, sampling
from musicgen.device import choose_device
from musicgen.load import Model
from musicgen.melody import melody_conditioner
from musicgen.placeholder import Embedding
from musicgen.text import text_conditioner
from musicgen.weights import load_weights
from recordings import audio, wording
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
    overlap_sec = config.overlap or sampling.default_overlap_sec(model)
    if sampling.to_frames(model, overlap_sec) >= sampling.to_frames(model, model.max_duration):
        raise UserError(
            f"--overlap={overlap_sec:g}: must be less than the model's window of "
            f"{model.max_duration:g} s"
        )
    opening = _opening(config, model, overlap_sec)
    melody = _melody(config, model)
    frames = sampling.to_frames(model, config.duration) * len(config.prompt)
    written = []
    with tqdm(total=frames, unit="frame", desc="generating", mininterval=1) as bar:
        for prompt, names in zip(config.prompt, paths, strict=True):
            wavs = sampling.generate(
                model,
                prompt,
                duration_sec=config.duration,
                overlap_sec=overlap_sec,
                seed=config.seed,
                variations=config.variations,
                opening=opening,
                melody=melody,
                sampling=sampling.Sampling(
                    config.top_k, config.top_p, config.temperature, config.cfg_coef
                ),
                on_frame=lambda: bar.update(min(1, bar.total - bar.n)),
            )
            for path, wav in zip(names, wavs, strict=True):
                sampling.write_wav(path, wav, model.sample_rate)
                written.append(path)
    for path in written:
        print(path)
    return written


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
    return codes[..., -sampling.to_frames(model, overlap_sec) :]


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
