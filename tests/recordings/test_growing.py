"""A wav file that grows plays at any moment, and ends as the 16-bit file of the whole piece."""

import io
import random
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
import torch
from conftest import ROOT, room

from errors import UserError
from recordings import audio
from recordings.growing import PEAK, GrowingWav, longest_sec, part_path

RATE = 32_000
GROW = """
import itertools, sys
from pathlib import Path
import numpy as np
from recordings.growing import GrowingWav
growing = GrowingWav(Path(sys.argv[1]), 32_000, 2)
for number in itertools.count():
    growing.add(np.full((2, 300_000), number, np.float32))
    print(number, flush=True)
"""


def music(level: float, channels: int, seconds: float = 2.0) -> np.ndarray:
    """[C, samples] with a peak of `level`."""
    wav = np.random.default_rng(0).uniform(-1, 1, (channels, round(seconds * RATE)))
    wav[0, 20_000] = -1
    return (level * wav).astype(np.float32)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def grow(path: Path, wav: np.ndarray, *ends: int) -> GrowingWav:
    growing = GrowingWav(path, RATE, len(wav))
    for block in np.split(wav, ends, axis=1):
        growing.add(block)
    return growing


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("level", [0.0, 0.3, 0.99, 0.999, 1.0, 3.7])
def test_the_file_is_that_of_the_whole_piece(level, channels, tmp_path):
    """Turned down in float32 as one tensor, and written by libsndfile in one go."""
    wav = music(level, channels)
    path = tmp_path / "new" / "folder" / "a.b.wav"
    grow(path, wav, 1, 500, 500, 20_001, 60_000).finish()

    whole = torch.from_numpy(wav)
    peak = float(whole.abs().max())
    whole = whole * (PEAK / peak) if peak > PEAK else whole
    expected = io.BytesIO()
    sf.write(expected, whole.T.numpy(), RATE, subtype="PCM_16", format="WAV")
    assert path.read_bytes() == expected.getvalue()
    assert names(path.parent) == ["a.b.wav"]


def test_blocks_of_the_second_pass_make_no_difference(tmp_path, monkeypatch):
    wav = music(2.0, 2)
    grow(tmp_path / "a.wav", wav).finish()
    monkeypatch.setattr("recordings.growing.COPIED_FRAMES", 999)
    grow(tmp_path / "b.wav", wav).finish()
    assert (tmp_path / "a.wav").read_bytes() == (tmp_path / "b.wav").read_bytes()


@pytest.mark.parametrize("channels", [1, 2])
def test_the_part_file_plays_between_any_two_blocks(channels, tmp_path):
    wav = music(1.5, channels)
    path = tmp_path / "a.wav"
    part_path(path).write_bytes(b"of an earlier process" * 100_000)
    growing = GrowingWav(path, RATE, channels)
    end = 0
    for size in (0, 1, 7, 30_000, 0, 25_000):
        growing.add(wav[:, end : end + size])
        end += size
        played, rate = sf.read(part_path(path), dtype="float32", always_2d=True)
        assert rate == RATE
        np.testing.assert_array_equal(played.T, wav[:, :end])
        assert sf.info(part_path(path)).subtype == "FLOAT"
    assert "*" not in sf.info(part_path(path), verbose=True).extra_info  # libsndfile's complaints
    assert audio.check(part_path(path)) == (RATE, channels, end, False)
    assert names(tmp_path) == ["a.part.wav"]


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.long)])
def test_the_part_file_plays_after_a_kill(kills, tmp_path):
    for _ in range(kills):
        command = [sys.executable, "-c", GROW, str(tmp_path / "a.wav")]
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        assert process.stdout
        for _ in range(random.randint(1, 10)):
            told = int(process.stdout.readline())
        time.sleep(random.uniform(0, 0.01))
        process.kill()
        rest = process.communicate()[0].split()
        told = int(rest[-1]) if rest else told

        played = sf.read(tmp_path / "a.part.wav", dtype="float32")[0]
        blocks, left = divmod(len(played), 300_000)
        assert left == 0
        assert blocks - 1 in (told, told + 1)  # the last one may have been written, but not told
        np.testing.assert_array_equal(played[:, 1], np.repeat(np.arange(blocks), 300_000))


def test_memory_does_not_grow(tmp_path):
    """A second at a time, 100 MB in all."""
    growing = GrowingWav(tmp_path / "a.wav", RATE, 2)
    block = music(2.0, 2, seconds=1.0)
    tracemalloc.start()
    try:
        for _ in range(400):
            growing.add(block)
        peak_of_adds = tracemalloc.get_traced_memory()[1]
        assert part_path(growing.path).stat().st_size > 1e8
        growing.finish()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak_of_adds < 2e6
    assert peak < 1e7
    assert sf.info(growing.path).frames == 400 * RATE


def test_a_full_disk_is_told_and_what_was_made_plays(tmp_path, capfd):
    """Also the part of a block that still found room does no harm."""
    wav = music(1.5, 2)
    growing = grow(tmp_path / "a.wav", wav[:, :30_000])
    part = part_path(growing.path)
    for size in (part.stat().st_size + 100_001, part.stat().st_size):
        with room(size), pytest.raises(UserError, match=r"a\.part\.wav: can't be written \("):
            growing.add(wav[:, 30_000:])
        assert part.stat().st_size >= size
        np.testing.assert_array_equal(sf.read(part, dtype="float32")[0].T, wav[:, :30_000])
        assert audio.check(part).frames == 30_000

    with room(100_000), pytest.raises(UserError, match=r"a\.wav: can't be written \(") as told:
        growing.finish()
    assert f"The whole piece is in {part}." in str(told.value)
    assert names(tmp_path) == ["a.part.wav"]

    growing.add(wav[:, 30_000:])
    growing.finish()
    grow(tmp_path / "whole.wav", wav).finish()
    assert growing.path.read_bytes() == (tmp_path / "whole.wav").read_bytes()
    assert names(tmp_path) == ["a.wav", "whole.wav"]
    assert capfd.readouterr() == ("", "")


def test_a_folder_that_can_not_be_made_is_told(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"a\.part\.wav: can't be written"):
        GrowingWav(tmp_path / "file" / "a.wav", RATE, 1)


@pytest.mark.parametrize(("channels", "hours"), [(1, 9.3), (2, 4.6)])
def test_a_part_file_holds_hours(channels, hours, tmp_path):
    """Up to the last sample of the longest; its samples so far are a hole in the file."""
    longest = round(longest_sec(RATE, channels) * RATE)
    assert longest / RATE / 3600 == pytest.approx(hours, abs=0.1)
    growing = GrowingWav(tmp_path / "a.wav", RATE, channels)
    growing._frames = longest - 1
    last = np.full((channels, 1), 0.5, np.float32)
    growing.add(last)
    with sf.SoundFile(part_path(growing.path)) as part:
        assert part.frames == longest
        part.seek(longest - 2)
        assert part.read(always_2d=True).T.tolist() == [[0, 0.5]] * channels
