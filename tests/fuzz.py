"""Damage files at random and look at them as `prepare.py check` does.

`python tests/fuzz.py --count=3000 --seed=0`; a small part of it runs in test_shards.py. Whatever
is not named as unusable must decode fully; nothing may crash or hang.
"""

import csv
import io
import json
import multiprocessing
import signal
import sys
import tarfile
import tempfile
import time
from collections import Counter
from pathlib import Path

import fire
import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

from conftest import tone
from test_sources import FORMATS, RATE, write

import dataset
import prepare
from flags import UserError

LIMIT_SEC = 10
NUMBERS = [0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 2**63 - 1]


def damaged(content: bytes, rng: np.random.Generator) -> bytes:
    """Content with one to four things wrong; half of them near its start, where headers are."""
    data = bytearray(content)
    for _ in range(rng.integers(1, 5)):
        if not data:
            break
        end = len(data) if rng.random() < 0.5 else min(len(data), 600)
        at = int(rng.integers(end))
        size = int(rng.integers(1, 2 ** rng.integers(1, 13)))
        how = rng.integers(7)
        if how == 0:
            data[at] ^= 1 << rng.integers(8)
        elif how == 1:
            del data[at:]
        elif how == 2:
            del data[at : at + size]
        elif how == 3:
            other = int(rng.integers(len(data)))
            data[at:at] = data[other : other + size]
        elif how == 4:
            data[at : at + size] = rng.bytes(min(size, len(data) - at))
        elif how == 5:
            order = "big" if rng.random() < 0.5 else "little"
            number = NUMBERS[rng.integers(len(NUMBERS))].to_bytes(8, order)
            data[at : at + 4] = number[:4] if order == "little" else number[-4:]
        else:
            data[at:at] = bytes([data[at]]) * (size * 64)  # in a text: deep, or long
    return bytes(data)


def originals(folder: Path) -> dict[str, bytes]:
    """A good file of each kind, by suffix."""
    made = {}
    for number, suffix in enumerate(FORMATS):
        path = folder / f"a.{suffix}"
        write(path, tone(number, 1.0, RATE), {"title": "Rain", "comment": "a tune"})
        made[f".{suffix}"] = path.read_bytes()
    made[".json"] = json.dumps({"description": "a tune", "moods": [["x"], []], "bpm": 90}).encode()
    made[".txt"] = "a tune, é".encode()
    table = io.StringIO()
    csv.writer(table).writerows([("file_name", "text"), *((f"{i}.wav", "a") for i in range(9))])
    made["metadata.csv"] = table.getvalue().encode()
    rows = (json.dumps({"file_name": f"{i}.wav", "text": "a tune"}) for i in range(9))
    made["metadata.jsonl"] = "\n".join(rows).encode()
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        for path in [*folder.glob("a.*")][:3] * 2:
            archive.add(path, f"{'x' * 120}{len(packed.getvalue())}{path.suffix}")
    made[".tar"] = packed.getvalue()
    return made


def look(folder: Path, results: "multiprocessing.Queue[object]") -> None:
    """Scan a folder, and decode what is usable, as `prepare.py check` does."""
    tags = ".tags" in folder.name
    try:
        tracks, problems = dataset.find(str(folder), from_tags=tags)
    except UserError as error:
        results.put(("told", str(error)))
        return
    for track in tracks:
        start = time.monotonic()
        result = prepare._listen_or_say(track)
        took = time.monotonic() - start
        if took > LIMIT_SEC:
            results.put(("slow", f"{track.name}: {took:.0f} s"))
        results.put(("told later" if isinstance(result, str) else "decoded", track.name))
    for problem in problems:
        results.put(("told", problem))


def run(count: int = 3_000, seed: int = 0, each: int = 25, keep: str = "fuzz") -> Counter[str]:
    """Damage `count` files, `each` in a folder; what went wrong stays in the folder `keep`."""
    rng = np.random.default_rng(seed)
    totals: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as temporary:
        (Path(temporary) / "good").mkdir()
        good = originals(Path(temporary) / "good")
        kinds = list(good)
        for number in range(-(-count // each)):
            folder = Path(temporary) / f"{number}{'.tags' if number % 4 == 3 else ''}"
            folder.mkdir()
            for i in range(min(each, count - number * each)):
                kind = kinds[rng.integers(len(kinds))]
                name = kind if kind.startswith("metadata") else f"{i}{kind}"
                (folder / name).write_bytes(damaged(good[kind], rng))
                if kind in (".json", ".txt"):
                    (folder / f"{i}.wav").write_bytes(good[".wav"])
                elif not kind.startswith("metadata") and rng.random() < 0.9:
                    (folder / f"{i}.txt").write_bytes(good[".txt"])
                totals["files"] += 1
            results: multiprocessing.Queue[tuple[str, str]] = multiprocessing.Queue()
            process = multiprocessing.Process(target=look, args=(folder, results))
            start = time.monotonic()
            process.start()
            while process.is_alive() and time.monotonic() - start < LIMIT_SEC * each:
                process.join(0.01)
                while not results.empty():
                    what, text = results.get()
                    totals[what] += 1
                    if what == "slow":
                        print(f"{folder.name}: {what} {text}")
            took = time.monotonic() - start
            totals["longest folder, ms"] = max(totals["longest folder, ms"], round(took * 1_000))
            if process.is_alive():
                process.kill()
            process.join()
            while not results.empty():
                totals[results.get()[0]] += 1
            if process.exitcode:
                totals[f"exit code {process.exitcode}"] += 1
                Path(keep).mkdir(exist_ok=True)
                folder.rename(Path(keep) / f"{seed}-{folder.name}")
                print(f"{folder.name}: exit code {process.exitcode}")
    return totals


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for what, number in fire.Fire(run, serialize=lambda _: None).items():
        print(f"{what:20} {number}")
