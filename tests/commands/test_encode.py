"""`prepare.py encode` and `shard`: what they leave trains as the recordings, and survives kills."""

import json
import re
import signal
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
import torch
import webdataset
from conftest import metrics, tiny_config, tone, weights
from processes import Started
from safetensors import safe_open

import files
import prepare
import run
from demo.tiny import build_musicgen
from errors import UserError
from musicgen import codec, load
from recordings import cache, scan, token_file
from training.tracks import scan_dataset

LENGTHS = (3.0, 1.5, 0.73)


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def encode(cli, mono_folder):
    def call(data: Path, out: Path, **flags: object):
        flags = {"model_id": mono_folder, "device": "cpu", **flags}
        return cli(prepare, "encode", str(data), str(out), **flags)

    return call


@pytest.fixture
def shard(cli):
    def call(data: Path, out: Path, **flags: object):
        return cli(prepare, "shard", str(data), str(out), **flags)

    return call


def everything(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def times(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")}


def fails(*_: object, **__: object) -> None:
    raise AssertionError


def assert_same(one: Path, two: Path) -> None:
    assert metrics(one) == metrics(two)
    a, b = weights(one), weights(two)
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_training_from_tokens_or_shards_is_training_from_the_recordings(
    fit, encode, shard, make_pairs, tmp_path, stereo_folder, monkeypatch, capsys
):
    model = stereo_folder
    data = make_pairs(seconds=(*LENGTHS, 33.0), sample_rate=44_100, channels=2)
    (data / "album").mkdir()
    for suffix in (".wav", ".txt"):
        (data / f"clip1{suffix}").rename(data / "album" / f"some.thing{suffix}")
    flags = {"max_steps": 6, "valid_split": 0.3, "use_cfg": True, "cache_tokens": True}
    cached = fit(model, data, "cached", **flags)
    assert encode(data, tmp_path / "tokens", model_id=model).code == 0
    (data / "album/some.thing.wav").rename(data / "album/some_thing.wav")  # as in shards
    (data / "album/some.thing.txt").rename(data / "album/some_thing.txt")
    assert shard(data, tmp_path / "audio", shard_mb=1).code == 0
    assert len(list((tmp_path / "audio").glob("audio-00000?.tar"))) > 1
    with monkeypatch.context() as patch:
        patch.setattr("musicgen.codec.encode_audio", fails)
        patch.setattr("recordings.audio.read_crop", fails)
        patch.setattr(cache.Cache, "fill", fails)
        capsys.readouterr()
        kept = fit(model, tmp_path / "tokens", "kept", **{**flags, "cache_tokens": False})
        assert "files of tokens, nothing is encoded" in capsys.readouterr().out
        assert_same(cached, kept)
    plain = fit(model, data, "plain", **flags)
    assert_same(plain, fit(model, tmp_path / "audio", "sharded", **flags))
    assert encode(tmp_path / "audio", tmp_path / "again", model_id=model).code == 0
    assert shard(tmp_path / "again", tmp_path / "tars").code == 0
    assert_same(plain, fit(model, tmp_path / "tars", "tars", **flags))


def test_a_file_says_what_it_is_and_safetensors_reads_it(encode, make_pairs, tmp_path, mono_folder):
    data = make_pairs(seconds=(2.0,), sample_rate=44_100)
    assert encode(data, tmp_path / "out").code == 0
    path = tmp_path / "out" / "clip0.safetensors"
    model = load.load_model(str(mono_folder), torch.device("cpu"))
    (track,) = scan.scan(str(data))
    whole = codec.encode_track(model, track, 1)
    with safe_open(path, framework="np") as file:
        facts = file.metadata()
        codes = file.get_tensor("codes")
    assert codes.dtype == np.int16
    assert np.array_equal(codes, whole)
    assert facts["codec"] == codec.codec_hash(model)
    assert facts["model_id"] == str(mono_folder)
    assert (facts["sample_rate"], facts["frames"]) == ("44100", "88200")
    assert facts["frame_rate"] == "50"
    for first, frames in ((0, 100), (3, 5), (98, 9), (100, 4)):
        part = token_file.read(path, first, frames, 10**4)
        assert np.array_equal(part, whole[:, first : first + frames])


def test_captions_go_along_as_they_are_read(encode, make_pairs, tmp_path):
    data = make_pairs(seconds=(1.0, 1.0, 1.0, 1.0))
    for i in (1, 2, 3):
        (data / f"clip{i}.txt").unlink()
    (data / "clip1.json").write_text(' {"description": "A waltz", "genre": "Jazz", "x": 1}')
    (data / "metadata.csv").write_text("file_name,text\nclip2.wav,from a table\n")
    (data / "clip3.txt").write_bytes("\ufeff  two\n lines ".encode())
    assert encode(data, tmp_path / "out").code == 0
    for name in ("clip0.txt", "clip1.json", "clip3.txt"):
        assert (tmp_path / "out" / name).read_bytes() == (data / name).read_bytes()
    before, after = (
        [(t.caption, t.written.fields) for t in scan.scan(str(f))] for f in (data, tmp_path / "out")
    )
    assert before == after
    assert encode(data, tmp_path / "one", caption="for all").code == 0
    assert {t.caption for t in scan.scan(str(tmp_path / "one"))} == {"for all"}
    assert encode(data, tmp_path / "none", no_label=1).code == 0
    assert all(name.endswith(".safetensors") for name in everything(tmp_path / "none"))


def test_tags_become_files_with_the_same_fields(encode, tmp_path):
    with sf.SoundFile(tmp_path / "a.flac", "w", 32_000, 1) as file:
        file.title, file.genre, file.comment = "Rain", "Bossa Nova", "soft guitar"
        file.write(tone(1, 1.0))
    folder = tmp_path / "music"
    folder.mkdir()
    (tmp_path / "a.flac").rename(folder / "a.flac")
    (before,) = scan.scan(str(folder), from_tags=True)
    assert encode(folder, tmp_path / "out", caption_from="tags").code == 0
    (after,) = scan.scan(str(tmp_path / "out"))
    assert before.written.fields == ("genre: bossa nova",) == after.written.fields
    assert before.caption == after.caption == "soft guitar"


def test_only_what_has_changed_is_encoded_again(encode, make_pairs, tmp_path):
    data, out = make_pairs(seconds=LENGTHS), tmp_path / "out"
    assert encode(data, out).code == 0
    before = times(out)
    assert "0 encoded now, 3 were there" in encode(data, out).out
    assert times(out) == before
    sf.write(data / "clip1.wav", tone(7, 1.5), 32_000)  # of the same length
    assert "1 encoded now, 2 were there" in encode(data, out).out
    after = times(out)
    assert {name for name in after if after[name] != before[name]} == {"clip1.safetensors"}
    encode(data, tmp_path / "fresh")
    assert everything(out) == everything(tmp_path / "fresh")
    (data / "clip2.wav").unlink()
    (data / "clip2.txt").unlink()
    result = encode(data, out)
    assert "1 file of tokens in" in result.out
    assert "clip2.safetensors" in result.out


def test_nothing_of_others_is_overwritten(encode, shard, make_pairs, tmp_path):
    data, out = make_pairs(seconds=(1.0,)), tmp_path / "out"
    assert "is in the input folder" in encode(data, data / "tokens").err
    assert "is in the input folder" in shard(data, data).err
    for name, says in (
        ("clip0.safetensors", "not a file of tokens"),
        ("clip0.txt", "differs from the caption"),
    ):
        out.mkdir()
        (out / name).write_bytes(b"mine" * 9)
        assert says in encode(data, out).err
        assert "holds files already" in shard(data, out).err
        assert everything(out) == {name: b"mine" * 9}
        (out / name).unlink()
        out.rmdir()


def test_another_codec_is_refused_by_name(
    encode, fit, make_pairs, tmp_path, mono_folder, stereo_folder
):
    data, out = make_pairs(seconds=(1.0,)), tmp_path / "out"
    encode(data, out)
    before = everything(out)
    other = build_musicgen(tmp_path / "other", segment_sec=20.0, seed=1)
    for model in (other, stereo_folder):
        with pytest.raises(UserError) as caught:
            fit(model, out)
        told = str(caught.value)
        assert "clip0.safetensors" in told and str(mono_folder) in told
        assert f"prepare.py encode --model_id={model}" in told
        assert "name a new folder" in encode(data, out, model_id=model).err
    assert everything(out) == before
    assert list(weights(fit(mono_folder, out, "good", max_steps=1)))


def test_tokens_and_audio_are_not_mixed_and_melodies_need_audio(
    encode, make_pairs, tmp_path, mono_folder, melody_folder, fit
):
    data, out = make_pairs(seconds=(1.0, 1.0)), tmp_path / "out"
    encode(data, out)
    with pytest.raises(UserError, match=r"safetensors is a file of tokens, .*wav is audio"):
        scan_dataset(tiny_config(mono_folder, out, tmp_path / "o", valid_path=str(data)))
    assert "is a file of tokens already" in encode(out, tmp_path / "twice").err
    encode(data, tmp_path / "of_melody", model_id=melody_folder)
    with pytest.raises(UserError, match=r"melodies can't be found in tokens[\s\S]*--drop_melody=1"):
        fit(melody_folder, tmp_path / "of_melody")
    assert weights(fit(melody_folder, tmp_path / "of_melody", max_steps=1, drop_melody=1.0))
    (out / "clip0.wav").write_bytes((data / "clip0.wav").read_bytes())
    with pytest.raises(UserError, match="same name"):
        scan.scan(str(out))


def test_check_and_dry_run_take_tokens(encode, make_pairs, tmp_path, cli, mono_folder):
    data, out = make_pairs(seconds=(2.0, 61.0)), tmp_path / "out"
    encode(data, out)
    result = cli(prepare, "check", str(out), picture=tmp_path / "p.png")
    assert result.code == 0, result.err
    assert "2 recordings, 1:03 in all" in result.out
    assert "2 files of tokens among them, not listened to" in result.out
    flags = {"dataset_path": out, "model_id": mono_folder, "output_dir": tmp_path / "o"}
    result = cli(run, "--dry_run", **flags, duration=2)
    assert result.code == 0, result.err
    assert "nothing is encoded" in result.out and ", encoding" not in result.out


def with_header(good: bytes, change) -> bytes:
    """A file of tokens with another header."""
    start = 8 + int.from_bytes(good[:8], "little")
    header = json.loads(good[8:start])
    change(header)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + good[start:]


def setting(*keys: str, value: object):
    def change(header: dict) -> None:
        for key in keys[:-1]:
            header = header[key]
        header[keys[-1]] = value

    return change


META = "__metadata__"
DAMAGES = {
    "empty": (lambda good: b"", "header can't be read"),
    "cut": (lambda good: good[:-7], "truncated"),
    "longer": (lambda good: good + b"\0\0", "truncated or damaged"),
    "cut in its header": (lambda good: good[:50], "header can't be read"),
    "huge header": (lambda good: (2**62).to_bytes(8, "little") + good[8:], "header can't be read"),
    "no json": (lambda good: good[:8] + b"?" * (len(good) - 8), "not a file of tokens"),
    "deep json": (lambda good: (60_000).to_bytes(8, "little") + b"[" * 60_000, "not a file of tok"),
    "no metadata": (lambda good: with_header(good, lambda h: h.pop(META)), "not a file of tokens"),
    "no codec": (
        lambda good: with_header(good, lambda h: h[META].pop("codec")),
        "not a file of tok",
    ),
    "a second tensor": (
        lambda good: with_header(good, setting("b", value={"dtype": "I16"})),
        "not a file of tokens",
    ),
    "other type": (lambda good: with_header(good, setting("codes", "dtype", value="F32")), "F32"),
    "other shape": (
        lambda good: with_header(good, setting("codes", "shape", value=[4, 49, 1])),
        "not a file of tokens",
    ),
    "negative": (
        lambda good: with_header(good, setting("codes", "shape", value=[-4, -50])),
        "codebooks",
    ),
    "other length": (
        lambda good: with_header(good, setting(META, "frames", value="64000")),
        "token frames are not 2 s",
    ),
    "endless": (
        lambda good: with_header(good, setting(META, "frames", value="9" * 400)),
        "token frames are not",
    ),
    "no rate": (
        lambda good: with_header(good, setting(META, "sample_rate", value="0")),
        "0 Hz",
    ),
    "offsets": (
        lambda good: with_header(good, setting("codes", "data_offsets", value=[0, 2**60])),
        "damaged",
    ),
}


def test_damaged_files_are_named_with_the_reason(encode, make_pairs, tmp_path, cli, shard):
    data, out = make_pairs(seconds=(1.0,)), tmp_path / "out"
    encode(data, out)
    good = (out / "clip0.safetensors").read_bytes()
    (out / "clip0.safetensors").unlink()
    (out / "clip0.txt").unlink()
    for name, (damage, _) in DAMAGES.items():
        (out / f"{name}.safetensors").write_bytes(damage(good))
    (out / "good.safetensors").write_bytes(good)
    tracks, problems = scan.find(str(out), with_captions=False)
    told = {name.removesuffix(".safetensors"): reason for name, reason in problems}
    assert [track.name for track in tracks] == ["good.safetensors"]
    wrong = {
        name: told.get(name)
        for name, (_, says) in DAMAGES.items()
        if says not in told.get(name, "")
    }
    assert not wrong
    result = cli(prepare, "check", str(out), no_label=1, picture=tmp_path / "p.png")
    assert result.code == 1 and "huge header.safetensors" in result.out


@pytest.mark.parametrize("num_workers", [0, 1])
def test_codes_that_the_model_does_not_have_are_found_before_they_are_used(
    encode, fit, make_pairs, tmp_path, mono_folder, num_workers
):
    data, out = make_pairs(seconds=(1.0,)), tmp_path / "out"
    encode(data, out)
    path = out / "clip0.safetensors"
    path.write_bytes(path.read_bytes()[:-2] + b"\xff\x7f")
    with pytest.raises(UserError, match=r"clip0\.safetensors: damaged: .*codes outside 0 to"):
        fit(mono_folder, out, num_workers=num_workers)


# Shards.


def test_the_webdataset_library_reads_them(shard, make_pairs, tmp_path):
    data, out = make_pairs(seconds=(1.0, 1.0)), tmp_path / "out"
    (data / "al.bum").mkdir()
    for suffix in (".wav", ".txt"):
        (data / f"clip1{suffix}").rename(data / "al.bum" / f"a: clip.1{suffix}")
    (data / "clip0.txt").rename(data / "clip0.json")
    (data / "clip0.json").write_text('{"description": "a waltz"}')
    assert shard(data, out).code == 0
    samples = {
        sample["__key__"]: sample
        for sample in webdataset.WebDataset(str(out / "out-000000.tar"), shardshuffle=False)
    }
    assert samples.keys() == {"clip0", "al.bum/a_ clip_1"}
    assert samples["clip0"]["wav"] == (data / "clip0.wav").read_bytes()
    assert json.loads(samples["clip0"]["json"]) == {"description": "a waltz"}
    assert samples["al.bum/a_ clip_1"]["txt"] == (data / "al.bum" / "a: clip.1.txt").read_bytes()
    assert len(scan.scan(str(out))) == 2
    with tarfile.open(out / "out-000000.tar") as tar:
        owners = {(m.mtime, m.uid, m.gid, m.uname, m.mode) for m in tar}
    assert owners == {(0, 0, 0, "", 0o644)}


def test_two_recordings_that_would_have_one_key_are_named(shard, make_pairs, tmp_path):
    data = make_pairs(seconds=(1.0, 1.0))
    for i, name in enumerate(("a.b", "a_b")):
        for suffix in (".wav", ".txt"):
            (data / f"clip{i}{suffix}").rename(data / f"{name}{suffix}")
    told = shard(data, tmp_path / "out").err
    assert "a.b.wav" in told and "a_b.wav" in told and "rename one" in told


def test_shards_of_the_same_plan_are_kept_and_no_others(shard, make_pairs, tmp_path):
    data, out = make_pairs(seconds=(10.0, 10.0, 10.0)), tmp_path / "out"
    assert shard(data, out, shard_mb=1).code == 0
    whole = everything(out)
    assert len(whole) == 4
    made = (out / "out-000000.tar").stat().st_mtime_ns
    (out / "out-000001.tar").write_bytes(whole["out-000001.tar"][:5000])
    (out / "out-000002.tar").unlink()
    assert "2 written now, 1 were there" in shard(data, out, shard_mb=1).out
    assert everything(out) == whole
    assert (out / "out-000000.tar").stat().st_mtime_ns == made
    assert "holds files already" in shard(data, out).err
    (data / "clip1.txt").write_text("another caption")
    assert "holds files already" in shard(data, out, shard_mb=1).err
    assert everything(out) == whole


# Kills, full disks.


def prepare_slowly() -> None:
    """So that it is killed in the middle on a busy machine too."""
    write = files.write
    files.write = lambda *what: time.sleep(0.5) or write(*what)
    prepare.main()


@pytest.mark.parametrize("command", ["encode", "shard"])
def test_a_killed_run_goes_on_to_the_same_bytes(
    command, make_pairs, tmp_path, encode, shard, mono_folder, processes
):
    data = make_pairs(seconds=tuple([12.0] * 6))
    call, flags = {"encode": (encode, {}), "shard": (shard, {"shard_mb": 1})}[command]
    assert call(data, tmp_path / "whole" / "o", **flags).code == 0
    whole, out = everything(tmp_path / "whole" / "o"), tmp_path / "killed" / "o"
    more = {"model_id": mono_folder, "device": "cpu"} if command == "encode" else flags
    words = (command, data, out)
    started = Started(processes, tmp_path / "logs", *words, main=prepare_slowly, **more)
    end = time.monotonic() + 60
    while started.is_alive() and time.monotonic() < end:
        if len(list(out.glob("*[rs]"))) > 2:  # some are done
            break
        time.sleep(0.002)
    started.signal(signal.SIGKILL)
    assert started.end()[0] == {-signal.SIGKILL}, "it was too fast"
    (out / ".clip5.safetensors.1.tmp").write_bytes(b"half")
    (out / ".o-000002.tar.1.tmp").write_bytes(b"half")
    left = everything(out)
    left = {name: left[name] for name in left if ".tmp" not in name and name != files.LOCK}
    assert left.items() < whole.items()
    assert call(data, out, **flags).code == 0
    left = {name for name in everything(out) if ".tmp" in name}
    assert left == {{"encode": ".o-000002.tar.1.tmp", "shard": ".clip5.safetensors.1.tmp"}[command]}
    for name in left:
        (out / name).unlink()
    assert everything(out) == whole


@pytest.mark.parametrize("command", ["encode", "shard"])
def test_a_full_disk_leaves_no_broken_file(
    command, make_pairs, tmp_path, encode, shard, monkeypatch
):
    data, out = make_pairs(seconds=(10.0, 10.0)), tmp_path / "out"
    call = {"encode": encode, "shard": lambda *folders: shard(*folders, shard_mb=1)}[command]
    write = files.write

    def on_a_full_disk(path: Path, fill) -> None:
        def part(file) -> None:
            fill(file)
            if re.search("clip1.safe|000001", path.name):
                file.truncate(100)
                raise OSError(28, "No space left on device")

        write(path, part)

    with monkeypatch.context() as patch:
        patch.setattr("files.write", on_a_full_disk)
        result = call(data, out)
    assert result.code == 1
    assert re.search(r"can't be written \(.*No space left on device", result.err)
    left = everything(out)
    assert left and not [name for name in left if re.search("clip1.safe|000001|tmp", name)]
    assert call(data, out).code == 0
    fresh = tmp_path / "fresh" / "out"
    assert call(data, fresh).code == 0
    assert everything(out) == everything(fresh)
    assert left.items() < everything(out).items()


def test_shards_in_a_renamed_folder_are_known_again(shard, make_pairs, tmp_path):
    data = make_pairs()
    shard(data, tmp_path / "one")
    before = everything(tmp_path / "one")
    (tmp_path / "one").rename(tmp_path / "two")
    assert "0 written now" in shard(data, tmp_path / "two").out
    assert everything(tmp_path / "two") == before


def test_a_folder_that_is_refused_stays_as_it_is(shard, make_pairs, tmp_path):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "notes.txt").write_text("mine")
    (mine / ".notes.json.7.tmp").write_text("of another program")
    before = everything(mine)
    assert "holds files already" in shard(make_pairs(), mine).err
    assert everything(mine) == before


def test_tokens_of_a_recording_of_any_case_have_its_crops(encode, make_pairs, tmp_path):
    data = make_pairs(seconds=(3.0,))
    (data / "clip0.wav").rename(data / "clip0.WAV")
    encode(data, tmp_path / "tokens")
    (track,), (encoded,) = (scan.scan(str(folder)) for folder in (data, tmp_path / "tokens"))
    assert track.key == encoded.key


def test_tokens_put_in_place_of_others_are_named(encode, make_pairs, tmp_path):
    one, two = make_pairs(seconds=(1.0, 1.5)), tmp_path / "two"
    encode(one, tmp_path / "tokens", no_label=1)
    two.mkdir()
    sf.write(two / "clip0.wav", tone(9, 2.0), 32_000)
    told = encode(two, tmp_path / "tokens", no_label=1)
    assert "1 of them in place of others" in told.out and "clip0.safetensors" in told.out
    assert "clip1.safetensors" in told.out, "of no recording in this folder"


def test_a_name_with_no_room_for_a_suffix_is_told(encode, tmp_path):
    (tmp_path / "data").mkdir()
    sf.write(tmp_path / "data" / f"{'あ' * 83}.wav", tone(0, 1.0), 32_000)
    (tmp_path / "tokens").mkdir()
    told = encode(tmp_path / "data", tmp_path / "tokens", no_label=1)
    assert told.code == 1 and "File name too long" in told.err


def test_shards_in_a_hidden_folder_are_no_hidden_files(shard, make_pairs, tmp_path):
    shard(make_pairs(), tmp_path / ".hidden")
    assert scan.scan(str(tmp_path / ".hidden"))
