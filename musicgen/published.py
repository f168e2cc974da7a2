"""Names, sizes and configs of Meta's published MusicGen models.

The code that loads a config sets its device and dtype.
"""

from typing import Any

SIZES = {  # width, heads, layers
    "small": (1024, 16, 24),
    "medium": (1536, 24, 48),
    "large": (2048, 32, 48),
}
_MONO = (*SIZES, "melody", "melody-large")
SHORT_NAMES = {
    name: f"facebook/musicgen-{name}" for name in (*_MONO, *(f"stereo-{name}" for name in _MONO))
}
REFUSED = {  # by a part of the id of other kinds of models
    "musicgen-style": "audiocraft 1.3.0 has no style conditioner",
    "magnet": "MAGNeT fills in masked codes in rounds and needs another training",
    "jasco": "JASCO is not a language model, and audiocraft 1.3.0 does not have it",
}
# The published small's; source: audiocraft's config/ (model/lm/musicgen_lm.yaml,
# conditioner/text2music.yaml, model/encodec/encodec_large_nq4_s640.yaml and their defaults).
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
# What differs in melody models; source: audiocraft's config/conditioner/chroma2music.yaml.
MELODY = {
    "classifier_free_guidance": {"training_dropout": 0.2},
    "attribute_dropout": {"args": {"active_on_eval": False}, "text": {}, "wav": {"self_wav": 0.5}},
    "fuser": {"prepend": ["self_wav", "description"], "cross": []},
    "conditioners": {
        "self_wav": {
            "model": "chroma_stem",
            "chroma_stem": {
                "sample_rate": 32000,
                "n_chroma": 12,
                "radix2_exp": 14,
                "argmax": True,
                "match_len_on_eval": False,
                "eval_wavs": None,
                "n_eval_wavs": 100,
                "cache_path": None,
            },
        },
        "description": {"t5": {"word_dropout": 0.2}},
    },
}
# What differs in stereo models: four codebooks for each channel.
STEREO = {
    "channels": 2,
    "interleave_stereo_codebooks": {"use": True},
    "codebooks_pattern": {"delay": {"delays": [0, 0, 1, 1, 2, 2, 3, 3]}},
    "transformer_lm": {"n_q": 8},
}
# The text encoders; AudioGen has the large one. Source: their config.json on Hugging Face.
T5: dict[str, dict[str, Any]] = {
    name: {
        **{"vocab_size": 32128, "d_kv": 64, "d_model": width, "d_ff": 4 * width},
        **{"num_layers": layers, "num_heads": heads},
    }
    for name, width, layers, heads in (("t5-base", 768, 12, 12), ("t5-large", 1024, 24, 16))
}


def lm_config(name: str) -> Any:
    """Return the language model's config for a short name, such as "stereo-melody-large"."""
    *kind, last = name.split("-")
    dim, heads, layers = SIZES["medium" if last == "melody" else last]
    sizes = {"transformer_lm": {"dim": dim, "num_heads": heads, "num_layers": layers}}
    return family_config(sizes, stereo="stereo" in kind, melody="melody" in (*kind, last))


def family_config(sizes: dict[str, Any], *, stereo: bool = False, melody: bool = False) -> Any:
    """Return a language model's config with the given sizes."""
    from omegaconf import OmegaConf

    config = OmegaConf.create(LM_CONFIG)
    return OmegaConf.merge(config, STEREO if stereo else {}, MELODY if melody else {}, sizes)
