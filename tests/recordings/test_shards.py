"""Shards train as the folder that they were made of; a hostile or broken one is named."""

import csv
import http.server
import io
import itertools
import json
import multiprocessing
import os
import signal
import tarfile
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import webdataset
from conftest import ROOT, metrics, tone, weights
from processes import Started
from samples import FORMATS, PAIR, RATE, clips, sound, tar_of, write

import prepare
from dataset import Pick
from errors import UserError
from recordings import shards
from recordings.audio import SUFFIXES
from recordings.scan import find, scan
from training.plan import Plan, train_batches


@pytest.fixture(autouse=True)
def _no_hang() -> Iterator[None]:
    """Each within 20 s: the worst are meant to go on for ever."""
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.alarm(20)
    yield
    signal.alarm(0)


def pack(folder: Path, *tars: Path, form: int = tarfile.PAX_FORMAT) -> None:
    """Deal a folder's files, each beside its caption, out to tars in turn."""
    stems = sorted({path.with_suffix("") for path in folder.rglob("*") if path.is_file()})
    for number, tar in enumerate(tars):
        tar.parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(tar, "w", format=form) as archive:
            for stem in stems[number :: len(tars)]:
                for path in sorted(stem.parent.glob(f"{stem.name}.*")):
                    archive.add(path, path.relative_to(folder).as_posix())


def found(dataset_path: object, **options: bool) -> tuple[list[str], list[str]]:
    tracks, problems = find(str(dataset_path), **options)
    names = [track.member.name if track.member else track.name for track in tracks]
    return names, [": ".join(problem) for problem in problems]


@pytest.fixture(scope="module")
def album(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every format; captions as .txt, .json and a table."""
    folder = tmp_path_factory.mktemp("album")
    rows = [("file_name", "text")]
    for number, suffix in enumerate(FORMATS):
        path = folder / f"disc{number % 2}" / f"{number} x.{suffix}"
        write(path, tone(number, 1.2 + 0.2 * number, RATE))
        if number % 3 == 0:
            path.with_suffix(".txt").write_text(f"tune {number}")
        elif number % 3 == 1:
            content = {"description": f"tune {number}", "genre": "jazz", "bpm": 90 + number}
            path.with_suffix(".json").write_text(json.dumps(content))
        else:
            rows.append((path.relative_to(folder).as_posix(), f"tune {number}"))
    with (folder / "metadata.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return folder


def steps(output: Path) -> list[dict]:
    return [row for row in metrics(output) if "loss" in row]


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_an_album_in_a_shard_is_the_folder_bit_by_bit(form, album, tmp_path):
    pack(album, tmp_path / "a.tar", form=form)
    plain, packed = clips(album), clips(tmp_path / "a.tar")
    assert len(plain) == len(packed) == len(FORMATS)
    assert {Path(track.name).suffix for track in packed.tracks} == {f".{s}" for s in FORMATS}
    for epoch, index in itertools.product(range(2), range(len(FORMATS))):
        a, b = (made[Pick(epoch, index)] for made in (plain, packed))
        assert torch.equal(a.wav, b.wav), a.name
        assert a.caption == b.caption
    assert [t.written for t in plain.tracks] == [t.written for t in packed.tracks]


def test_an_album_in_shards_trains_as_the_folder(album, mono_folder, tmp_path, fit):
    pack(album, tmp_path / "shards" / "a.tar")
    flags = {"max_steps": 2, "batch_size": 4, "merge_text_p": 0.5}
    plain = fit(mono_folder, album, "plain", **flags)
    for number, path in enumerate(("shards", "shards/{a..a}.tar")):
        packed = fit(mono_folder, tmp_path / path, f"packed{number}", **flags)
        assert metrics(packed) == metrics(plain)
        torch.testing.assert_close(weights(packed), weights(plain), rtol=0, atol=0)


def test_shards_of_webdatasets_own_writer_train(mono_folder, tmp_path, fit):
    pattern = str(tmp_path / "train-%06d.tar")
    with webdataset.ShardWriter(pattern, maxcount=2, verbose=0) as writer:
        for number in range(5):
            writer.write(
                {"__key__": f"song.{number}", "wav": sound(number), "json": {"description": "x y"}}
                if number % 2
                else {"__key__": f"deep/{number}", "wav": sound(number), "txt": f"tune {number}"}
            )
    output = fit(mono_folder, tmp_path / "train-{000000..000002}.tar", epochs=1)
    assert len(steps(output)) == 3
    tracks = scan(str(tmp_path / "train-{000000..000002}.tar"))
    assert Counter(t.caption for t in tracks) == {"x y": 2, "tune 0": 1, "tune 2": 1, "tune 4": 1}


def test_long_names_and_other_alphabets(tmp_path):
    names = ["e/" * 60 + "é 雨.wav", "a" * 120 + ".wav", "b" * 240 + ".wav"]
    for form in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        with tarfile.open(tmp_path / "a.tar", "w", format=form) as archive:
            for name in names:
                info = tarfile.TarInfo(name)
                info.size = len(PAIR[0][1])
                archive.addfile(info, io.BytesIO(PAIR[0][1]))
        assert sorted(found(tmp_path / "a.tar", with_captions=False)[0]) == sorted(names)


@pytest.fixture
def many(tmp_path: Path) -> Path:
    """17 clips in 3 shards."""
    folder = tmp_path / "many"
    for number in range(17):
        write(folder / f"{number:02}.wav", tone(number, 0.6), rate=32_000)
        (folder / f"{number:02}.txt").write_text(f"tune {number}")
    pack(folder, *(tmp_path / "tars" / f"{i}.tar" for i in range(3)))
    return tmp_path / "tars" / "{0..2}.tar"


@pytest.mark.parametrize(("workers", "ranks"), [(0, 1), (1, 1), (4, 1), (1, 2)])
def test_an_epoch_takes_every_clip_once(workers, ranks, many):
    made = clips(many)
    plan = Plan(len(made), 2, 2, epochs=2, max_steps=None, seed=0, processes=ranks)
    seen, orders = [Counter(), Counter()], []
    for rank in range(ranks):
        batches = train_batches(made, plan, start=0, rank=rank, workers=workers)
        for step in range(plan.total_steps):
            for _ in plan.batches(step, rank):
                batch = next(batches)
                heard = batch.lengths > 0  # others only fill up a process's share
                names = [n for n, is_heard in zip(batch.names, heard, strict=True) if is_heard]
                seen[step // plan.steps_per_epoch].update(names)
                orders.append(names)
    assert seen[0] == seen[1] == Counter(track.name for track in made.tracks)
    assert len(orders) > 4


def test_stop_and_resume_with_shards_is_exact(many, mono_folder, fit, tmp_path):
    flags = {
        "batch_size": 4,
        "epochs": 2,
        "save_step": 3,
        "num_workers": 1,
        "lr_scheduler": "constant",
    }
    whole = fit(mono_folder, many, "whole", **flags)
    part = fit(mono_folder, many, "part", **{**flags, "max_steps": 3})
    fit(mono_folder, many, "part", **flags, resume=True)
    torch.testing.assert_close(weights(part), weights(whole), rtol=0, atol=0)


def test_two_processes_train_from_shards_as_one(many, mono_folder, fit, tmp_path, processes):
    flags = {"lr": 1e-4, "warmup_steps": 0, "epochs": 1, "num_workers": 0, "duration": 1}
    alone = fit(mono_folder, many, "alone", **flags, batch_size=4)
    flags |= {"model_id": mono_folder, "dataset_path": many, "device": "cpu", "batch_size": 2}
    flags |= {"output_dir": tmp_path / "two", "grad_acc": 1}
    signal.alarm(0)
    both = Started(processes, tmp_path / "logs", count=2, **flags)
    codes, _, errors = both.end()
    assert codes == {0}, errors
    torch.testing.assert_close(weights(tmp_path / "two"), weights(alone), rtol=0, atol=1e-6)


# Broken shards.


def test_missing_shards_are_named(many, tmp_path):
    (tmp_path / "tars" / "1.tar").unlink()
    with pytest.raises(UserError, match=r"no such file: .*tars/1\.tar, .*/3\.tar; give a folder"):
        scan(str(many).replace("2}", "3}"))
    with pytest.raises(UserError, match="unbalanced brace"):
        scan(str(tmp_path / "{0..2.tar"))


def test_a_path_that_is_there_is_taken_as_it_is(many, tmp_path):
    tars, odd = tmp_path / "tars", tmp_path / "folder.tar"
    odd.mkdir()
    (tars / "0.tar").rename(odd / "a{1,2}.tar")
    (odd / "._a.tar").write_bytes(b"of macOS, beside files on disks of others")
    assert len(scan(str(odd))) == len(scan(str(odd / "a{1,2}.tar"))) > 0


def test_names_of_any_language_are_taken(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, content in (("夏\u3000空.wav", sound(0, 1.0)), ("夏\u3000空.txt", b"summer")):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    assert [track.caption for track in scan(str(tmp_path))] == ["summer"]


def test_a_shard_cut_anywhere_is_named(tmp_path):
    tar = tar_of(tmp_path / "a.tar", [*PAIR, ("late.wav", sound(1)), ("late.txt", b"late")])
    whole = tar.read_bytes()
    with tarfile.open(tar) as archive:
        infos = archive.getmembers()
    end = infos[-1].offset + 1024
    assert found(tar)[1] == []
    starts = [info.offset for info in infos]
    cuts = {0, 1, 511, *starts, *(s + 100 for s in starts), *(s + 512 for s in starts)}
    cuts |= {infos[0].offset_data + 7_000, infos[2].offset_data + 1, end - 512, end - 1, end}
    for cut in sorted(cuts):
        tar.write_bytes(whole[:cut])
        problems = found(tar)[1]
        assert any("truncated or damaged" in p and "make it again" in p for p in problems), cut
    tar.write_bytes(whole + whole)
    assert "data follows its end" in found(tar)[1][0]


@pytest.mark.parametrize("how", ["gz", "bz2", "xz", "zst"])
def test_a_compressed_shard_is_named_with_its_compression(how, tmp_path):
    tar = tar_of(tmp_path / "a.tar")
    if how == "zst":
        tar.write_bytes(b"\x28\xb5\x2f\xfd" + bytes(600))
    else:
        with tarfile.open(tar, f"w:{how}") as archive:
            archive.add(ROOT / "README.md", "a.txt")
    with pytest.raises(UserError, match={"gz": "gzip", "bz2": "bzip2"}.get(how, how)):
        scan(str(tar))


# Hostile shards. Each holds the good pair too, before the attack.


def header(name: bytes, size: bytes = b"%011o\0" % 0, kind: bytes = b"0", link: bytes = b""):
    block = bytearray(512)
    block[0:100] = name.ljust(100, b"\0")[:100]
    block[100:124] = b"%07o\0" % 0o644 + 2 * (b"%07o\0" % 0)
    block[124:136] = size.ljust(12, b"\0")
    block[136:148] = b"%011o\0" % 0
    block[148:156] = b" " * 8
    block[156:157] = kind
    block[157:257] = link.ljust(100, b"\0")[:100]
    block[257:265] = b"ustar\x0000"
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def octal(size: int) -> bytes:
    return b"%011o\0" % size


def binary(size: int) -> bytes:
    return (b"\xff" if size < 0 else b"\x80") + size.to_bytes(11, "big", signed=True)


def padded(content: bytes) -> bytes:
    return content + bytes(-len(content) % 512)


def member(name: bytes, content: bytes = sound(5), kind: bytes = b"0") -> bytes:
    return header(name, octal(len(content)), kind) + padded(content)


def pax(*records: bytes, kind: bytes = b"x") -> bytes:
    return member(b"pax", b"".join(records), kind)


def record(key: bytes, value: bytes) -> bytes:
    length = len(key) + len(value) + 3
    length += len(str(length + len(str(length))))
    return b"%d %s=%s\n" % (length, key, value)


WAV = member(b"late.wav")
OUT, LINK = "leads out of the folder", "is a link or a device"
NOT_SHOWN, BROKEN = "has control characters or is not UTF-8", "truncated or damaged"
ATTACKS = {  # what follows the good pair -> what is said, None = it does no harm
    "absolute": (member(b"/etc/evil.wav"), OUT),
    "dots": (member(b"../evil.wav"), OUT),
    "dots within": (member(b"a/../../evil.wav"), OUT),
    "backslashes": (member(b"..\\evil.wav"), OUT),
    "drive": (member(b"C:evil.wav"), OUT),
    "pax dots": (pax(record(b"path", b"../evil.wav")) + WAV, OUT),
    "gnu dots": (member(b"L", b"../../evil.wav\0", b"L") + WAV, OUT),
    "symlink": (header(b"evil.wav", kind=b"2", link=b"/etc/passwd"), LINK),
    "hard link": (header(b"evil.txt", kind=b"1", link=b"/etc/passwd"), LINK),
    "link in itself": (header(b"evil.wav", kind=b"1", link=b"evil.wav"), LINK),
    "link with a size": (header(b"evil.wav", octal(9**9), b"2", b"good.wav"), LINK),
    "device": (header(b"evil.wav", kind=b"3"), LINK),
    "block device": (header(b"evil.wav", kind=b"4"), LINK),
    "fifo": (header(b"evil.wav", kind=b"6"), LINK),
    "another type": (member(b"evil.wav", kind=b"Z"), LINK),
    "sparse": (header(b"evil.wav", octal(512), b"S") + bytes(512), BROKEN),
    "pax sparse": (pax(record(b"GNU.sparse.size", b"9" * 12)) + WAV, BROKEN),
    "pax sparse map": (pax(record(b"GNU.sparse.major", b"1")) + WAV, BROKEN),
    "size octal": (header(b"evil.wav", b"777777777777") + bytes(512), BROKEN),
    "size base-256": (header(b"evil.wav", binary(2**80)) + bytes(512), BROKEN),
    "size negative": (header(b"evil.wav", binary(-2_048)) + bytes(512), BROKEN),
    "size -512": (header(b"evil.wav", binary(-512)) + bytes(512), BROKEN),
    "size no number": (header(b"evil.wav", b"many") + bytes(512), BROKEN),
    "longname negative": (header(b"x", binary(-1_024), b"L") + WAV, BROKEN),
    "longname huge": (header(b"x", binary(2**70), b"L") + WAV, BROKEN),
    "pax negative": (header(b"x", binary(-1_024), b"x") + WAV, BROKEN),
    "pax global negative": (header(b"x", binary(-1_024), b"g") + WAV, BROKEN),
    "link negative": (header(b"x", binary(-1_024), b"K") + WAV, BROKEN),
    "type negative": (header(b"x", binary(-1_024), b"Z") + WAV, BROKEN),
    "longnames chained": (member(b"L", b"a.wav\0", b"L") * 5_000 + WAV, None),
    "pax chained": (pax(record(b"a", b"b")) * 5_000 + WAV, None),
    "longname giant": (member(b"L", b"a" * 2**21, b"L") + WAV, BROKEN),
    "pax giant": (pax(record(b"comment", b"a" * 2**21)) + WAV, BROKEN),
    "pax long": (pax(record(b"comment", b"a" * 2**19)) + WAV, None),
    "pax digits": (pax(b"1" * 2**19) + WAV, BROKEN),  # CVE-2024-6232
    "pax length 0": (pax(b"0 path=evil.wav\n" * 99) + WAV, BROKEN),  # CVE-2019-20907
    "pax length short": (pax(b"1 1 1 1 1 1 1 1 " * 9_999 + b"=\n") + WAV, BROKEN),
    "pax length long": (pax(b"99999 path=evil.wav\n") + WAV, BROKEN),
    "pax length negative": (pax(b"-5 path=evil.wav\n") + WAV, BROKEN),
    "pax no end": (header(b"x", octal(20), b"x") + b"20 path=", BROKEN),
    "pax size negative": (pax(record(b"size", b"-512")) + WAV, BROKEN),  # CVE-2025-8194
    "pax size huge": (pax(record(b"size", b"9" * 30)) + WAV, BROKEN),
    "pax size digits": (pax(record(b"size", b"9" * 9_999)) + WAV, BROKEN),
    "pax size no number": (pax(record(b"size", b"x")) + WAV, BROKEN),
    "pax nothing after": (pax(record(b"path", b"evil.wav")), None),
    "twice": (member(b"good.wav"), "good.wav: occurs twice"),
    "twice by ./": (member(b"./good.wav"), "good.wav: occurs twice"),
    "escapes": (member(b"\x1b[2J\x07.wav"), NOT_SHOWN),
    "new line": (member(b"a\nb.wav"), NOT_SHOWN),
    "zero in pax": (pax(record(b"path", b"a\0b.wav")) + WAV, NOT_SHOWN),
    "not UTF-8": (member(b"\xe9\xff.wav"), NOT_SHOWN),
    "right to left": (member("a\u202egnp.wav".encode()), NOT_SHOWN),
    "a folder": (header(b"a.wav/", kind=b"5"), None),
    "old folder": (header(b"a.wav/", kind=b"\0"), None),
    "no name": (member(b""), None),
    "dot": (member(b"."), None),
    "a shard within": (member(b"in.tar", tarfile.NUL * 10_240), None),
    "bad sum": (WAV[:100] + b"7" + WAV[101:], BROKEN),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_a_hostile_shard_is_only_looked_into(name, tmp_path, cli, monkeypatch):
    monkeypatch.setattr("commands.check.ProcessPoolExecutor", ThreadPoolExecutor)  # saves seconds
    monkeypatch.setattr("commands.check.draw", lambda *_: None)
    attack, says = ATTACKS[name]
    tar = tmp_path / "in" / "a.tar"
    good = tar_of(tar).read_bytes()
    good = good[: len(good.rstrip(b"\0")) // 512 * 512 + 512]
    tar.write_bytes(good + attack + bytes(1_024))
    signal.alarm(5)
    names, problems = found(tar, with_captions=False)
    signal.alarm(20)
    assert "good.wav" in names
    assert not any("evil" in name for name in names)
    told = "\n".join(problems)
    assert (says in told) if says else not told
    before = {path: path.lstat().st_mtime_ns for path in tmp_path.rglob("*")}
    flags = {"fix": tmp_path / "fixed", "picture": tmp_path / "check.png", "no_label": 1}
    result = cli(prepare, "check", str(tar), **flags)
    assert result.code == bool(says), result.err
    assert all(line.isprintable() for line in result.out.split("\n"))
    after = {path: path.lstat().st_mtime_ns for path in tmp_path.rglob("*")}
    made = {path for path in after if path not in before and tmp_path / "fixed" not in path.parents}
    assert made == {tmp_path / "fixed"}
    assert {p: t for p, t in after.items() if p in before and p != tmp_path} == {
        p: t for p, t in before.items() if p != tmp_path
    }
    (kept,) = (tmp_path / "fixed").rglob("good.wav")
    assert kept.read_bytes() == PAIR[0][1]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_recording_that_lists_other_files_reads_none(suffix, tmp_path):
    """ffmpeg's concat and HLS are lists of names, which it would open."""
    (tmp_path / "secret.wav").write_bytes(sound())
    secret = tmp_path / "secret.wav"
    for text in (
        f"ffconcat version 1.0\nfile {secret}\n",
        "ffconcat version 1.0\nfile secret.wav\n",
        f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nfile://{secret}\n#EXT-X-ENDLIST\n",
    ):
        tar = tar_of(tmp_path / "a.tar", [(f"a{suffix}", text.encode())])
        for options in ({"with_captions": False}, {"from_tags": True}):
            names, problems = found(tar, **options)
            assert not names
            assert "can't be read" in problems[0]


def test_a_shard_that_goes_or_changes_is_told_and_nothing_else_is_read(tmp_path):
    for number, change in enumerate(
        [
            lambda tar: tar.unlink(),
            lambda tar: tar.write_bytes(b""),
            lambda tar: tar.write_bytes(bytes(tar.stat().st_size)),
            lambda tar: tar.write_bytes(tar.read_bytes()[:9_000]),
            lambda tar: (tar.unlink(), tar.mkdir()),
        ]
    ):
        tar = tar_of(tmp_path / f"{number}.tar")
        made = clips(tar)
        change(tar)
        assert "good.wav: " in (made[Pick(0, 0)].error or "")


def test_what_is_no_tar_in_a_folder_is_named(tmp_path):
    (tmp_path / "good.wav").write_bytes(sound())
    os.mkfifo(tmp_path / "pipe.tar")
    os.mkfifo(tmp_path / "pipe.wav")
    (tmp_path / "gone.tar").symlink_to(tmp_path / "nothing")
    names, problems = found(tmp_path, with_captions=False)
    assert names == ["good.wav"]
    assert sorted(p.split(":")[0] for p in problems) == ["gone.tar", "pipe.tar", "pipe.wav"]


def test_captions_in_a_shard_that_steer_the_terminal_are_shown_harmless(tmp_path, cli):
    words = b"\x1b[2J same"
    members = [("a.wav", sound(1)), ("a.txt", words), ("b.wav", sound(2)), ("b.txt", words)]
    result = cli(prepare, "check", str(tar_of(tmp_path / "a.tar", members)),
                 picture=tmp_path / "check.png")  # fmt: skip
    assert result.code == 0
    assert "\\x1b[2J same" in result.out
    assert "\x1b" not in result.out


# Shards of the network.


class Server(http.server.ThreadingHTTPServer):
    asked: list[str]


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, Server]]:
    """(URL of a folder www, server); /cut/ ends in the middle, /slow/ waits."""
    www = tmp_path / "www"

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.server.asked.append(self.path)  # type: ignore[attr-defined]
            path = www / Path(self.path.partition("?")[0]).name
            if not path.exists():
                self.send_error(404)
                return
            content = path.read_bytes()
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[: len(content) // 2] if "/cut/" in self.path else content)

        def log_message(self, *_: object) -> None:
            pass

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    made = Server(("127.0.0.1", 0), Handler)
    made.asked = []
    thread = threading.Thread(target=made.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{made.server_port}", made
    made.shutdown()
    thread.join()
    made.server_close()


def kept(tmp_path: Path) -> list[str]:
    """List what has a final name in the cache folder."""
    return [path.name for path in (tmp_path / "cache").rglob("[!.]*") if path.is_file()]


def test_shards_of_the_network_are_fetched_once(server, many, tmp_path):
    url, asked = server[0], server[1].asked
    (tmp_path / "tars").rename(tmp_path / "www")
    made = clips(f"{url}/{{0..2}}.tar")
    assert len(made) == 17
    assert made[Pick(0, 3)].error is None
    assert len(asked) == 3
    assert len(scan(f"{url}/{{0..2}}.tar")) == 17
    assert len(asked) == 3
    assert len(kept(tmp_path)) == 3
    signed = f"{url}/0.tar?signature={'x' * 300}"
    assert scan(signed)[0].caption == "tune 0"


def test_two_processes_fetch_a_shard_once(server, many, tmp_path):
    (tmp_path / "tars").rename(tmp_path / "www")
    url = f"{server[0]}/0.tar"
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        a, b = pool.map(shards.find, [url, url])
    assert a == b
    assert server[1].asked == ["/0.tar"]


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("{}/cut/a.tar", "bytes are missing"),
        ("{}/b.tar", "404"),
        ("http://127.0.0.1:9/a.tar", "can't be downloaded"),
        ("http://nowhere.invalid/a.tar", "can't be downloaded"),
        ("http://[/a.tar", "can't be downloaded"),
        ("file:///etc/passwd", "give an http or https URL"),
        ("ftp://127.0.0.1/a.tar", "give an http or https URL"),
        ("pipe://cat a.tar", "give an http or https URL"),
    ],
)
def test_what_can_not_be_fetched_is_named_and_leaves_nothing(url, says, server, tmp_path):
    tar_of(tmp_path / "www" / "a.tar")
    url = url.format(server[0])
    with pytest.raises(UserError) as caught:
        scan(url)
    assert url in str(caught.value)
    assert says in str(caught.value)
    assert not kept(tmp_path)


def test_an_unfinished_download_and_a_long_list_are_told(many, tmp_path):
    tar = tmp_path / "tars" / "0.tar"
    tar.write_bytes(bytes(2**20) + tar.read_bytes())
    assert "begins with zeros" in found(tmp_path / "tars")[1][0]
    with pytest.raises(UserError, match="no such file"):
        scan(f"{tmp_path}/{{{','.join(f'train-{n:06d}' for n in range(40))}}}.tar")
