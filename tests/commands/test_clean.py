"""`prepare.py clean` takes out vocals and silences, and evens the loudness; in a new folder."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pyloudnorm
import pytest
import soundfile as sf
import torch
from conftest import build_demucs, tone, use_hub, write_pairs

import commands.clean
import files
import prepare
from errors import UserError
from flags.prepare import CleanConfig
from recordings import scan

RATE = 32_000


@pytest.fixture
def run(cli, tmp_path):
    def call(folder: Path, *words: str, out: Path = tmp_path / "out", **flags: object):
        return cli(prepare, "clean", str(folder), str(out), *words, **flags)

    return call


def everything(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def audio(path: Path) -> np.ndarray:  # [frames, C]
    return sf.read(path, dtype="float32", always_2d=True)[0]


def silence(seconds: float, channels: int = 1) -> np.ndarray:
    return np.zeros((round(seconds * RATE), channels))


def test_pieces_hold_all_that_sounds_exactly_and_each_its_captions(run, tmp_path):
    data = write_pairs(tmp_path / "data", seconds=(0.6,))
    (data / "a").mkdir()
    parts = [tone(i, seconds, RATE, 2) for i, seconds in enumerate((5.0, 4.0, 1.5, 3.0))]
    gaps = [silence(seconds, 2) for seconds in (2.0, 1.2, 0.7)]  # the last is too short to cut
    song = np.concatenate([silence(3, 2), *(x for p, g in zip(parts, gaps) for x in (p, g))])  # noqa: B905
    song = np.concatenate([song, parts[3]])
    sf.write(data / "a" / "song.wav", song, RATE, "PCM_24")
    (data / "a" / "song.txt").write_text("a  song\n")
    (data / "a" / "song.json").write_text('{"description": "x", "bpm": 90}')
    source = everything(data)
    result = run(data, split_silences=1, piece_sec=2)
    assert result.code == 0, result.err
    assert everything(data) == source
    out = tmp_path / "out"
    wav = audio(data / "a" / "song.wav")
    pieces = [audio(path) for path in sorted(out.glob("a/song_*.flac"))]
    assert [path.name for path in sorted(out.glob("a/*.flac"))] == [
        f"song_00{i}.flac" for i in (1, 2, 3)
    ]
    heard = np.zeros(len(wav), bool)
    at = 0
    for piece in pieces:  # each is found whole, sample for sample, behind the one before
        first = np.flatnonzero(np.abs(piece).max(axis=1))[0]
        place = at + np.flatnonzero(np.abs(wav[at:]).max(axis=1))[0] - first
        assert np.array_equal(piece, wav[place : place + len(piece)])
        heard[place : place + len(piece)] = True
        at = place + len(piece)
    assert not wav[~heard].any()
    # 3 s, 2 s and 1.2 s of silence: half a second stays at either side
    assert (~heard).sum() == pytest.approx(RATE * (2.5 + 1.0 + 0.2), abs=RATE * 0.2)
    for i in (1, 2, 3):
        copy = out / "a" / f"song_00{i}.txt"  # the .json beside it is not the caption
        assert copy.read_bytes() == (data / "a" / "song.txt").read_bytes()
    assert np.array_equal(audio(out / "clip0_001.flac"), audio(data / "clip0.wav"))
    assert "2 recordings, 0:21" in result.out and "4 files" in result.out
    scan.scan(str(out))  # can be trained on


def test_short_pieces_are_joined_unless_far_apart(run, tmp_path):
    config = CleanConfig(
        dataset_path=str(tmp_path), output_dir="x", split_silences=True, piece_sec=4
    )
    parts = [tone(0, 1.0), silence(2), tone(1, 5.0), silence(2), tone(2, 1.0), silence(9)]
    wav = np.concatenate([*parts, tone(3, 1.0)]).astype(np.float32)
    pieces = commands.clean._pieces(wav, RATE, config)
    seconds = [(round(start / RATE, 1), round(stop / RATE, 1)) for start, stop in pieces]
    assert seconds == [(0, 8.5), (9.5, 11.5), (19.5, 21)]
    assert commands.clean._pieces(np.zeros((RATE, 1), np.float32), RATE, config) == []


@pytest.mark.parametrize("rate", [11_025, 44_100])
def test_loudness_is_that_of_the_whole_measured_at_once(rate, monkeypatch):
    monkeypatch.setattr("commands.clean.BLOCK_SEC", 3)
    for seconds in (0.5, 10.34, 12.05):
        wav = tone(1, seconds, rate, 2) * np.linspace(0.01, 1, round(seconds * rate))[:, None]
        whole = pyloudnorm.Meter(rate).integrated_loudness(wav)
        assert commands.clean._loudness(wav.astype(np.float32), rate) == pytest.approx(
            whole, abs=0.02
        )


def test_all_become_equally_loud_and_none_clips(run, tmp_path):
    data = write_pairs(tmp_path / "data", seconds=(0.6,))
    t = np.arange(8 * RATE) / RATE
    quiet = np.stack([np.sin(2 * np.pi * f * t) for f in (440, 660)], axis=1)
    spiky = 0.01 * quiet
    spiky[::RATE] = 0.9
    for name, wav in {"quiet": 0.02 * quiet, "loud": 0.9 * quiet, "spiky": spiky}.items():
        sf.write(data / f"{name}.wav", wav, RATE)
    sf.write(data / "silent.wav", silence(1), RATE)
    surround = np.concatenate([0.1 * quiet, 0.1 * quiet, 0.1 * quiet], axis=1)
    sf.write(data / "surround.wav", surround, RATE)
    result = run(data, loudness=-14, no_label=1)
    assert result.code == 0, result.err
    out = tmp_path / "out"
    for name in ("quiet", "loud", "clip0"):
        wav = audio(out / f"{name}.flac")
        assert wav.shape == audio(data / f"{name}.wav").shape
        assert sf.info(out / f"{name}.flac").samplerate == RATE
        assert pyloudnorm.Meter(RATE).integrated_loudness(wav) == pytest.approx(-14, abs=0.5)
    peaks = {path.stem: np.abs(audio(path)).max() for path in out.glob("*.flac")}
    assert max(peaks.values()) <= commands.clean.PEAK + 1e-6
    assert peaks["spiky"] == pytest.approx(commands.clean.PEAK, abs=1e-6)
    assert "spiky.flac: " in result.out and "quieter than asked" in result.out
    assert "silent.flac: too quiet" in result.out and peaks["silent"] == 0
    assert sf.info(out / "surround.flac").channels == 6


def test_what_is_beyond_full_scale_is_made_quieter_and_not_cut(run, tmp_path):
    data = write_pairs(tmp_path / "data", seconds=(0.6,))
    wav = 3 * tone(0, 2.0)
    sf.write(data / "clip0.wav", wav, RATE, "FLOAT")
    result = run(data, split_silences=1)
    assert "its peak would clip" in result.out
    made = audio(tmp_path / "out" / "clip0_001.flac")
    np.testing.assert_allclose(made, wav / np.abs(wav).max(), atol=1e-6)


@pytest.fixture
def with_demucs(tmp_path, monkeypatch):
    build_demucs(tmp_path / "hub")
    use_hub(tmp_path / "hub", tmp_path, monkeypatch)


def test_vocals_are_left_out_of_the_sum_of_stems(run, tmp_path, monkeypatch, with_demucs):
    from demucs import apply

    shares = torch.tensor([0.5, 0.125, 0.0625, 0.25]).view(1, 4, 1, 1)  # the last is the vocals
    monkeypatch.setattr(apply, "apply_model", lambda model, mix, **how: mix[:, None] * shares)
    data = tmp_path / "data"
    data.mkdir()
    for name, rate, channels in (("a", 44_100, 1), ("b", 44_100, 2), ("c", RATE, 2)):
        sf.write(data / f"{name}.wav", tone(0, 1.234, rate, channels), rate, "PCM_24")
    sf.write(data / "surround.wav", tone(0, 1.0, RATE, 6), RATE)
    result = run(data, remove_vocals=1, no_label=1)
    assert result.code == 1 and "surround.wav: has 6 channels" in result.out
    for name, error in (("a", 2e-7), ("b", 2e-7), ("c", 0.02)):  # c is resampled
        wav, made = audio(data / f"{name}.wav"), audio(tmp_path / "out" / f"{name}.flac")
        assert made.shape == wav.shape
        assert np.abs(made - 0.6875 * wav).max() <= error


def test_blocks_without_vocals_are_those_of_the_whole(tmp_path, monkeypatch, with_demucs):
    from demucs.apply import apply_model

    demucs = commands.clean._demucs("cpu")
    path = tmp_path / "a.wav"
    sf.write(path, tone(0, 9.7, 44_100, 2), 44_100, "FLOAT")
    (track,) = scan.find(str(tmp_path), with_captions=False)[0]
    with torch.no_grad():
        stems = apply_model(demucs, torch.from_numpy(audio(path).T)[None], shifts=0)[0]
    monkeypatch.setattr("commands.clean.STRIDES", 4)  # of 0.75 s
    blocks = list(commands.clean._without_vocals(demucs, track))
    assert len(blocks) == 4
    np.testing.assert_allclose(np.concatenate(blocks), stems[:3].sum(0).T, atol=1e-5)


def test_captions_of_tables_and_what_cannot_be_used(run, tmp_path):
    data = write_pairs(tmp_path / "data", seconds=(0.6, 0.7, 0.8))
    (data / "clip0.txt").unlink()
    (data / "metadata.csv").write_text("file_name,text\nclip0.wav,from the table\n")
    (data / "clip1.wav").write_bytes(b"RIFF nothing")
    (data / "clip2.txt").rename(data / "clip2.TXT")
    sf.write(data / "silent.wav", silence(2), RATE)
    (data / "silent.txt").write_text("silence")
    result = run(data, split_silences=1)
    assert result.code == 1
    assert "clip1.wav: " in result.out and "silent.wav: silent from start" in result.out
    made = everything(tmp_path / "out")
    assert made["clip0_001.txt"] == b"from the table\n"
    assert made["clip2_001.txt"] == (data / "clip2.TXT").read_bytes()
    names = {
        "clip0_001.flac",
        "clip0_001.txt",
        "clip2_001.flac",
        "clip2_001.txt",
        commands.clean.RECORD,
    }
    assert made.keys() == names


def test_a_killed_run_leaves_no_broken_file_and_is_gone_on_with(run, tmp_path, monkeypatch):
    data = write_pairs(tmp_path / "data", seconds=(0.6, 0.7, 0.8))
    out = tmp_path / "out"
    real = commands.clean._write

    def dying(file, **what):
        if len(list(out.glob("*.flac"))) == 1:
            file.write(b"half a fi")
            file.flush()
            monkeypatch.setattr(Path, "unlink", lambda path, **how: None)  # as when it is killed
            raise KeyboardInterrupt
        real(file, **what)

    with monkeypatch.context() as patch:
        patch.setattr("commands.clean._write", dying)
        assert run(data, loudness=-20).code == 130
        monkeypatch.undo()
    assert [path.name for path in out.glob("*.flac")] == ["clip0.flac"]
    assert list(out.glob(".*.tmp"))
    first = (out / "clip0.flac").stat().st_mtime_ns
    assert "holds files already" in run(data, loudness=-21).err
    result = run(data, loudness=-20)
    assert result.code == 0 and "1 of the recordings by an earlier run" in result.out
    assert "3 recordings" in result.out and "3 files" in result.out
    assert (out / "clip0.flac").stat().st_mtime_ns == first
    assert not list(out.glob(".*.tmp"))
    assert {path.stem for path in out.glob("*.flac")} == {"clip0", "clip1", "clip2"}
    whole = tmp_path / "whole"
    run(data, out=whole, loudness=-20)
    same = {
        name: content for name, content in everything(out).items() if name != commands.clean.RECORD
    }
    assert same.items() <= everything(whole).items()
    sf.write(data / "clip0.wav", tone(5, 1.0), RATE)
    result = run(data, loudness=-20)
    assert result.code == 1 and "clip0.wav: has changed" in result.out


def test_a_full_disk_is_an_error(run, tmp_path, monkeypatch):
    """Let libsndfile's own writing run into a full disk, also when it only closes the file."""
    resource = pytest.importorskip("resource")
    data = write_pairs(tmp_path / "data", seconds=(2.0,))
    assert run(data, out=tmp_path / "whole", split_silences=1).code == 0
    size = (tmp_path / "whole" / "clip0_001.flac").stat().st_size
    track = scan.scan(str(data))[0]
    wav = audio(track.path)
    signal = pytest.importorskip("signal")
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        for room in (size // 2, size - 10):
            resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
            with pytest.raises(UserError, match="disk full"):
                path = tmp_path / "a.flac"
                files.write(path, lambda f: commands.clean._write(f, wav=wav, rate=RATE, gain=1.0))
            assert not path.exists()
        resource.setrlimit(resource.RLIMIT_FSIZE, (wav.nbytes // 2, limits[1]))
        result = run(data, split_silences=1)  # the temporary file is too large
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert result.code == 1 and "can't be written" in result.err
    assert os.listdir(tmp_path / "out") == [commands.clean.RECORD]  # noqa: PTH208


def test_mistakes_are_told(run, tmp_path, monkeypatch):
    data = write_pairs(tmp_path / "data", seconds=(0.6,))
    assert "nothing to do: give --remove_vocals=1" in run(data).err
    assert "does nothing without --split_silences=1" in run(data, loudness=-14, piece_sec=3).err
    assert "--loudness=3" in run(data, loudness=3).err
    assert "--no_label exclude" in run(data, loudness=-9, no_label=1, caption_from="tags").err
    assert "give one outside" in run(data, out=data / "new", loudness=-14).err
    assert "give one outside" in run(data, out=data, loudness=-14).err
    assert "no such folder" in run(tmp_path / "nothing", loudness=-14).err
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.json").write_text(json.dumps({}))
    assert "holds files already" in run(data, out=tmp_path / "mine", loudness=-14).err
    monkeypatch.setitem(__import__("sys").modules, "demucs.hf", None)
    result = run(data, remove_vocals=1)
    assert result.code == 1 and "pip install" in result.err and "--remove_vocals" in result.err


def test_what_changed_between_two_runs_is_told(run, tmp_path):
    """And what a killed run has left of a recording goes, if it is cleaned once more."""
    data, out = write_pairs(tmp_path / "data", seconds=(1.0, 1.5)), tmp_path / "out"
    run(data, split_silences=1)
    made = out / "clip0_001.flac"
    record = json.loads((out / commands.clean.RECORD).read_text())
    del record["done"]["clip0.wav"]
    (out / commands.clean.RECORD).write_text(json.dumps({**record, "begun": "clip0.wav"}))
    shutil.copy(made, out / "clip0_007.flac")
    (out / "clip0_007.txt").write_text("of more pieces, before the recording changed")
    shutil.copy(made, out / "clip0_001_001.flac")
    assert run(data, split_silences=1).code == 0
    assert made.exists() and not list(out.glob("clip0_007.*"))
    assert (out / "clip0_001_001.flac").exists(), "of a recording clip0_001"

    (data / "clip0.txt").write_text("other words")
    (data / "clip1.wav").unlink()
    told = run(data, split_silences=1)
    assert told.code == 1
    assert "clip0.wav: has changed" in told.out
    assert "no longer in" in told.out and "clip1.wav" in told.out

    before = everything(out)
    wav = audio(data / "clip0.wav")
    (data / "clip0.wav").unlink()
    sf.write(data / "clip0.flac", wav, RATE)
    assert "clip0.flac: has changed" in run(data, split_silences=1).out
    assert everything(out) == before


def test_a_run_killed_before_its_record_goes_on(run, tmp_path):
    data, out = write_pairs(tmp_path / "data", seconds=(1.0,)), tmp_path / "out"
    out.mkdir()
    (out / "..clean.json.7.tmp").write_text("half")
    assert run(data, loudness=-20).code == 0
    assert not list(out.glob(".*.tmp"))
