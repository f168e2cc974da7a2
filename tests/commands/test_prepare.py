"""`prepare.py check` says what training would see, and copies what is usable; nothing else."""

import os
import shutil
from pathlib import Path

import fuzz
import numpy as np
import pytest
import soundfile as sf
from conftest import run_script, tone, write_pairs
from PIL import Image
from samples import sound, tar_of

import prepare
import run
from errors import UserError
from recordings import scan


@pytest.fixture
def look(cli, tmp_path):
    def call(folder: Path, *words: str, **flags: object):
        picture = flags.pop("picture", tmp_path / "check.png")
        return cli(prepare, "check", str(folder), *words, picture=picture, **flags)

    return call


def everything(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def spoil(folder: Path) -> None:
    """Files of every kind of trouble, beside the good clip0 and sub/clip1."""
    (folder / "sub").mkdir()
    for suffix in (".wav", ".txt"):
        (folder / f"clip1{suffix}").rename(folder / "sub" / f"clip1{suffix}")

    def add(name: str, wav: np.ndarray | None, caption: str | None = "other words") -> None:
        if wav is not None:
            sf.write(folder / f"{name}.wav", wav, 32_000)
        if caption is not None:
            (folder / f"{name}.txt").write_text(caption)

    add("broken", None)
    (folder / "broken.wav").write_bytes(b"RIFF nothing")
    add("cut", tone(1, 3.0), "cut short")
    whole = (folder / "cut.wav").read_bytes()
    (folder / "cut.wav").write_bytes(whole[: len(whole) // 2])
    add("uncaptioned", tone(2, 1.0), caption=None)
    add("silent", np.zeros(32_000), "silence")
    add("clipping", np.clip(20 * tone(3, 2.0), -1, 1), "too loud")
    add("faint", 1e-2 * tone(4, 2.0), "too soft")
    add("half", np.concatenate([tone(5, 2.0), np.zeros((64_000, 1))]), "half silent")
    shutil.copy(folder / "clip0.wav", folder / "twin.wav")
    shutil.copy(folder / "clip0.txt", folder / "twin.txt")
    (folder / "sub" / "other.APE").write_bytes(b"words")


def test_a_good_dataset_is_told_in_numbers(look, tmp_path):
    data = write_pairs(tmp_path / "data", seconds=(3.0, 2.0, 61.0))
    before = everything(data)
    result = look(data, batch_size=1, grad_acc=2)
    assert result.code == 0, result.err
    assert "3 recordings, 1:06 in all" in result.out
    assert "2 shorter than 30 s" in result.out
    assert "32000 Hz (3)" in result.out
    assert "2 an epoch" in result.out
    assert "Training would start" in result.out
    assert Image.open(tmp_path / "check.png").size[0] > 500
    assert everything(data) == before


def test_every_trouble_is_told_with_its_file_and_what_is_usable_copied(look, tmp_path):
    data = write_pairs(tmp_path / "data", seconds=(1.5, 2.0))
    spoil(data)
    before = everything(data)
    fixed = tmp_path / "fixed"
    result = look(data, fix=fixed)
    assert result.code == 1
    assert "Training would not start" in result.out
    told = {}  # what is wrong -> lines
    for part in result.out.split("\n\n"):
        title, *lines = part.splitlines()
        told[title] = "\n".join(lines)

    def names(title: str) -> str:
        return next(lines for what, lines in told.items() if title in what)

    assert all(name in names("can't be trained on") for name in ("broken", "cut", "uncaptioned"))
    assert "truncated" in names("can't be trained on")
    assert "silent.wav" in names("silent from start to end")
    assert "twin.wav: as clip0.wav" in names("identical to another")
    assert "clipping.wav" in names("clipping (")
    assert "faint.wav" in names("quieter")
    assert "half.wav: 50%" in names("more than a third")
    assert "twin.wav: melody number 0" in names("caption of another")
    assert "sub/other.APE" in names("format that can't be read")

    assert everything(data) == before
    usable = {"clip0.wav", "sub/clip1.wav", "clipping.wav", "faint.wav", "half.wav"}
    kept = {track.name: track for track in scan.scan(str(fixed))}
    assert kept.keys() == usable
    for name, track in kept.items():
        assert track.path.read_bytes() == (data / name).read_bytes()
        assert track.caption == " ".join((data / name).with_suffix(".txt").read_text().split())
    assert look(fixed).code == 0


def test_the_verdict_is_that_of_training(look, tmp_path, cli):
    data = write_pairs(tmp_path / "data", seconds=(1.0, 1.5))
    (data / "clip1.txt").unlink()
    training = {"dataset_path": data, "output_dir": tmp_path / "out", "model_id": "demo"}
    training |= {"max_steps": 1, "duration": 1, "device": "cpu", "num_workers": 0}
    assert look(data).code == cli(run, **training).code == 1
    assert look(data, no_label=1).code == cli(run, **training, no_label=1).code == 0


def test_a_file_that_breaks_further_on_is_found(look, tmp_path):
    """Its header is good, as training would first see it."""
    data = write_pairs(tmp_path / "data", seconds=(3.0, 1.0))
    sf.write(data / "clip0.flac", tone(0, 3.0), 32_000)
    flac = bytearray((data / "clip0.flac").read_bytes())
    flac[len(flac) // 2 : len(flac) // 2 + 400] = bytes(400)
    (data / "clip0.wav").write_bytes(flac)
    result = look(data)
    assert result.code == 1
    assert "clip0.wav: " in result.out


def test_nothing_of_the_users_is_overwritten(look, tmp_path):
    data = write_pairs(tmp_path / "data", seconds=(1.0,))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    assert "holds files already" in look(data, fix=tmp_path / "mine").err
    assert "is in the input folder" in look(data, fix=data / "fixed").err
    (tmp_path / "photo.png").write_bytes(b"mine")
    assert "another file has this name" in look(data, picture=tmp_path / "photo.png").err
    assert (tmp_path / "photo.png").read_bytes() == b"mine"
    assert look(data).code == look(data).code == 0  # its own picture it replaces


def test_a_caption_that_the_console_cannot_show_is_escaped(tmp_path):
    data = write_pairs(tmp_path / "data", seconds=(1.0, 1.5))
    for path in data.glob("*.txt"):
        path.write_text("ピアノ", encoding="utf-8")
    words = ["check", data, "--picture", tmp_path / "check.png"]
    done = run_script("prepare.py", *words, PYTHONIOENCODING="cp1252", PYTHONUTF8="0")
    assert done.returncode == 0, done.stderr
    assert r"clip1.wav: \u30d4\u30a2\u30ce" in done.stdout


def test_mistakes_are_told(look, cli, tmp_path):
    assert cli(prepare).code == 2
    assert cli(prepare, "--help").code == 0
    assert "did you mean check?" in cli(prepare, "chekc", ".").err
    (tmp_path / "empty").mkdir()
    assert "no recordings" in look(tmp_path / "empty").err
    assert "--fxi" in look(tmp_path, fxi="x").err
    assert "no such folder" in look(tmp_path / "nothing").err
    with pytest.raises(UserError):
        scan.scan(str(tmp_path / "empty"))


def _die(track):
    os._exit(1)


def test_a_decoder_that_ends_its_process_is_told(look, tmp_path, monkeypatch):
    data = write_pairs(tmp_path / "data", seconds=(1.0,))
    monkeypatch.setattr("commands.check._listen_or_say", _die)
    assert "clip0.wav: this file, or one soon after it, ended the process" in look(data).err


@pytest.mark.parametrize("count", [60, pytest.param(4_000, marks=pytest.mark.long)])
def test_of_damaged_files_none_crashes_it_and_none_is_passed_over(count, capsys):
    totals = fuzz.run(count=count, seed=1)
    assert sum(totals.values()) == count
    assert not {outcome for _, outcome in totals} & set(fuzz.WRONG), capsys.readouterr().out
    assert {outcome for _, outcome in totals} >= {"told", "decoded"}


def test_every_bad_table_and_every_bad_recording_is_named(look, tmp_path):
    data = write_pairs(tmp_path / "data", seconds=(1.0,))
    for album, table in {"one": b"\xff", "two": b"file_name\na.wav"}.items():
        (data / album).mkdir()
        (data / album / "metadata.csv").write_bytes(table)
        for name in "ab":
            shutil.copy(data / "clip0.wav", data / album / f"{name}.wav")
    for number in range(30):
        (data / f"{number}.wav").write_bytes(b"nothing")
        (data / f"{number}.txt").write_text("a caption")
    told = look(data)
    assert told.code == 1
    assert "data       1 recording," in told.out
    assert "34 can't be trained on" in told.out
    assert told.out.count("30 files: can't be read as audio") == 1
    for album in ("one", "two"):
        assert told.out.count(f"2 files: {album}/metadata.csv ") == 1
    lines = told.out.splitlines()
    for name in (*(f"{n}.wav" for n in range(30)), "one/a.wav", "one/b.wav", "two/a.wav"):
        assert lines.count(f"    {name}") == 1


def test_what_is_fixed_stays_in_its_folder_and_apart(look, tmp_path):
    """Whatever the shards are called: each recording is another one."""
    data, fixed = tmp_path / "in" / "data", tmp_path / "in" / "fixed"
    (data / "t").mkdir(parents=True)
    (tmp_path / "in" / "x.txt").write_text("mine")
    write_pairs(tmp_path / "made", seconds=(1.0, 1.1, 1.2, 1.3, 1.4))
    wavs = [path.read_bytes() for path in sorted((tmp_path / "made").glob("*.wav"))]
    for number, name in enumerate(("t.tar", "a b.tar", "a_b.tar", "x...tar")):
        tar_of(data / name, [("x.wav", wavs[number]), ("x.txt", name.encode())])
    (data / "t" / "x.wav").write_bytes(wavs[4])
    (data / "t" / "x.txt").write_text("of the folder")
    assert look(data, fix=fixed).code == 0
    captions = {"t.tar", "a b.tar", "a_b.tar", "x...tar", "of the folder"}
    assert {track.caption for track in scan.scan(str(fixed))} == captions
    assert (tmp_path / "in" / "x.txt").read_text() == "mine"
    both = f"{data}/{{a b,t}}.tar"
    assert look(Path(both), fix=tmp_path / "other").code == 0
    assert {t.caption for t in scan.scan(str(tmp_path / "other"))} == {"t.tar", "a b.tar"}


def test_what_cannot_be_copied_is_told(look, tmp_path):
    """A tar may hold a folder of a file's name; no folder of the disk can."""
    inner = [(name, sound(number)) for number, name in enumerate(("x.wav", "x.wav/y.wav"))]
    tar_of(tmp_path / "data" / "a.tar", inner)
    told = look(tmp_path / "data", fix=tmp_path / "fixed", no_label=1)
    assert told.code == 1
    assert "x.wav/y.wav: can't be copied to" in told.err
