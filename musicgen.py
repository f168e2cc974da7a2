"""audiocraft in one place: load a MusicGen, audio -> codes, captions -> embeddings, token loss.

Letters: B batch, C channels, K codebooks, T token frames, S pattern steps, L text tokens,
F chroma frames, P pitch classes, D model width, card = codebook size.
"""

import contextlib
import functools
import hashlib
import importlib.machinery
import json
import logging
import os
import sys
import types
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint as recomputed

import captions
import placeholder
import published
from flags import UserError, is_out_of_memory
from published import SHORT_NAMES


def _stand_in_for_xformers() -> None:
    """Let audiocraft import without xformers, which many systems have no wheels for.

    audiocraft's attention runs on torch; of xformers it then uses only these three names.
    """
    ops = types.ModuleType("xformers.ops")
    ops.unbind = torch.unbind  # type: ignore[attr-defined]
    ops.LowerTriangularMask = type("LowerTriangularMask", (), {})  # type: ignore[attr-defined]
    ops.memory_efficient_attention = None  # type: ignore[attr-defined]
    package = types.ModuleType("xformers")
    package.ops = ops  # type: ignore[attr-defined]
    for module in (package, ops):
        module.__spec__ = importlib.machinery.ModuleSpec(module.__name__, None)
        sys.modules.setdefault(module.__name__, module)


@contextlib.contextmanager
def _without(name: str) -> Iterator[None]:
    """Importing `name` fails inside the block, as if it were not installed."""
    before = sys.modules.get(name)
    sys.modules[name] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[name]
        if before is not None:
            sys.modules[name] = before


_stand_in_for_xformers()
# flashy, a part of audiocraft, would import wandb, which is for --use_wandb=1 alone.
with warnings.catch_warnings(), _without("wandb"):
    warnings.simplefilter("ignore")  # of the libraries' own making; nothing a user can act on
    from audiocraft.models import MusicGen, builders
    from audiocraft.models.encodec import CompressionModel, HFEncodecCompressionModel
    from audiocraft.models.lm import LMModel
    from audiocraft.modules.conditioners import (
        ConditioningAttributes,
        T5Conditioner,
        WavCondition,
    )
    from huggingface_hub import snapshot_download
    from omegaconf import DictConfig, OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from safetensors import SafetensorError
    from transformers import EncodecModel as HFEncodecModel
    from transformers import T5Config
    from transformers.utils import logging as transformers_logging

    import attention  # noqa: F401  (changes audiocraft's)
    from melody import Melodies, MelodyConditioner

# For the other files, which get audiocraft with the shim above only.
__all__ = ["ConditioningAttributes", "Melodies", "MelodyConditioner", "MusicGen", "WavCondition"]

FOLDERS = {"demo": Path(__file__).parent / "demo" / "model"}
WEIGHTS = ["state_dict.bin", "compression_state_dict.bin"]
HF_FILES = ["*.json", "*.model", "model.safetensors"]
HF_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
T5_NEEDS = [("config.json",), HF_WEIGHTS, ("tokenizer.json", "spiece.model")]
DAMAGES = (OmegaConfBaseException, SafetensorError)
CODEC_NEEDS = [("config.json",), HF_WEIGHTS]


def load(
    model_id: str,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    layers_dtype: torch.dtype | None = None,
) -> MusicGen:
    """Load a MusicGen by short name, Hugging Face id or folder; offline if it is on disk.

    A folder may hold its text encoder in `t5/`; else, and for ids, the Hugging Face cache has it.
    `dtype` is the language model's number format, `layers_dtype` another one for the matrices of
    its transformer layers, nearly all of its weights.
    audiocraft's own `MusicGen.get_pretrained` reads the same files, but asks the hub first, has
    no say in the number format, and loads demucs with every melody model.
    Errors: UserError when it is not there, can't be downloaded, or is of another family.
    """
    folder = _find_model(model_id)
    with warnings.catch_warnings(), _quiet_transformers(), _told_as_damage(model_id):
        warnings.simplefilter("ignore")
        lm = _load_lm(folder, model_id, device, dtype, layers_dtype or dtype)
        codec = _load_codec(folder, model_id, device)
    return _Model(model_id, codec, lm.eval())


def load_codec(model_id: str, device: torch.device) -> MusicGen:
    """A MusicGen that only encodes: its EnCodec, without text encoder and language model.

    Errors: UserError, as for `load`.
    """
    folder = _find_model(model_id)
    with warnings.catch_warnings(), _quiet_transformers(), _told_as_damage(model_id):
        warnings.simplefilter("ignore")
        cfg = OmegaConf.create(_read_package(folder / WEIGHTS[0], model_id)["xp.cfg"])
        _check_supported(cfg, model_id)
        lm: Any = nn.Linear(1, 1, device=device)  # stands in: MusicGen asks it for its device
        lm.cfg, lm.card, lm.num_codebooks = cfg, cfg.transformer_lm.card, cfg.transformer_lm.n_q
        return _Model(model_id, _load_codec(folder, model_id, device), lm)


@contextlib.contextmanager
def _told_as_damage(model_id: str) -> Iterator[None]:
    """Whatever goes wrong inside with a model's files is a UserError."""
    try:
        yield
    except (*DAMAGES, KeyError, RuntimeError, OSError, ValueError) as error:
        if is_out_of_memory(error):
            raise
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"--model_id={model_id}: is no MusicGen that can be loaded "
            f"({type(error).__name__}: {reason}); download or export it again"
        ) from error


class _Model(MusicGen):
    """MusicGen whose constructor also takes models of short pieces (its own wants over 18 s)."""

    def set_generation_params(self, **params: Any) -> None:  # type: ignore[override]
        super().set_generation_params(**{"extend_stride": 0.6 * self.max_duration, **params})


def choose_device(name: str) -> torch.device:
    """What --device asks for; auto = CUDA, else MPS, else the CPU. Errors: UserError."""
    has = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if name == "auto":
        name = next(kind for kind in has if has[kind])
    if not has[name]:
        raise UserError(
            f"--device={name}: torch sees no such device on this machine; leave the flag out, or "
            "install the torch that fits its driver"
        )
    return torch.device(name)


def load_weights(lm: LMModel, path: str) -> None:
    """Load an lm_*.pt into a model. Errors: UserError if it is damaged or of another model."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load has no class for "this is not my file"
        raise UserError(
            f"--weights_path={path} can't be read as weights ({type(error).__name__}); give the "
            "lm_final.pt or lm_<step>.pt that run.py left"
        ) from None
    try:
        lm.load_state_dict(state)
    except (RuntimeError, TypeError, AttributeError) as error:
        reason = str(error).strip().splitlines()
        raise UserError(
            f"--weights_path={path} does not fit the model: give the --model_id that it was tuned "
            f"from ({' '.join(line.strip() for line in reason[:2])[:300]})"
        ) from None


def portable_id(model_id: str) -> str:
    """What names the same model from another working folder: a name, an id or a full path."""
    folder = Path(model_id).expanduser()
    is_name = model_id in SHORT_NAMES or model_id in FOLDERS
    return model_id if is_name or not folder.is_dir() else str(folder.resolve())


def _find_model(model_id: str) -> Path:
    path = FOLDERS.get(model_id, Path(model_id).expanduser())
    if model_id in SHORT_NAMES or not path.is_dir():
        if model_id.startswith(("/", ".", "~")) or model_id.count("/") > 1 or path.exists():
            raise UserError(f"--model_id={model_id}: no such folder")
        for word, reason in published.REFUSED.items():
            if word in f"musicgen-{model_id}".lower():
                raise UserError(f"--model_id={model_id} can't be trained: {reason}")
        repo = SHORT_NAMES.get(model_id, model_id)
        needs = [(name,) for name in WEIGHTS]
        path = _hub_folder(repo, WEIGHTS, needs, os.environ.get("AUDIOCRAFT_CACHE_DIR"))
    missing = [name for name in WEIGHTS if not (path / name).is_file()]
    if missing:
        raise UserError(
            f"--model_id={model_id}: no MusicGen in audiocraft's exported format: "
            f"{' and '.join(missing)} not found in it"
        )
    return path


def _hub_folder(
    repo: str, patterns: list[str], needs: Sequence[tuple[str, ...]], cache_dir: str | None = None
) -> Path:
    """The local snapshot of a Hugging Face repository; downloaded only if it is not complete.

    `needs` are the files that make it complete, each with its alternatives.
    """
    fetch = functools.partial(snapshot_download, repo, allow_patterns=patterns, cache_dir=cache_dir)
    try:
        path = Path(fetch(local_files_only=True))
        if not _lacking(path, needs):
            return path
    except (OSError, ValueError):  # not in the cache, or no valid id: the hub's answer says which
        pass
    try:
        path = Path(fetch())
        lacks = _lacking(path, needs)
        reason = f"it has no {lacks}"
    except Exception as error:  # offline, no such id, no access: each a class of its own
        lines = str(error).strip().splitlines() or ["no reason given"]
        lacks, reason = "all", f"{type(error).__name__}: {lines[0]}"
    if lacks:
        raise UserError(
            f"{repo} is not in the Hugging Face cache and could not be downloaded ({reason}).\n"
            "Connect to the network once, or give --model_id a folder with "
            f"{' and '.join(WEIGHTS)} and its text encoder in t5/, or one of "
            f"{', '.join([*FOLDERS, *SHORT_NAMES])}."
        )
    return path


def _lacking(folder: Path, needs: Sequence[tuple[str, ...]]) -> str:
    """The first file that a folder needs and has not, or an empty string."""
    missing = (names for names in needs if not any((folder / name).exists() for name in names))
    return " or ".join(next(missing, ()))


def _read_package(path: Path, model_id: str) -> dict[str, Any]:
    try:
        package = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch.load has no class for "this is not my file"
        raise UserError(
            f"--model_id={model_id}: {path.name} can't be read ({type(error).__name__}); "
            "it is damaged or no torch file: download or export it again"
        ) from None
    exported = isinstance(package, dict) and {"xp.cfg", "best_state"} <= package.keys()
    named_codec = isinstance(package, dict) and path.name == WEIGHTS[1] and "pretrained" in package
    if not exported and not named_codec:
        raise UserError(
            f"--model_id={model_id}: {path.name} is not in audiocraft's exported format"
        )
    return package


def _check_supported(cfg: DictConfig, model_id: str) -> None:
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


def read_lm_state(model_id: str) -> dict[str, torch.Tensor]:
    """The language model's weights as they are on disk, on the CPU. Errors: UserError."""
    folder = _find_model(model_id)
    return _read_package(folder / WEIGHTS[0], model_id)["best_state"]


def configs(model_id: str) -> tuple[DictConfig, DictConfig, T5Config]:
    """The configs of language model, codec and text encoder, without loading weights.

    Of a published model they are known, also if it is not on disk. Errors: UserError.
    """
    codec: Any = OmegaConf.create(published.CODEC_CONFIG)
    names = {repo: name for name, repo in SHORT_NAMES.items()}
    name = names.get(model_id, model_id)
    if name in SHORT_NAMES:
        return published.lm_config(name), codec, T5Config(**published.T5["t5-base"])
    folder = _find_model(model_id)
    with _told_as_damage(model_id):
        lm: Any = OmegaConf.create(_read_package(folder / WEIGHTS[0], model_id)["xp.cfg"])
        _check_supported(lm, model_id)
        package = _read_package(folder / WEIGHTS[1], model_id)
        if "xp.cfg" in package:  # else the name of the published one
            codec = OmegaConf.create(package["xp.cfg"])
        t5_name = lm.conditioners[text_name(lm)].t5.name
        if (folder / "t5" / "config.json").exists():
            t5 = T5Config.from_pretrained(folder / "t5")
        elif t5_name in published.T5:
            t5 = T5Config(**published.T5[t5_name])
        else:
            t5 = T5Config.from_pretrained(_hub_folder(t5_name, HF_FILES, T5_NEEDS))
    return lm, codec, t5


def _load_lm(
    folder: Path,
    model_id: str,
    device: torch.device,
    dtype: torch.dtype,
    layers_dtype: torch.dtype,
) -> LMModel:
    package = _read_package(folder / WEIGHTS[0], model_id)
    cfg = OmegaConf.create(package["xp.cfg"])
    _check_supported(cfg, model_id)
    cfg.device = str(device)
    cfg.dtype = str(layers_dtype).removeprefix("torch.")
    name = text_name(cfg)
    local = folder / "t5"
    if not local.is_dir():
        local = _hub_folder(cfg.conditioners[name].t5.name, HF_FILES, T5_NEEDS)
    elif lacks := _lacking(local, T5_NEEDS):
        raise UserError(f"--model_id={model_id}: its text encoder t5/ has no {lacks}")
    # audiocraft takes a text encoder only by a name on its list, and then asks the hub for it.
    T5Conditioner.MODELS.append(str(local))
    T5Conditioner.MODELS_DIMS[str(local)] = json.loads((local / "config.json").read_text())[
        "d_model"
    ]
    published = cfg.conditioners[name].t5.copy()
    cfg.conditioners[name].t5.name = str(local)
    cfg.conditioners[name].t5.autocast_dtype = None  # it takes no device like cuda:0
    try:
        lm = builders.get_lm_model(cfg)
    finally:
        T5Conditioner.MODELS.remove(str(local))
    cfg.conditioners[name].t5 = published
    conditioner = text_conditioner(lm)
    off = torch.autocast(device.type, enabled=False)
    conditioner.autocast = off  # type: ignore[assignment]
    conditioner.word_dropout = 0.0  # on in the published configs; here the dataset does it
    if layers_dtype != dtype:
        all_but_matrices_to(lm, dtype)
    lm.load_state_dict(package["best_state"])
    lm.cfg = cfg
    return lm


def all_but_matrices_to(lm: LMModel, dtype: torch.dtype) -> None:
    """Bring to `dtype` what is not a matrix of the transformer's layers: 4 % of small's weights."""
    matrices = {p for p in lm.transformer.layers.parameters() if p.ndim > 1}
    for parameter in set(lm.parameters()) - matrices:
        parameter.data = parameter.data.to(dtype)


def _load_codec(folder: Path, model_id: str, device: torch.device) -> CompressionModel:
    package = _read_package(folder / WEIGHTS[1], model_id)
    if "pretrained" in package:  # a name instead of weights, as in the stereo models
        local = folder / "encodec"
        if not local.is_dir():
            local = _hub_folder(package["pretrained"], HF_FILES, CODEC_NEEDS)
        bare: Any = HFEncodecModel.from_pretrained(local)
        bare.cfg_text = (local / "config.json").read_text()
        codec: CompressionModel = HFEncodecCompressionModel(bare).to(device)
    else:
        cfg = OmegaConf.create(package["xp.cfg"])
        cfg.device = str(device)
        codec = builders.get_compression_model(cfg)
        codec.load_state_dict(package["best_state"])
        codec.cfg_text = package["xp.cfg"]
    return codec.eval().requires_grad_(False)


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """No progress bars and advice while a text encoder loads."""
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        transformers_logging.enable_progress_bar()


def text_conditioner(lm: LMModel) -> T5Conditioner:
    """The one text conditioner of a model that `load` has accepted."""
    conditioners = lm.condition_provider.conditioners.values()
    return next(c for c in conditioners if isinstance(c, T5Conditioner))


def melody_conditioner(lm: LMModel) -> MelodyConditioner | None:
    """That of a melody model."""
    conditioners = lm.condition_provider.conditioners.values()
    return next((c for c in conditioners if isinstance(c, MelodyConditioner)), None)


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Without waiting for CUDA. MPS may read a temporary after it is freed, so there it waits."""
    return tensor.to(device, non_blocking=device.type == "cuda")


@torch.no_grad()
def encode_audio(model: MusicGen, wav: torch.Tensor) -> torch.Tensor:
    """wav `[B, C, samples]` at the model's rate -> codes `[B, K, T]`; in float32, no autocast.

    On a GPU as one batch. On the CPU, where that is no faster, clip by clip: there a batch rounds
    differently from a single clip, and of a nearly tied code another one wins.
    """
    parts = wav.split(1) if wav.device.type == "cpu" else [wav]
    encoded = [model.compression_model.encode(part) for part in parts]
    assert all(scale is None for _, scale in encoded), "MusicGen's codecs don't renormalize"
    return torch.cat([codes for codes, _ in encoded])


def move(model: MusicGen, half: str, device: torch.device | str) -> None:
    """Move EnCodec's "encoder", unused with kept tokens, or its "decoder", used for samples."""
    for module in getattr(_codec(model), half).to(device).modules():
        weight = module.__dict__.get("weight")  # weight_norm keeps there what it last computed
        if isinstance(weight, torch.Tensor):
            module.weight = weight.to(device)


def codec_hash(model: MusicGen) -> str:
    """Of what the codes depend on: EnCodec's weights and config."""
    codec = _codec(model)
    digest = hashlib.sha256(codec.cfg_text.encode())
    for name, tensor in codec.state_dict().items():
        digest.update(name.encode() + tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _codec(model: MusicGen) -> Any:
    codec: Any = model.compression_model
    while not hasattr(codec, "decoder"):  # around it: for stereo, for Hugging Face's
        codec = codec.model
    return codec


class TextEncoder:
    """Captions -> T5's hidden states, computed once per distinct caption, in float32.

    Each caption is encoded by itself, so that its embedding doesn't depend on its batch. The
    empty caption is the null condition of classifier-free guidance: zeros, fully masked. (T5 on a
    fully masked input is NaN in half precision, and NaN * 0 stays NaN.)

    Captions with the new word change with its vector: they are computed each time, and with
    gradients if those are enabled.
    """

    def __init__(
        self, lm: LMModel, max_cached: int = 10_000, new_word: placeholder.NewWord | None = None
    ) -> None:
        self.conditioner = text_conditioner(lm)
        self.new_word = new_word
        self._cached = functools.lru_cache(max_cached)(torch.no_grad()(self._encode))

    def _hidden(self, caption: str) -> torch.Tensor:
        if self.new_word and captions.has(self.new_word.word, caption):
            return self._encode(caption)
        return self._cached(caption)

    def _encode(self, caption: str) -> torch.Tensor:  # [L, width of T5], on the CPU
        conditioner = self.conditioner
        inputs = conditioner.t5_tokenizer(
            [caption], return_tensors="pt", truncation=True, max_length=captions.MAX_TOKENS
        ).to(conditioner.t5.device)
        hidden = conditioner.t5(
            input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]
        ).last_hidden_state[0]
        return hidden.float().cpu()

    def __call__(
        self, captions: list[str], device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden states `[B, L, width of T5]`, zero-padded, and mask `[B, L]` (1 = text)."""
        null = torch.zeros(0, self.conditioner.dim)
        hidden = [self._hidden(caption) if caption else null for caption in captions]
        length = max(1, *(len(h) for h in hidden))
        padded = torch.stack([F.pad(h, (0, 0, 0, length - len(h))) for h in hidden])
        mask = torch.tensor([[float(i < len(h)) for i in range(length)] for h in hidden])
        text = to_device(padded, device)
        if self.new_word and torch.is_grad_enabled():
            # If no caption has it: a gradient of zero, which DDP waits for.
            text = text + 0 * self.new_word.vector.sum()
        return text, to_device(mask, device)


class TokenLoss(nn.Module):
    """The forward pass that is trained: the one module for DDP, FSDP or torch.compile to wrap.

    Gives what audiocraft's `LMModel.compute_predictions` and a masked cross entropy per codebook
    give, but in pattern space and one codebook at a time: no [B, card, K, T] logits are gathered
    and scattered. Padded frames are special tokens, as in audiocraft's solver with its
    `padding_with_special_token`.
    """

    def __init__(self, lm: LMModel) -> None:
        super().__init__()
        self.lm = lm

    def forward(
        self,
        codes: torch.Tensor,  # [B, K, T]
        valid_frames: torch.Tensor,  # [B]
        text: torch.Tensor,  # [B, L, width of T5]
        text_mask: torch.Tensor,  # [B, L]
        melody: torch.Tensor | None = None,  # [B, F, P], for melody models; None = no melody
    ) -> torch.Tensor:
        """Sum of cross entropies (nats) over each clip's valid tokens, `[B, K]`."""
        padding = torch.arange(codes.shape[-1], device=codes.device) >= valid_frames[:, None]
        codes = codes.masked_fill(padding[:, None], self.lm.special_token_id)  # padding: [B, T]
        sequence = _interleave(self.lm, codes, self.lm.special_token_id)  # [B, K, T] -> [B, K, S]
        return self.of_sequence(sequence, text, text_mask, melody)

    def of_sequence(
        self,
        sequence: torch.Tensor,
        text: torch.Tensor,
        text_mask: torch.Tensor,
        melody: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The same for codes `[B, K, S]` in the order in which the model reads them."""
        lm = self.lm
        inputs, targets = sequence[..., :-1], sequence[..., 1:]

        x = sum(embed(inputs[:, k]) for k, embed in enumerate(lm.emb))  # [B, S - 1, D]
        condition = text_conditioner(lm).output_proj(text) * text_mask[..., None]  # [B, L, D]
        if conditioner := melody_conditioner(lm):
            if melody is None:
                melody = conditioner.none().expand(len(x), -1, -1)
            melody = conditioner.output_proj(melody)  # [B, F, D]
            x, steps = _behind_prefix(torch.cat([melody, condition], dim=1), text_mask, x)
            x = lm.transformer(x)
            x = x.gather(1, steps.expand(-1, -1, x.shape[-1]))
        else:
            x = lm.transformer(x, cross_attention_src=(condition, text_mask))
        if lm.out_norm is not None:
            x = lm.out_norm(x)

        # Logits are computed again in the backward pass: kept in float32, those of all codebooks
        # of small would take 49 MB for each clip of 30 s.
        losses = [
            recomputed(self._codebook_loss, head, x, targets[:, k], use_reentrant=False)
            for k, head in enumerate(lm.linears)
        ]
        return torch.stack(losses, dim=1)

    def _codebook_loss(
        self, head: nn.Module, x: torch.Tensor, targets: torch.Tensor
    ) -> torch.Tensor:
        """x [B, S - 1, D], targets [B, S - 1] -> [B]."""
        losses = F.cross_entropy(
            head(x).flatten(0, 1),  # [B * (S - 1), card]
            targets.flatten(),
            ignore_index=self.lm.special_token_id,
            reduction="none",
        )
        return losses.view(len(x), -1).sum(1)


def _behind_prefix(
    prefix: torch.Tensor,  # [B, F + L, D]: melody and text
    text_mask: torch.Tensor,  # [B, L]
    x: torch.Tensor,  # [B, S, D]
) -> tuple[torch.Tensor, torch.Tensor]:
    """x behind each clip's own prefix `[B, F + L + S, D]`, and where it is `[B, S, 1]`.

    The padding of short captions goes behind x, where causal attention doesn't see it. So a clip
    is computed as by itself, as a prompt is in generation. No caption is one vector of zeros.
    """
    padding = text_mask.shape[1] - text_mask.sum(1, keepdim=True).long().clamp(min=1)  # [B, 1]
    start = prefix.shape[1] - padding  # of x
    both = torch.cat([prefix, x], dim=1)
    to = torch.arange(both.shape[1], device=x.device).expand(len(x), -1)  # [B, F + L + S]
    source = (to + padding * (to >= start)).clamp(max=both.shape[1] - 1)
    steps = torch.arange(x.shape[1], device=x.device)
    return both.gather(1, source[..., None].expand_as(both)), (start + steps)[..., None]


def token_counts(lm: LMModel, valid_frames: torch.Tensor, frames: int) -> torch.Tensor:
    """How many tokens of each codebook are trained on, `[K]`, for clips of `frames` frames.

    The last frames of delayed codebooks are outside of the pattern's valid steps.
    Example: T = 4, delays [0, 1], all valid: [4, 3].
    """
    index = torch.arange(frames).expand(1, lm.num_codebooks, frames).contiguous()
    sequence = _interleave(lm, index, frames)  # [1, K, S], of frame numbers
    return (sequence < valid_frames.cpu()[:, None, None]).sum((0, 2))


def _interleave(lm: LMModel, codes: torch.Tensor, special: int) -> torch.Tensor:
    pattern = lm.pattern_provider.get_pattern(codes.shape[-1])
    return pattern.build_pattern_sequence(codes, special, keep_only_valid_steps=True)[0]


builders.ChromaStemConditioner = MelodyConditioner  # type: ignore
for _library in ("audiocraft", "bitsandbytes"):
    logging.getLogger(_library).setLevel(logging.ERROR)
