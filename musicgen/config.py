"""A model's configs: read, checked, or known of the published ones."""

from typing import Any

from omegaconf import DictConfig, OmegaConf
from transformers import T5Config

from errors import UserError
from musicgen import published
from musicgen.hub import (
    HF_FILES,
    T5_NEEDS,
    WEIGHTS,
    find_model,
    hub_folder,
    read_package,
    told_as_damage,
)
from musicgen.published import SHORT_NAMES


def configs(model_id: str) -> tuple[DictConfig, DictConfig, T5Config]:
    """The configs of language model, codec and text encoder, without loading weights.

    Of a published model they are known, also if it is not on disk. Errors: UserError.
    """
    codec: Any = OmegaConf.create(published.CODEC_CONFIG)
    names = {repo: name for name, repo in SHORT_NAMES.items()}
    name = names.get(model_id, model_id)
    if name in SHORT_NAMES:
        return published.lm_config(name), codec, T5Config(**published.T5["t5-base"])
    folder = find_model(model_id)
    with told_as_damage(model_id):
        lm: Any = OmegaConf.create(read_package(folder / WEIGHTS[0], model_id)["xp.cfg"])
        check_supported(lm, model_id)
        package = read_package(folder / WEIGHTS[1], model_id)
        if "xp.cfg" in package:  # else the name of the published one
            codec = OmegaConf.create(package["xp.cfg"])
        t5_name = lm.conditioners[text_name(lm)].t5.name
        if (folder / "t5" / "config.json").exists():
            t5 = T5Config.from_pretrained(folder / "t5")
        elif t5_name in published.T5:
            t5 = T5Config(**published.T5[t5_name])
        else:
            t5 = T5Config.from_pretrained(hub_folder(t5_name, HF_FILES, T5_NEEDS))
    return lm, codec, t5


def check_supported(cfg: DictConfig, model_id: str) -> None:
    conditioners = {k: v.model for k, v in cfg.conditioners.items() if k != "args"}
    name = text_name(cfg)
    families = ({name: "t5"}, {"self_wav": "chroma_stem", name: "t5"})
    if cfg.lm_model != "transformer_lm" or conditioners not in families:
        raise UserError(
            f"--model_id={model_id}: a {cfg.lm_model} conditioned on "
            f"{', '.join(conditioners) or 'nothing'}; only MusicGen models conditioned on text, or "
            f"on text and melody, can be trained: {', '.join(SHORT_NAMES)}"
        )
    transformer, has_melody = cfg.transformer_lm, len(conditioners) == 2
    fused = {"prepend": ["self_wav", name] if has_melody else [], "cross": [name]}
    if has_melody:
        fused["cross"] = []
    unlike_published = {
        "its conditions are not fused as the published models'": any(
            list(cfg.fuser[way]) != fused.get(way, [])
            for way in ("prepend", "cross", "sum", "input_interpolate")
        ),
        "T5 was fine-tuned": cfg.conditioners[name].t5.finetune,
        "torch's own attention": not (transformer.memory_efficient or transformer.custom),
        "attention_as_float32": transformer.attention_as_float32,
        "qk_layer_norm_cross": transformer.get("qk_layer_norm_cross", False),
    }
    for what, is_so in unlike_published.items():
        if is_so:
            raise UserError(f"--model_id={model_id}: not a model this can train: {what}")


def text_name(cfg: DictConfig) -> str | None:
    """What a config calls its condition on text."""
    conditioners = ((name, c.get("model")) for name, c in cfg.conditioners.items())
    return next((name for name, model in conditioners if model == "t5"), None)
