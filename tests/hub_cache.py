"""Write a Hugging Face cache as downloads of the published models leave it, with random weights.

    python tests/hub_cache.py FOLDER                       # every model, narrow
    python tests/hub_cache.py FOLDER small --true_size=1   # this one and what it needs, as large
                                                           # as the published one
    HF_HOME=FOLDER HF_HUB_OFFLINE=1 python run.py --model_id=small --dataset_path=my_music

File names, keys and configs are those of the published files as far as public sources tell; nobody
here has seen the real files. The sources:

- audiocraft's config/ for the configs, utils/export.py for the packages; export_legacy.py says that
  the first release has no `version` and no `exported`, and models/loaders.py and builders.py name
  the settings that published configs have and newer code drops.
- audiocraft's pull request 534: torch.load with weights_only=True fails on audiogen-medium.
- transformers' conversion scripts: keys of the language models, config of facebook/encodec_32khz.
- Sizes that users quote. state_dict.bin has 0.78 GiB for small, 2.58 for melody, 3.43 for medium
  and AudioGen: two bytes a weight. compression_state_dict.bin with weights has 0.22 GiB: four.
- Copies of t5-base on the hub: spiece.model and tokenizer.json, but no tokenizer_config.json.

What transformers' files the melody and stereo repositories have is a guess. The text encoders and
facebook/encodec_32khz are float16 here, the harder case; the real ones are said to be float32.
"""

import hashlib
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import fire

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from omegaconf import DictConfig, OmegaConf
from safetensors.torch import save_file
from sentencepiece import sentencepiece_model_pb2
from transformers import (
    EncodecConfig,
    EncodecModel,
    T5Config,
    T5ForConditionalGeneration,
    T5Tokenizer,
)

from demo.tiny import quiet, t5_pieces
from musicgen import VERSION, published
from musicgen.lm import build_lm

AUDIOGEN, CODEC = "facebook/audiogen-medium", "facebook/encodec_32khz"
FIRST_RELEASE = ("small", "medium", "large", "melody")


class Model(NamedTuple):
    """A published model, and whether its codec's file has weights or the name of a codec."""

    name: str
    codec: str


MODELS = [
    Model("small", "weights"),
    Model("medium", "weights"),
    Model("large", "weights"),  # sources differ: some found a name there
    Model("large", "name"),
    Model("melody", "weights"),
    Model("melody-large", "name"),
    *(Model(name, "name") for name in published.SHORT_NAMES if name.startswith("stereo-")),
    Model(AUDIOGEN, "weights"),
]
TEXTS = [".gitattributes", "README.md"]
TOKENIZER = ["special_tokens_map.json", "spiece.model", "tokenizer.json", "tokenizer_config.json"]
SETTINGS = ["config.json", "generation_config.json", "preprocessor_config.json", *TOKENIZER]


def parts(stem: str, suffix: str, count: int = 2) -> list[str]:
    """List the files of weights that transformers has split."""
    names = [f"{stem}-{i:05}-of-{count:05}.{suffix}" for i in range(1, count + 1)]
    return [*names, f"{stem}.{suffix}.index.json"]


# Files that only transformers reads. Users quote 5.4 GiB for the repository of small, which is two
# forms in float32; for medium and melody 11.1 and 8.6 GiB, one form; AudioGen has none.
TRANSFORMERS = {
    "small": [*SETTINGS, "model.safetensors", "pytorch_model.bin"],
    "medium": [*SETTINGS, *parts("pytorch_model", "bin")],
    "large": [*SETTINGS, *parts("pytorch_model", "bin")],
    "stereo-small": [*SETTINGS, "model.safetensors"],
    AUDIOGEN: [],
}
IN_PARTS = [*SETTINGS, *parts("model", "safetensors")]  # the rest

# An experiment's settings that a loaded model has no use for. Source: audiocraft's config/.
EXPERIMENT = """
dtype: float32
autocast: true
autocast_dtype: float16
seed: 2036
show: false
continue_from: null
execute_only: null
execute_inplace: false
benchmark_no_load: false
num_threads: 1
mp_start_method: forkserver
label: null
logging: {level: INFO, log_updates: 10, log_tensorboard: true}
tensorboard: {with_media_logging: false, name: null, sub_dir: null}
slurm: {gpus: 32, mem_per_gpu: 40, time: 3600, constraint: null, partition: a, setup: []}
dora: {dir: /experiments, exclude: [device, 'logging.*', 'dataset.num_workers'], git_save: true}
datasource: {max_sample_rate: 44100, max_channels: 2, train: a/train, valid: a/valid}
fsdp: {use: true, param_dtype: float16, sharding_strategy: shard_grad_op, per_block: true}
profiler: {enabled: false}
deadlock: {use: true, timeout: 600}
cache: {path: null, write: false, write_shard: 0, write_num_shards: 1}
dataset:
  {batch_size: 192, num_workers: 10, num_samples: null, return_info: true, shuffle: false,
   sample_on_duration: false, sample_on_weight: false,
   train: {num_samples: 1000000, shuffle: true, shuffle_seed: 0, permutation_on_files: false},
   valid: {num_samples: 10000}, generate: {num_samples: 50}}
metrics:
  fad: {use_gt: false, model: tf, tf: {bin: null, model_path: //reference/fad/vggish_model.ckpt}}
  chroma_cosine: {use_gt: false, model: chroma_base, chroma_base: {sample_rate: '${sample_rate}'}}
checkpoint: {save_last: true, save_every: 50, keep_last: 10, keep_every_states: null}
generate:
  every: 25
  num_workers: 5
  path: samples
  audio: {format: wav, strategy: loudness, sample_rate: '${sample_rate}'}
  lm: {prompted_samples: true, prompt_duration: null, use_sampling: true, top_k: 250, top_p: 0.0}
evaluate: {every: 25, num_workers: 5, truncate_audio: null, metrics: {base: false, fad: false}}
optim:
  epochs: 500
  updates_per_epoch: 2000
  lr: 1
  optimizer: dadam
  max_norm: 1.0
  eager_sync: true
  adam: {betas: [0.9, 0.95], weight_decay: 0.1, eps: 1e-8}
  ema: {use: true, updates: '${optim.updates_per_epoch}', device: '${device}', decay: 0.99}
schedule:
  lr_scheduler: cosine
  step: {step_size: null, gamma: null}
  cosine: {warmup: 4000, lr_min_ratio: 0.0, cycle_length: 1.0}
"""
# Settings of the first release that newer code drops or gives another name.
OLD_LM: dict[str, Any] = {
    "transformer_lm": {"q_modeling": "delay"},
    "codebooks_pattern": {"valle": {"delays": [0, 0, 0]}},
    "conditioners": {"args": {"merge_text_conditions_p": 0.25, "drop_desc_p": 0.5}},
}
CHROMA = {"sample_rate": "${sample_rate}", "cache_path": "/a/folder/of/another/machine"}
MELODY_LM = {"conditioners": {"self_wav": {"chroma_stem": CHROMA}}}
AUDIOGEN_LM = {
    "solver": "audiogen",
    "sample_rate": 16_000,
    "compression_model_checkpoint": "//reference/bd44a852/checkpoint.th",
    "dataset": {"segment_duration": 10, "min_segment_ratio": 1.0, "train": {"mix_p": 0.5}},
    "codebooks_pattern": {"valle": {"delays": [0, 0, 0]}},
    "classifier_free_guidance": {"training_dropout": 0.1},
    "conditioners": {"description": {"t5": {"name": "t5-large", "word_dropout": 0.0}}},
}
OLD_CODEC = {
    "encodec": {"sample_rate": "${sample_rate}", "channels": "${channels}", "renorm": False},
    "seanet": {"channels": "${channels}", "causal": "${encodec.causal}"},
    "losses": {"adv": 4.0, "feat": 4.0, "l1": 0.1, "mel": 0.0, "msspec": 2.0, "sisnr": 0.0},
    "adversarial": {"every": 1, "adversaries": ["msstftd"], "adv_loss": "hinge"},
    "dataset": {"segment_duration": 1, "batch_size": 64},
}
AUDIOGEN_CODEC = {"sample_rate": 16_000, "seanet": {"ratios": [8, 5, 4, 2]}}
OLD_T5 = {
    **{"architectures": ["T5ForConditionalGeneration"], "model_type": "t5", "n_positions": 512},
    **{"decoder_start_token_id": 0, "eos_token_id": 1, "pad_token_id": 0, "output_past": True},
    **{"dropout_rate": 0.1, "initializer_factor": 1.0, "is_encoder_decoder": True},
    **{"layer_norm_epsilon": 1e-06, "relative_attention_num_buckets": 32},
    "task_specific_params": {"summarization": {"max_length": 200, "prefix": "summarize: "}},
}


class Sizes(NamedTuple):
    """The settings in which a narrow copy differs from one of the published size."""

    lm: dict[str, Any]
    codec: dict[str, Any]
    t5: dict[str, Any]


# T5 keeps its width, which audiocraft checks; the codebooks keep theirs.
NARROW = Sizes(
    {"dim": 64, "num_heads": 4, "num_layers": 2},
    {"n_filters": 4, "dimension": 16},
    {"d_kv": 16, "d_ff": 64, "num_layers": 1, "num_heads": 2, "vocab_size": 512},
)
PUBLISHED = Sizes({}, {}, {})


def build(hf_home: Path, models: list[Model], sizes: Sizes = NARROW) -> Path:
    """Write what downloads of these models, with the text encoders and codecs they need, leave."""
    random = torch.random.fork_rng(devices=[])
    with tempfile.TemporaryDirectory(dir=hf_home) as work, random, quiet():
        torch.manual_seed(0)
        made = Path(work)
        for name in ("t5-base", "t5-large"):
            if any((model.name == AUDIOGEN) == (name == "t5-large") for model in models):
                _write_t5(made / name, name, sizes)
        if any(model.codec == "name" for model in models):
            _write_codec(made / CODEC, sizes)
        for model in models:
            repo = published.SHORT_NAMES.get(model.name, model.name)
            t5 = made / ("t5-large" if model.name == AUDIOGEN else "t5-base")
            _write_model(made / repo, model, t5, sizes)
        for folder in (*made.glob("t5-*"), *made.glob("facebook/*")):
            _publish(hf_home / "hub", folder.relative_to(made).as_posix(), folder)
    return hf_home


def lm_config(name: str, sizes: Sizes = PUBLISHED) -> DictConfig:
    """Return the whole config that a published language model was trained with."""
    layers = [published.lm_config("medium" if name == AUDIOGEN else name), {"dtype": "float32"}]
    layers += [{"transformer_lm": sizes.lm}]
    layers += [OLD_LM] if name in FIRST_RELEASE else []
    layers += [MELODY_LM] if "melody" in name else []
    layers += [AUDIOGEN_LM] if name == AUDIOGEN else []
    config = OmegaConf.merge(OmegaConf.create(EXPERIMENT), *layers)
    assert isinstance(config, DictConfig)
    return config


def codec_config(name: str, sizes: Sizes = PUBLISHED) -> DictConfig:
    """Return the whole config that a codec within a published model was trained with."""
    layers = [OmegaConf.create(published.CODEC_CONFIG), OLD_CODEC, {"seanet": sizes.codec}]
    layers += [AUDIOGEN_CODEC] if name == AUDIOGEN else []
    config = OmegaConf.merge(OmegaConf.create(EXPERIMENT), *layers)
    assert isinstance(config, DictConfig)
    return config


def _write_model(folder: Path, model: Model, t5: Path, sizes: Sizes) -> None:
    from audiocraft.models.builders import get_compression_model  # after musicgen/__init__.py

    folder.mkdir(parents=True)
    config, on_cpu = lm_config(model.name, sizes), {"device": "cpu", "dtype": "float32"}
    lm = build_lm(OmegaConf.merge(config, on_cpu), t5).half()
    _save(folder / "state_dict.bin", lm.state_dict(), config, model.name)
    if model.codec == "name":
        package = {"pretrained": CODEC, "exported": True, "version": VERSION}
        torch.save(package, folder / "compression_state_dict.bin")
    else:
        config = codec_config(model.name, sizes)
        codec = get_compression_model(OmegaConf.merge(config, on_cpu))
        for level in codec.quantizer.vq.layers:
            level._codebook.embed.normal_()
            level._codebook.inited.fill_(1)  # else the first clip would set the codebook
        _save(folder / "compression_state_dict.bin", codec.state_dict(), config, model.name)
    for name in TEXTS + TRANSFORMERS.get(model.name, IN_PARTS):
        (folder / name).write_text("{}" if name.endswith(".json") else "")


def _save(path: Path, state: dict[str, torch.Tensor], config: DictConfig, name: str) -> None:
    package: dict[str, Any] = {"best_state": state, "xp.cfg": OmegaConf.to_yaml(config)}
    if name == AUDIOGEN:
        package |= {"xp.cfg": config, "version": torch.__version__}  # objects, both of them
    elif name not in FIRST_RELEASE:
        package |= {"version": VERSION, "exported": True}
    torch.save(package, path)


def _write_t5(folder: Path, name: str, sizes: Sizes) -> None:
    """Write encoder and decoder, as published, with a config in the words of their time."""
    config = {**published.T5[name], **sizes.t5}
    T5ForConditionalGeneration(T5Config(**config)).half().save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({**OLD_T5, **config}))
    pieces = t5_pieces()
    T5Tokenizer(vocab=pieces).save_pretrained(folder)
    (folder / "tokenizer_config.json").unlink()
    proto = sentencepiece_model_pb2.ModelProto()
    for piece, score in pieces[:-100]:  # the <extra_id_...> are in tokenizer.json only
        kind = {"<unk>": 2, "<pad>": 3, "</s>": 3}.get(piece, 1)  # unknown, control, normal
        proto.pieces.add(piece=piece, score=score, type=kind)
    proto.trainer_spec.model_type = 1  # unigram
    proto.trainer_spec.pad_id, proto.trainer_spec.eos_id, proto.trainer_spec.unk_id = 0, 1, 2
    proto.trainer_spec.bos_id = -1
    (folder / "spiece.model").write_bytes(proto.SerializeToString())
    for other in (*TEXTS, "pytorch_model.bin"):
        (folder / other).write_text("")


def _write_codec(folder: Path, sizes: Sizes) -> None:
    """Write EnCodec as transformers has it, with the names of torch's old weight_norm."""
    config = EncodecConfig(
        **{"target_bandwidths": [2.2], "sampling_rate": 32_000, "upsampling_ratios": [8, 5, 4, 4]},
        num_filters=sizes.codec.get("n_filters", 64),
        hidden_size=sizes.codec.get("dimension", 128),
        codebook_dim=sizes.codec.get("dimension", 128),
        **{"codebook_size": 2048, "use_causal_conv": False, "normalize": False},
        use_conv_shortcut=False,
    )
    model = EncodecModel(config).half()
    for level in model.quantizer.layers:
        level.codebook.embed.normal_()
    model.save_pretrained(folder)
    new = (".parametrizations.weight.original0", ".parametrizations.weight.original1")
    state = {
        key.replace(new[0], ".weight_g").replace(new[1], ".weight_v"): tensor.contiguous()
        for key, tensor in model.state_dict().items()
    }
    assert any(key.endswith(".weight_g") for key in state)
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    (folder / "preprocessor_config.json").write_text(
        json.dumps({"feature_extractor_type": "EncodecFeatureExtractor", "sampling_rate": 32_000})
    )
    for other in (*TEXTS, "pytorch_model.bin"):
        (folder / other).write_text("")


def _publish(hub: Path, repo: str, folder: Path) -> None:
    """Move a repository's files into a cache: a snapshot of links to blobs, named by content."""
    place = hub / f"models--{repo.replace('/', '--')}"
    commit = hashlib.sha1(repo.encode()).hexdigest()
    snapshot = place / "snapshots" / commit
    for path in (snapshot, place / "blobs", place / "refs"):
        path.mkdir(parents=True)
    (place / "refs" / "main").write_text(commit)
    for path in sorted(folder.iterdir()):
        blob = hashlib.sha256(path.read_bytes()).hexdigest()
        shutil.move(path, place / "blobs" / blob)
        (snapshot / path.name).symlink_to(Path("../../blobs") / blob)
    folder.rmdir()


def main(folder: str, *names: str, true_size: bool = False) -> None:
    """Write the cache; of large, with the weights of its codec."""
    models = [m for m in MODELS if m != Model("large", "name") and (not names or m.name in names)]
    home = Path(folder)
    home.mkdir(parents=True, exist_ok=True)
    build(home, models, PUBLISHED if true_size else NARROW)


if __name__ == "__main__":
    fire.Fire(main)
