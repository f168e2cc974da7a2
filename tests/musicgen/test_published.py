"""Each published model trains, generates and resumes by its name, offline, from a faithful copy.

The copies have the files, keys and configs of the published repositories; see tests/hub_cache.py.
"""

import contextlib
import logging
import re
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import soundfile as sf
import torch
from audiocraft.models.builders import get_compression_model
from conftest import ROOT, build_demucs, metrics, run_script, use_hub, write_pairs
from hub_cache import AUDIOGEN, MODELS, PUBLISHED, Model, build, codec_config, lm_config
from omegaconf import OmegaConf
from torch import nn
from transformers import T5Config, T5Tokenizer

import generate
import run
from musicgen import published, skeleton

LARGE_BY_NAME = Model("large", "name")  # a cache holds one of the two forms of large
WORRYING = re.compile("warn|error|traceback|deprecat|unexpected|missing|not used", re.I)


@pytest.fixture(scope="module")
def hubs(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """Caches with all models; under True, with large's other form."""
    homes = [tmp_path_factory.mktemp("hf_home") for _ in range(2)]
    build(homes[0], [model for model in MODELS if model != LARGE_BY_NAME])
    build(homes[1], [LARGE_BY_NAME])
    build_demucs(homes[0] / "hub")
    return {bool(i): home / "hub" for i, home in enumerate(homes)}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Recordings in two channels, and a cache in which their melodies are found once for all."""
    world = tmp_path_factory.mktemp("world")
    write_pairs(world / "data", seconds=(1.5, 1.2), channels=2, sample_rate=44_100)
    return world


@contextlib.contextmanager
def told() -> Iterator[list[str]]:
    """Collect the warnings and log lines that a user sees where pytest hides them."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    known = [x for x in logging.root.manager.loggerDict.values() if isinstance(x, logging.Logger)]
    loggers = [logging.root, *(logger for logger in known if not logger.propagate)]
    with warnings.catch_warnings(record=True) as caught:
        warnings.resetwarnings()
        python_hides = (DeprecationWarning, PendingDeprecationWarning, ImportWarning)
        for hidden in (*python_hides, ResourceWarning):
            warnings.simplefilter("ignore", hidden)
        for logger in loggers:
            logger.addHandler(handler)
        try:
            yield lines
        finally:
            for logger in loggers:
                logger.removeHandler(handler)
            lines += [str(warning.message) for warning in caught]


def test_what_pytest_hides_is_collected():
    with told() as lines:
        warnings.warn("this will change", FutureWarning, stacklevel=1)
        logging.getLogger("transformers").error("another thing")
        logging.getLogger("another.library").warning("a third")
    assert lines == ["another thing", "a third", "this will change"]


@pytest.mark.parametrize("model", MODELS, ids="-".join)
def test_a_published_model_trains_generates_and_resumes(
    model, hubs, world, tmp_path, monkeypatch, cli
):
    """And says nothing that a user would worry about."""
    use_hub(hubs[model == LARGE_BY_NAME], world, monkeypatch)

    def command(main: ModuleType, **flags: object) -> None:
        with told() as lines:
            result = cli(main, **flags, model_id=model.name, device="cpu", seed=1)
        assert result.code == 0, result.err
        assert not lines
        assert not WORRYING.search(result.out + result.err), result.out + result.err

    training = {"dataset_path": world / "data", "output_dir": tmp_path / "out", "duration": 1}
    training |= {"batch_size": 1, "grad_acc": 1, "save_step": 1, "num_workers": 0}
    command(run, **training, max_steps=1)
    wav = tmp_path / "piece.wav"
    asked = {"prompt": "a slow waltz", "duration": 0.5, "output_dir": wav}
    command(generate, **asked, weights_path=tmp_path / "out" / "lm_final.pt")
    audio, rate = sf.read(wav, always_2d=True)  # [samples, channels]
    assert rate == (16_000 if "audiogen" in model.name else 32_000)
    assert audio.shape == (rate // 2, 1 + ("stereo" in model.name))
    command(run, **training, max_steps=2, resume=1)
    assert [row["step"] for row in metrics(tmp_path / "out") if "loss" in row] == [1, 2]


def test_both_of_a_text_encoders_tokenizers_are_the_same(hubs, tmp_path):
    """Some T5s on the hub have spiece.model, some tokenizer.json; the published ones have both."""
    (folder,) = (hubs[False] / "models--t5-base" / "snapshots").iterdir()
    (tmp_path / "spiece").mkdir()
    for name in ("config.json", "spiece.model"):
        shutil.copy(folder / name, tmp_path / "spiece")
    captions = ["a slow waltz with piano and bass", "Ünusual, 120 bpm"]
    folders = (folder, tmp_path / "spiece")
    ids = [T5Tokenizer.from_pretrained(path)(captions).input_ids for path in folders]
    assert ids[0] == ids[1]


def language_model(name: str) -> nn.Module:
    """Build one of the published size without memory."""
    config = lm_config(name)
    t5 = T5Config(**published.T5[config.conditioners.description.t5.name])
    return skeleton.build_skeleton(config, t5, config.transformer_lm.num_layers, torch.float16)


def codec(name: str) -> nn.Module:
    """Build one of the published size without memory."""
    with torch.device("meta"):
        return get_compression_model(OmegaConf.merge(codec_config(name), {"device": "meta"}))


def gib(model: nn.Module, bytes_of_a_weight: int) -> float:
    return bytes_of_a_weight * sum(t.numel() for t in model.state_dict().values()) / 2**30


def test_the_table_has_the_models_that_are_tried_here():
    page = (ROOT / "docs/models.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([^`]+)` \| ([\d.]+) GiB \| (weights|name)\b", page, re.M)
    assert [Model(name, codec) for name, _, codec in rows] == MODELS
    assert all(size == f"{gib(language_model(name), 2):.1f}" for name, size, _ in rows)


@pytest.mark.parametrize(
    ("name", "quoted"), [("small", 0.78), ("medium", 3.43), ("melody", 2.58), (AUDIOGEN, 3.43)]
)
def test_the_configs_give_files_of_the_sizes_that_users_quote(name, quoted):
    assert gib(language_model(name), 2) == pytest.approx(quoted, abs=0.006)
    assert gib(codec(name), 4) == pytest.approx(0.22, abs=0.006)


@pytest.mark.long
def test_small_trains_generates_and_resumes_at_its_true_size(tmp_path):
    """In processes as a user starts them; needs some 10 GB each of memory and of disk."""
    build(tmp_path, [Model("small", "weights")], PUBLISHED)
    here = {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "XDG_CACHE_HOME": str(tmp_path)}
    flags = {"model_id": "small", "device": "cpu", "seed": 1}
    training = {"dataset_path": write_pairs(tmp_path / "data", seconds=(2.5, 2.5))}
    training |= {"output_dir": tmp_path / "out", "duration": 2, "batch_size": 1, "grad_acc": 1}
    training |= {"save_step": 1, "num_workers": 0}

    def command(script: str, **more: object) -> None:
        given = [f"--{name}={value}" for name, value in {**flags, **more}.items()]
        done = run_script(script, *given, timeout=900, **here)
        assert done.returncode == 0, done.stderr
        assert not WORRYING.search(done.stdout + done.stderr), done.stdout + done.stderr

    try:
        command("run.py", **training, max_steps=1)
        tuned = {"weights_path": tmp_path / "out" / "lm_final.pt"}
        wav = tmp_path / "piece.wav"
        command("generate.py", **tuned, prompt="a waltz", duration=1, output_dir=wav)
        assert sf.info(wav).frames == 32_000
        command("run.py", **training, max_steps=2, resume=1)
        assert [row["step"] for row in metrics(tmp_path / "out") if "loss" in row] == [1, 2]
    finally:
        shutil.rmtree(tmp_path)
