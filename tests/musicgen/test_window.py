"""The steps of a window on a GPU: nothing waits for it, nothing is copied; CUDA graphs.

The GPU is pretended: see test_device.py.
"""

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    unset_fake_temporarily,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from musicgen import load, window
from musicgen.conditions import Condition, Conditions
from musicgen.generation import Piece, generate_blocks
from musicgen.load import Model
from musicgen.melody import melody_conditioner
from musicgen.network import Network
from musicgen.sampling import Sampling
from musicgen.skeleton import make_fake
from musicgen.text import text_conditioner
from musicgen.window import Windows

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
FRAMES = 6
# Of a CUDA tensor each of these asks for values, or for a size that depends on them.
WAITING = {
    *("_local_scalar_dense", "nonzero", "masked_select", "unique_consecutive", "_unique2"),
    *("equal", "is_nonzero", "bincount", "repeat_interleave.Tensor"),
}


class Watch(TorchDispatchMode):
    """Notes what waits for the device, or takes a tensor to or from it."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__
        before = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        self.calls += 1
        if {name, name.split(".")[0]} & WAITING:
            self.found.append(name)
        out = func(*args, **(kwargs or {}))
        after = [leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        if any(tensor.device != CUDA for tensor in before + after):
            self.found.append(f"{name} on another device")
        return out


@pytest.fixture(params=["mono", "melody"])
def model(
    request: pytest.FixtureRequest, mono_folder: Path, melody_folder: Path, fake_mode: None
) -> Model:
    """In float16, as on CUDA."""
    folder = mono_folder if request.param == "mono" else melody_folder
    with unset_fake_temporarily():
        model = load.load_model(str(folder), CPU, torch.float16)
    for part in (model.lm, text_conditioner(model.lm).t5):
        make_fake(part, CUDA)
    model.device = text_conditioner(model.lm).device = CUDA
    return model


def watched_steps(model: Model, sampling: Sampling, monkeypatch: pytest.MonkeyPatch) -> Watch:
    """Generate for two captions; watch from the first frame's end to the last one's."""
    guided, dim = sampling.cfg_coef != 1, model.lm.dim
    if melody_conditioner(model.lm):  # audiocraft's conditioner asks for values
        prefix = torch.zeros(1 + guided, 9, dim, device=CUDA)
        pieces = [Condition(prefix, prefix[:, :0])] * 2
    else:
        conditions = Conditions(model, None, guided)
        pieces = [conditions.at(prompt, 0) for prompt in ("slow piano", "drums with soft bass")]
        assert pieces[0].cross.shape != pieces[1].cross.shape
    before = pieces[0].prefix.shape[1]
    windows = Windows(Network(model.lm), [p.cross for p in pieces], before, FRAMES, sampling)
    K = model.lm.num_codebooks
    for name in ("sequence", "noise", "step"):
        assert getattr(windows, name).device == CUDA
    for tensor in (*windows.cache.keys, *windows.cache.values):
        assert (tensor.device, tensor.dtype) == (CUDA, torch.float16)
    for of_layer in windows.cache.crosses:
        for keys, values, mask in filter(None, of_layer):
            assert keys.dtype == values.dtype == torch.float16
            assert mask is not None and mask.device == CUDA
    norms, run = [], windows.network.run
    monkeypatch.setattr(
        windows.network, "run", lambda *how: norms.append(run(*how).dtype) or run(*how)
    )
    watch, stack, frames = Watch(), contextlib.ExitStack(), []

    def on_frame() -> None:
        frames.append(1)
        if len(frames) == 1:
            stack.enter_context(watch)
        if len(frames) == FRAMES:
            stack.close()

    context = torch.zeros(2, K, 0, dtype=torch.long, device=CUDA)
    prefixes = [piece.prefix for piece in pieces]
    with stack:
        made = windows.generate(
            prefixes, context, FRAMES, lambda steps: torch.rand(steps, 2, K), on_frame
        )
    assert (made.device, made.shape) == (CUDA, (2, K, FRAMES))
    assert set(norms) == {torch.float32}, "what goes from layer to layer is not rounded"
    assert watch.calls > 100 * FRAMES
    return watch


class Stand:
    """In the place of a graph: does what it would replay."""

    def __init__(self, advance: Any, device: torch.device) -> None:
        self.replay = lambda: advance(None)


@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(top_k=20),
        Sampling(top_p=0.9),
        Sampling(top_k=0),
        Sampling(temperature=0),
        Sampling(cfg_coef=1),
    ],
)
def test_between_two_steps_nothing_waits_for_the_gpu(
    sampling: Sampling, captured: bool, model, monkeypatch, capsys
) -> None:
    if captured:
        monkeypatch.setattr(window, "_capture", Stand)
    assert watched_steps(model, sampling, monkeypatch).found == []
    assert ("without a CUDA graph" in capsys.readouterr().err) is not captured


def planted_item(logits: torch.Tensor, *_: Any) -> torch.Tensor:
    return logits.argmax(-1) + int(logits.argmax().item())


def planted_cpu(logits: torch.Tensor, *_: Any) -> torch.Tensor:
    return logits.argmax(-1).cpu().to(CUDA)


def planted_constant(logits: torch.Tensor, *_: Any) -> torch.Tensor:
    return logits.argmax(-1) + torch.zeros(4, dtype=torch.long).to(CUDA)


def planted_mask(logits: torch.Tensor, *_: Any) -> torch.Tensor:
    return logits.argmax(-1) + len(logits[logits > 0])


@pytest.mark.parametrize(
    "planted", [planted_item, planted_cpu, planted_constant, planted_mask], ids=lambda f: f.__name__
)
def test_what_waits_would_be_noticed(planted, model, monkeypatch) -> None:
    monkeypatch.setattr(window, "choose", planted)
    with contextlib.suppress(DataDependentOutputException, DynamicOutputShapeException):
        assert watched_steps(model, Sampling(), monkeypatch).found != []
        return
    assert planted in (planted_item, planted_mask), "pretended tensors have no values to wait for"


@pytest.mark.parametrize("model", ["mono"], indirect=True)
def test_pieces_are_made_on_the_gpu_and_handed_out_on_the_cpu(model, monkeypatch) -> None:
    monkeypatch.setattr(window, "_capture", Stand)
    monkeypatch.setattr("musicgen.generation._free", lambda device: 2**30)
    pieces = [Piece("drums"), Piece("drums", 1)]
    how = {"duration_sec": 0.1, "overlap_sec": 0.5, "seed": 0}
    (first, second) = generate_blocks(model, pieces, **how)
    assert first.codes.device == second.codes.device == CPU
    assert first.codes.shape == (4, 5)


def test_without_cuda_there_is_no_graph() -> None:
    assert window._capture(lambda span: pytest.fail("nothing to capture"), CPU) is None


class Fails:
    def __init__(self, error: Exception) -> None:
        self.error = error

    def __call__(self) -> None:
        raise self.error


def test_a_graph_that_cannot_be_captured_is_told_and_done_without(
    monkeypatch, capsys, model
) -> None:
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Fails(RuntimeError("no graphs here")))
    watched_steps(model, Sampling(), monkeypatch)
    told = capsys.readouterr().err
    assert told == "note: generation without a CUDA graph, so slower (no graphs here)\n"


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), ValueError("ours, to be seen")]
)
def test_other_failures_of_a_capture_are_raised(error: Exception, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Fails(error))
    with pytest.raises(type(error)):
        window._capture(lambda span: None, CUDA)


def test_a_step_is_captured_in_a_side_stream_after_one_outside(monkeypatch) -> None:
    """Which is left again, also if capturing fails."""
    log: list[str] = []

    class Named:
        def __init__(self, name: str) -> None:
            self.name = name

        def wait_stream(self, other: "Named") -> None:
            log.append(f"{self.name} waits for {other.name}")

    @contextlib.contextmanager
    def inside(name: str) -> Any:
        log.append(f"into {name}")
        try:
            yield
        finally:
            log.append(f"out of {name}")

    def capturing(graph: object, stream: Named, capture_error_mode: str) -> Any:
        assert capture_error_mode == "thread_local"
        return inside(f"a graph in {stream.name}")

    cuda = torch.cuda
    monkeypatch.setattr(cuda, "CUDAGraph", lambda: "graph")
    monkeypatch.setattr(cuda, "current_stream", lambda device: Named("main"))
    monkeypatch.setattr(cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(cuda, "stream", lambda stream: inside(stream.name))
    monkeypatch.setattr(cuda, "graph", capturing)
    monkeypatch.setattr(window, "_side", lambda device: Named("side"))

    def advance(span: int | None) -> None:
        assert span is None and not torch.is_grad_enabled()
        log.append("step")

    assert window._capture(advance, CUDA) == "graph"
    assert log == [
        *("side waits for main", "into side", "step", "into a graph in side", "step"),
        *("out of a graph in side", "out of side", "main waits for side"),
    ]
