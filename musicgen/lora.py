"""LoRA on MusicGen's language model: put on and saved with peft, merged into plain weights.

Letters: r rank; an adapted weight W [out, in] becomes W + scale * scaling * B [out, r] A [r, in].
"""

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import nn

import files
from errors import UserError
from musicgen.attention import adapted_linear

FILES = ("adapter_config.json", "adapter_model.safetensors")  # peft's names
if TYPE_CHECKING:  # slow to import, and only for LoRA
    from peft import LoraConfig, PeftModel
LAYERS = r"transformer\.layers\.\d+\.(linear1|linear2|(self_attn|cross_attention)\.out_proj)"
ENDS = r"emb\.\d+|linears\.\d+"  # token embeddings and output heads
FUSED = ["self_attn.in_proj_weight", "cross_attention.in_proj_weight"]  # Q, K and V


class Adapter(NamedTuple):
    """The tensors of an adapter by peft's names, and its config."""

    tensors: dict[str, torch.Tensor]
    config: "LoraConfig"


def attach(
    lm: Any,
    *,
    rank: int,
    alpha: float,
    dropout: float = 0.0,
    ends: bool = False,
    base: str | None = None,
) -> "PeftModel":
    """Freeze `lm` and put new adapters on it, in place, on the device of its weights.

    They start without effect. `base` is the model's name for the adapter's config. The adapters
    are float32; the frozen weights stay as they are.
    Errors: UserError if the attention is of a kind that attention.py doesn't compute.
    """
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora import LoraLayer

    attention = lm.transformer.layers[0].self_attn
    unlike_published = {
        "rotary positions": attention.rope is not None,
        "past_context": attention.past_context is not None,
        "kv_repeat": attention.kv_repeat != 1,
        "qk_layer_norm": attention.qk_layer_norm,
        "no memory_efficient attention": not attention.memory_efficient,
    }
    for what, is_so in unlike_published.items():
        if is_so:
            raise UserError(f"--lora_rank: not for this model: {what}; leave it out")
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]  # scaling = alpha / r; any number will do
        target_modules=f"{LAYERS}|{ENDS}" if ends else LAYERS,
        target_parameters=FUSED,
    )
    model = get_peft_model(lm, config)
    config.base_model_name_or_path = base  # not before: peft knows its own models' names only
    for layer in lm.modules():
        if not isinstance(layer, LoraLayer):
            continue
        if isinstance(layer.get_base_layer(), nn.Linear):
            layer.forward = functools.partial(adapted_linear, layer)  # type: ignore[attr-defined]
        if dropout:  # peft's own flag for it excludes target_parameters; attention.py applies it
            layer.lora_dropout["default"] = nn.Dropout(dropout).train(lm.training)
    return model


def save(model: "PeftModel", folder: Path) -> None:
    """Write the adapter as peft does; each file whole or not at all."""
    folder.mkdir(exist_ok=True)
    tensors, config = parts(model)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    config_name, tensors_name = FILES
    files.write_bytes(folder / tensors_name, to_bytes(tensors, metadata={"format": "pt"}))
    files.write_json(folder / config_name, {**config.to_dict(), "inference_mode": True})


def merge(
    state: dict[str, torch.Tensor],
    adapter: Adapter,
    scale: float = 1.0,
    *,
    in_place: bool = False,
) -> None:
    """Add an adapter to the weights of a plain language model's state dict.

    The sums are taken in float32; they replace the entries of `state`, or, one after the other
    and in their own number format, the values of its tensors if `in_place`.
    Errors: UserError if the adapter is of a model of another size.
    """
    tensors, config = adapter
    scaling = scale * config.lora_alpha / (config.r**0.5 if config.use_rslora else config.r)
    for key, inner in tensors.items():
        if scale == 0 or not _is_inner(key):
            continue
        outer = tensors[_partner(key)].detach().float()
        delta = scaling * (outer @ inner.detach().float())
        if "lora_embedding" in key:
            delta = delta.T
        name = _weight_name(key)
        weight = state.get(name)
        if weight is None or weight.shape != delta.shape:
            raise UserError(
                f"the adapter does not fit the model at {name}: give the --model_id that it was "
                "trained on"
            )
        total = weight.float() + delta.to(weight.device)
        if in_place:
            weight.copy_(total)
        else:
            state[name] = total


def parts(model: "PeftModel") -> Adapter:
    """The tensors and the LoraConfig of adapters that are in training, as `merge` takes them."""
    from peft import LoraConfig, get_peft_model_state_dict

    config = model.peft_config["default"]
    assert isinstance(config, LoraConfig)
    return Adapter(get_peft_model_state_dict(model, save_embedding_layers=False), config)


def read(folder: str) -> Adapter:
    """The tensors and the LoraConfig of an adapter in peft's format. Errors: UserError."""
    from peft import LoraConfig

    path = Path(folder)
    missing = [name for name in FILES if not (path / name).is_file()]
    if missing:
        raise UserError(
            f"--lora={folder}: no LoRA adapter: {' and '.join(missing)} not found in it; give the "
            "lora_final folder that run.py left"
        )
    try:
        config = LoraConfig.from_pretrained(folder)
        if not isinstance(config, LoraConfig):
            raise ValueError("of another kind than LoRA")
        tensors = load_file(path / FILES[1])
    except (SafetensorError, OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"--lora={folder}: can't be read ({type(error).__name__}: {error}); it is damaged"
        ) from None
    others = ("use_dora", "lora_bias", "rank_pattern", "alpha_pattern", "modules_to_save")
    beyond = [name for name in others if getattr(config, name)]
    pairs = [key for key in tensors if _is_inner(key) and _partner(key) in tensors]
    if beyond or not pairs or len(tensors) != 2 * len(pairs):
        what = ", ".join(beyond) or "the names of its tensors"
        raise UserError(f"--lora={folder}: is not plain LoRA of one rank ({what})")
    return Adapter(tensors, config)


def _is_inner(key: str) -> bool:  # A, not B
    return "lora_A" in key or "lora_embedding_A" in key


def _partner(key: str) -> str:
    return key.replace("lora_A", "lora_B").replace("lora_embedding_A", "lora_embedding_B")


def _weight_name(key: str) -> str:
    """An adapter's tensor -> the weight that it changes.

    Example: base_model.model.transformer.layers.0.self_attn.base_layer.out_proj.lora_A.weight
    -> transformer.layers.0.self_attn.out_proj.weight
    """
    path = key.removeprefix("base_model.model.").replace("base_layer.", "")
    owner = path[: path.index(".lora_")]
    is_fused = owner.endswith(("self_attn", "cross_attention"))
    return f"{owner}.in_proj_weight" if is_fused else f"{owner}.weight"
