"""generate.py and pieces that are stopped, too long, or more than memory or the disk can hold."""

import json
import signal
import time
import weakref
from pathlib import Path

import pytest
import soundfile as sf
import torch
from conftest import room, tone
from processes import Started

import files
import generate
from demo.tiny import build_musicgen
from errors import UserError
from musicgen import codec
from musicgen.load import load_model
from musicgen.network import Network
from musicgen.sampling import Sampling
from musicgen.window import Windows

RATE = 32_000
DECODE_SEC = 1.0  # here, so that a part file grows often


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Windows of 2 s."""
    return build_musicgen(tmp_path_factory.mktemp("short"), segment_sec=2.0)


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codec, "DECODE_SEC", DECODE_SEC)


def generate_in_steps() -> None:
    codec.DECODE_SEC = DECODE_SEC
    generate.main()


def flags(model: Path, output: Path, **others: object) -> dict[str, object]:
    usual = {"prompt": "drums", "model_id": model, "weights_path": None, "device": "cpu"}
    return {**usual, "output_dir": output, **others}


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGKILL, -9), (signal.SIGINT, 130), (signal.SIGTERM, 143)]
)
def test_what_was_made_before_a_stop_plays(number, code, model, cli, processes, tmp_path):
    asked = flags(model, tmp_path / "a.wav", duration=3600)
    started = Started(processes, tmp_path / "log", main=generate_in_steps, **asked)
    part, lengths = tmp_path / "a.part.wav", set()
    while len(lengths) < 4:
        assert started.is_alive()
        if part.exists():
            lengths.add(sf.info(part).frames)  # whole at any moment
        time.sleep(0.005)
    started.signal(number)
    codes, out, errors = started.end()
    assert codes == {code}, errors
    assert out == ""
    assert "Traceback" not in errors
    if number != signal.SIGKILL:
        assert errors.splitlines()[-1] == f"stopped: {part} has the music made so far"
    played, _ = sf.read(part)
    assert len(played) >= max(lengths)
    assert len(played) % round(DECODE_SEC * RATE) == 0
    assert played[-RATE:].std() > 1e-3

    kept = part.read_bytes()
    refused = cli(generate, **asked)
    assert refused.code == 1
    assert f"{part} exists, of a piece that was stopped" in refused.err
    assert "--overwrite=1" in refused.err
    assert part.read_bytes() == kept
    done = cli(generate, **{**asked, "duration": 2.5}, overwrite=1)
    assert done.code == 0, done.err
    assert sorted(path.name for path in tmp_path.glob("*.wav")) == ["a.wav"]
    assert sf.info(tmp_path / "a.wav").frames == 2.5 * RATE


@pytest.mark.parametrize("name", ["a.part.wav", "a.wav"])
@pytest.mark.parametrize("flag", ["prompt_audio", "melody"])
def test_a_recording_that_is_read_is_not_overwritten(flag, name, model, cli, tmp_path):
    """Of an hour in a part file, the new piece would have the last seconds alone."""
    recording = tmp_path / name
    sf.write(recording, tone(1, 1.0), RATE)
    kept = recording.read_bytes()
    asked = flags(model, tmp_path / "a.wav", duration=0.1, **{flag: recording})
    refused = cli(generate, **asked, overwrite=1)
    assert refused.code == 1
    assert f"--{flag}={recording}: would be overwritten" in refused.err
    assert recording.read_bytes() == kept


def test_a_stop_before_any_music_leaves_nothing(model, cli, tmp_path, monkeypatch):
    def stop(*arguments, **flags):
        raise KeyboardInterrupt

    monkeypatch.setattr(codec.Decoding, "add", stop)
    stopped = cli(generate, **flags(model, tmp_path / "a.wav", duration=5))
    assert stopped.code == 130
    assert "nothing of them is kept" in stopped.err
    assert list(tmp_path.glob("*.wav")) == []


def test_a_piece_that_no_wav_can_hold_is_refused_before_it_is_made(model, cli, tmp_path):
    refused = cli(generate, **flags(model, tmp_path / "a.wav", duration=40_000))
    assert refused.code == 1
    assert "--duration=40000: a wav file holds 9.3 hours" in refused.err
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def eight(model: Path, tmp_path: Path) -> dict[str, object]:
    """The flags of eight pieces of three windows."""
    prompts = json.dumps([f"tune {number}" for number in range(8)])
    return flags(model, tmp_path / "out", prompt=prompts, duration=4, overlap=1)


def test_a_full_disk_ends_all_pieces_plainly(eight, cli):
    """The first that finds no room for its third second."""
    with room(3 * 4 * RATE):
        ended = cli(generate, **eight)
    assert ended.code == 1
    assert "Traceback" not in ended.err
    assert "tune-0_0.part.wav: can't be written (" in ended.err.splitlines()[-1]
    parts = sorted(Path(str(eight["output_dir"])).iterdir())
    assert [part.name for part in parts] == [f"tune-{number}_0.part.wav" for number in range(8)]
    lengths = []
    for part in parts:
        assert f"stopped: {part} has the music made so far" in ended.err
        lengths.append(sf.info(part).frames / RATE)
    assert lengths == [2.0] + [1.0] * 7


def test_pieces_that_are_whole_stay_when_another_can_not_be_written(eight, cli, monkeypatch):
    write, places = files.write, []

    def full(path, content):
        places.append(path)
        if len(places) == 3:
            raise UserError(f"{path}: can't be written (No space left on device)")
        write(path, content)

    monkeypatch.setattr(files, "write", full)
    ended = cli(generate, **eight)
    assert ended.code == 1
    assert "Traceback" not in ended.err
    assert "tune-2_0.wav: can't be written (No space left on device)" in ended.err
    assert "The whole piece is in" in ended.err
    found = sorted(Path(str(eight["output_dir"])).iterdir())
    assert [path.name for path in found] == [
        *("tune-0_0.wav", "tune-1_0.wav"),
        *(f"tune-{number}_0.part.wav" for number in range(2, 8)),
    ]
    assert [sf.info(path).frames for path in found[:3]] == [4 * RATE] * 3


@pytest.mark.parametrize("free", [0, 1_000_000])
def test_a_computer_with_little_memory_makes_the_same_files(free, eight, cli, monkeypatch):
    together, alive, sizes = cli(generate, **eight), weakref.WeakSet(), []
    paths = [Path(line) for line in together.out.splitlines()]
    assert len(paths) == 8
    expected = [path.read_bytes() for path in paths]
    begin = Windows.__init__

    def counted(self, network, crosses, *rest):
        assert not alive, "the caches of the pieces before are still there"
        alive.add(self)
        sizes.append(len(crosses))
        begin(self, network, crosses, *rest)

    monkeypatch.setattr(Windows, "__init__", counted)
    monkeypatch.setattr("musicgen.generation.free_memory", lambda: free)
    split = cli(generate, **eight, overwrite=1)
    assert split.code == 0, split.err
    assert split.out == together.out
    assert [path.read_bytes() for path in paths] == expected
    assert sizes == ([1] * 8 if free == 0 else [3, 3, 2])
    assert not alive


def test_the_bytes_of_a_cache_are_counted(model):
    lm = load_model(str(model), torch.device("cpu")).lm
    network, windows = Network(lm), []
    for pieces in (1, 4, 8):
        crosses = [torch.zeros(2, 7, lm.dim)] * pieces
        windows = Windows(network, crosses, 0, 1500, Sampling())
        cache = windows.cache
        kept = [*cache.keys, *cache.values, windows.sequence, windows.noise]
        kept += [each for layer in cache.crosses for cross in layer for each in cross[:2]]
        taken = sum(each.nbytes for each in kept)
        assert taken == pytest.approx(2 * pieces * network.cache_bytes(1500), rel=0.05)
