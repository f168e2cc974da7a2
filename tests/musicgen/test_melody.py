"""Melody models learn with their clips' own melodies, which demucs finds once for each recording.

Letters: B batch, C channels, K codebooks, T token frames, F chroma frames, P pitch classes.
"""

import functools
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
import torch
from audiocraft.models import MusicGen, builders
from audiocraft.modules.conditioners import (
    ChromaStemConditioner,
    ConditioningAttributes,
    WavCondition,
)
from conftest import build_demucs, metrics, tone, use_hub, weights
from demucs import apply, pretrained
from demucs.hf import get_hf_model
from huggingface_hub import constants
from torch.nn import functional as F

import files
import generate
import run
from dataset import Clips, Pick
from demo.tiny import build_hub_cache
from errors import UserError
from musicgen import load, melody
from musicgen.loss import TokenLoss
from musicgen.text import TextEncoder
from recordings import scan
from recordings.melodies import Melodies
from recordings.track import Track

CPU = torch.device("cpu")
RATE, T = 32_000, 40


@pytest.fixture(scope="module")
def folder(melody_folder: Path) -> Path:
    return melody_folder


@pytest.fixture(scope="module")
def hub(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face cache with the model, its T5 and a small random demucs."""
    home = tmp_path_factory.mktemp("hf_home")
    build_hub_cache(home, folder, repo_id="facebook/musicgen-melody")
    build_demucs(home / "hub")
    return home / "hub"


@pytest.fixture(autouse=True)
def here(hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_hub(hub, tmp_path, monkeypatch)


@pytest.fixture
def separations(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds of audio of each call of demucs."""
    calls = []
    real = apply.apply_model

    def counting(model, mix, **how):
        if isinstance(model, apply.BagOfModels):  # not its own calls for parts
            calls.append(mix.shape[-1] / model.samplerate)
        return real(model, mix, **how)

    monkeypatch.setattr(apply, "apply_model", counting)
    return calls


@pytest.fixture
def without_demucs(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "demucs"]:
        monkeypatch.setitem(sys.modules, name, None)


def audiocraft_loss(lm, codes: torch.Tensor, captions: list[str], wavs: list) -> torch.Tensor:
    """Sum of cross entropies over each clip's tokens, [B, K]; a wav is [samples], or None."""
    conditions = []
    for caption, wav in zip(captions, wavs, strict=True):
        length = 0 if wav is None else len(wav)
        wav = torch.zeros(1, 1, 1) if wav is None else wav[None, None]
        melody = WavCondition(wav, torch.tensor([length]), [RATE], [None], [None])
        conditions.append(ConditioningAttributes({"description": caption}, {"self_wav": melody}))
    output = lm.compute_predictions(codes, conditions)
    logits = output.logits.permute(0, 3, 1, 2)  # [B, card, K, T]
    return F.cross_entropy(logits, codes, reduction="none").where(output.mask, 0.0).sum(-1)


def test_the_loss_is_that_of_audiocraft_with_its_own_conditioner(folder, make_pairs, monkeypatch):
    unshifted = functools.partial(apply.apply_model, shifts=0)  # else by a random time
    monkeypatch.setattr(apply, "apply_model", unshifted)
    monkeypatch.setattr(pretrained, "get_model", get_hf_model)
    with monkeypatch.context() as plain:
        plain.setattr(builders, "ChromaStemConditioner", ChromaStemConditioner)
        theirs = MusicGen.get_pretrained(str(folder), device="cpu").lm
    assert type(theirs.condition_provider.conditioners["self_wav"]) is ChromaStemConditioner
    ours = load.load_model(str(folder), CPU).lm
    module, encode = TokenLoss(ours), TextEncoder(ours)

    captions = ["a slow piano", "a lively flute tune with brushed drums"]
    codes = torch.randint(64, (2, 4, T), generator=torch.Generator().manual_seed(0))
    valid = torch.full((2,), T)
    close = functools.partial(torch.testing.assert_close, rtol=1e-4, atol=1e-3)
    tracks = scan.scan(str(make_pairs(seconds=(20.0, 7.0))))  # a whole window, and less
    melodies = prepared(ours, tracks)
    chroma = torch.tensor(np.stack([melodies.crop(track, 0, track.frames) for track in tracks]))
    with_melody, without = [], []
    for i, track in enumerate(tracks):  # together, audiocraft pads the shorter one
        wav = torch.from_numpy(sf.read(track.path, dtype="float32")[0])
        one = theirs, codes[[i]], captions[i : i + 1]
        with_melody.append(audiocraft_loss(*one, [wav]))
        without.append(audiocraft_loss(*one, [None]))
    with_melody, without = torch.cat(with_melody), torch.cat(without)
    assert (with_melody - without).abs().max() > 0.1, "the melody has no say"

    # As a batch, in which the shorter caption's padding must not matter.
    close(module(codes, valid, *encode(captions, CPU), chroma), with_melody)
    close(module(codes, valid, *encode(captions, CPU)), without)
    null = audiocraft_loss(theirs, codes[[0]], [""], [None])
    close(module(codes, valid, *encode(["", captions[1]], CPU))[:1], null)


def prepared(lm, tracks: list[Track]) -> Melodies:
    conditioner = melody.melody_conditioner(lm)
    melodies = melody.melodies_of(conditioner)
    melody.fill(conditioner, melodies, tracks)
    return melodies


def test_a_recording_is_separated_once_and_again_when_it_has_changed(
    fit, folder, make_pairs, separations
):
    data = make_pairs(seconds=(2.0, 3.0))
    fit(folder, data, "first", epochs=3)
    assert len(separations) == 2
    fit(folder, data, "second", valid_split=0.5)
    assert len(separations) == 2, "the cache was not used"
    sf.write(data / "clip1.wav", sf.read(data / "clip0.wav")[0], RATE)
    fit(folder, data, "third")
    assert len(separations) == 3


def test_a_long_recording_is_separated_in_blocks_with_the_same_result(
    folder, make_pairs, separations, monkeypatch
):
    """demucs itself hears each block on its own: here it gives back what it gets."""
    monkeypatch.setattr(
        apply, "apply_model", lambda model, mix, **how: mix[:, None].expand(-1, 4, -1, -1) / 2
    )
    lm = load.load_model(str(folder), CPU).lm
    (track,) = scan.scan(str(make_pairs(seconds=(19.0,), sample_rate=22_050)))
    whole = prepared(lm, [track]).crop(track, 0, track.frames)
    monkeypatch.setattr("musicgen.melody.BLOCK_SEC", 6)
    monkeypatch.setattr("musicgen.melody.MARGIN_SEC", 1)
    for path in files.cache_folder("melodies").iterdir():
        path.unlink()
    blocks = prepared(lm, [track]).crop(track, 0, track.frames)
    assert (whole == blocks).all(axis=1).mean() > 0.97  # resampling differs at the seams


def test_a_crop_has_the_melody_of_its_own_place(folder, tmp_path):
    """Half a recording of A, half of E: crops have the one or the other, repeated to the window."""
    t = np.arange(10 * RATE) / RATE
    (tmp_path / "data").mkdir()
    wav = 0.5 * np.sin(2 * np.pi * np.where(t < 5, 440.0, 659.26) * t)
    sf.write(tmp_path / "data" / "a.wav", wav, RATE)
    lm = load.load_model(str(folder), CPU).lm
    tracks = scan.scan(str(tmp_path / "data"), with_captions=False)
    conditioner = melody.melody_conditioner(lm)
    conditioner._get_stemmed_wav = lambda wav, rate: wav  # demucs is not what is tested here
    melodies = melody.melodies_of(conditioner)
    melody.fill(conditioner, melodies, tracks)
    for start, pitch_class in ((1.0, 9), (6.0, 4)):
        chroma = melodies.crop(tracks[0], round(start * RATE), 3 * RATE)  # [F, P]
        assert chroma.shape == (157, 12)
        assert (chroma.argmax(1) == pitch_class).all()
    across = melodies.crop(tracks[0], 4 * RATE, 2 * RATE).argmax(1).tolist()
    assert across[:16] == across[16:32]  # 2 s are 16 frames
    assert {*across} == {9, 4}


def test_a_clip_without_caption_has_no_melody_and_others_by_chance(folder, make_pairs):
    lm = load.load_model(str(folder), CPU).lm
    tracks = scan.scan(str(make_pairs(seconds=(3.0, 2.0))))
    melodies = prepared(lm, tracks)

    def shares(**drops: float) -> tuple[float, float]:
        """Return the shares of 200 clips that have a caption, and a melody."""
        shape = {"sample_rate": RATE, "channels": 1, "samples": RATE, "seed": 0}
        clips = Clips(tracks, **shape, melodies=melodies, **drops)
        some = [clips[Pick(epoch, index)] for epoch in range(100) for index in (0, 1)]
        heard = [not np.array_equal(clip.melody, melodies.none) for clip in some]
        captioned = [clip.caption != "" for clip in some]
        assert all(clip.melody.shape == (157, 12) for clip in some)
        assert not any(h and not c for h, c in zip(heard, captioned, strict=True))
        return np.mean(captioned), np.mean(heard)

    assert shares() == (1, 1)
    assert shares(drop_melody=0.5) == pytest.approx((1, 0.5), abs=0.1)
    assert shares(drop_caption=0.5) == pytest.approx((0.5, 0.5), abs=0.1)
    assert shares(drop_caption=0.5, drop_melody=0.5) == pytest.approx((0.5, 0.25), abs=0.1)


@pytest.mark.parametrize("flags", [{}, {"drop_melody": 1}, {"lora_rank": 2, "use_cfg": 1}])
def test_a_melody_model_learns_and_all_its_conditions_with_it(fit, folder, make_pairs, flags):
    data = make_pairs(seconds=(2.0, 3.0))
    output = fit(folder, data, max_steps=12, lr=1e-2, valid_path=str(data), valid_step=12, **flags)
    losses = [row["valid_loss"] for row in metrics(output) if "valid_loss" in row]
    assert losses[-1] < losses[0] - 0.3
    before = torch.load(folder / "state_dict.bin", weights_only=True)["best_state"]
    after = weights(output)
    assert after.keys() == before.keys()
    for name in () if "lora_rank" in flags else ("self_wav", "description"):
        key = f"condition_provider.conditioners.{name}.output_proj.weight"
        assert not torch.equal(after[key], before[key].float())


def test_a_resumed_run_keeps_its_share_of_melodies(fit, folder, mono_folder, make_pairs):
    data = make_pairs(seconds=(1.0, 1.5))
    flags = {"max_steps": 4, "save_step": 2, "lr_scheduler": "constant"}
    whole = weights(fit(folder, data, "whole", **flags))
    fit(folder, data, "parts", **{**flags, "max_steps": 2})
    with pytest.raises(UserError, match=r"--drop_melody=0\.2, was 0\.5"):
        fit(folder, data, "parts", **flags, resume=True, drop_melody=0.2)
    parts = weights(fit(folder, data, "parts", **flags, resume=True))
    assert all(torch.equal(whole[key], parts[key]) for key in whole)
    with pytest.raises(UserError, match="--drop_melody does nothing with"):
        fit(mono_folder, data, "mono", drop_melody=0.2)


def test_two_names_of_a_recording_and_two_processes_do_not_meet(folder, make_pairs, tmp_path):
    data = make_pairs(seconds=(1.0, 1.5, 1.2))
    other = tmp_path / "links"
    other.symlink_to(data)
    tracks = scan.scan(str(data)) + scan.scan(str(other))
    conditioner = melody.melody_conditioner(load.load_model(str(folder), CPU).lm)
    counts = []
    for rank in (0, 1):
        melodies = melody.melodies_of(conditioner)
        melody.fill(conditioner, melodies, tracks, rank=rank, processes=2)
        counts.append(len(list(files.cache_folder("melodies").iterdir())))
    assert counts == [2, 3]


def test_a_running_training_does_not_mind_a_file_that_is_touched(folder, make_pairs):
    tracks = scan.scan(str(make_pairs(seconds=(1.0,))))
    melodies = prepared(load.load_model(str(folder), CPU).lm, tracks)
    before = melodies.crop(tracks[0], 0, RATE)
    os.utime(tracks[0].path)
    assert np.array_equal(melodies.crop(tracks[0], 0, RATE), before)
    for path in files.cache_folder("melodies").iterdir():
        path.unlink()
    with pytest.raises(OSError, match="can't be read"):
        melodies.crop(tracks[0], 0, RATE)


def test_the_split_of_a_step_into_batches_does_not_matter(fit, folder, make_pairs):
    """Captions of different lengths, some dropped: each clip's loss is its own."""
    data = make_pairs(seconds=(1.0, 1.2, 1.5, 2.0))
    flags = {"max_steps": 2, "use_cfg": True, "cfg_p": 0.4, "seed": 3}
    splits = {"batch_size": 4, "grad_acc": 1}, {"batch_size": 1, "grad_acc": 4}
    together, apart = (
        weights(fit(folder, data, str(split["grad_acc"]), **flags, **split)) for split in splits
    )
    for key in together:
        torch.testing.assert_close(together[key], apart[key], rtol=0, atol=1e-4)


def test_beside_a_model_on_mps_demucs_is_on_the_cpu_without_tf32(folder, monkeypatch):
    assert {p.device for p in melody.load_demucs("mps", "").models[0].parameters()} == {CPU}
    conditioner = melody.melody_conditioner(load.load_model(str(folder), CPU).lm)
    conditioner.device = "meta"  # in the place of MPS
    monkeypatch.setattr(melody, "codec_device", lambda device: CPU)
    seen = []

    def watched(demucs, wav, *, device, **_):
        cudnn = torch.backends.cudnn
        seen.extend([wav.device, device, cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision])
        return torch.zeros(len(wav), 4, *wav.shape[1:])

    monkeypatch.setattr(apply, "apply_model", watched)
    assert conditioner._get_stemmed_wav(torch.zeros(2, 1, 32_000), 32_000).device.type == "meta"
    assert seen == [CPU, CPU, "ieee", "ieee"]
    assert torch.backends.cudnn.conv.fp32_precision == "tf32"


def test_without_demucs_captions_alone_can_be_trained(
    folder, make_pairs, tmp_path, cli, without_demucs
):
    flags = {"dataset_path": make_pairs(seconds=(1.0,)), "output_dir": tmp_path / "out"}
    flags |= {"model_id": folder, "duration": 1, "max_steps": 1, "device": "cpu"}
    result = cli(run, **flags)
    assert result.code == 1
    assert "pip install" in result.err and "--drop_melody=1" in result.err
    assert cli(run, **flags, drop_melody=1).code == 0
    result = cli(generate, **asked(folder, tmp_path / "x.wav"), melody=recording(tmp_path))
    assert result.code == 1 and "pip install" in result.err


def asked(model: Path, output: Path) -> dict[str, object]:
    """Flags of generate.py for a second of music."""
    flags = {"prompt": "a waltz", "model_id": model, "weights_path": None, "output_dir": output}
    return {**flags, "duration": 1, "device": "cpu"}


def recording(folder: Path) -> Path:
    sf.write(folder / "melody.wav", tone(0, 1.5), RATE)
    return folder / "melody.wav"


def test_demucs_that_cannot_be_downloaded_is_named(folder, make_pairs, tmp_path, monkeypatch, cli):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "empty"))
    flags = {"dataset_path": make_pairs(seconds=(1.0,)), "output_dir": tmp_path / "out"}
    result = cli(run, **flags, model_id=folder, duration=1, max_steps=1, device="cpu")
    assert result.code == 1
    assert "adefossez/HTDemucs" in result.err and "--drop_melody=1" in result.err


def test_generation_follows_the_melody_that_is_given(folder, mono_folder, tmp_path, cli):
    plain, led = tmp_path / "plain.wav", tmp_path / "led.wav"
    melody = recording(tmp_path)
    result = cli(generate, **asked(folder, plain))
    assert result.code == 0, result.err
    result = cli(generate, **asked(folder, led), melody=melody)
    assert result.code == 0, result.err
    audio = [sf.read(path)[0] for path in (plain, led)]
    assert audio[0].shape == audio[1].shape == (RATE,)
    assert not np.array_equal(*audio)
    result = cli(generate, **asked(mono_folder, tmp_path / "no.wav"), melody=melody)
    assert result.code == 1 and "takes no melody" in result.err
