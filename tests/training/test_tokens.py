"""--cache_tokens: recordings are encoded once, and training slices their codes.

Letters: C channels, K codebooks, T token frames.
"""

from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
import torch
from conftest import build_demucs, metrics, tiny_config, tone, weights
from huggingface_hub import constants
from processes import Started, assert_same_run

import files
import run
from dataset import Clip, Clips, Pick
from demo.tiny import build_musicgen
from errors import UserError
from musicgen import codec, load, melody
from musicgen.config import configs
from recordings import audio
from recordings.scan import scan
from recordings.tokens import Tokens
from training import memory

CPU = torch.device("cpu")
RATE, HOP = 32_000, 640
LENGTHS = (3.0, 1.5, 0.73)  # seconds; crops are of 1 s


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens and melodies are kept below tmp_path."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The samples of each call of EnCodec."""
    calls, encode = [], codec.encode_audio

    def counting(model, wav):
        calls.append(wav.shape[-1])
        return encode(model, wav)

    monkeypatch.setattr("musicgen.codec.encode_audio", counting)
    return calls


def kept() -> dict[str, tuple[float, np.ndarray]]:
    """Return each file in the cache: when it was written, and what is in it."""
    return {
        path.name: (path.stat().st_mtime_ns, np.load(path))
        for path in files.cache_folder("tokens").glob("*.npy")
    }


def prepared(folder: Path, data: Path, **how: int) -> tuple[load.Model, Tokens, list]:
    model, tracks = load.load_model(str(folder), CPU), scan(str(data))
    found = codec.tokens_of(model)
    codec.fill(model, found, tracks, 2, **how)
    return model, found, tracks


def make_clips(model, tracks, found: Tokens | None, **how) -> Clips:
    shape = {"sample_rate": RATE, "channels": model.audio_channels, "samples": RATE, "seed": 3}
    return Clips(tracks, **shape, tokens=found, **how)


def test_training_neither_decodes_nor_encodes_and_learns_the_same(
    fit, stereo_folder, make_pairs, monkeypatch
):
    data = make_pairs(seconds=(4.0, 3.0, 2.0), channels=2)
    flags = {"max_steps": 30, "lr": 3e-3, "valid_path": str(data), "valid_step": 30}
    fit(stereo_folder, data, "plain", **flags)
    fit(stereo_folder, data, "fill", max_steps=1, cache_tokens=True, valid_path=str(data))

    def fail(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr("musicgen.codec.encode_audio", fail)
    monkeypatch.setattr("recordings.audio.read_crop", fail)
    fit(stereo_folder, data, "kept", **flags, cache_tokens=True)
    curves = {}
    for name in ("plain", "kept"):
        rows = metrics(data.parent / name)
        curves[name] = [row["valid_loss"] for row in rows if "valid_loss" in row]
    assert curves["kept"][-1] < curves["kept"][0] - 0.2
    # Their codes differ: without the cache crops begin between frames too.
    assert curves["kept"] == pytest.approx(curves["plain"], rel=0.15)


def test_a_recording_is_encoded_once_and_again_when_it_has_changed(
    fit, mono_folder, make_pairs, encoded
):
    data = make_pairs(seconds=LENGTHS)
    fit(mono_folder, data, "first", epochs=3, cache_tokens=True)
    assert sorted(encoded) == [round(seconds * RATE) for seconds in sorted(LENGTHS)]
    fit(mono_folder, data, "second", valid_split=0.4, cache_tokens=True)
    assert len(encoded) == 3, "the cache was not used"
    sf.write(data / "clip1.wav", tone(7, 2.0), RATE)
    fit(mono_folder, data, "third", cache_tokens=True)
    assert encoded[3:] == [2 * RATE]


def test_another_codec_has_another_cache(mono_folder, stereo_folder, make_pairs, tmp_path):
    data = make_pairs(seconds=(1.0,))
    prepared(mono_folder, data)
    prepared(stereo_folder, data)
    assert len(kept()) == 2
    other = build_musicgen(tmp_path / "other", segment_sec=20.0, seed=1)
    prepared(other, data)
    assert len(kept()) == 3
    package = torch.load(other / "compression_state_dict.bin", weights_only=True)
    package["xp.cfg"] = package["xp.cfg"].replace("dilation_base: 2", "dilation_base: 3")
    torch.save(package, other / "compression_state_dict.bin")
    prepared(other, data)
    assert len(kept()) == 4


class Killed(BaseException):
    pass


def test_encoding_that_was_killed_goes_on_where_it_stopped(mono_folder, make_pairs, monkeypatch):
    data = make_pairs(seconds=LENGTHS)
    prepared(mono_folder, data)
    whole = {name: codes for name, (_, codes) in kept().items()}
    for path in files.cache_folder("tokens").iterdir():
        path.unlink()

    save, saves = np.save, []

    def killed(file, arr):
        saves.append(None)
        if len(saves) == 2:
            file.write(b"half of it")
            raise Killed
        save(file, arr=arr)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(np, "save", killed)
        prepared(mono_folder, data)
    (first,) = kept().items()
    prepared(mono_folder, data)
    assert kept()[first[0]][0] == first[1][0], "a finished file was made again"
    after = kept()
    assert after.keys() == whole.keys()
    assert all(np.array_equal(after[name][1], whole[name]) for name in whole)
    assert not list(files.cache_folder("tokens").glob(".*"))


def test_a_stopped_run_ends_as_one_that_was_not(fit, mono_folder, make_pairs):
    data = make_pairs(seconds=LENGTHS)
    flags = {"max_steps": 4, "save_step": 2, "lr_scheduler": "constant", "cache_tokens": True}
    whole = weights(fit(mono_folder, data, "whole", **flags))
    fit(mono_folder, data, "parts", **{**flags, "max_steps": 2})
    parts = weights(fit(mono_folder, data, "parts", **flags, resume=True))
    assert all(torch.equal(whole[key], parts[key]) for key in whole)
    workers = weights(fit(mono_folder, data, "workers", **flags, num_workers=1))
    assert all(torch.equal(whole[key], workers[key]) for key in whole)


def test_two_processes_encode_and_train_as_one(fit, mono_folder, make_pairs, tmp_path, processes):
    data = make_pairs(seconds=(*LENGTHS, 1.2))
    (data / "link.wav").symlink_to(data / "clip0.wav")  # one recording, one file in the cache
    (data / "link.txt").write_text("the first again")
    alone = fit(mono_folder, data, "one", epochs=2, batch_size=4, cache_tokens=True)
    one = {name: codes for name, (_, codes) in kept().items()}
    assert len(one) == 4
    for path in files.cache_folder("tokens").iterdir():
        path.unlink()
    flags = {"dataset_path": data, "model_id": mono_folder, "output_dir": tmp_path / "two"}
    flags |= {"device": "cpu", "duration": 1, "batch_size": 2, "grad_acc": 1, "epochs": 2}
    flags |= {"warmup_steps": 0, "lr": 1e-3, "num_workers": 0, "cache_tokens": 1}
    both = Started(processes, tmp_path / "logs", count=2, **flags)
    codes, _, errors = both.end()
    assert codes == {0}, errors
    two = kept()
    assert two.keys() == one.keys()
    assert all(np.array_equal(two[name][1], one[name]) for name in one)
    assert_same_run(alone, tmp_path / "two", 1e-4)


@pytest.mark.parametrize("sample_rate", [32_000, 44_100, 11_025])
def test_crops_are_those_of_the_files_to_within_half_a_frame(
    mono_folder, make_pairs, sample_rate, monkeypatch
):
    data = make_pairs(seconds=(5.013,), sample_rate=sample_rate)
    model, found, tracks = prepared(mono_folder, data)
    read, starts = audio.read_crop, []
    monkeypatch.setattr(
        audio,
        "read_crop",
        lambda path, start, *how: starts.append(start) or read(path, start, *how),
    )
    plain, sliced = make_clips(model, tracks, None), make_clips(model, tracks, found)
    whole = found.crop(tracks[0], 0, 10**6)
    assert whole.dtype == np.int16 and whole.shape == (4, 250)
    firsts = set()
    for epoch in range(40):
        pick = Pick(epoch, 0)
        assert plain[pick].caption == sliced[pick].caption
        clip = sliced[pick]
        first = round(starts[-1] / sample_rate * 50)
        assert abs(first / 50 - starts[-1] / sample_rate) <= 0.01 + 1e-9
        T = clip.length // HOP
        assert T in (50, 49) and (T == 50 or first == 201)
        assert np.array_equal(clip.codes[:, :T], whole[:, first : first + T])
        firsts.add(first)
    assert len(firsts) > 20


def test_a_short_clips_padding_is_not_trained_on(fit, mono_folder, make_pairs, monkeypatch):
    data = make_pairs(seconds=(0.73, 2.0))
    model, found, tracks = prepared(mono_folder, data)
    clip = make_clips(model, tracks, found)[Pick(0, 0)]
    assert clip.codes.shape == (4, 50)
    assert clip.length == 36 * HOP  # whole frames of 0.73 s
    plain = weights(fit(mono_folder, data, "run", max_steps=2, cache_tokens=True))
    read = Clips.__getitem__

    def noisy(self: Clips, pick: Pick) -> Clip:
        clip = read(self, pick)
        assert clip.codes is not None
        clip.codes[:, clip.length // HOP :] = 5
        return clip

    monkeypatch.setattr(Clips, "__getitem__", noisy)
    other = weights(fit(mono_folder, data, "other", max_steps=2, cache_tokens=True))
    assert all(torch.equal(plain[key], other[key]) for key in plain)


@pytest.mark.parametrize("seconds", [9.0, 10.4, 14.0, 14.01, 23.3])
def test_a_long_recording_is_encoded_in_blocks_with_the_same_codes(
    stereo_folder, make_pairs, monkeypatch, encoded, seconds
):
    data = make_pairs(seconds=(seconds,), sample_rate=16_000, channels=2)
    model, found, (track,) = prepared(stereo_folder, data)
    whole = found.crop(track, 0, 10**6)
    assert whole.shape == (model.lm.num_codebooks, seconds * 50 // 1)
    monkeypatch.setattr("musicgen.codec.WINDOW_SEC", 6)
    monkeypatch.setattr("musicgen.codec.MARGIN_SEC", 1)
    encoded.clear()
    _, found, _ = prepared(stereo_folder, data)
    assert encoded and max(encoded) <= 6 * RATE
    blocks = found.crop(track, 0, 10**6)
    assert blocks.shape == whole.shape
    assert (blocks == whole).mean() > 0.99  # resampling and rounding differ at the seams


def test_stereo_codes_are_those_of_both_channels_in_turn(stereo_folder, make_pairs):
    model, found, tracks = prepared(stereo_folder, make_pairs(seconds=(2.0,), channels=2))
    wav = torch.from_numpy(sf.read(tracks[0].path, dtype="float32")[0].T.copy())
    codes = found.crop(tracks[0], 0, 100)
    assert np.array_equal(codes, codec.encode_audio(model, wav[None])[0].numpy())
    left = model.compression_model.model.encode(wav[None, :1])[0][0].numpy()
    assert np.array_equal(codes[0::2], left)
    assert not np.array_equal(codes[1::2], left)


def test_tokens_and_melodies_together(fit, make_pairs, tmp_path, monkeypatch):
    build_demucs(tmp_path / "hub")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    folder = build_musicgen(tmp_path / "melody", melody=True, segment_sec=20.0)
    data = make_pairs(seconds=(2.0, 1.5))
    output = fit(folder, data, max_steps=3, cache_tokens=True)
    assert [row["step"] for row in metrics(output)] == [1, 2, 3]
    model, found, tracks = prepared(folder, data)
    conditioner = melody.melody_conditioner(model.lm)
    melodies = melody.melodies_of(conditioner)
    melody.fill(conditioner, melodies, tracks)
    for index in (0, 1):
        pick = Pick(4, index)
        with_tokens = make_clips(model, tracks, found, melodies=melodies)[pick]
        without = make_clips(model, tracks, None, melodies=melodies)[pick]
        assert with_tokens.codes is not None and with_tokens.wav is None
        assert torch.equal(with_tokens.melody, without.melody)


@pytest.mark.parametrize(
    ("num_workers", "harm"), [(0, Path.unlink), (1, Path.unlink), (0, Path.touch)]
)
def test_tokens_that_vanish_in_the_middle_are_named(
    fit, mono_folder, make_pairs, monkeypatch, num_workers, harm
):
    data = make_pairs(seconds=(1.0,))
    fill = codec.fill

    def vanishing(*what, **how):
        fill(*what, **how)
        for path in files.cache_folder("tokens").iterdir():
            path.write_bytes(b"")
            harm(path)

    monkeypatch.setattr(codec, "fill", vanishing)
    with pytest.raises(UserError, match=r"clip0\.wav: .*tokens/\w+\.npy.* start again$"):
        fit(mono_folder, data, cache_tokens=True, num_workers=num_workers)


def test_a_recording_that_cannot_be_read_is_named(mono_folder, make_pairs, monkeypatch):
    data = make_pairs(seconds=(1.0, 2.0))
    tracks = scan(str(data))
    sf.write(data / "clip1.wav", tone(0, 0.6), RATE)  # after it was checked
    model = load.load_model(str(mono_folder), CPU)
    with pytest.raises(UserError, match=r"clip1\.wav: ends after"):
        codec.fill(model, codec.tokens_of(model), tracks, 1)
    (data / "clip1.wav").unlink()
    with pytest.raises(UserError, match=r"clip1\.wav: no longer exists"):
        codec.fill(model, codec.tokens_of(model), tracks, 1)


def test_samples_are_made_without_the_encoder_and_the_files_left_alone(
    fit, mono_folder, make_pairs
):
    data = make_pairs(seconds=LENGTHS)
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in data.iterdir()}
    flags = {"sample_step": 1, "sample_duration": 0.2, "max_steps": 1, "cache_tokens": True}
    output = fit(mono_folder, data, **flags)
    assert list(output.glob("samples/*.wav"))
    assert before == {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in data.iterdir()}


def test_dry_run_counts_no_encoder_while_training(tmp_path, cli, make_pairs):
    model = configs("small")
    plain, without = (
        memory.estimate(
            tiny_config("small", tmp_path, tmp_path, cache_tokens=on), model, 100, torch.bfloat16
        )
        for on in (False, True)
    )
    assert plain.encoding > 0 and without.encoding == 0
    assert 100e6 < plain.encoders - without.encoders < 130e6  # EnCodec's encoder
    assert without.language_model_peak == plain.language_model_peak
    flags = {"dataset_path": make_pairs(), "model_id": "demo", "output_dir": tmp_path / "out"}
    result = cli(run, "--dry_run", **flags, duration=5, cache_tokens=1)
    assert result.code == 0, result.err
    assert ", encoding" not in result.out and "while recordings are encoded" in result.out
    assert not (tmp_path / "cache").exists()
