"""A second start opens only the recordings that are new or have changed, and finds the same."""

import json
import os
import shutil
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf

import files
from errors import UserError
from recordings import audio, index
from recordings.scan import find, scan

RATE = 8_000
HOUR_AGO = time.time() - 3600


def put(path: Path, seconds: float = 1.0, changed: float = HOUR_AGO) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    sf.write(path, np.zeros(round(seconds * RATE)), RATE)
    path.with_suffix(".txt").write_text(f"tune {path.stem}")
    os.utime(path, (changed, changed))


@pytest.fixture
def opened(monkeypatch):
    """The names of the recordings that are opened."""
    names = []
    check = audio.check
    monkeypatch.setattr(
        "recordings.audio.check", lambda s: names.append(Path(s.name).name) or check(s)
    )
    return names


@pytest.fixture(params=["folder", "folder of shards", "shard"])
def data(request, tmp_path, monkeypatch):
    """A dataset of three recordings, found in a cache of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "data"
    for number in range(3):
        put(folder / f"{number % 2}" / f"{number}.wav", 1.0 + number)
    if request.param == "folder":
        return folder
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.add(folder, ".")
    os.utime(tmp_path / "a.tar", (HOUR_AGO, HOUR_AGO))
    shutil.rmtree(folder)
    folder.mkdir()
    (tmp_path / "a.tar").rename(folder / "a.tar")
    return folder / "a.tar" if request.param == "shard" else folder


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in "abc":
        put(tmp_path / "data" / f"{name}.wav")
    scan(str(tmp_path / "data"))
    return tmp_path / "data"


def index_file() -> Path:
    (path,) = files.cache_folder("index").iterdir()
    return path


def test_a_second_scan_opens_nothing_and_finds_the_same(data, opened):
    first = scan(str(data))
    assert len(first) == len(opened) == 3
    written = index_file().stat().st_mtime_ns
    assert scan(str(data)) == first == find(str(data))[0]
    assert len(opened) == 6, "find has no index, the second scan has"
    assert index_file().stat().st_mtime_ns == written, "written anew without need"


def test_another_tar_of_the_same_name_is_looked_at(data, opened):
    tar = data if data.suffix == ".tar" else data / "a.tar"
    if not tar.exists():
        pytest.skip("a folder of files")
    scan(str(data))
    os.utime(tar, (HOUR_AGO + 1, HOUR_AGO + 1))
    scan(str(data))
    assert len(opened) == 6


def test_only_what_is_new_or_has_changed_is_opened(folder, opened):
    put(folder / "a.wav", 2.0)  # longer, of the same time
    put(folder / "b.wav", 1.0, HOUR_AGO + 1)  # touched
    put(folder / "d.wav", 3.0)
    (folder / "c.wav").unlink()
    tracks = scan(str(folder))
    assert [(t.name, t.duration_sec) for t in tracks] == [("a.wav", 2), ("b.wav", 1), ("d.wav", 3)]
    assert opened == ["a.wav", "b.wav", "d.wav"]
    assert sorted(json.loads(index_file().read_bytes())["rows"]) == ["a.wav", "b.wav", "d.wav"]
    assert scan(str(folder)) == tracks
    assert len(opened) == 3


def test_a_file_with_a_problem_is_looked_at_each_time(folder, opened):
    put(folder / "b.wav", 0.1)
    for _ in range(2):
        with pytest.raises(UserError, match=r"b\.wav: too short"):
            scan(str(folder))
    assert opened == ["b.wav", "b.wav"]
    put(folder / "b.wav")
    assert len(scan(str(folder))) == 3


def test_a_file_that_has_just_changed_is_looked_at_again(folder, opened):
    put(folder / "a.wav", changed=time.time())
    for _ in range(2):
        scan(str(folder))
    assert opened == ["a.wav", "a.wav"]


def test_captions_are_read_each_time(folder, opened):
    (folder / "a.txt").write_text("another")
    (folder / "b.txt").unlink()
    with pytest.raises(UserError, match=r"b\.wav: no caption"):
        scan(str(folder))
    captions = [track.caption for track in scan(str(folder), with_captions=False)]
    assert captions == ["", "", ""]
    (folder / "b.txt").write_text("new")
    assert [track.caption for track in scan(str(folder))] == ["another", "new", "tune c"]
    assert {track.caption for track in scan(str(folder), caption="one")} == {"one"}
    assert opened == []


DAMAGE = {
    "cut": lambda b: b[:-20],
    "empty": lambda b: b"",
    "no JSON": lambda b: b"\xff\x00",
    "a list": lambda b: b"[1]",
    "another version": lambda b: b.replace(index.VERSION.encode(), b"0"),
    "no rows": lambda b: b.replace(b"rows", b"more"),
    "other rows": lambda b: b.replace(b'"8000 ', b'"x '),
    "rows of numbers": lambda b: json.dumps({"version": index.VERSION, "rows": {"a.wav": 3}}),
}


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_index_is_made_anew(how, folder, opened):
    whole, tracks = index_file().read_bytes(), scan(str(folder))
    damaged = DAMAGE[how](whole)
    index_file().write_bytes(damaged if isinstance(damaged, bytes) else damaged.encode())
    assert scan(str(folder)) == tracks
    assert len(opened) == 3
    assert index_file().read_bytes() == whole


def test_it_goes_without_a_cache_folder(folder, tmp_path, monkeypatch, opened):
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert len(scan(str(folder))) == 3
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/full/none")
    assert len(scan(str(folder))) == 3
    assert len(opened) == 6


def test_a_file_from_before_1970_is_known_too(folder, opened):
    os.utime(folder / "a.wav", (-100, -100))
    scan(str(folder))
    opened.clear()
    scan(str(folder))
    assert not opened


def test_two_datasets_have_an_index_each(folder, tmp_path, opened):
    put(tmp_path / "other" / "a.wav", 2.0)
    for _ in range(2):
        assert scan(str(tmp_path / "other"))[0].duration_sec == 2
        assert scan(str(folder))[0].duration_sec == 1
    assert opened == ["a.wav"]
