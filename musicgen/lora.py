"""LoRA on MusicGen's language model: attached and saved with peft, merged into plain weights.

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
if TYPE_CHECKING:  # slow to import, and only LoRA needs it
    from peft import LoraConfig, PeftModel
LAYERS = r"transformer\.layers\.\d+\.(linear1|linear2|(self_attn|cross_attention)\.out_proj)"
EMBEDDINGS = r"emb\.\d+|linears\.\d+"  # token embeddings and output heads
FUSED = ["self_attn.in_proj_weight", "cross_attention.in_proj_weight"]  # Q, K and V


class Adapter(NamedTuple):
    """An adapter's config, and its tensors by peft's names."""

    tensors: dict[str, torch.Tensor]
    config: "LoraConfig"


def attach(
    lm: Any,
    *,
    rank: int,
    alpha: float,
    dropout: float = 0.0,
    embeddings: bool = False,
    base: str | None = None,
) -> "PeftModel":
    """Freeze `lm` and attach new adapters to it, in place, on the device of its weights.

    They have no effect until trained. `base` is the model's name for the adapter's config;
    `embeddings` adapts token embeddings and output heads too. The adapters are float32; the
    frozen weights keep their format.
    Raises: UserError if the attention is of a kind that attention.py doesn't compute.
    """
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora import LoraLayer

    attention = lm.transformer.layers[0].self_attn
    unsupported = {
        "rotary positions": attention.rope is not None,
        "past_context": attention.past_context is not None,
        "kv_repeat": attention.kv_repeat != 1,
        "qk_layer_norm": attention.qk_layer_norm,
        "attention that is not memory_efficient": not attention.memory_efficient,
    }
    for what, is_so in unsupported.items():
        if is_so:
            raise UserError(
                f"--lora_rank: does not work with {what}, which this model has; leave it out"
            )
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]  # scaling = alpha / r; need not be an integer
        target_modules=f"{LAYERS}|{EMBEDDINGS}" if embeddings else LAYERS,
        target_parameters=FUSED,
    )
    model = get_peft_model(lm, config)
    config.base_model_name_or_path = base  # set afterwards: peft accepts only names that it knows
    for layer in lm.modules():
        if not isinstance(layer, LoraLayer):
            continue
        if isinstance(layer.get_base_layer(), nn.Linear):
            layer.forward = functools.partial(adapted_linear, layer)  # type: ignore[attr-defined]
        if dropout:  # peft's own option excludes target_parameters; attention.py applies this
            layer.lora_dropout["default"] = nn.Dropout(dropout).train(lm.training)
    return model


def save(model: "PeftModel", folder: Path) -> None:
    """Write the adapter in peft's format, each file whole or not at all."""
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
    """Add an adapter to the weights in a plain language model's state dict.

    Sums are taken in float32 and replace the entries of `state`. If `in_place`, they go into its
    tensors instead, rounded to their number format after each adapter.
    Raises: UserError if the adapter belongs to a model of another size.
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
    """Return the adapter of a model in training, for `merge`."""
    from peft import LoraConfig, get_peft_model_state_dict

    config = model.peft_config["default"]
    assert isinstance(config, LoraConfig)
    return Adapter(get_peft_model_state_dict(model, save_embedding_layers=False), config)


def read(folder: str) -> Adapter:
    """Read an adapter in peft's format. Raises: UserError."""
    from peft import LoraConfig

    path = Path(folder)
    missing = [name for name in FILES if not (path / name).is_file()]
    if missing:
        raise UserError(
            f"--lora={folder}: is not a LoRA adapter: it has no {' and no '.join(missing)}; give "
            "the lora_final folder that run.py wrote"
        )
    try:
        config = LoraConfig.from_pretrained(folder)
        if not isinstance(config, LoraConfig):
            raise ValueError("not LoRA")
        tensors = load_file(path / FILES[1])
    except (SafetensorError, OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"--lora={folder}: can't be read ({type(error).__name__}: {error}); it is damaged"
        ) from None
    others = ("use_dora", "lora_bias", "rank_pattern", "alpha_pattern", "modules_to_save")
    beyond = [name for name in others if getattr(config, name)]
    pairs = [key for key in tensors if _is_inner(key) and _partner(key) in tensors]
    if beyond or not pairs or len(tensors) != 2 * len(pairs):
        what = ", ".join(beyond) or "unknown tensors"
        raise UserError(f"--lora={folder}: is not plain LoRA of one rank: it has {what}")
    return Adapter(tensors, config)


def _is_inner(key: str) -> bool:  # A, not B
    return "lora_A" in key or "lora_embedding_A" in key


def _partner(key: str) -> str:
    return key.replace("lora_A", "lora_B").replace("lora_embedding_A", "lora_embedding_B")


def _weight_name(key: str) -> str:
    """Return the name of the weight that an adapter's tensor changes.

    Example: base_model.model.transformer.layers.0.self_attn.base_layer.out_proj.lora_A.weight
    -> transformer.layers.0.self_attn.out_proj.weight
    """
    path = key.removeprefix("base_model.model.").replace("base_layer.", "")
    owner = path[: path.index(".lora_")]
    is_fused = owner.endswith(("self_attn", "cross_attention"))
    return f"{owner}.in_proj_weight" if is_fused else f"{owner}.weight"
