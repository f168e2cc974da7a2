"""Train the demo's codec, a miniature EnCodec, on rendered music; about an hour on 2 cores.

    python -m demo.build.codec

Reads demo/output/build/{pretrain,codec}/; writes codec.bin beside them, in half precision and
audiocraft's exported format, and codec.png beside this file. A run that was stopped continues from
its last checkpoint.
"""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch

import musicgen  # noqa: F401  (stands in for the xformers that audiocraft imports)

# isort: split
from audiocraft.losses import MultiScaleMelSpectrogramLoss
from audiocraft.models.builders import get_compression_model
from matplotlib.figure import Figure
from omegaconf import OmegaConf
from scipy.ndimage import uniform_filter1d

from demo import tiny
from demo.build.music import WORK
from demo.build.render import RATE
from musicgen import published

EXPORTED = WORK / "codec.bin"
CARD = 512  # codebook size
SIZES = {"seanet": {"dimension": 64, "n_filters": 12}, "rvq": {"bins": CARD}}
STEPS = 8_500
PLAIN_STEPS = 600  # first, without the quantizer
BATCH_SIZE, CROP_SEC = 8, 1.0
LR = 1e-3
CODEC_SHARE = 0.25  # of the crops have other instruments than the language model's
DEAD = 0.15  # mean uses of an entry per batch, below which it gets a new vector
DECODER_STEPS, DECODER_LR = 1_500, 5e-4
SAVE_EVERY = 500
INPUT_GAIN = 3.0  # music is at about -20 dBFS, but the network works best with numbers near 1


def config() -> Any:
    """Return the codec's config: the published one with our sizes."""
    return OmegaConf.merge(OmegaConf.create(published.CODEC_CONFIG), SIZES)


def build(cfg: Any) -> Any:
    """Build an untrained codec on the CPU."""
    here = {"device": "cpu", "dtype": "float32", "rvq": {"threshold_ema_dead_code": 0}}
    merged: Any = OmegaConf.merge(cfg, here)
    return get_compression_model(merged)


def main() -> None:
    """Train the whole codec, then only the decoder, which leaves the codes as they are."""
    torch.manual_seed(0)
    codec = build(config())
    _init(codec)
    _fit(codec, "codec", STEPS, LR)
    codec.half().float()  # as it is shipped
    _fit(codec, "decoder", DECODER_STEPS, DECODER_LR)
    _draw_losses(Path(__file__).with_suffix(".png"))
    tiny.export(EXPORTED.with_suffix(".tmp"), codec.half(), config())
    EXPORTED.with_suffix(".tmp").replace(EXPORTED)


def _fit(codec: Any, name: str, steps: int, lr: float) -> None:
    """Train the part `name`, codec or decoder; write name.pt and name.jsonl."""
    is_all = name == "codec"
    trained = codec if is_all else codec.decoder
    optimizer = torch.optim.AdamW(trained.parameters(), lr, betas=(0.8, 0.99), weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps, pct_start=0.03)
    mel_loss = MultiScaleMelSpectrogramLoss(
        RATE, range_start=8, range_end=12, normalized=True, alphas=False
    )
    state_path, log_path = WORK / f"{name}.pt", WORK / f"{name}.jsonl"
    first = 1
    if state_path.exists():
        state = torch.load(state_path, weights_only=True)
        codec.load_state_dict(state["codec"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        first = state["step"] + 1
    codec.train()
    codec.quantizer.train(is_all)
    crops = [sorted((WORK / folder).glob("*.wav")) for folder in ("pretrain", "codec")]
    began = time.monotonic()
    for step in range(first, steps + 1):
        wav = _batch(crops, np.random.default_rng(step if is_all else (step, 1)))
        is_plain = is_all and step <= PLAIN_STEPS
        with torch.set_grad_enabled(is_all):
            latents, commit = _encode(codec, wav, is_plain=is_plain)
        losses = {**_losses(codec.decoder(latents), wav, mel_loss), "commit": commit}
        optimizer.zero_grad()
        (losses["l1"] + 0.3 * losses["mel"] + 0.5 * losses["commit"]).backward()
        norm = torch.nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if is_all and not is_plain and step % 20 == 0 and step < 0.9 * steps:
            _revive(codec, wav)
        if step % 50 == 0:
            row = {"step": step, **{name: loss.item() for name, loss in losses.items()}}
            row |= {"grad_norm": norm.item(), "sec": round(time.monotonic() - began, 1)}
            with log_path.open("a") as log:
                log.write(json.dumps(row) + "\n")
        if step % SAVE_EVERY == 0 or step == steps:
            state = {"codec": codec.state_dict(), "optimizer": optimizer.state_dict()}
            state |= {"schedule": schedule.state_dict(), "step": step}
            torch.save(state, state_path.with_suffix(".tmp"))
            state_path.with_suffix(".tmp").replace(state_path)


def _batch(crops: list[list[Path]], rng: np.random.Generator) -> torch.Tensor:
    """Return random crops [B, 1, samples] at random levels, like users' recordings."""
    frames = int(CROP_SEC * RATE)
    wavs: list[np.ndarray] = []
    while len(wavs) < BATCH_SIZE:
        paths = crops[int(rng.random() < CODEC_SHARE)]
        with soundfile.SoundFile(paths[rng.integers(len(paths))]) as file:
            file.seek(int(rng.integers(file.frames - frames)))
            wavs.append(file.read(frames, dtype="float32") * 10 ** (rng.uniform(-12, 4) / 20))
    return torch.from_numpy(np.stack(wavs))[:, None].clamp(-1, 1)


def _encode(codec: Any, wav: torch.Tensor, *, is_plain: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Return latents [B, D, T], quantized unless `is_plain`, and the quantization error."""
    latents = codec.encoder(wav)
    if is_plain:
        return latents, torch.zeros(())
    variance = latents.detach().var()
    quantized = codec.quantizer(latents, codec.frame_rate)
    return quantized.x, quantized.penalty / variance


def _losses(out: torch.Tensor, wav: torch.Tensor, mel_loss: Any) -> dict[str, torch.Tensor]:
    """Return L1 relative to each clip's level, and multi-scale mel distance."""
    level = wav.abs().mean(dim=(1, 2), keepdim=True) + 1e-3
    return {"l1": ((out - wav).abs() / level).mean(), "mel": mel_loss(out, wav)}


def _init(codec: Any) -> None:
    """Set weights that keep the level of a signal even, both forward and backward.

    torch's own initialization shrinks it at every layer and adds biases to what is left: after 300
    steps none of the waveform came through (SI-SDR under -5 dB on held-out clips; 3 to 4 dB here).
    """
    modules: Iterator[tuple[str, Any]] = codec.named_modules()
    for name, conv in modules:
        if not hasattr(conv, "weight_v"):
            continue
        stride = conv.stride[0] if conv.transposed else 1
        gain = 1.3  # for ELU
        if conv.in_channels == 1:
            gain = INPUT_GAIN
        elif conv.out_channels == 1:
            gain /= INPUT_GAIN
        elif ".block.3." in name:  # the end of a residual branch
            gain *= 0.3
        conv.weight_v.data.normal_(
            0, gain * (stride / conv.in_channels / conv.kernel_size[0]) ** 0.5
        )
        norms = conv.weight_v.data.flatten(1).norm(dim=1)
        conv.weight_g.data.copy_(norms.view_as(conv.weight_g))
        conv.bias.data.zero_()


@torch.no_grad()
def _revive(codec: Any, wav: torch.Tensor) -> None:
    """Give hardly used entries a vector from this batch.

    audiocraft's own method has no effect: it changes `embed`, which the moving average of the same
    step then overwrites.
    """
    residual = codec.encoder(wav).transpose(1, 2).flatten(0, 1)  # [B * T, D]
    for level in codec.quantizer.vq.layers:
        book = level._codebook
        dead = (book.cluster_size < DEAD).nonzero()[:, 0]
        fresh = residual[torch.randint(len(residual), (len(dead),))]
        book.embed[dead] = fresh
        book.embed_avg[dead] = fresh * 2 * DEAD
        book.cluster_size[dead] = 2 * DEAD
        residual = residual - book.decode(book.quantize(residual))


def _draw_losses(path: Path) -> None:
    rows = [json.loads(line) for line in (WORK / "codec.jsonl").open()]
    figure = Figure(figsize=(5.5, 3.6), layout="constrained")
    axes = figure.subplots()
    for name in ("l1", "mel", "commit"):
        smooth = uniform_filter1d([row[name] for row in rows], 9)
        axes.plot([row["step"] for row in rows], smooth, label=name)
    axes.set(title="codec: losses", xlabel="step", ylim=(0, 1.2))
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    main()
