"""Generate audio of any length by rolling continuation, and write wav files.

Letters: B batch (variations), C channels, K codebooks, T token frames.
"""

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import soundfile as sf
import torch
from audiocraft.modules.conditioners import ConditioningAttributes, WavCondition

import files
from musicgen.device import codec_device
from musicgen.load import Model

DECODE_SEC = 30.0  # decoded at a time, so that memory doesn't grow with the length
DECODE_MARGIN_SEC = 2.0  # context on both sides, for the codec's LSTM and convolutions
PEAK = 0.99
OVERLAP_SEC = 12.0


@dataclass(frozen=True)
class Sampling:
    """The choice of the next code. The defaults are audiocraft's."""

    top_k: int = 250
    top_p: float = 0.0
    temperature: float = 1.0
    cfg_coef: float = 3.0


def default_overlap_sec(model: Model) -> float:
    """Return the default of --overlap: 12 s, or half of a short window."""
    return min(OVERLAP_SEC, model.max_duration / 2)


def to_frames(model: Model, seconds: float) -> int:
    return max(1, round(seconds * model.frame_rate))


@torch.no_grad()
def generate(
    model: Model,
    prompt: str,
    *,
    duration_sec: float,
    overlap_sec: float,
    seed: int,
    variations: int = 1,
    opening: torch.Tensor | None = None,
    melody: torch.Tensor | None = None,
    sampling: Sampling | None = None,
    on_frame: Callable[[], None] | None = None,
) -> torch.Tensor:
    """Generate music for one prompt: `[B, C, samples]` on the CPU, B = variations.

    Args:
        overlap_sec: how much of the previous window each further one continues; shorter than the
            window (`model.max_duration`, 30 s for the published models).
        opening: codes `[1, K, T]` to continue, no longer than the overlap; the result begins
            with them.
        melody: recording `[1, samples]` at the model's rate whose melody to follow, repeated if
            it is too short; for melody models.
        on_frame: called after each generated pattern step (about one a frame); may raise to stop.
    """
    options = sampling or Sampling()
    total = to_frames(model, duration_sec)
    window = to_frames(model, model.max_duration)
    overlap = to_frames(model, overlap_sec)
    codes = torch.zeros(variations, model.lm.num_codebooks, 0, dtype=torch.long)
    codes = codes.to(model.device)
    if opening is not None:
        codes = opening.to(model.device).expand(variations, -1, -1)
        total += codes.shape[-1]
    assert codes.shape[-1] <= overlap < window

    torch.manual_seed(seed)
    autocast = _autocast(model)
    while (done := codes.shape[-1]) < total:
        context = codes[..., max(0, done - overlap) :] if done else None
        kept = 0 if context is None else context.shape[-1]
        conditions = [_conditions(model, prompt, melody, done - kept)] * variations
        with autocast:
            made = model.lm.generate(
                context,
                conditions,
                max_gen_len=min(window, kept + total - done),
                use_sampling=options.temperature > 0,
                temp=options.temperature,
                top_k=min(options.top_k, model.lm.card),
                top_p=options.top_p,
                cfg_coef=options.cfg_coef,
                two_step_cfg=False,  # a config may have it on, and then cfg_coef does nothing
                callback=None if on_frame is None else lambda *_: on_frame(),
            )
        codes = torch.cat([codes, made[..., kept:]], dim=-1)
    return decode(model, codes)


def _autocast(model: Model) -> torch.autocast:
    """Use float16 on a GPU; elsewhere the layers' format, if it is shorter than float32."""
    if model.device.type == "cuda":
        return torch.autocast("cuda", torch.float16)
    short = {p.dtype for p in model.lm.transformer.parameters()} - {torch.float32}
    dtype = short.pop() if short else None
    return torch.autocast(model.device.type, dtype, enabled=dtype is not None)


def _conditions(
    model: Model, prompt: str, melody: torch.Tensor | None, frame: int
) -> ConditioningAttributes:
    """Return the conditions of the window that begins at a frame."""
    provider = model.lm.condition_provider
    (name,) = provider.text_conditions
    given = ConditioningAttributes(text={name: prompt})
    for wav_name in provider.wav_conditions:
        wav, length = torch.zeros(1, 1, 1), 0  # how audiocraft writes "no melody"
        if melody is not None:
            length = round(model.max_duration * model.sample_rate)
            start = round(frame / model.frame_rate * model.sample_rate)
            wav = melody[None, :, torch.arange(start, start + length) % melody.shape[-1]]
        given.wav[wav_name] = WavCondition(
            wav.to(model.device),
            torch.tensor([length], device=model.device),
            [model.sample_rate],
            [None],
            [0.0],
        )
    return given


@torch.no_grad()
def decode(model: Model, codes: torch.Tensor) -> torch.Tensor:
    """Decode codes `[B, K, T]` to wav `[B, C, samples]` on the CPU, piece by piece."""
    hop = round(model.sample_rate / model.frame_rate)  # samples in a frame
    codes = codes.to(codec_device(codes.device))
    step, margin = to_frames(model, DECODE_SEC), to_frames(model, DECODE_MARGIN_SEC)
    pieces = []
    for start in range(0, codes.shape[-1], step):
        stop = min(start + step, codes.shape[-1])
        first = max(0, start - margin)
        wav = model.compression_model.decode(codes[..., first : stop + margin].contiguous())
        pieces.append(wav[..., (start - first) * hop : (stop - first) * hop].float().cpu())
    return torch.cat(pieces, dim=-1)


def write_wav(path: Path, wav: torch.Tensor, sample_rate: int) -> None:
    """Write `[C, samples]` as a 16-bit wav, turned down as a whole if it would clip."""
    peak = float(wav.abs().max())
    if peak > PEAK:
        wav = wav * (PEAK / peak)
    path.parent.mkdir(parents=True, exist_ok=True)
    content = io.BytesIO()  # on a full disk, libsndfile would print tracebacks
    sf.write(content, wav.T.numpy(), sample_rate, subtype="PCM_16", format="WAV")
    files.write_bytes(path, content.getvalue())
