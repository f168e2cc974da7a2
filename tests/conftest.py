"""Small models of the true architecture and made-up audio, shared by all tests."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf

import musicgen  # noqa: F401  (before anything imports audiocraft)
from demo.tiny import build_musicgen

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def mono_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_musicgen(tmp_path_factory.mktemp("mono"), segment_sec=10.0)


@pytest.fixture(scope="session")
def stereo_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_musicgen(tmp_path_factory.mktemp("stereo"), stereo=True, segment_sec=10.0)


@pytest.fixture
def make_pairs(tmp_path: Path) -> Callable[..., Path]:
    """A folder of wav/txt pairs: `make_pairs(seconds=[3.0, 1.5])`; every clip sounds different."""

    def make(
        name: str = "dataset",
        seconds: tuple[float, ...] = (3.0, 2.0, 1.5, 4.0),
        sample_rate: int = 32_000,
        channels: int = 1,
    ) -> Path:
        folder = tmp_path / name
        folder.mkdir(parents=True)
        for i, length in enumerate(seconds):
            sf.write(folder / f"clip{i}.wav", tone(i, length, sample_rate, channels), sample_rate)
            words = "with brushed drums and a bass " * (i % 3)  # of different lengths
            (folder / f"clip{i}.txt").write_text(f"melody number {i} {words}")
        return folder

    return make


def tone(seed: int, seconds: float, sample_rate: int = 32_000, channels: int = 1) -> np.ndarray:
    """[samples, channels]: a few notes of a decaying harmonic tone, and a little noise."""
    rng = np.random.default_rng(seed)
    t = np.arange(round(seconds * sample_rate)) / sample_rate
    out = np.zeros((len(t), channels))
    for channel in range(channels):
        note = rng.integers(40, 80, size=len(t) // (sample_rate // 4) + 1)
        pitch = 440 * 2 ** ((note[(t * 4).astype(int)] - 69) / 12)
        phase = 2 * np.pi * np.cumsum(pitch) / sample_rate
        out[:, channel] = (np.sin(phase) + 0.5 * np.sin(2 * phase)) * np.exp(-(t * 4 % 1) * 3) * 0.3
    return out + 0.01 * rng.standard_normal(out.shape)


def run_script(
    script: str, *flags: object, timeout: float = 120, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run run.py or generate.py as a user would, from the project's folder."""
    return subprocess.run(
        [sys.executable, str(ROOT / script), *map(str, flags)],
        cwd=ROOT,
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
