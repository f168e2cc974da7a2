"""Watch the memory of generate.py while it makes a long piece with the demo model.

    python -m benchmarks.long               # an hour of music
    python -m benchmarks.long --minutes=5

Run it in the project's root. generate.py runs in a process of its own. Each line is the seconds
since its start, the seconds of music in its part file, and the memory it holds. At the end: the
median once the first 2 minutes of music were in the file, and how far memory went from it.
"""

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import fire
import psutil
import soundfile as sf

from recordings.growing import part_path

SETTLED_SEC = 120.0  # of music: the first windows, and the first long blocks for EnCodec
MB = 1e6


def watch(minutes: float = 60, interval: float = 10) -> None:
    """Print the memory every `interval` seconds, then its spread and facts of the wav."""
    with tempfile.TemporaryDirectory() as folder:
        wav = Path(folder) / "long.wav"
        command = [sys.executable, "generate.py", "--prompt=slow piano waltz", "--device=cpu"]
        command += ["--model_id=demo", "--weights_path=None", f"--duration={60 * minutes}"]
        child = subprocess.Popen(
            [*command, f"--output_dir={wav}"], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
        )
        began, settled = time.monotonic(), []
        try:
            while child.poll() is None:
                music = _music_sec(part_path(wav))
                taken = psutil.Process(child.pid).memory_info().rss
                if music >= SETTLED_SEC:
                    settled.append(taken)
                seconds = time.monotonic() - began
                print(f"{seconds:6.0f} s {music:6.0f} s of music {taken / MB:6.0f} MB", flush=True)
                time.sleep(interval)
        finally:
            child.kill()
        info = sf.info(wav)
        print(f"{info.duration:.2f} s of music, {info.subtype}, in {seconds:.0f} s")
        usual = statistics.median(settled)
        least, most = (f"{value / usual - 1:+.1%}" for value in (min(settled), max(settled)))
        print(f"memory {usual / MB:.0f} MB, {least} to {most}")


def _music_sec(part: Path) -> float:
    try:
        return sf.info(part).duration
    except sf.LibsndfileError:  # not begun, or just finished
        return 0.0


if __name__ == "__main__":
    fire.Fire(watch)
