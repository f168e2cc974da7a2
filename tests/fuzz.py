"""Damage files at random, and look at each as `prepare.py check` does: what becomes of it?

    python tests/fuzz.py --count=3000 --seed=0

What is damaged must be named with a reason, at once (told) or when it is listened to (told later),
or decode fully. `make test` looks at 60 files, `make test-long` at 4,000. `--first=17 --count=1`
makes number 17 again, but for the random numbers that Ogg files are marked with.
"""

import json
import multiprocessing
import os
import shutil
import signal
import sys
import tarfile
import tempfile
import traceback
from collections import Counter
from pathlib import Path

import fire
import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

from conftest import tone
from samples import FORMATS, RATE, write

import commands.check
from errors import UserError
from recordings import scan, token_file
from recordings.track import Track

LIMIT_SEC = 10
WRONG = ("UNNAMED", "CRASH", "DIED", "HANG")
CARD = 64
NUMBERS = [0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 2**63 - 1]
TEXTS = [b"[" * 100_000, b'{"a":' * 100_000, b"9" * 5_000, b"1e999", b"NaN", b"-1", b"null"]
TEXTS += [b"\\ud800", b"\xff", b"\0", b"\r", b'"', b"\n"]


def damaged(content: bytes, rng: np.random.Generator) -> bytes:
    """Content with one to four things wrong, half of them near its start, where headers are."""
    data = bytearray(content)
    for _ in range(rng.integers(1, 5)):
        at = int(rng.integers(min(len(data), 600) if rng.random() < 0.5 else len(data)))
        other = int(rng.integers(len(data)))
        size = int(rng.integers(1, 2 ** rng.integers(1, 13)))
        how = rng.integers(7)
        if how == 0:
            data[at] ^= 1 << rng.integers(8)
        elif how == 1:
            del data[max(at, 1) :]
        elif how == 2:
            del data[at : at + min(size, len(data) - 1)]
        elif how == 3:
            data[at:at] = data[other : other + size]
        elif how == 4:
            data[at : at + size] = rng.bytes(min(size, len(data) - at))
        elif how == 5:
            number = NUMBERS[rng.integers(len(NUMBERS))]
            order = "big" if rng.random() < 0.5 else "little"
            bits = int(rng.choice([16, 32, 64]))
            data[at : at + bits // 8] = (number % 2**bits).to_bytes(bits // 8, order)
        else:
            data[at:at] = TEXTS[rng.integers(len(TEXTS))]
    return bytes(data)


def originals(folder: Path) -> dict[str, bytes]:
    """A good file of each kind, by name."""
    for number, suffix in enumerate([*FORMATS, "wav"]):
        write(folder / f"a.{suffix}", tone(number, 1.0, RATE), {"title": "Rain", "comment": "a"})
    (folder / "a.json").write_text(json.dumps({"description": "a", "moods": [["x"], []], "bpm": 9}))
    rows = [("file_name", "text"), *((f"{name}.wav", "a tune") for name in "abcdefgh")]
    (folder / "metadata.csv").write_text("\r\n".join(map(",".join, rows)))
    lines = (json.dumps(dict(zip(rows[0], row, strict=True))) for row in rows[1:])
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    with (folder / "a.safetensors").open("wb") as file:
        codes = np.random.default_rng(0).integers(CARD, size=(4, 50)).astype(np.int16)
        token_file.write(file, codes, token_file.Facts("codec", "small", 50, RATE, RATE, "[]"))
    with tarfile.open(folder / "a.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        for name in ("a.wav", "a.json", "a.ogg", "a.m4a"):
            tar.add(folder / name, f"{'é' * 120}{len(tar.getmembers()) // 2}{name}")
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def choose(number: int, seed: int, good: dict[str, bytes]) -> tuple[str, np.random.Generator]:
    """Choose the kind of file that `number` is, and what damages it."""
    rng = np.random.default_rng([seed, number])
    return list(good)[rng.integers(len(good))], rng


def make(folder: Path, number: int, seed: int, good: dict[str, bytes]) -> str:
    """Fill an empty folder with a damaged file, and what makes a data set of it -> its name."""
    name, rng = choose(number, seed, good)
    if name.startswith("metadata") or name == "a.json":
        (folder / "a.wav").write_bytes(good["a.wav"])
    (folder / name).write_bytes(damaged(good[name], rng))
    if (folder / name).suffix[1:] in (*FORMATS, "safetensors") and number % 4:
        (folder / "a.txt").write_text("a tune")
    return name


def look(folder: Path, name: str) -> tuple[str, str]:
    """(what became of the damaged file, details)."""
    try:
        is_audio = name.split(".")[1] in FORMATS
        from_tags = is_audio and not (folder / "a.txt").exists()
        tracks, found = scan.find(str(folder), from_tags=from_tags)
        problems = [": ".join(problem) for problem in found]
    except UserError as error:
        tracks, problems = [], [str(error)]
    except Exception:
        return "CRASH", traceback.format_exc()
    try:
        later = [text for track in tracks for text in [decode(track)] if text]
    except Exception:
        return "CRASH", traceback.format_exc()
    names = (name, f"its {Path(name).suffix} ", f"its {Path(name).suffix}:")  # of its recording
    if problems and not any(said in text for text in problems for said in names):
        return "UNNAMED", "\n".join(problems)
    what = "told" if problems else "told later" if later else "decoded"
    return what, "\n".join([*problems, *later])


def decode(track: Track) -> str | None:
    """Why it can't be read, if so."""
    if not track.codec:
        result = commands.check._listen_or_say(track)
        return result if isinstance(result, str) else None
    try:
        token_file.read(track.source, 0, track.frames, CARD)
    except ValueError as error:
        return str(error)
    return None


def work(numbers: range, seed: int, good: dict[str, bytes], folder: Path, results: Path) -> None:
    """A line in `results` for each number when it is done; SIGALRM ends what takes too long."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # decoders complain there
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    for number in numbers:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        name = make(folder, number, seed, good)
        signal.alarm(LIMIT_SEC)
        outcome = look(folder, name)
        signal.alarm(0)
        with results.open("a") as file:
            file.write(json.dumps([name, *outcome]) + "\n")


def run(count: int, seed: int = 0, first: int = 0) -> Counter[tuple[str, str]]:
    """Damage `count` files and return (name, outcome) -> how many; print what is wrong."""
    totals: Counter[tuple[str, str]] = Counter()
    fork = multiprocessing.get_context("fork")  # a new one after each that dies, at once
    with tempfile.TemporaryDirectory() as temporary:
        (Path(temporary) / "good").mkdir()
        good = originals(Path(temporary) / "good")
        folder, results = Path(temporary) / "folder", Path(temporary) / "results"
        number = first
        while number < first + count:
            results.write_text("")
            child = fork.Process(
                target=work, args=(range(number, first + count), seed, good, folder, results)
            )
            child.start()
            child.join()
            rows = [json.loads(line) for line in results.read_text().splitlines()]
            if child.exitcode:
                name, _ = choose(number + len(rows), seed, good)
                how = "HANG" if child.exitcode == -signal.SIGALRM else "DIED"
                rows.append([name, how, f"exit code {child.exitcode}"])
            for name, what, details in rows:
                totals[name, what] += 1
                if what in WRONG:
                    print(f"{what} --seed={seed} --first={number} --count=1: {name}\n{details}")
                number += 1
    return totals


def main(count: int = 3_000, seed: int = 0, first: int = 0) -> None:
    totals = run(count, seed, first)
    for (name, what), number in sorted(totals.items()):
        print(f"{name:16} {what:10} {number}")


if __name__ == "__main__":
    fire.Fire(main)
