"""Models come from a folder or the local cache, without the network, and are audiocraft's own."""

import contextlib
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest
import torch
from audiocraft.models import MusicGen
from audiocraft.modules import transformer
from audiocraft.modules.conditioners import ConditioningAttributes
from conftest import ROOT, build_hf_codec, run_script, tone, weights
from huggingface_hub import constants
from omegaconf import OmegaConf

import musicgen
import run
from demo.tiny import build_hub_cache, build_musicgen
from errors import UserError
from musicgen import codec, generation, load, sampling
from musicgen.loss import TokenLoss
from musicgen.text import TextEncoder, text_conditioner

CPU = torch.device("cpu")
CAPTIONS = ["slow piano", "a lively guitar tune with soft bass and brushed drums", ""]


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Models that plain audiocraft can load: their T5 has the width of t5-base."""
    folders = {}

    def build(kind: str) -> Path:
        if kind not in folders:
            folder = tmp_path_factory.mktemp(f"wide_{kind}")
            stereo = kind == "stereo"
            folders[kind] = build_musicgen(folder, stereo=stereo, segment_sec=20.0, t5_dim=768)
        return folders[kind]

    return build


@pytest.fixture(scope="module")
def hf_home(wide, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face cache that holds facebook/musicgen-small and t5-base."""
    home = tmp_path_factory.mktemp("hf_home")
    build_hub_cache(home, wide("mono"))
    return home


@pytest.fixture
def cache(hf_home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make that cache this process's own, offline."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(hf_home / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return hf_home / "hub"


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "empty_cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "empty_cache"


NO_NETWORK = """
import os, socket

def refuse(*args, **kwargs):
    with open(os.environ["NETWORK_LOG"], "a") as log:
        log.write(f"{args}\\n")
    raise OSError("the network is forbidden")

socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = refuse
"""


def test_a_run_from_the_cache_needs_no_network(hf_home, cache, wide, make_pairs, tmp_path, cli):
    """In a process whose sockets raise, and offline; the same as from the folder."""
    (tmp_path / "guard").mkdir()
    (tmp_path / "guard" / "sitecustomize.py").write_text(NO_NETWORK)
    log = tmp_path / "network.log"
    guard = {"PYTHONPATH": str(tmp_path / "guard"), "NETWORK_LOG": str(log)}
    reach = "import urllib.request; urllib.request.urlopen('http://127.0.0.1:9')"
    subprocess.run([sys.executable, "-c", reach], env=guard, capture_output=True)
    assert "127.0.0.1" in log.read_text(), "the guard does not work"
    log.unlink()

    flags = {"dataset_path": make_pairs(seconds=(1.0, 1.5)), "max_steps": 2, "duration": 1}
    flags |= {"num_workers": 0, "device": "cpu"}
    guarded = {**flags, "model_id": "small", "output_dir": tmp_path / "guarded"}
    words = [f"--{name}={value}" for name, value in guarded.items()]
    done = run_script("run.py", *words, HF_HOME=str(hf_home), **guard)
    assert done.returncode == 0, done.stderr
    assert not done.stderr, "imports and loading warn of nothing"
    assert "step 2/2" in done.stdout
    assert not log.exists(), log.read_text()

    for name, model in (("offline", "small"), ("folder", wide("mono"))):
        result = cli(run, **flags, output_dir=tmp_path / name, model_id=model)
        assert result.code == 0, result.err
    runs = [weights(tmp_path / name) for name in ("offline", "guarded", "folder")]
    assert runs[0].keys() == runs[1].keys() == runs[2].keys()
    assert all(torch.equal(runs[0][key], other[key]) for other in runs[1:] for key in runs[0])


def leaves(module: torch.nn.Module) -> list[torch.nn.Module]:
    return [part for part in module.modules() if not list(part.children())]


@pytest.mark.parametrize("source", ["mono", "stereo", "facebook/musicgen-small"])
def test_a_loaded_model_is_audiocrafts_own(source, wide, cache):
    name = source if "/" in source else str(wide(source))
    theirs = MusicGen.get_pretrained(name, device="cpu")
    ours = load.load_model(name, CPU)

    for part in ("lm", "compression_model"):
        left, right = (getattr(model, part).state_dict() for model in (theirs, ours))
        assert left.keys() == right.keys()
        assert all(torch.equal(left[key], right[key]) for key in left)
        assert not any(module.training for module in leaves(getattr(ours, part)))
    assert {tensor.dtype for tensor in ours.lm.state_dict().values()} == {torch.float32}
    for name in ("sample_rate", "frame_rate", "audio_channels", "max_duration"):
        assert getattr(theirs, name) == getattr(ours, name)

    attributes = [ConditioningAttributes(text={"description": caption}) for caption in CAPTIONS]
    provider = theirs.lm.condition_provider
    with torch.no_grad():
        expected, expected_mask = provider(provider.tokenize(attributes))["description"]
        hidden, mask = TextEncoder(ours.lm)(CAPTIONS, CPU)
        projected = text_conditioner(ours.lm).output_proj(hidden) * mask[..., None]
    assert torch.equal(mask, expected_mask.float())
    torch.testing.assert_close(projected, expected, atol=1e-5, rtol=1e-4)

    channels = ours.audio_channels
    wav = torch.from_numpy(tone(0, 1.0, ours.sample_rate, channels)).T[None].float()
    with torch.no_grad():
        codes, _ = theirs.compression_model.encode(wav)
    assert torch.equal(codec.encode_audio(ours, wav), codes)

    theirs.set_generation_params(use_sampling=False, duration=0.5, cfg_coef=3.0)
    expected = theirs.generate([CAPTIONS[1]])
    made = generation.generate(
        ours,
        [CAPTIONS[1]],
        duration_sec=0.5,
        overlap_sec=1.0,
        seed=0,
        sampling=sampling.Sampling(temperature=0.0),
    )
    assert made.std() > 1e-3
    torch.testing.assert_close(made, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", ["small", "facebook/musicgen-small"])
def test_short_names_and_ids_are_the_same_model(name, cache, wide):
    loaded = load.load_model(name, CPU).lm.state_dict()
    in_folder = load.load_model(str(wide("mono")), CPU).lm.state_dict()
    assert all(torch.equal(loaded[key], in_folder[key]) for key in in_folder)


def test_a_folder_without_a_text_encoder_takes_the_cached_one(cache, wide, tmp_path):
    ignore = shutil.ignore_patterns("t5")
    folder = shutil.copytree(wide("mono"), tmp_path / "model", ignore=ignore)
    hidden = [
        TextEncoder(load.load_model(str(f), CPU).lm)(CAPTIONS, CPU) for f in (folder, "small")
    ]
    assert torch.equal(hidden[0][0], hidden[1][0])


def test_without_a_text_encoder_the_message_says_where_to_put_one(empty_cache, wide, tmp_path):
    ignore = shutil.ignore_patterns("t5")
    folder = shutil.copytree(wide("mono"), tmp_path / "model", ignore=ignore)
    with pytest.raises(UserError, match=r"(?s)t5-base is not in the Hugging Face cache.*t5/"):
        load.load_model(str(folder), CPU)


@pytest.mark.parametrize(
    "missing", ["compression_state_dict.bin", "tokenizer.json", "model.safetensors"]
)
def test_a_half_downloaded_model_is_not_taken_for_a_whole_one(
    missing, hf_home, tmp_path, monkeypatch
):
    home = shutil.copytree(hf_home, tmp_path / "home", symlinks=True)
    for path in home.rglob(missing):
        path.unlink()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="could not be downloaded"):
        load.load_model("small", CPU)


def loss(folder: Path) -> torch.Tensor:
    """[B, K] of two clips that a model does not know."""
    model = load.load_model(str(folder), CPU)
    T = 40
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(model.lm.card, (2, model.lm.num_codebooks, T), generator=generator)
    text, mask = TextEncoder(model.lm)(CAPTIONS[:2], CPU)
    with torch.no_grad():
        return TokenLoss(model.lm)(codes, torch.tensor([T, 25]), text, mask)


def test_xformers_makes_no_difference(mono_folder, monkeypatch):
    assert not hasattr(transformer.ops, "__file__"), "these tests run without xformers"
    without = loss(mono_folder)
    for name in [name for name in sys.modules if name.split(".")[0] == "xformers"]:
        monkeypatch.delitem(sys.modules, name)
    with contextlib.redirect_stderr(None):
        ops = pytest.importorskip("xformers.ops")
    assert ops is not transformer.ops
    monkeypatch.setattr(transformer, "ops", ops)
    assert torch.equal(loss(mono_folder), without)
    for name in [name for name in sys.modules if name.split(".")[0] == "xformers"]:
        monkeypatch.delitem(sys.modules, name)


def test_stereo_codes_are_the_two_channels_in_turn(stereo_folder):
    model = load.load_model(str(stereo_folder), CPU)
    assert (model.audio_channels, model.lm.num_codebooks) == (2, 8)
    wav = torch.from_numpy(tone(0, 1.0, model.sample_rate, channels=2)).T[None].float()
    codes = codec.encode_audio(model, wav)
    for channel in (0, 1):
        alone, _ = model.compression_model.model.encode(wav[:, [channel]])  # the mono codec in it
        assert torch.equal(codes[:, channel::2], alone)
    assert not torch.equal(codes[:, 0::2], codes[:, 1::2])
    assert loss(stereo_folder).isfinite().all()


@pytest.mark.parametrize(("kind", "where"), [("mono", "in the cache"), ("stereo", "in the folder")])
def test_a_codec_given_by_name_loads(
    kind, where, wide, hf_home, tmp_path, monkeypatch, make_pairs, cli
):
    ignore = shutil.ignore_patterns("t5")
    folder = shutil.copytree(wide(kind), tmp_path / "model", ignore=ignore)
    name = "facebook/encodec_32khz"
    torch.save({"pretrained": name, "exported": True}, folder / "compression_state_dict.bin")
    hub = tmp_path / "hub"
    in_cache = hub / "models--facebook--encodec_32khz"
    build_hf_codec(in_cache / "snapshots" / "1")
    (in_cache / "refs").mkdir()
    (in_cache / "refs" / "main").write_text("1")
    (hub / "models--t5-base").symlink_to(hf_home / "hub" / "models--t5-base")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(hub))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    theirs = MusicGen.get_pretrained(str(folder), device="cpu")
    if where == "in the folder":
        (in_cache / "snapshots" / "1").rename(folder / "encodec")

    ours = load.load_model(str(folder), CPU)
    wav = torch.from_numpy(tone(0, 1.0, 32_000, ours.audio_channels)).T[None].float()
    with torch.no_grad():
        codes, _ = theirs.compression_model.encode(wav)
    assert torch.equal(codec.encode_audio(ours, wav), codes)
    assert codes.shape == (1, 8 if kind == "stereo" else 4, 50)
    assert not any(p.requires_grad for p in ours.compression_model.parameters())

    flags = {"dataset_path": make_pairs(seconds=(1.0,)), "output_dir": tmp_path / "out"}
    result = cli(run, **flags, model_id=folder, duration=1, max_steps=1, device="cpu")
    assert result.code == 0, result.err


T5 = {"model": "t5", "t5": {"name": "t5-base", "finetune": False, "word_dropout": 0.3}}
UNSUPPORTED = {  # change to the config, what the message names
    "style": ({"conditioners": {"self_wav": {"model": "style"}, "description": T5}}, "self_wav"),
    "unconditioned": ({"conditioners": {}}, "nothing"),
    "MAGNeT": ({"lm_model": "transformer_lm_magnet"}, "transformer_lm_magnet"),
}


def reconfigured(folder: Path, copy: Path, change: dict) -> Path:
    """A copy of a model whose config has other values at the top level."""
    shutil.copytree(folder, copy)
    package = torch.load(copy / "state_dict.bin", weights_only=True)
    cfg = OmegaConf.create(package["xp.cfg"])
    for key, value in change.items():
        cfg[key] = value
    package["xp.cfg"] = OmegaConf.to_yaml(cfg)
    torch.save(package, copy / "state_dict.bin")
    return copy


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_a_model_of_another_kind_is_refused_by_name(name, mono_folder, tmp_path):
    change, says = UNSUPPORTED[name]
    folder = reconfigured(mono_folder, tmp_path / "model", change)
    with pytest.raises(UserError) as error:
        load.load_model(str(folder), CPU)
    assert f"--model_id={folder}" in str(error.value)
    assert says in str(error.value)
    assert "small, medium, large" in str(error.value)


@pytest.mark.parametrize(
    "name", ["facebook/musicgen-style", "style", "facebook/MAGNeT-small-30secs", "jasco"]
)
def test_models_of_another_kind_are_refused_before_a_download(name):
    with pytest.raises(UserError, match=f"--model_id={name} can't be trained: .{{20}}"):
        load.load_model(name, CPU)


def test_a_melody_that_is_fused_otherwise_is_refused(mono_folder, tmp_path):
    chroma = {"model": "chroma_stem", "chroma_stem": {"n_chroma": 12}}
    change = {"conditioners": {"self_wav": chroma, "description": T5}}
    folder = reconfigured(mono_folder, tmp_path / "model", change)
    with pytest.raises(UserError, match="not fused as the published"):
        load.load_model(str(folder), CPU)


def test_a_model_of_shorter_pieces_loads(mono_folder, tmp_path):
    """audiocraft's own constructor wants a window of more than 18 s."""
    folder = reconfigured(mono_folder, tmp_path / "model", {"dataset": {"segment_duration": 3.0}})
    model = load.load_model(str(folder), CPU)
    assert model.max_duration == 3.0
    wav = generation.generate(model, ["a tune"], duration_sec=3.5, overlap_sec=1.0, seed=0)
    assert wav.shape == (1, 1, 175 * 640)


def test_the_dropout_settings_of_a_published_config_are_no_obstacle(mono_folder, tmp_path):
    """Some exports keep audiocraft's training options among the conditioners."""
    options = {"merge_text_conditions_p": 0.25, "drop_desc_p": 0.5}
    change = {"conditioners": {"args": options, "description": T5}}
    folder = reconfigured(mono_folder, tmp_path / "model", change)
    model = load.load_model(str(folder), CPU)
    assert text_conditioner(model.lm).word_dropout == 0


def test_another_audiocraft_is_refused_with_the_line_to_type(tmp_path):
    info = tmp_path / "audiocraft-1.2.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Name: audiocraft\nVersion: 1.2.0\n")
    result = run_script(
        "run.py", "--dataset_path=demo/dataset/train", PYTHONPATH=str(tmp_path)
    )  # where Python looks first
    assert result.returncode == 1
    assert result.stderr == (
        "error: audiocraft 1.2.0 is installed, but 1.3.0 is needed: "
        "pip install --no-deps audiocraft==1.3.0\n"
    )


def test_a_missing_audiocraft_is_told_with_the_line_to_type(monkeypatch):
    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    with pytest.raises(UserError, match="is not installed: pip install --no-deps"):
        musicgen._check_version()


def test_wandb_is_not_imported_with_audiocraft():
    code = "import sys, musicgen; sys.exit('wandb' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
