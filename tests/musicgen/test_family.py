"""Every member of the family trains, saves, loads and generates, by its published name.

Letters: B batch, C channels, K codebooks, T token frames.
"""

from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
import torch
from conftest import build_demucs, tone, use_hub, weights, write_pairs

import generate
import run
from demo.tiny import build_hub_cache, build_musicgen
from musicgen import codec, load, published
from musicgen.config import configs
from recordings import audio

CPU = torch.device("cpu")
FAMILY = {  # name -> how build_musicgen makes a small one
    "small": {},
    "stereo-medium": {"stereo": True},
    "melody": {"melody": True},
    "stereo-melody-large": {"stereo": True, "melody": True},
    "facebook/audiogen-medium": {"sample_rate": 16_000, "segment_sec": 10.0},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A small random model of each kind, whose T5 has the width of t5-base."""
    path = tmp_path_factory.mktemp
    return {
        name: build_musicgen(path("model"), **{"segment_sec": 20.0, "t5_dim": 768, **how})
        for name, how in FAMILY.items()
    }


@pytest.fixture(scope="module")
def hub(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("hf_home")
    for name, folder in folders.items():
        build_hub_cache(home, folder, repo_id=published.SHORT_NAMES.get(name, name))
    build_demucs(home / "hub")
    return home / "hub"


@pytest.fixture(autouse=True)
def here(hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_hub(hub, tmp_path, monkeypatch)


ADAPTED = ["stereo-melody-large", "facebook/audiogen-medium"]  # what the others have too


@pytest.mark.parametrize(
    ("name", "lora_rank"),
    [
        *((name, 0) for name in FAMILY),
        *((name, 2) for name in ADAPTED),
        *(pytest.param(name, 2, marks=pytest.mark.long) for name in FAMILY if name not in ADAPTED),
    ],
)
def test_a_member_of_the_family_trains_and_generates(name, lora_rank, folders, tmp_path, cli):
    """On stereo clips with two different channels, of another rate than the model's."""
    data = write_pairs(tmp_path / "data", seconds=(1.5, 1.2), channels=2, sample_rate=22_050)
    flags = {"model_id": name, "device": "cpu", "seed": 1}
    training = {"dataset_path": data, "output_dir": tmp_path / "out", "duration": 1}
    training |= {"max_steps": 2, "lr": 1e-2, "lora_rank": lora_rank, "num_workers": 0}
    result = cli(run, **flags, **training)
    assert result.code == 0, result.err

    before = torch.load(folders[name] / "state_dict.bin", weights_only=True)["best_state"]
    after = weights(tmp_path / "out")
    assert {key: tensor.shape for key, tensor in after.items()} == {
        key: tensor.shape for key, tensor in before.items()
    }
    changed = {key for key in before if not torch.equal(before[key].float(), after[key])}
    matrices = {key for key in before if "layers" in key and key.endswith("weight")}
    assert changed >= {key for key in matrices if "norm" not in key}

    asked = {**flags, "prompt": "a waltz", "duration": 1, "output_dir": tmp_path / "tuned.wav"}
    if "melody" in name:
        sf.write(tmp_path / "melody.wav", tone(0, 1.0), 32_000)
        asked["melody"] = tmp_path / "melody.wav"
    result = cli(generate, **asked, weights_path=tmp_path / "out" / "lm_final.pt")
    assert result.code == 0, result.err
    audio, rate = sf.read(tmp_path / "tuned.wav", always_2d=True)  # [samples, C]
    stereo = "stereo" in name
    assert rate == (16_000 if "audiogen" in name else 32_000)
    assert audio.shape == (rate, 1 + stereo)
    assert audio.std() > 1e-4
    assert not stereo or not np.array_equal(audio[:, 0], audio[:, 1])


@pytest.mark.parametrize("name", FAMILY)
def test_only_sound_needs_the_decoder(name, folders):
    """Training keeps it off the GPU: here on the meta device, where it can't compute."""
    model = load.load_model(str(folders[name]), CPU)
    codec.move(model, "decoder", "meta")
    left = [tensor for part in decoder_parts(model) for tensor in vars(part).values()]
    assert not [t for t in left if isinstance(t, torch.Tensor) and t.device.type != "meta"]
    codes = codec.encode_audio(model, torch.randn(1, model.audio_channels, model.sample_rate))
    with pytest.raises((RuntimeError, NotImplementedError)):
        model.compression_model.decode(codes).sum().item()


def decoder_parts(model: load.Model) -> list[torch.nn.Module]:
    modules = model.compression_model.named_modules()
    parts = [part for name, part in modules if "decoder" in name.split(".")]
    assert len(parts) > 10
    return parts


@pytest.mark.parametrize("name", list(published.SHORT_NAMES))
def test_the_published_sizes_are_known(name):
    """24 layers of width 1024 and so on; melody is a medium."""
    cfg, codec, _ = configs(name)
    size = next((s for s in ("small", "large") if s in name), "medium")
    lm = cfg.transformer_lm
    assert (lm.dim, lm.num_heads, lm.num_layers) == published.SIZES[size]
    assert lm.n_q == (8 if "stereo" in name else 4)
    assert len(cfg.codebooks_pattern.delay.delays) == lm.n_q
    assert ("self_wav" in cfg.conditioners) == ("melody" in name)
    assert codec.sample_rate == 32_000


def test_stereo_stays_stereo_for_stereo_models_only(folders, tmp_path):
    """[C] of the clips; and codes of left and right that differ as left and right do."""
    data = write_pairs(tmp_path / "stereo", seconds=(1.0,), channels=2)
    sf.write(data / "mono.wav", tone(5, 1.0), 32_000)
    (data / "mono.txt").write_text("one channel")
    wavs = {}
    for name in ("small", "stereo-medium"):
        model = load.load_model(str(folders[name]), CPU)
        for path in sorted(data.glob("*.wav")):
            wav = torch.from_numpy(
                audio.read_crop(path, 0, 32_000, model.sample_rate, model.audio_channels)
            )
            wavs[name, path.stem] = wav, codec.encode_audio(model, wav[None])[0]
    both, mono = sf.read(data / "clip0.wav", dtype="float32")[0].T, wavs["small", "clip0"][0]
    np.testing.assert_allclose(mono[0], both.mean(0), atol=1e-6)
    wav, codes = wavs["stereo-medium", "clip0"]
    np.testing.assert_array_equal(wav, both)
    assert (codes[0::2] != codes[1::2]).float().mean() > 0.3  # [K, T]: left, right, left, ...
    wav, codes = wavs["stereo-medium", "mono"]
    assert torch.equal(wav[0], wav[1])
    assert torch.equal(codes[0::2], codes[1::2])
