"""A tiny MusicGen and a small dataset, made from nothing: for the demo, tests and benchmarks.

The model has the published one's architecture, files and config, with random weights; only the
sizes differ. The music is synthesised with numpy. Nothing here touches the network.

Letters: B batch, K codebooks, T token frames, D width, N vectors, card = codebook size.
"""

import hashlib
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import soundfile

Audio = npt.NDArray[np.float32]
Voice = Callable[[float, float, int], Audio]

# The published small's two configs; source: audiocraft's config/ (model/lm/musicgen_lm.yaml,
# conditioner/text2music.yaml, model/encodec/encodec_large_nq4_s640.yaml and their defaults).
# Whoever loads them sets device and dtype.
LM_CONFIG = """
solver: musicgen
device: cuda
dtype: float16
sample_rate: 32000
channels: 1
efficient_attention_backend: torch
compression_model_checkpoint: //pretrained/facebook/encodec_32khz
compression_model_n_q: null
interleave_stereo_codebooks: {use: false, per_timestep: false}
dataset:
  segment_duration: 30
  min_segment_ratio: 0.8
  train: {merge_text_p: 0.25, drop_desc_p: 0.5, drop_other_p: 0.5}
tokens: {padding_with_special_token: false}
lm_model: transformer_lm
codebooks_pattern:
  modeling: delay
  delay: {delays: [0, 1, 2, 3], flatten_first: 0, empty_initial: 0}
  unroll: {flattening: [0, 1, 2, 3], delays: [0, 0, 0, 0]}
  music_lm: {group_by: 2}
  coarse_first: {delays: [0, 0, 0]}
transformer_lm: {
  dim: 1024, num_heads: 16, num_layers: 24, hidden_scale: 4, n_q: 4, card: 2048, dropout: 0.0,
  emb_lr: null, activation: gelu, norm: layer_norm, norm_first: true, bias_ff: false,
  bias_attn: false, bias_proj: false, past_context: null, causal: true, custom: false,
  memory_efficient: true, attention_as_float32: false, layer_scale: null,
  positional_embedding: sin, xpos: false, checkpointing: none, weight_init: gaussian,
  depthwise_init: current, zero_bias_init: true, cross_attention: false, qk_layer_norm: false,
  qk_layer_norm_cross: false, attention_dropout: null, kv_repeat: 1, two_step_cfg: false}
classifier_free_guidance: {training_dropout: 0.3, inference_coef: 3.0}
attribute_dropout: {}
fuser: {
  cross_attention_pos_emb: false, cross_attention_pos_emb_scale: 1, sum: [], prepend: [],
  cross: [description], input_interpolate: []}
conditioners:
  description:
    model: t5
    t5: {name: t5-base, finetune: false, word_dropout: 0.3, normalize_text: false}
"""
CODEC_CONFIG = """
solver: compression
device: cuda
dtype: float32
sample_rate: 32000
channels: 1
compression_model: encodec
encodec: {
  autoencoder: seanet, quantizer: rvq, sample_rate: 32000, channels: 1, causal: false,
  renormalize: false}
seanet: {
  dimension: 128, channels: 1, causal: false, n_filters: 64, n_residual_layers: 1,
  ratios: [8, 5, 4, 4], activation: ELU, activation_params: {alpha: 1.0}, norm: weight_norm,
  norm_params: {}, kernel_size: 7, residual_kernel_size: 3, last_kernel_size: 7,
  dilation_base: 2, pad_mode: constant, true_skip: true, compress: 2, lstm: 2,
  disable_norm_outer_blocks: 0, encoder: {},
  decoder: {trim_right_ratio: 1.0, final_activation: null, final_activation_params: null}}
rvq: {
  n_q: 4, q_dropout: false, bins: 2048, decay: 0.99, kmeans_init: true, kmeans_iters: 50,
  threshold_ema_dead_code: 2, orthogonal_reg_weight: 0.0,
  orthogonal_reg_active_codes_only: false}
no_quant: {}
"""

NOTES = ("C", "C#", "D", "Eb", "E", "F", "F#", "G", "Ab", "A", "Bb", "B")
SCALES = {"major": (0, 2, 4, 5, 7, 9, 11), "minor": (0, 2, 3, 5, 7, 8, 10)}  # semitones
PROGRESSIONS = {  # scale degrees of the chords' roots, 0 = tonic; one chord a bar
    "major": ((0, 4, 5, 3), (0, 5, 3, 4), (1, 4, 0, 5), (0, 3, 0, 4)),
    "minor": ((0, 5, 2, 6), (0, 3, 4, 0), (0, 6, 5, 6), (0, 3, 5, 4)),
}
WORDS = """a and with in of the bpm slow steady lively fast gentle bright wistful dark happy sad
    calm waltz tune song ballad music piano guitar plucked electric acoustic flute bell bells synth
    pad warm soft bass drum drums beat brushed light strings violin arpeggios melody solo rock jazz
    folk pop ambient techno lofi hip hop classical major minor loop vocals no"""


def build_musicgen(
    folder: Path,
    *,
    stereo: bool = False,
    dim: int = 64,
    num_heads: int = 4,
    num_layers: int = 2,
    card: int = 64,
    n_filters: int = 4,
    codec_dim: int = 16,
    segment_sec: float = 30.0,
    dropout: float = 0.0,
    t5_dim: int = 32,
    seed: int = 0,
) -> Path:
    """Write a random-weight MusicGen in audiocraft's exported format, its text encoder in `t5/`.

    The published small is dim=1024, num_heads=16, num_layers=24, card=2048, n_filters=64,
    codec_dim=128, t5_dim=768. Plain audiocraft takes t5_dim=768 only, see `build_hub_cache`.
    As published, the LM is stored in float16 and the codec in float32.
    """
    import musicgen  # noqa: F401  (before audiocraft: stands in for xformers)
    import torch
    from audiocraft.models.builders import get_compression_model, get_lm_model
    from audiocraft.modules.conditioners import T5Conditioner
    from omegaconf import OmegaConf

    delays = [0, 0, 1, 1, 2, 2, 3, 3] if stereo else [0, 1, 2, 3]
    sizes = {"dim": dim, "num_heads": num_heads, "num_layers": num_layers, "card": card}
    lm_sizes = {
        "channels": 2 if stereo else 1,
        "interleave_stereo_codebooks": {"use": stereo},
        "dataset": {"segment_duration": segment_sec},
        "codebooks_pattern": {"delay": {"delays": delays}},
        "transformer_lm": {**sizes, "n_q": len(delays), "dropout": dropout},
    }
    codec_sizes = {
        "seanet": {"dimension": codec_dim, "n_filters": n_filters},
        "rvq": {"bins": card},
    }
    lm_cfg: Any = OmegaConf.merge(OmegaConf.create(LM_CONFIG), lm_sizes)
    codec_cfg: Any = OmegaConf.merge(OmegaConf.create(CODEC_CONFIG), codec_sizes)

    # The config says t5-base, but the LM is built with our own: audiocraft takes only what is in
    # its list and its table of widths, so ours is in them while we build.
    t5 = str(build_t5(folder / "t5", dim=t5_dim, seed=seed))
    on_cpu = {"device": "cpu", "dtype": "float32"}
    with_our_t5 = {**on_cpu, "conditioners": {"description": {"t5": {"name": t5}}}}
    T5Conditioner.MODELS.append(t5)
    T5Conditioner.MODELS_DIMS[t5] = t5_dim
    try:
        with _quiet(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            lm = get_lm_model(OmegaConf.merge(lm_cfg, with_our_t5))
            codec = get_compression_model(OmegaConf.merge(codec_cfg, on_cpu)).eval()
            _fit_codec(codec, seed)
    finally:
        T5Conditioner.MODELS.remove(t5)
        del T5Conditioner.MODELS_DIMS[t5]
    _export(folder / "state_dict.bin", lm.half(), lm_cfg)
    _export(folder / "compression_state_dict.bin", codec, codec_cfg)
    return folder


def build_t5(folder: Path, *, dim: int = 32, num_layers: int = 2, seed: int = 0) -> Path:
    """Write a random-weight T5 encoder of width `dim` with its tokenizer, in Hugging Face format.

    t5-base is dim=768, num_layers=12. Words of music are one token each, other words are spelled
    letter by letter; what is beyond Latin-1 is the unknown token, as in the real T5.
    """
    import torch
    from transformers import T5Config, T5EncoderModel, T5Tokenizer

    letters = [chr(code) for code in (*range(33, 127), *range(161, 256)) if code != 173]
    # (piece, log-probability): a known word beats its letters
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -5.0)]
    pieces += [(f"▁{word}", -7.0) for word in WORDS.split()]
    pieces += [(letter, -5.0) for letter in letters]
    pieces += [(f"<extra_id_{i}>", 0.0) for i in reversed(range(100))]
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
    with _quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        T5EncoderModel(config).save_pretrained(folder)
    return folder


def build_hub_cache(
    hf_home: Path, model: Path, *, repo_id: str = "facebook/musicgen-small"
) -> None:
    """Lay out a Hugging Face cache with `model` under a published name and its T5 as t5-base.

    With HF_HOME set to it and HF_HUB_OFFLINE=1, `MusicGen.get_pretrained(repo_id)` loads it.
    `model` comes from `build_musicgen(..., t5_dim=768)`: the width audiocraft has for t5-base.
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


def build_dataset(folder: Path, *, clips: int = 8, seconds: float = 35.0, seed: int = 0) -> Path:
    """Write `clips` pairs of .wav and .txt: synthesised music and a caption that describes it.

    44.1 kHz, 16 bit, peaks at -3 dBFS, every other clip mono; the same files for the same seed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(clips):
        wav, caption = song(index, seconds, 44100, seed)
        if index % 2:
            wav = wav.mean(axis=0, keepdims=True)
        wav *= 10 ** (-3 / 20) / np.abs(wav).max()
        name = f"{index:02d} {list(LEADS)[index % 3]}".replace(" ", "_")
        soundfile.write(folder / f"{name}.wav", wav.T, 44100, subtype="PCM_16")
        (folder / f"{name}.txt").write_text(f"{caption}\n", encoding="utf-8")
    return folder


def _fit_codec(codec: Any, seed: int, clip_sec: float = 10.0) -> None:
    """Make a random codec's codes follow the sound, and its sound the codes, on some music.

    As they come, the encoder hardly leaves its mean and the decoder hums at the frame rate
    whatever the codes, for their biases. So drop those, scale what the encoder gives to mean 0
    and deviation 1, fit the codebooks to it, and set the decoder's level to the music's.
    """
    import torch

    rate = codec.sample_rate
    fit_sec = max(40.0, 3 * codec.cardinality / codec.frame_rate)  # 3 vectors for each entry
    clips = int(np.ceil(fit_sec / clip_sec))
    songs = [song(index, clip_sec, rate, seed + 1)[0].mean(axis=0) for index in range(clips)]
    wavs = torch.from_numpy(np.stack(songs))[:, None]  # [B, 1, samples]
    with torch.no_grad():
        for name, parameter in codec.named_parameters():
            if "bias" in name:
                parameter.zero_()
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
        _scale_last_conv(codec.decoder, out.mean()[None], wavs[0].std() / out.std()[None])


def _scale_last_conv(network: Any, mean: Any, scale: Any) -> None:
    """Change the network's output to (output - mean) * scale, for each channel `[C]`."""
    conv = network.model[-1].conv.conv
    conv.weight_g.mul_(scale[:, None, None])
    conv.bias.copy_((conv.bias - mean) * scale)


def _kmeans(vectors: Any, count: int, iterations: int = 10) -> tuple[Any, Any]:
    """Lloyd's algorithm on [N, D] -> centers [count, D], index of each vector's center [N].

    audiocraft's own holds N x card x D differences: 6 GB for the true small.
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
def _quiet() -> Iterator[None]:
    """No progress bars of transformers, no deprecation warnings on audiocraft's behalf."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logging.enable_progress_bar()


def _export(path: Path, model: Any, cfg: Any) -> None:
    import torch
    from audiocraft import __version__
    from omegaconf import OmegaConf

    state, text = model.state_dict(), OmegaConf.to_yaml(cfg)
    package = {"best_state": state, "xp.cfg": text, "version": __version__, "exported": True}
    torch.save(package, path)


def song(index: int, seconds: float, rate: int, seed: int = 0) -> tuple[Audio, str]:
    """Compose and play one piece -> wav [2, samples] at `rate` Hz, peak 1, and its caption.

    `index` chooses lead and meter; key, tempo, chords and band are drawn from (seed, index).
    """
    rng = np.random.default_rng((seed, index))
    lead, meter = list(LEADS)[index % 3], (4, 3, 4, 4)[index % 4]
    mode, key = ("minor", "major")[rng.integers(2)], int(rng.integers(12))
    bpm, chords = int(rng.integers(68, 140)), PROGRESSIONS[mode][rng.integers(4)]
    has_pad, has_bass, has_drums = rng.random(3) < (0.6, 0.8, 0.6)
    has_arpeggios = not has_pad or lead == "plucked guitar"
    beat_sec = 60 / bpm
    mix = np.zeros((2, int(seconds * rate)), dtype=np.float32)

    def play(voice: Voice, degree: int, beat: float, beats: float, gain: float, pan: float) -> None:
        """Add a note, some ms late and a little softer, as hands do; pan -1 left to 1 right."""
        octave, step = divmod(degree, 7)  # degree 0 = the tonic between C3 and B3
        hz = 440 * 2 ** ((48 + key + 12 * octave + SCALES[mode][step] - 69) / 12)
        start = int((beat * beat_sec + rng.uniform(0, 0.008)) * rate)
        note = voice(hz, beats * beat_sec, rate)[: max(0, mix.shape[1] - start)]
        angle = (pan + 1) * np.pi / 4
        shares = np.array([[np.cos(angle)], [np.sin(angle)]], dtype=np.float32)
        mix[:, start : start + len(note)] += float(gain * rng.uniform(0.8, 1)) * shares * note

    tune = 9  # scale degree of the melody's last note
    for bar in range(int(seconds / (meter * beat_sec)) + 1):
        first, root = bar * meter, chords[bar % 4]
        triad = (root, root + 2, root + 4)
        for degree, pan in zip(triad if has_pad else (), (-0.8, 0.0, 0.8), strict=False):
            play(PAD, degree, first, meter + 1, 0.12, pan)
        for eighth in range(2 * meter):
            beat, on_beat = first + eighth / 2, eighth % 2 == 0
            strong = eighth in ((0, 4) if meter == 4 else (0,))
            if has_bass and strong:
                play(BASS, root - (7 if root < 5 else 14), beat, 1.5, 0.35, 0.0)
            if has_arpeggios:
                play(_pluck, (*triad, root + 7)[(0, 2, 1, 3)[eighth % 4]], beat, 2, 0.35, -0.4)
            if has_drums:
                play(KICK if strong else BRUSH if on_beat else HAT, 0, beat, 0.5, 0.3, 0.1)
            if rng.random() < (0.75 if on_beat else 0.25):
                tune = int(np.clip(tune + rng.integers(-2, 3), 6, 15))
                if on_beat:  # the nearest note of the chord
                    tune = min(
                        (d % 7 + 7 * o for d in triad for o in (0, 1, 2)),
                        key=lambda degree: abs(degree - tune),
                    )
                voice, octaves, beats = LEADS[lead]
                play(voice, tune + 7 * octaves, beat, beats, 0.5, 0.3)

    mix = _reverb(mix, rate)
    fade = int(min(2.0, seconds / 10) * rate)
    mix[:, -fade:] *= np.linspace(1, 0, fade, dtype=np.float32)
    speed = "slow" if bpm < 88 else "steady" if bpm < 115 else "lively"
    mood = {"minor": ("wistful", "dark"), "major": ("bright", "gentle")}[mode][index % 2]
    form = "waltz" if meter == 3 else "tune"
    band = {
        "guitar arpeggios": has_arpeggios and lead != "plucked guitar",
        "a warm synth pad": has_pad,
        "soft bass": has_bass,
        "brushed drums": has_drums,
    }
    players = ", ".join(name for name, plays in band.items() if plays)
    players = " and ".join(players.rsplit(", ", 1))
    caption = f"a {speed}, {mood} {lead} {form} in {NOTES[key]} {mode}, {bpm} bpm"
    return mix / np.abs(mix).max(), caption + (f", with {players}" if players else "")


# A voice plays one note: (frequency in Hz, length in seconds, sample rate in Hz) -> [samples].


@lru_cache(maxsize=64)
def _pluck(hz: float, sec: float, rate: int) -> Audio:
    """A string (Karplus-Strong): a burst of noise goes round and is averaged in each period."""
    period, cycles = int(rate / hz), np.arange(int(hz * sec) + 2)[:, None]
    harmonics = np.arange(period // 2 + 1)
    burst = np.fft.rfft(np.random.default_rng(period).uniform(-1, 1, period))
    burst *= (harmonics > 0) / (1 + harmonics / 12)  # no DC, a soft fingertip
    loss = np.cos(np.pi * harmonics / period) * 10 ** (-3 / (2 * hz))  # -60 dB in 2 s or less
    wave = np.fft.irfft(burst * loss**cycles, n=period).ravel()
    wave *= 0.3 / wave[:period].std()
    # A period of whole samples is a little sharp: read it slower, to be in tune.
    times = np.arange(int(sec * rate)) * (period * hz / rate)
    return _shape(np.interp(times, np.arange(len(wave)), wave), rate)


@lru_cache(maxsize=64)
def _bell(hz: float, sec: float, rate: int) -> Audio:
    """Frequency modulation with an inharmonic ratio."""
    t = np.arange(int(sec * rate)) / rate
    modulator = 1.2 * np.exp(-4 * t) * np.sin(2 * np.pi * 3.5 * hz * t)
    return _shape(0.6 * np.sin(2 * np.pi * hz * t + modulator) * np.exp(-2.5 * t), rate)


def _tone(partials: tuple[float, ...], decay: float, attack: float, vibrato: float = 0) -> Voice:
    """A voice of harmonics; `decay` per second, `attack` in seconds, `vibrato` in radians."""

    @lru_cache(maxsize=64)
    def voice(hz: float, sec: float, rate: int) -> Audio:
        t = np.arange(int(sec * rate)) / rate
        phase = 2 * np.pi * hz * t + vibrato * np.sin(2 * np.pi * 5 * t)
        wave = sum(gain * np.sin((i + 1) * phase) for i, gain in enumerate(partials))
        return _shape(wave * np.exp(-decay * t), rate, attack)

    return voice


def _drum(hz: float, brightness: int, decay: float) -> Voice:
    """A sine that falls to `hz`, or at 0 Hz noise, high-passed `brightness` times."""

    @lru_cache(maxsize=4)
    def voice(_: float, sec: float, rate: int) -> Audio:
        t = np.arange(int(sec * rate)) / rate
        noise = np.diff(np.random.default_rng(0).normal(size=len(t) + brightness), brightness)
        fall = np.sin(2 * np.pi * hz * (t + (1 - np.exp(-30 * t)) / 30))
        wave = fall if hz else 0.25 * noise / noise.std()
        return _shape(wave * np.exp(-decay * t), rate)

    return voice


def _shape(wave: Any, rate: int, attack_sec: float = 0.002) -> Audio:
    """Ramps at both ends, so that no note clicks."""
    t = np.arange(len(wave)) / rate
    ends = np.minimum(t / attack_sec, (t[-1] - t) / max(0.04, attack_sec))
    return np.asarray(wave * np.minimum(ends, 1), dtype=np.float32)


def _reverb(mix: Audio, rate: int, length_sec: float = 1.2, wet: float = 0.25) -> Audio:
    """A room: each channel [2, samples] convolved with its own decaying noise."""
    t = np.arange(int(length_sec * rate)) / rate
    room = np.random.default_rng(0).normal(size=(2, len(t))) * np.exp(-6 * t)
    room *= wet / np.sqrt((room**2).sum(axis=1, keepdims=True))
    size = 1 << (mix.shape[1] + len(t)).bit_length()
    echo = np.fft.irfft(np.fft.rfft(mix, size) * np.fft.rfft(room, size), size)
    return np.asarray(mix + echo[:, : mix.shape[1]], dtype=np.float32)


PAD = _tone((1, 0.5, 0.3, 0.2, 0.1), decay=0, attack=0.5)
BASS = _tone((1, 0.3, 0.1), decay=2, attack=0.01)
FLUTE = _tone((0.5, 0.2, 0.06), decay=0.5, attack=0.05, vibrato=0.3)
KICK, BRUSH, HAT = _drum(50, 0, 12), _drum(0, 1, 25), _drum(0, 2, 80)
LEADS = {"plucked guitar": (_pluck, 0, 3), "bell": (_bell, 1, 3), "flute": (FLUTE, 0, 1)}
