"""Data as people have it: any format, captions wherever they are, give what the wav twin gives."""

import contextlib
import csv
import json
import os
import shutil
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile as sf
from conftest import metrics, tiny_config, tone, weights
from samples import FORMATS, FROM_THE_START, RATE, clips, write

from dataset import Pick
from errors import UserError
from flags.parse import build
from flags.run import Config
from recordings import ffmpeg
from recordings.audio import read_crop
from recordings.captions import Caption
from recordings.scan import _refuse, scan
from recordings.wording import in_front, merged
from training import facts
from training.resume import fingerprint
from training.start import start
from training.tracks import scan_dataset, split

LOSSLESS = {"wav", "flac", "aiff", "aif", "w64", "mp4", "mka"}
PADDED = {"aac", "wma", "mkv"}  # don't say where the sound begins and ends


def captioned(folder: Path, name: str = "a.wav", caption: str = "a tune", seconds: float = 1.0):
    write(folder / name, tone(1, seconds, RATE))
    (folder / name).with_suffix(".txt").write_text(caption)
    return folder


# Formats.


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("suffix", FORMATS)
def test_a_crop_is_that_part_of_the_whole_file(suffix, channels, tmp_path):
    path = tmp_path / f"a.{suffix}"
    write(path, tone(3, 8.0, RATE, channels))
    (track,) = scan(str(tmp_path), with_captions=False)
    assert abs(track.frames - 8 * RATE) <= (0.1 * RATE if suffix in PADDED else 1)
    whole = read_crop(path, 0, track.frames, RATE, channels)
    rng = np.random.default_rng(0)
    for frames in (1, 1_000, RATE):
        last = track.frames - frames
        ends = [last - n for n in (0, 1, 100, 2_000, 9_000, 30_000)]  # ogg's last page
        for first in [0, 1, 1_024, 8_192, 8_193, *ends, *rng.integers(last, size=12)]:
            crop = read_crop(path, int(first), frames, RATE, channels)
            there = whole[:, first : first + frames]
            np.testing.assert_allclose(crop, there, atol=1e-6, err_msg=f"{first} {frames}")


@pytest.mark.parametrize("suffix", ["mp3", "ogg", "opus", "m4a", "webm"])
def test_a_lossy_file_is_heard_without_delay(suffix, tmp_path):
    wav = tone(3, 4.0, RATE)
    write(tmp_path / f"a.{suffix}", wav)
    heard = read_crop(tmp_path / f"a.{suffix}", RATE, 2 * RATE, RATE, 1)[0]
    shifts = range(-1_500, 1_501)
    fit = [heard @ wav[RATE + n : 3 * RATE + n, 0] for n in shifts]
    assert shifts[int(np.argmax(fit))] == 0
    # 0.01 of it is noise, which no lossy format keeps
    assert np.abs(heard - wav[RATE : 3 * RATE, 0]).mean() < 0.02


@pytest.mark.parametrize("suffix", [s for s in FORMATS if s not in FROM_THE_START])
def test_only_the_crop_is_decoded(suffix, tmp_path, monkeypatch):
    captioned(tmp_path, f"a.{suffix}", seconds=60.0)
    decoded = []
    decode, read = ffmpeg._decode, sf.SoundFile.read

    def counting(file, start):
        for at, wav in decode(file, start):
            decoded.append(len(wav))
            yield at, wav

    def reading(self, *args, **options):
        block = read(self, *args, **options)
        decoded.append(len(block))
        return block

    made = clips(tmp_path)
    monkeypatch.setattr("recordings.ffmpeg._decode", counting)
    monkeypatch.setattr(sf.SoundFile, "read", reading)
    for epoch in range(5):
        decoded.clear()
        assert made[Pick(epoch, 0)].length == 32_000
        assert RATE <= sum(decoded) <= RATE + 25_000


@pytest.mark.parametrize("suffix", [s for s in FORMATS[1:] if s not in PADDED])
def test_an_album_trains_as_its_wav_twin(suffix, mono_folder, tmp_path, fit):
    for number in range(2):
        for twin in ("wav", suffix):
            path = tmp_path / twin / "disc" / f"{number} x.{twin}"
            write(path, tone(number, 2.0, RATE))
            path.with_suffix(".txt").write_text(f"tune {number}")
    runs = [
        metrics(fit(mono_folder, tmp_path / twin, f"run {twin}", max_steps=2))
        for twin in ("wav", suffix)
    ]
    wav, other = ([row["loss"] for row in rows if "loss" in row] for rows in runs)
    assert len(wav) == 2
    # What a lossy format leaves out of the noise gives a few other codes.
    np.testing.assert_allclose(other, wav, atol=1e-6 if suffix in LOSSLESS else 0.1)
    a, b = (clips(tmp_path / twin)[Pick(1, 0)].wav[0].numpy() for twin in ("wav", suffix))
    assert np.corrcoef(a, b)[0, 1] > 0.95, "of another place"


def test_a_twin_has_the_same_crops_and_is_held_out_alike(tmp_path):
    names = [f"{n}{suffix}" for n in range(12) for suffix in ("", " b", "-c")]
    for twin in ("wav", "flac"):
        for number, name in enumerate(names):
            captioned(tmp_path / twin, f"{name}.{twin}", seconds=1.5 + number % 3)
    wav, flac = (clips(tmp_path / twin) for twin in ("wav", "flac"))
    for index in range(len(names)):
        a, b = (made[Pick(3, index)] for made in (wav, flac))
        assert np.array_equal(a.wav, b.wav), a.name
    held = [
        [Path(track.name).stem for track in split(made.tracks, 0.3, 5)[1]] for made in (wav, flac)
    ]
    assert held[0] == held[1]


def test_the_case_of_a_suffix_changes_no_crop(tmp_path):
    (track,) = scan(str(captioned(tmp_path, "Loud.WAV")))
    assert track.key == "Loud.wav"


def test_what_is_no_plain_file_or_cannot_be_opened_is_told(tmp_path):
    folder = captioned(tmp_path, "a.wav")
    (folder / "a.txt").unlink()
    os.mkfifo(folder / "a.txt")
    with pytest.raises(UserError, match=r"its \.txt can't be read \(it is not a plain"):
        scan(str(folder))
    (folder / "a.txt").unlink()
    os.mkfifo(folder / "metadata.csv")
    with pytest.raises(UserError, match=r"metadata\.csv can't .*\(it is not a plain file"):
        scan(str(folder))
    with pytest.raises(UserError, match=r"sub: can't be opened .*make it readable"):
        _refuse(PermissionError(13, "Permission denied", "sub"))  # root may open all


def test_suffixes_in_any_case_and_folders_within_folders(tmp_path):
    for suffix in FORMATS:
        name = f"{suffix.upper()} x.{suffix.upper()}"
        captioned(tmp_path, f"deep/{suffix}/{name}", f"in {suffix}")
    tracks = scan(str(tmp_path))
    assert sorted(track.caption for track in tracks) == sorted(f"in {s}" for s in FORMATS)
    assert all(abs(track.duration_sec - 1) <= 0.1 for track in tracks)


def test_two_recordings_of_one_name_are_named(tmp_path):
    captioned(captioned(tmp_path, "x/a.mp3"), "x/a.wav")
    captioned(tmp_path, "y/a.wav")  # in another folder it is another
    with pytest.raises(UserError, match=r"1 of 3 .*\n.*x/a.* same name as x/a\.\w+, .*keep one"):
        scan(str(tmp_path))


DAMAGE = {
    "cut": lambda b: b[: len(b) // 2],
    "empty": lambda b: b"",
    "text": lambda b: b"la la la " * 99,
    "start": lambda b: b[:30],
}


@pytest.mark.parametrize("how", DAMAGE)
@pytest.mark.parametrize("suffix", FORMATS)
def test_damaged_files_are_named_with_the_reason(suffix, how, tmp_path):
    path = tmp_path / f"a.{suffix}"
    write(path, tone(0, 3.0, RATE))
    path.write_bytes(DAMAGE[how](path.read_bytes()))
    if how == "cut" and suffix in ("ogg", "opus", "aac"):  # they don't say how long they are
        assert 0.5 < scan(str(tmp_path), with_captions=False)[0].duration_sec < 2
        return
    reason = {"cut": "truncated", "empty": "is empty"}.get(how, "can't be read as audio")
    with pytest.raises(UserError, match=rf"a\.{suffix}: .*{reason}"):
        scan(str(tmp_path), with_captions=False)


def test_an_m4a_of_unknown_coding_is_named(tmp_path):
    write(tmp_path / "a.m4a", tone(0, 1.0, RATE))
    content = (tmp_path / "a.m4a").read_bytes()
    (tmp_path / "a.m4a").write_bytes(content.replace(b"mp4a", b"mpXa").replace(b"esds", b"free"))
    with pytest.raises(UserError, match=r"a\.m4a: .*unknown codec"):
        scan(str(tmp_path), with_captions=False)


@pytest.mark.parametrize("suffix", FORMATS)
def test_too_short_files_are_named(suffix, tmp_path):
    write(tmp_path / f"a.{suffix}", tone(0, 0.3, RATE))
    with pytest.raises(UserError, match=r"too short: less than 0\.5"):
        scan(str(tmp_path), with_captions=False)


def test_an_aiff_with_nan_is_named(tmp_path):
    wav = tone(0, 1.0, RATE)
    wav[-1] = np.nan
    write(tmp_path / "a.aif", wav)
    with pytest.raises(UserError, match="not finite"):
        scan(str(tmp_path), with_captions=False)


# Where captions are.


def put_txt(folder: Path, texts: dict[str, str]) -> None:
    for name, text in texts.items():
        (folder / name).with_suffix(".txt").write_text(text)


def put_json(folder: Path, texts: dict[str, str]) -> None:
    for name, text in texts.items():
        content = {"description": text, "genre": None, "duration": 3.0}
        (folder / name).with_suffix(".json").write_text(json.dumps(content))


def put_csv(folder: Path, texts: dict[str, str], column: str = "text", encoding: str = "utf-8"):
    with (folder / "metadata.csv").open("w", encoding=encoding, newline="") as file:
        table = csv.writer(file)
        table.writerows([("file_name", "x", column), *((n, 0, t) for n, t in texts.items())])
        table.writerow(("gone.wav", 0, "moved out of the folder"))


def put_jsonl(folder: Path, texts: dict[str, str]) -> None:
    rows = [json.dumps({"file_name": f"./{name}", "text": text}) for name, text in texts.items()]
    (folder / "metadata.jsonl").write_text("\n\n".join(rows) + "\n", encoding="utf-8-sig")


def put_csv_in_each_folder(folder: Path, texts: dict[str, str]) -> None:
    put_csv(folder, {n: t for n, t in texts.items() if "/" not in n} | {"deep/é.flac": "a lie"})
    put_csv(folder / "deep", {n[5:]: t for n, t in texts.items() if "/" in n})


WAYS: dict[str, Callable[[Path, dict[str, str]], object]] = {
    "txt": put_txt,
    "json": put_json,
    "csv": put_csv,
    "csv of Excel": lambda *a: put_csv(*a, encoding="utf-8-sig"),
    "csv with captions": lambda *a: put_csv(*a, column="caption"),
    "csv of Windows": lambda f, t: put_csv(f, {n.replace("/", "\\"): x for n, x in t.items()}),
    "csv of macOS": lambda f, t: put_csv(f, {unicodedata.normalize("NFD", n): t[n] for n in t}),
    "jsonl": put_jsonl,
    "nearest csv": put_csv_in_each_folder,
}
TEXTS = {"a.wav": 'slow piano, "vinyl"', "deep/é.flac": "chuva, é 雨"}


def music(folder: Path) -> Path:
    for name in TEXTS:
        write(folder / name, tone(1, 0.6, RATE))
    return folder


@pytest.mark.parametrize("way", WAYS)
def test_each_way_gives_the_same_captions(way, tmp_path):
    WAYS[way](music(tmp_path), TEXTS)
    assert {track.name: track.caption for track in scan(str(tmp_path))} == TEXTS


def test_the_first_that_is_there_is_taken_and_each_is_counted(tmp_path, mono_folder):
    folder = music(tmp_path / "music")
    for put in (put_jsonl, put_csv, put_json, put_txt):  # each goes before the one before
        name = put.__name__
        put(folder, {n: f"{name} {n}" for n in TEXTS})
        assert {t.caption for t in scan(str(folder))} == {f"{name} {n}" for n in TEXTS}
    (folder / "a.txt").unlink()
    (folder / "a.json").unlink()
    tracks = scan(str(folder))
    told = facts._caption_facts(tiny_config(mono_folder, folder, tmp_path / "o"), tracks)
    assert told == "1 from metadata.csv, 1 from .txt files"


def test_a_table_that_nobody_needs_may_be_anything(tmp_path):
    put_txt(music(tmp_path), TEXTS)
    (tmp_path / "metadata.csv").write_bytes(b"\xff of another program")
    assert len(scan(str(tmp_path))) == 2


BAD_TABLES = {
    "no text": ("metadata.csv", b"file_name,words\na.wav,x\n", "line 2 has no file_name"),
    "no file_name": ("metadata.csv", b"name,text\na.wav,x\n", "line 2 has no file_name"),
    "not UTF-8": ("metadata.csv", b"file_name,text\na.wav,caf\xe9\n", "save it as UTF-8"),
    "not for it": ("metadata.csv", b"file_name,text\nc.wav,x\n", "a.wav: no caption"),
    "empty": ("metadata.csv", b"file_name,text\na.wav, \n", "a.wav: its caption.*csv is empty"),
    "short row": ("metadata.csv", b"file_name,text\na.wav\n", "a.wav: its caption.*is empty"),
    "two": ("metadata.csv", b"file_name,text\na.wav,x\na.wav,y\n", "a.wav: .*different"),
    "comma": ("metadata.csv", b"file_name,text\na.wav,slow, old\n", "line 2 has more columns"),
    "quote": ("metadata.csv", b'file_name,text\na.wav,"hi\nb.wav,x\n', "can't be read"),
    "deep line": ("metadata.jsonl", b"[" * 100_000, "metadata.jsonl can't be read"),
    "no JSON": ("metadata.jsonl", b"{file_name: 3}\n", "metadata.jsonl can't be read"),
    "a list": ("metadata.jsonl", b"[1]\n", "line 1 is not a JSON object"),
    "a number": ("metadata.jsonl", b'{"file_name": "a.wav", "text": 3}', "must be text"),
    "no column": ("metadata.jsonl", b'{"file_name": "a.wav"}', "line 1 has no file_name"),
    "json deep": ("a.json", b'{"a": ' + b"[" * 100_000, "its .json is not JSON"),
    "json surrogate": ("a.json", b'{"description": "\\ud800 x"}', "a.wav: .*half a character"),
    "json digits": ("a.json", b'{"bpm": ' + b"9" * 5_000 + b"}", "its .json is not JSON"),
    "json list": ("a.json", b"[1]", "a.wav: its .json is not a JSON object"),
    "json cut": ("a.json", b'{"description": ', "its .json is not JSON"),
    "json not UTF-8": ("a.json", b'{"description": "\xe9"}', "its .json is not UTF-8"),
    "json empty": ("a.json", b'{"duration": 3, "moods": []}', "its .json is empty: .*description"),
    "json bpm": ("a.json", b'{"bpm": "fast"}', "its .json: bpm is 'fast', not a number"),
    "json object": ("a.json", b'{"genre": {"a": 1}}', "its .json: genre is .*not text"),
    "json yes": ("a.json", b'{"description": true}', "its .json: description is True"),
}


@pytest.mark.parametrize("suffix", ["m4a", "wav"])
def test_an_mp3_by_another_name_is_read_as_one(suffix, tmp_path):
    write(tmp_path / "a.mp3", tone(1, 1.0, RATE))
    heard = read_crop(tmp_path / "a.mp3", 20_000, 9_000, RATE, 1)
    (tmp_path / "a.mp3").rename(tmp_path / f"a.{suffix}")
    (track,) = scan(str(tmp_path), with_captions=False)
    assert track.frames == RATE
    there = read_crop(track.path, 20_000, 9_000, RATE, 1)
    np.testing.assert_allclose(there, heard, atol=1e-5)


@pytest.mark.parametrize("name", BAD_TABLES)
def test_bad_captions_are_named_with_the_reason(name, tmp_path):
    file, content, says = BAD_TABLES[name]
    write(tmp_path / "a.wav", tone(1, 0.6, RATE))
    (tmp_path / file).write_bytes(content)
    with pytest.raises(UserError, match=says):
        scan(str(tmp_path))


def test_a_missing_caption_is_answered_with_every_way(tmp_path):
    with pytest.raises(UserError) as caught:
        scan(str(music(tmp_path)))
    ways = ("NAME.txt", "NAME.json", "metadata.csv", "metadata.jsonl", "--caption=", "--no_label=1")
    assert [way for way in (*ways, "--caption_from=tags") if way not in str(caught.value)] == []


TAGS = {"title": "Rain", "artist": "Ana", "genre": "Bossa Nova", "comment": "soft guitar"}


@pytest.mark.parametrize("suffix", [s for s in FORMATS if s not in ("w64", "aac")])
def test_tags_are_captions(suffix, tmp_path):
    write(tmp_path / f"a.{suffix}", tone(1, 0.6, RATE), TAGS)
    (track,) = scan(str(tmp_path), from_tags=True)
    assert track.caption == "soft guitar"
    assert suffix in ("aif", "aiff") or track.written.fields == ("genre: bossa nova",)
    write(tmp_path / f"a.{suffix}", tone(1, 0.6, RATE), {"title": "Rain"})
    assert scan(str(tmp_path), from_tags=True)[0].caption == "title: Rain"
    write(tmp_path / f"a.{suffix}", tone(1, 0.6, RATE))
    with pytest.raises(UserError, match=r"has none of the tags .*--caption_from"):
        scan(str(tmp_path), from_tags=True)


def test_one_caption_and_a_trigger(mono_folder, tmp_path):
    put_txt(music(tmp_path / "music"), TEXTS)

    def captions(**flags: Any) -> list[str]:
        config = tiny_config(mono_folder, tmp_path / "music", tmp_path / "o", **flags)
        return [track.caption for track in scan_dataset(config)[0]]

    assert captions() == list(TEXTS.values())
    assert captions(caption="one for all") == ["one for all"] * 2
    assert captions(trigger="my-style") == [f"my-style, {text}" for text in TEXTS.values()]
    assert captions(no_label=True) == ["", ""]
    both = captions(trigger="my-style", placeholder="<w>", caption="a")
    assert both == ["my-style, <w> a"] * 2


def test_a_trigger_that_is_there_is_not_put_twice():
    assert in_front("jazz", "<w>", "jazz, slow") == "<w> jazz, slow"
    assert in_front("jazz", None, "jazz, slow") == "jazz, slow"
    assert in_front("jazz", None, "jazzy piano") == "jazz, jazzy piano"


EXCLUDED = [
    ({"caption": "x", "no_label": True}, "--caption and --no_label exclude"),
    ({"trigger": "x", "no_label": True}, "--trigger and --no_label exclude"),
    ({"caption_from": "tags", "no_label": True}, "--caption_from and --no_label exclude"),
    ({"caption_from": "tags", "caption": "x"}, "--caption_from and --caption exclude"),
    ({"merge_text_p": 0.5, "caption": "x"}, "--merge_text_p and --caption exclude"),
    ({"caption": " "}, "--caption"),
    ({"caption_from": "sky"}, "--caption_from=sky"),
]


@pytest.mark.parametrize(("flags", "says"), EXCLUDED)
def test_flags_that_exclude_each_other(flags, says, tmp_path):
    with pytest.raises(UserError) as caught:
        build(Config, {"dataset_path": str(tmp_path), **flags})
    assert says in str(caught.value)


# audiocraft's fields.

FULL = {"title": "Rain", "artist": "Ana", "description": "A waltz.", "genre": "Jazz", "bpm": 90}
FULL |= {"moods": ["Calm", "sad "], "instrument": "piano", "key": "C Minor", "keywords": None}
FIELDS = ("genre: jazz", "moods: calm, sad", "instrument: piano", "bpm: 90.0", "key: c minor")


def with_fields(folder: Path, content: dict[str, Any]) -> Path:
    write(folder / "a.wav", tone(1, 1.0, RATE))
    (folder / "a.json").write_text(json.dumps(content))
    return folder


def test_fields_are_read_as_audiocraft_reads_them(tmp_path):
    (track,) = scan(str(with_fields(tmp_path, FULL)))
    assert track.written == Caption(".json files", "A waltz.", FIELDS)
    assert track.caption == "A waltz."
    (track,) = scan(str(with_fields(tmp_path, {**FULL, "description": "", "key": "c, d"})))
    assert track.caption == ". ".join(["title: Rain", "artist: Ana", *FIELDS[:4]])


def test_fields_are_merged_as_often_as_asked_and_in_any_order(tmp_path):
    (track,) = scan(str(with_fields(tmp_path, FULL)))
    rng = np.random.default_rng(0)
    texts = [merged(track.written, 0.5, rng) for _ in range(8_000)]
    with_some = [text for text in texts if ": " in text]
    share = 0.5 * (1 - 0.5**5)  # nothing is merged when all five are left out
    assert len(with_some) / len(texts) == pytest.approx(share, abs=0.02)
    assert set(texts) - set(with_some) == {"A waltz."}
    without = [text for text in with_some if not text.startswith("A waltz. ")]
    assert len(without) / len(with_some) == pytest.approx(0.5, abs=0.03)
    for field in FIELDS:
        kept = sum(field in text for text in texts) / len(texts)
        assert kept == pytest.approx(0.5 * 0.5, abs=0.025)
    both = [text for text in with_some if FIELDS[0] in text and FIELDS[4] in text]
    first = sum(text.index(FIELDS[0]) < text.index(FIELDS[4]) for text in both)
    assert first / len(both) == pytest.approx(0.5, abs=0.06)


def test_a_clips_text_is_of_seed_epoch_and_file_and_has_the_trigger(tmp_path):
    folder = with_fields(tmp_path, FULL)
    made = [clips(folder, merge_text_p=0.9, in_front="my-style, {}".format) for _ in range(2)]
    texts = [[some[Pick(epoch, 0)].caption for epoch in range(30)] for some in made]
    assert texts[0] == texts[1]
    assert len(set(texts[0])) > 10
    assert all(text.startswith("my-style, ") for text in texts[0])
    other = clips(folder, merge_text_p=0.9, seed=1)
    assert [other[Pick(e, 0)].caption for e in range(30)] != [t[10:] for t in texts[0]]


def test_captions_without_fields_draw_nothing(tmp_path):
    captioned(tmp_path, caption="one two three four five")
    plain, merging = (
        clips(tmp_path, drop_word=0.5, drop_caption=0.3, merge_text_p=p) for p in (0.0, 1.0)
    )
    for epoch in range(20):
        assert plain[Pick(epoch, 0)].caption == merging[Pick(epoch, 0)].caption


def test_held_out_clips_and_samples_have_the_plain_text(mono_folder, tmp_path):
    config = tiny_config(
        mono_folder,
        with_fields(tmp_path / "a", FULL),
        tmp_path / "o",
        valid_path=str(with_fields(tmp_path / "b", FULL)),
        merge_text_p=1.0,
        trigger="x",
    )
    run = start(config, contextlib.ExitStack())
    assert {run.held_out[Pick(e, 0)].caption for e in range(9)} == {"x, A waltz."}
    assert len({run.clips[Pick(e, 0)].caption for e in range(9)}) > 4
    assert run.prompts == ["x, A waltz."]


def test_what_fields_say_is_in_the_fingerprint(tmp_path):
    one = scan(str(with_fields(tmp_path / "a", FULL)))
    other = scan(str(with_fields(tmp_path / "b", {**FULL, "genre": "Rock"})))
    assert one[0].caption == other[0].caption
    assert fingerprint(one) != fingerprint(other)


def test_a_run_from_tags_is_resumed_from_tags_only(mono_folder, tmp_path, fit):
    write(tmp_path / "music" / "a.wav", tone(1, 1.0, RATE), TAGS)
    (tmp_path / "music" / "a.txt").write_text("from a file")
    given = {"max_steps": 1, "save_step": 1, "batch_size": 1}
    fit(mono_folder, tmp_path / "music", "run", **given, caption_from="tags")
    with pytest.raises(UserError, match="--caption_from=auto, was tags"):
        fit(mono_folder, tmp_path / "music", "run", **{**given, "max_steps": 2}, resume=True)


def test_training_with_fields_says_so_and_is_the_same_again(mono_folder, tmp_path, fit, capsys):
    folder = with_fields(tmp_path / "music", FULL)
    shutil.copy(folder / "a.wav", folder / "b.wav")
    (folder / "b.txt").write_text("a plain one")
    runs = [
        fit(mono_folder, folder, name, max_steps=3, merge_text_p=0.9, trigger="my-style")
        for name in ("one", "two")
    ]
    told = "1 from .json files, 1 from .txt files; 1 with fields, merged with probability 0.9; "
    assert f"{told}my-style goes in front" in capsys.readouterr().out
    a, b = map(weights, runs)
    assert all(np.array_equal(a[name], b[name]) for name in a)
