"""A model's configs: known for the published models, read and checked for others."""

from typing import Any

from omegaconf import DictConfig, OmegaConf
from transformers import T5Config

from errors import UserError
from musicgen import published
from musicgen.hub import (
    HF_FILES,
    T5_NEEDS,
    WEIGHTS,
    damage_as_user_error,
    find_model,
    hub_folder,
    read_package,
)
from musicgen.published import SHORT_NAMES


def configs(model_id: str) -> tuple[DictConfig, DictConfig, T5Config]:
    """Return the configs of language model, codec and text encoder without loading weights.

    A published model's are built in, so it need not be on disk. Raises: UserError.
    """
    codec: Any = OmegaConf.create(published.CODEC_CONFIG)
    names = {repo: name for name, repo in SHORT_NAMES.items()}
    name = names.get(model_id, model_id)
    if name in SHORT_NAMES:
        return published.lm_config(name), codec, T5Config(**published.T5["t5-base"])
    folder = find_model(model_id)
    with damage_as_user_error(model_id):
        lm: Any = OmegaConf.create(read_package(folder / WEIGHTS[0], model_id)["xp.cfg"])
        check_supported(lm, model_id)
        package = read_package(folder / WEIGHTS[1], model_id)
        if "xp.cfg" in package:  # otherwise it names the published codec
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
    """Raise UserError if a model can't be trained here."""
    conditioners = {name: of.model for name, of in conditioner_configs(cfg).items()}
    name = text_name(cfg)
    families = ({name: "t5"}, {"self_wav": "chroma_stem", name: "t5"})
    if cfg.lm_model != "transformer_lm" or conditioners not in families:
        raise UserError(
            f"--model_id={model_id}: is a {cfg.lm_model} conditioned on "
            f"{', '.join(conditioners) or 'nothing'}; only MusicGen models conditioned on text, or "
            f"on text and melody, can be trained: {', '.join(SHORT_NAMES)}"
        )
    transformer, has_melody = cfg.transformer_lm, len(conditioners) == 2
    # As sets: audiocraft puts the text before the sequence, then the melody, in whatever order.
    fused = {"prepend": {"self_wav", name}} if has_melody else {"cross": {name}}
    unsupported = {
        "its conditions are not fused as the published models' are": any(
            set(cfg.fuser[way]) != fused.get(way, set())
            for way in ("prepend", "cross", "sum", "input_interpolate")
        ),
        "T5 was fine-tuned": cfg.conditioners[name].t5.finetune,
        "it uses torch's own attention": not (
            transformer.get("memory_efficient") or transformer.get("custom")
        ),
        "it has attention_as_float32": transformer.get("attention_as_float32"),
        "it has qk_layer_norm_cross": transformer.get("qk_layer_norm_cross"),
    }
    for what, is_so in unsupported.items():
        if is_so:
            raise UserError(f"--model_id={model_id}: this model can't be trained: {what}")


def text_name(cfg: DictConfig) -> str | None:
    """Return the name of a config's text condition."""
    conditioners = conditioner_configs(cfg).items()
    return next((name for name, conditioner in conditioners if conditioner.model == "t5"), None)


def conditioner_configs(cfg: DictConfig) -> dict[str, DictConfig]:
    """Return the configs of a config's conditioners by name.

    `args` beside them holds options of audiocraft's own training, or nothing.
    """
    return {name: of for name, of in (cfg.conditioners or {}).items() if name != "args"}
