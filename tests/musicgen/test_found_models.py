"""Models as people publish them: saved in other ways, with other configs and number formats."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import build_hf_codec, use_hub
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file
from transformers import T5EncoderModel

from errors import UserError
from musicgen import codec, generation, load, sampling
from musicgen.config import configs
from musicgen.hub import WEIGHTS, read_package
from musicgen.loss import TokenLoss
from musicgen.text import TextEncoder, text_conditioner

CPU = torch.device("cpu")


def changed(
    folder: Path,
    copy: Path,
    change: Callable[[Any], Any],
    files: list[str] = WEIGHTS[:1],
    **how: Any,
) -> Path:
    """A copy of a model in which `change(package)` is saved in the files' place."""
    shutil.copytree(folder, copy)
    for name in files:
        package = torch.load(copy / name, weights_only=True)
        torch.save(change(package) or package, copy / name, **how)
    return copy


def with_config(folder: Path, copy: Path, change: Callable[[Any], Any]) -> Path:
    """A copy of a model with the config that `change(config)` leaves."""

    def rewrite(package: Any) -> None:
        cfg = OmegaConf.create(package["xp.cfg"])
        change(cfg)
        package["xp.cfg"] = OmegaConf.to_yaml(cfg)

    return changed(folder, copy, rewrite)


@pytest.fixture(scope="module")
def mono(mono_folder: Path) -> load.Model:
    return load.load_model(str(mono_folder), CPU)


def assert_same(left: load.Model, right: load.Model) -> None:
    ours, theirs = left.lm.state_dict(), right.lm.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert codec.codec_hash(left) == codec.codec_hash(right)


# Its name


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("smal", "small"),
        ("Medium", "medium"),
        ("musicgen-small", "small"),
        ("MusicGen-Stereo-Melody", "stereo-melody"),
        ("stereo_large", "stereo-large"),
        ("facebook/musicgen-smal", "facebook/musicgen-small"),
        ("Facebook/MusicGen-Melody", "facebook/musicgen-melody"),
        ("facebook/audiogen-meduim", "facebook/audiogen-medium"),
    ],
)
def test_a_mistyped_name_is_told_with_the_right_one(name, meant, tmp_path, monkeypatch):
    use_hub(tmp_path, tmp_path, monkeypatch)
    with pytest.raises(UserError) as error:
        load.load_model(name, CPU)
    told = str(error.value)
    assert told.startswith(f"--model_id={name}: ")
    assert told.endswith(f"did you mean {meant}?")
    assert "\n" not in told


@pytest.mark.parametrize("name", ["small", "facebook/musicgen-small", "someone/musicgen-small"])
def test_a_name_that_may_be_right_is_not_corrected(name, tmp_path, monkeypatch):
    use_hub(tmp_path, tmp_path, monkeypatch)
    with pytest.raises(UserError, match="Connect to the network once") as error:
        load.load_model(name, CPU)
    assert "did you mean" not in str(error.value)


def test_an_unlike_name_is_told_with_all_names():
    with pytest.raises(UserError, match="--model_id=waltz: no such model or folder; known names"):
        load.load_model("waltz", CPU)


# How it was saved


@pytest.mark.parametrize("is_zip", [True, False])
def test_a_config_that_was_saved_as_an_object_is_read_as_text(is_zip, mono, mono_folder, tmp_path):
    def as_object(package: Any) -> None:
        package["xp.cfg"] = OmegaConf.create(package["xp.cfg"])
        package["version"] = torch.__version__
        OmegaConf.set_struct(package["xp.cfg"], True)

    how = {"_use_new_zipfile_serialization": is_zip}
    folder = changed(mono_folder, tmp_path / "model", as_object, WEIGHTS, **how)
    for name in WEIGHTS:
        text = torch.load(mono_folder / name, weights_only=True)["xp.cfg"]
        assert read_package(folder / name, "model")["xp.cfg"] == text
    assert_same(load.load_model(str(folder), CPU), mono)


def test_a_file_of_an_old_torch_is_read(mono, mono_folder, tmp_path):
    how = {"_use_new_zipfile_serialization": False}
    folder = changed(mono_folder, tmp_path / "model", lambda package: None, WEIGHTS, **how)
    assert_same(load.load_model(str(folder), CPU), mono)


class Code:
    """An object that runs code while it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("is_zip", [True, False])
@pytest.mark.parametrize("place", ["the config", "in the config", "the version"])
def test_other_objects_are_refused_by_name(place, is_zip, mono_folder, tmp_path):
    def spoil(package: Any) -> None:
        cfg = OmegaConf.create(package["xp.cfg"], flags={"allow_objects": True})
        cfg.seed = Code(tmp_path / "made") if place == "in the config" else 0
        package["xp.cfg"] = Code(tmp_path / "made") if place == "the config" else cfg
        package["version"] = Code(tmp_path / "made") if place == "the version" else "1"

    how = {"_use_new_zipfile_serialization": is_zip}
    folder = changed(mono_folder, tmp_path / "model", spoil, **how)
    with pytest.raises(UserError, match=r"state_dict.bin holds \w+.mkdir, which is refused"):
        load.load_model(str(folder), CPU)
    assert not (tmp_path / "made").exists()


def test_a_config_of_another_kind_is_refused(mono_folder, tmp_path):
    folder = changed(mono_folder, tmp_path / "model", lambda p: {**p, "xp.cfg": 7})
    with pytest.raises(UserError, match="can't be loaded as a MusicGen"):
        load.load_model(str(folder), CPU)


# Its config


def losses(folder: Path) -> torch.Tensor:
    """[B, K] of two clips whose captions differ in length."""
    model = load.load_model(str(folder), CPU)
    codes = torch.arange(2 * model.lm.num_codebooks * 40).reshape(2, -1, 40) % model.lm.card
    text, mask = TextEncoder(model.lm)(["slow piano", "a lively tune with soft drums"], CPU)
    with torch.no_grad():
        return TokenLoss(model.lm)(codes, torch.tensor([40, 25]), text, mask)


def test_the_order_in_which_melody_and_text_are_listed_means_nothing(melody_folder, tmp_path):
    def swap(cfg: Any) -> None:
        cfg.fuser.prepend = ["description", "self_wav"]
        cfg.conditioners = dict(reversed(cfg.conditioners.items()))

    folder = with_config(melody_folder, tmp_path / "model", swap)
    assert torch.equal(losses(folder), losses(melody_folder))
    prompts = ["slow piano", ""]
    made = [
        generation.generate(
            load.load_model(str(f), CPU), prompts[:1], duration_sec=0.2, overlap_sec=0.1, seed=0
        )
        for f in (folder, melody_folder)
    ]
    assert torch.equal(*made)


def without(path: str) -> Callable[[Any], None]:
    """A change that removes a key."""

    def change(cfg: Any) -> None:
        *parents, name = path.split(".")
        for parent in parents:
            cfg = cfg[parent]
        del cfg[name]

    return change


def null(path: str) -> Callable[[Any], None]:
    return lambda cfg: OmegaConf.update(cfg, path, None, force_add=True)


ACCEPTED = {
    "args is null": null("conditioners.args"),
    "args that are unknown": lambda cfg: OmegaConf.update(
        cfg, "conditioners.args", {"drop_desc_p": 0.5, "x": 1}, force_add=True
    ),
    "no attention_as_float32": without("transformer_lm.attention_as_float32"),
    "no qk_layer_norm_cross": without("transformer_lm.qk_layer_norm_cross"),
    "no custom": without("transformer_lm.custom"),
    "no word_dropout": without("conditioners.description.t5.word_dropout"),
    "no stereo": without("interleave_stereo_codebooks"),
    "no tokens": without("tokens"),
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_what_a_model_can_do_without_may_be_missing(name, mono, mono_folder, tmp_path):
    folder = with_config(mono_folder, tmp_path / "model", ACCEPTED[name])
    configs(str(folder))
    assert_same(load.load_model(str(folder), CPU), mono)


REFUSED = {
    "conditioners is null": (null("conditioners"), "conditioned on nothing"),
    "a conditioner is null": (null("conditioners.description"), ""),
    "no kind of conditioner": (without("conditioners.description.model"), "model"),
    "no settings of T5": (without("conditioners.description.t5"), "t5"),
    "prepend is null": (null("fuser.prepend"), ""),
    "no prepend": (without("fuser.prepend"), "prepend"),
    "no attention": (without("transformer_lm.memory_efficient"), "torch's own attention"),
    "no window": (without("dataset"), "dataset"),
    "no kind of model": (without("lm_model"), "lm_model"),
    "no model": (without("transformer_lm"), "transformer_lm"),
    "no width": (without("transformer_lm.dim"), "dim"),
    "unknown size": (lambda cfg: OmegaConf.update(cfg, "transformer_lm.x", 1, force_add=True), "x"),
    "odd heads": (lambda cfg: OmegaConf.update(cfg, "transformer_lm.num_heads", 5), ""),
    "no pattern": (without("codebooks_pattern"), "codebooks_pattern"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_model_needs_is_told_plainly(name, mono_folder, tmp_path):
    change, says = REFUSED[name]
    folder = with_config(mono_folder, tmp_path / "model", change)
    with pytest.raises(UserError) as error:
        load.load_model(str(folder), CPU)
    assert str(error.value).startswith(f"--model_id={folder}: ")
    assert says in str(error.value)


def test_cfg_coef_guides_also_where_the_config_takes_two_steps(mono_folder, tmp_path):
    def two_steps(cfg: Any) -> None:
        cfg.transformer_lm.two_step_cfg = True

    folder = with_config(mono_folder, tmp_path / "model", two_steps)

    def made(folder: Path, cfg_coef: float) -> torch.Tensor:
        options = sampling.Sampling(temperature=0.0, cfg_coef=cfg_coef)
        model = load.load_model(str(folder), CPU)
        how = {"duration_sec": 0.3, "overlap_sec": 1.0, "seed": 0, "sampling": options}
        return generation.generate(model, ["slow piano"], **how)

    assert not torch.equal(made(folder, 1.0), made(folder, 9.0))
    assert torch.equal(made(folder, 9.0), made(mono_folder, 9.0))


# Its number formats


def test_a_text_encoder_stored_in_half_precision_runs_in_float32(mono_folder, tmp_path):
    folder = shutil.copytree(mono_folder, tmp_path / "model")
    t5 = T5EncoderModel.from_pretrained(folder / "t5")
    t5.half().save_pretrained(folder / "t5")
    model = load.load_model(str(folder), CPU)
    assert {p.dtype for p in text_conditioner(model.lm).t5.parameters()} == {torch.float32}
    text, _ = TextEncoder(model.lm)(["slow piano"], CPU)
    assert not torch.equal(text, text.half().float())


def test_a_codec_stored_in_half_precision_runs_in_float32(mono_folder, tmp_path):
    folder = shutil.copytree(mono_folder, tmp_path / "model")
    torch.save({"pretrained": "facebook/encodec_32khz"}, folder / WEIGHTS[1])
    build_hf_codec(folder / "encodec", torch.float16)
    model = load.load_model(str(folder), CPU)
    state = model.compression_model.state_dict()
    assert {t.dtype for t in state.values() if t.is_floating_point()} == {torch.float32}
    assert codec.encode_audio(model, torch.randn(1, 1, 6400)).shape == (1, 4, 10)


def test_the_published_codecs_old_names_are_known_and_missing_weights_told(mono_folder, tmp_path):
    folder = shutil.copytree(mono_folder, tmp_path / "model")
    torch.save({"pretrained": "facebook/encodec_32khz"}, folder / WEIGHTS[1])
    file = build_hf_codec(folder / "encodec") / "model.safetensors"
    now = load.load_model(str(folder), CPU).compression_model.state_dict()

    new = ("parametrizations.weight.original0", "parametrizations.weight.original1")
    weights = load_file(file)
    assert any(new[0] in name for name in weights)
    for name in list(weights):
        old = name.replace(new[0], "weight_g").replace(new[1], "weight_v")
        weights[old] = weights.pop(name)
    save_file(weights, file, {"format": "pt"})
    old = load.load_model(str(folder), CPU).compression_model.state_dict()
    assert all(torch.equal(now[key], old[key]) for key in now)

    lost = min(name for name in weights if "encoder" in name)
    del weights[lost]
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(UserError, match="its codec has no encoder"):
        load.load_model(str(folder), CPU)


# What is said while it loads


@pytest.mark.parametrize("kind", ["mono", "stereo", "melody", "named codec"])
def test_loading_says_nothing(kind, tmp_path, request, capfd, recwarn):
    folder = request.getfixturevalue(f"{kind if kind != 'named codec' else 'mono'}_folder")
    if kind == "named codec":
        folder = shutil.copytree(folder, tmp_path / "model")
        torch.save({"pretrained": "facebook/encodec_32khz"}, folder / WEIGHTS[1])
        build_hf_codec(folder / "encodec", torch.float16)
    capfd.readouterr()
    recwarn.clear()
    load.load_model(str(folder), CPU)
    assert [str(warning.message) for warning in recwarn] == []
    assert capfd.readouterr() == ("", "")
