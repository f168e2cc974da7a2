"""Make a tiny MusicGen from nothing, for the demo, tests and benchmarks.

The model has a published one's architecture, files and config, but random weights and other
sizes. Nothing here touches the network.

Letters: B batch, K codebooks, T token frames, D width, N vectors, card = codebook size.
"""

import hashlib
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from demo.music import song
from musicgen import published

WORDS = """a and with in of the bpm slow steady lively fast gentle bright wistful dark happy sad
    calm waltz tune song ballad music piano guitar plucked electric acoustic flute bell bells synth
    pad warm soft bass drum drums beat brushed light strings violin arpeggios melody solo rock jazz
    folk pop ambient techno lofi hip hop classical major minor loop vocals no"""


def build_musicgen(
    folder: Path,
    *,
    stereo: bool = False,
    melody: bool = False,
    sample_rate: int = 32_000,
    dim: int = 64,
    num_heads: int = 4,
    num_layers: int = 2,
    card: int = 64,
    n_filters: int = 4,
    codec_dim: int = 16,
    segment_sec: float = 30.0,
    dropout: float = 0.0,
    t5_dim: int = 32,
    words: str = WORDS,
    seed: int = 0,
) -> Path:
    """Write a random-weight MusicGen in audiocraft's exported format, its text encoder in `t5/`.

    The published small is dim=1024, num_heads=16, num_layers=24, card=2048, n_filters=64,
    codec_dim=128, t5_dim=768; AudioGen has sample_rate=16000. Plain audiocraft requires
    t5_dim=768, see `build_hub_cache`. As published, the LM is stored in float16 and the codec in
    float32. Sampling with a card under 250 needs a lower top_k than audiocraft's default.
    """
    import torch
    from audiocraft.models.builders import get_compression_model
    from omegaconf import OmegaConf

    from musicgen.lm import build_lm

    sizes = {"dim": dim, "num_heads": num_heads, "num_layers": num_layers, "card": card}
    lm_sizes = {
        "sample_rate": sample_rate,
        "dataset": {"segment_duration": segment_sec},
        "transformer_lm": {**sizes, "dropout": dropout},
    }
    codec_sizes = {
        "sample_rate": sample_rate,
        "encodec": {"sample_rate": sample_rate},
        "seanet": {
            "dimension": codec_dim,
            "n_filters": n_filters,
            "ratios": [8, 5, 4, sample_rate // 8000],  # 50 frames a second
        },
        "rvq": {"bins": card},
    }
    lm_cfg = published.family_config(lm_sizes, stereo=stereo, melody=melody)
    codec_cfg: Any = OmegaConf.merge(OmegaConf.create(published.CODEC_CONFIG), codec_sizes)

    t5 = build_t5(folder / "t5", dim=t5_dim, words=words, seed=seed)  # the config says t5-base
    on_cpu = {"device": "cpu", "dtype": "float32"}
    lm_here: Any = OmegaConf.merge(lm_cfg, on_cpu)
    codec_here: Any = OmegaConf.merge(codec_cfg, on_cpu)
    with quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        lm = build_lm(lm_here, t5)
        codec = get_compression_model(codec_here).eval()
        _fit_codec(codec, seed)
    export(folder / "state_dict.bin", lm.half(), lm_cfg)
    export(folder / "compression_state_dict.bin", codec, codec_cfg)
    return folder


def build_t5(
    folder: Path, *, dim: int = 32, num_layers: int = 2, words: str = WORDS, seed: int = 0
) -> Path:
    """Write a random-weight T5 encoder of width `dim` with its tokenizer, in Hugging Face format.

    t5-base is dim=768, num_layers=12. Each of `words` is one token, and other words are spelled
    letter by letter. Characters beyond Latin-1 are the unknown token, as in the real T5.
    """
    import torch
    from transformers import T5Config, T5EncoderModel, T5Tokenizer

    pieces = t5_pieces(words)
    T5Tokenizer(vocab=pieces).save_pretrained(folder)
    num_heads = max(4, dim // 64)
    config = T5Config(
        vocab_size=len(pieces),
        d_model=dim,
        d_kv=dim // num_heads,
        d_ff=4 * dim,
        num_layers=num_layers,
        num_heads=num_heads,
    )
    with quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        T5EncoderModel(config).save_pretrained(folder)
    return folder


def t5_pieces(words: str = WORDS) -> list[tuple[str, float]]:
    """Return the vocabulary that `build_t5` describes, each piece with its log-probability."""
    letters = [chr(code) for code in (*range(33, 127), *range(161, 256)) if code != 173]
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -5.0)]
    pieces += [(f"▁{word}", -7.0) for word in dict.fromkeys(words.split())]  # beats its letters
    pieces += [(letter, -5.0) for letter in letters]
    return pieces + [(f"<extra_id_{i}>", 0.0) for i in reversed(range(100))]


def build_hub_cache(
    hf_home: Path, model: Path, *, repo_id: str = "facebook/musicgen-small"
) -> None:
    """Lay out a Hugging Face cache with `model` under a published name and its T5 as t5-base.

    With HF_HOME set to it and HF_HUB_OFFLINE=1, `MusicGen.get_pretrained(repo_id)` loads it.
    `model` comes from `build_musicgen(..., t5_dim=768)`: audiocraft expects t5-base's width.
    """
    weights = [model / "state_dict.bin", model / "compression_state_dict.bin"]
    for name, files in ((repo_id, weights), ("t5-base", sorted((model / "t5").iterdir()))):
        commit = hashlib.sha1(name.encode()).hexdigest()
        repo = hf_home / "hub" / f"models--{name.replace('/', '--')}"
        snapshot = repo / "snapshots" / commit
        snapshot.mkdir(parents=True, exist_ok=True)
        (repo / "refs").mkdir(exist_ok=True)
        (repo / "refs" / "main").write_text(commit)
        for file in files:
            shutil.copy(file, snapshot)


def _fit_codec(codec: Any, seed: int, clip_sec: float = 10.0) -> None:
    """Fit a random codec to some music, so that codes follow the sound and the sound the codes.

    Because of its biases, a random encoder hardly leaves its mean, and the decoder hums at the
    frame rate whatever the codes. So drop the biases, scale the encoder's output to mean 0 and
    deviation 1, and fit the codebooks to it. The codes also follow the phase of the waves, which
    looks random to a language model, so smooth them over the last kernel's 7 frames. Set the
    decoder's level to -20 dBFS.
    """
    import torch

    rate = codec.sample_rate
    fit_sec = max(40.0, 2 * codec.cardinality / codec.frame_rate)  # 2 vectors for each entry
    clips = int(np.ceil(fit_sec / clip_sec))
    songs = [song(index, clip_sec, rate, seed + 1)[0].mean(axis=0) for index in range(clips)]
    wavs = 0.7 * torch.from_numpy(np.stack(songs))[:, None]  # [B, 1, samples], as in the dataset
    with torch.no_grad():
        for name, parameter in codec.named_parameters():
            if "bias" in name:
                parameter.zero_()
        kernel = codec.encoder.model[-1].conv.conv.weight_v  # [D, channels, frames]
        smooth = torch.hann_window(kernel.shape[-1] + 2, periodic=False)[1:-1]
        kernel.copy_(kernel[..., :1] * smooth)
        latents = torch.cat([codec.encoder(wav[None])[0].T for wav in wavs])  # [N, D]
        mean, std = latents.mean(0), latents.std(0)
        _scale_last_conv(codec.encoder, mean, 1 / std)
        residual = (latents - mean) / std
        for level in codec.quantizer.vq.layers:
            book = level._codebook
            centers, nearest = _kmeans(residual, codec.cardinality)
            book.embed.copy_(centers)
            book.embed_avg.copy_(centers)
            book.cluster_size.copy_(torch.bincount(nearest, minlength=codec.cardinality))
            book.inited.fill_(1)
            residual = residual - centers[nearest]
        out = codec.decode(codec.encode(wavs[:1])[0])
        _scale_last_conv(codec.decoder, out.mean()[None], 0.1 / out.std()[None])


def _scale_last_conv(network: Any, mean: Any, scale: Any) -> None:
    """Change the network's output to (output - mean) * scale, for each channel `[C]`."""
    conv = network.model[-1].conv.conv
    conv.weight_g.mul_(scale[:, None, None])
    conv.bias.copy_((conv.bias - mean) * scale)


def _kmeans(vectors: Any, count: int, iterations: int = 10) -> tuple[Any, Any]:
    """Run Lloyd's algorithm on [N, D] -> centers [count, D], index of each vector's center [N].

    audiocraft's own holds N x card x D differences: 6 GB at the true size of small.
    """
    import torch

    centers = vectors[torch.randperm(len(vectors))[:count]].clone()
    for _ in range(iterations):
        nearest = torch.cdist(vectors, centers).argmin(dim=1)
        sums = torch.zeros_like(centers).index_add_(0, nearest, vectors)
        sizes = torch.bincount(nearest, minlength=count)[:, None]
        centers = torch.where(sizes > 0, sums / sizes.clamp(min=1), centers)
    return centers, torch.cdist(vectors, centers).argmin(dim=1)


@contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' progress bars and audiocraft's deprecation warnings."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.enable_progress_bar()


def export(path: Path, model: Any, cfg: Any) -> None:
    """Write a model's state in the format that audiocraft's loaders read."""
    import torch
    from audiocraft import __version__
    from omegaconf import OmegaConf

    state, text = model.state_dict(), OmegaConf.to_yaml(cfg)
    package = {"best_state": state, "xp.cfg": text, "version": __version__, "exported": True}
    torch.save(package, path)
