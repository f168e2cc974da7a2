"""Small models of the true architecture and made-up audio, shared by all tests."""

import contextlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from multiprocessing.context import ForkServerContext
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import pytest
import soundfile as sf
import torch
from huggingface_hub import constants
from matplotlib.figure import Figure
from safetensors.torch import save_file
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily

from demo.tiny import build_musicgen
from flags.run import Config

ROOT = Path(__file__).parent.parent

# More threads only wait for each other in models this small.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes that tests start


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep caches of recordings in a temporary folder, but matplotlib's fonts where they are."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MPLCONFIGDIR", matplotlib.get_cachedir())
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def mono_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_musicgen(tmp_path_factory.mktemp("mono"), segment_sec=20.0)


@pytest.fixture(scope="session")
def stereo_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_musicgen(tmp_path_factory.mktemp("stereo"), stereo=True, segment_sec=20.0)


@pytest.fixture(scope="session")
def melody_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("melody")
    return build_musicgen(path, melody=True, segment_sec=20.0, t5_dim=768)


@pytest.fixture(scope="session", params=["mono", "stereo"])
def model_folder(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(f"{request.param}_folder")


@pytest.fixture
def make_pairs(tmp_path: Path) -> Callable[..., Path]:
    """`make_pairs(seconds=(3.0, 1.5))` writes a folder of pairs below tmp_path."""

    def make(name: str = "dataset", **options: Any) -> Path:
        return write_pairs(tmp_path / name, **options)

    return make


def write_pairs(
    folder: Path,
    *,
    seconds: tuple[float, ...] = (3.0, 2.0, 1.5, 4.0),
    sample_rate: int = 32_000,
    channels: int = 1,
) -> Path:
    """A folder of wav/txt pairs; every clip sounds different, captions differ in length."""
    folder.mkdir(parents=True)
    for i, length in enumerate(seconds):
        sf.write(folder / f"clip{i}.wav", tone(i, length, sample_rate, channels), sample_rate)
        words = "with brushed drums and a bass " * (i % 3)
        (folder / f"clip{i}.txt").write_text(f"melody number {i} {words}")
    return folder


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


def tiny_config(model: Path, data: Path, output: Path, **flags: Any) -> Config:
    """Crops of a second, two clips a step, on the CPU, audio read by the main process."""
    tiny = {"duration": 1.0, "batch_size": 2, "grad_acc": 1, "warmup_steps": 0, "lr": 1e-3}
    here = {"device": "cpu", "num_workers": 0}
    paths = {"model_id": str(model), "dataset_path": str(data), "output_dir": str(output)}
    return Config(**{**paths, **tiny, **here, **flags})


def no_picture(rows: list[dict[str, Any]]) -> Figure:
    """In place of a run's curves, which take longer to draw than a tiny run."""
    return Figure(figsize=(1, 1))


@pytest.fixture
def fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Train in this process: `fit(model, data, "run", epochs=2)` -> its output folder."""
    from train import train

    monkeypatch.setattr("training.report.plot", no_picture)

    def run(model: Path, data: Path, name: str = "run", **flags: Any) -> Path:
        train(tiny_config(model, data, tmp_path / name, **flags))
        return tmp_path / name

    return run


@pytest.fixture(scope="session")
def processes() -> Iterator[ForkServerContext]:
    """Processes that start with everything imported: a fresh Python needs 10 s for that."""
    with pytest.MonkeyPatch.context() as patch:
        others = os.environ.get("PYTHONPATH", "").split(os.pathsep)
        places = [str(ROOT), str(ROOT / "tests"), *others]
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, places)))
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["train"])
        context.Process().start()  # and with it the server, that has this PYTHONPATH
    yield context


@pytest.fixture
def fake_mode(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeTensorMode]:
    """A mode of pretended tensors, in which audiocraft's patterns work."""
    from audiocraft.modules.codebooks_patterns import Pattern

    def with_real_numpy(build: Callable[..., Any]) -> Callable[..., Any]:
        """audiocraft fills these two in numpy, then moves them."""

        def built(self: Any, *args: Any, device: torch.device, **how: Any) -> Any:
            with unset_fake_temporarily():
                tensors = build(self, *args, **how)
            return tuple(mode.from_tensor(tensor).to(device) for tensor in tensors)

        return built

    for kind in ("pattern", "reverted"):
        name = f"_build_{kind}_sequence_scatter_indexes"
        monkeypatch.setattr(Pattern, name, with_real_numpy(getattr(Pattern, name)))
    monkeypatch.setattr(torch.backends.cudnn, "enabled", False)  # it would ask the driver
    with FakeTensorMode() as mode:
        yield mode


def build_demucs(hub: Path) -> None:
    """Put a small random demucs into a Hugging Face cache, as htdemucs."""
    from demucs.htdemucs import HTDemucs

    settings = {
        "sources": ["drums", "bass", "other", "vocals"],
        **{"channels": 8, "t_layers": 1, "t_heads": 2, "segment": 1.0},
    }
    repo = hub / "models--adefossez--HTDemucs"
    (repo / "snapshots" / "1").mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("1")
    (repo / "snapshots" / "1" / "htdemucs.yaml").write_text("models: [tiny]\n")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        state = HTDemucs(**settings).state_dict()
    how = {"klass": "demucs.htdemucs.HTDemucs", "args": "[]", "kwargs": json.dumps(settings)}
    save_file(state, repo / "snapshots" / "1" / "tiny.safetensors", how)


def build_hf_codec(folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """A random EnCodec in Hugging Face's format: 32 kHz, 50 frames a second, 4 codebooks of 64."""
    from transformers import EncodecConfig, EncodecModel

    config = EncodecConfig(
        target_bandwidths=[1.2],
        sampling_rate=32_000,
        upsampling_ratios=[8, 5, 4, 4],
        num_filters=4,
        hidden_size=16,
        codebook_size=64,
        codebook_dim=16,
        use_causal_conv=False,
        normalize=False,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        EncodecModel(config).to(dtype).save_pretrained(folder)
    return folder


def use_hub(hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Offline, with this Hugging Face cache, and what is kept of recordings below tmp_path."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(hub))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def weights(output: Path, step: int | str = "final") -> dict[str, torch.Tensor]:
    return torch.load(output / f"lm_{step}.pt", weights_only=True)


def metrics(output: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl, without the times."""
    lines = (output / "metrics.jsonl").read_text().splitlines()
    times = ("ms", "clips_per_sec")
    return [{k: v for k, v in json.loads(line).items() if k not in times} for line in lines]


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


@contextlib.contextmanager
def room(size: int) -> Iterator[None]:
    """Let no file grow beyond `size` bytes: stands in for a full disk."""
    resource = pytest.importorskip("resource")
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)


class Result(NamedTuple):
    """The end of a command: its exit code (0 = well), and what it wrote."""

    code: int
    out: str
    err: str


@pytest.fixture
def cli(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Result]:
    """A script's main() in this process: `cli(run, "--lr", lr=1e-4)` -> Result."""
    monkeypatch.setattr("training.report.plot", no_picture)

    def call(script: ModuleType, *words: str, **flags: object) -> Result:
        given = [f"--{name}={value}" for name, value in flags.items()]
        monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *words, *given])
        capsys.readouterr()
        code = 0
        try:
            script.main()
        except SystemExit as end:
            code = int(end.code or 0)
        return Result(code, *capsys.readouterr())

    return call
