"""No tensor is left on the CPU: the model's part of a step, run on pretended CUDA tensors.

In a FakeTensorMode tensors have a shape, a type and a device, but no values, and an operation on
tensors of two devices fails as on a GPU. What needs values (a backward pass, a sync) can't run.
"""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from audiocraft.modules.conditioners import WavCondition
from conftest import ROOT, build_hf_codec, tiny_config
from torch import nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    FakeTensorMode,
    unset_fake_temporarily,
)

import train
from dataset import Batch
from musicgen import codec, load, placeholder
from musicgen.conditions import Conditions
from musicgen.load import Model
from musicgen.loss import TokenLoss
from musicgen.melody import melody_conditioner
from musicgen.skeleton import make_fake
from musicgen.text import TextEncoder, text_conditioner
from training import evaluate, stop
from training.session import Session
from training.start import start

CPU, CUDA, MPS = torch.device("cpu"), torch.device("cuda", 0), torch.device("mps", 0)


def to_cuda(*modules: nn.Module) -> None:
    for module in modules:
        make_fake(module, CUDA)


@pytest.fixture
def model(model_folder: Path, fake_mode: FakeTensorMode) -> Model:
    with unset_fake_temporarily():
        model = load.load_model(str(model_folder), CPU)
    to_cuda(model.lm, model.compression_model, text_conditioner(model.lm).t5)
    model.lm.train()
    return model


def test_audio_is_encoded_on_the_gpu(model):
    wav = torch.empty(3, model.audio_channels, model.sample_rate, device=CUDA)
    codes = codec.encode_audio(model, wav)
    assert codes.device == CUDA
    assert codes.shape == (3, model.lm.num_codebooks, round(model.frame_rate))


def test_beside_a_model_on_mps_encodec_is_on_the_cpu(mono_folder, tmp_path):
    """Placed there by the loader, and by training before and after samples."""
    folder = shutil.copytree(mono_folder, tmp_path / "model")
    model = load.load_model(str(folder), CPU)
    for device in (MPS, "mps"):
        codec.move(model, "decoder", device)
    torch.save({"pretrained": "facebook/encodec_32khz"}, folder / "compression_state_dict.bin")
    build_hf_codec(folder / "encodec")
    loaded = [load._load_codec(path, "model", MPS) for path in (mono_folder, folder)]
    tensors = [t for part in (model.compression_model, *loaded) for t in part.state_dict().values()]
    assert {tensor.device for tensor in tensors} == {CPU}


def test_beside_a_model_on_mps_audio_is_encoded_and_decoded_on_the_cpu(model_folder, fake_mode):
    with unset_fake_temporarily():
        model = load.load_model(str(model_folder), CPU)
    make_fake(model.compression_model, CPU)
    wav = torch.empty(2, model.audio_channels, model.sample_rate, device=MPS)
    codes = codec.encode_audio(model, wav)
    assert codes.device == MPS
    assert codec.decode(model, codes).shape == wav.shape


@pytest.mark.parametrize("fails", [False, True])
def test_audio_is_encoded_without_tf32(fails, mono_folder, monkeypatch):
    model = load.load_model(str(mono_folder), CPU)
    encode, cudnn = model.compression_model.encode, torch.backends.cudnn
    seen = []

    def watched(wav: torch.Tensor) -> object:
        seen.append((cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision))
        if fails:
            raise RuntimeError("out of memory")
        return encode(wav)

    monkeypatch.setattr(model.compression_model, "encode", watched)
    before = cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision
    assert before == ("tf32", "tf32"), "torch's default"
    with pytest.raises(RuntimeError) if fails else contextlib.nullcontext():
        codec.encode_audio(model, torch.zeros(1, 1, 6400))
    assert seen == [("ieee", "ieee")]
    assert (cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision) == before
    assert cudnn.allow_tf32


def test_captions_wait_on_the_cpu_and_are_handed_out_on_the_gpu(model):
    encoder = TextEncoder(model.lm)
    text, mask = encoder(["", "a slow piano", "drums"], CUDA)
    assert text.device == mask.device == CUDA
    assert encoder._hidden("drums").device.type == "cpu"


def test_a_new_word_is_read_on_the_gpu_with_its_gradient(model):
    conditioner = text_conditioner(model.lm)
    vector = placeholder.mean_vector(conditioner, "slow piano")
    new_word = placeholder.add(conditioner, "<my-style>", vector, "--placeholder")
    encoder = TextEncoder(model.lm, new_word=new_word)
    text, mask = encoder(["", "<my-style> piano", "drums"], CUDA)
    assert new_word.vector.device == text.device == mask.device == CUDA
    assert text.requires_grad


@pytest.mark.parametrize("grad_checkpointing", ["none", "torch"])
def test_the_loss_is_computed_on_the_gpu(grad_checkpointing, model):
    model.lm.transformer.checkpointing = grad_checkpointing
    text, mask = TextEncoder(model.lm)(["", "a slow piano", "drums"], CUDA)
    codes = torch.zeros(3, model.lm.num_codebooks, 40, dtype=torch.long, device=CUDA)
    loss = TokenLoss(model.lm)(codes, torch.tensor([40, 7, 1], device=CUDA), text, mask)
    assert loss.device == CUDA
    assert loss.requires_grad
    with pytest.raises(RuntimeError, match="found at least two devices"):
        TokenLoss(model.lm)(codes, torch.tensor([40, 7, 1]), text, mask)


def test_melodies_are_on_the_gpu_in_training_and_generation(fake_mode, melody_folder, monkeypatch):
    with unset_fake_temporarily():
        model = load.load_model(str(melody_folder), CPU)
    to_cuda(model.lm, text_conditioner(model.lm).t5)
    conditioner = melody_conditioner(model.lm)
    conditioner.device = text_conditioner(model.lm).device = model.device = CUDA
    text, mask = TextEncoder(model.lm)(["", "a slow piano"], CUDA)
    codes = torch.zeros(2, model.lm.num_codebooks, 40, dtype=torch.long, device=CUDA)
    melody = torch.zeros(2, conditioner.chroma_len, 12, device=CUDA)
    for given in (melody, None):
        loss = TokenLoss(model.lm)(codes, torch.tensor([40, 7], device=CUDA), text, mask, given)
        assert loss.device == CUDA

    # Without guidance and audiocraft's conditioner, which ask for values.
    heard = []

    def chroma(condition: WavCondition) -> tuple[torch.Tensor, torch.Tensor]:
        heard.extend([condition.wav.device, condition.length.device])
        return torch.zeros(1, 5, model.lm.dim, device=CUDA), torch.ones(1, 5, device=CUDA)

    monkeypatch.setattr(conditioner, "forward", chroma)
    for wav in (torch.zeros(1, 32_000), None):
        prefix, cross = Conditions(model, wav, guided=False).at("piano", 50)
        assert prefix.device == cross.device == CUDA
        assert heard == [CUDA, CUDA]
        heard.clear()


def batches(*_: object, **__: object) -> Iterator[Batch]:
    """Yield batches as a DataLoader does: on the CPU."""
    while True:
        yield Batch(
            wav=torch.zeros(2, 1, 32_000),
            lengths=torch.tensor([32_000, 20_000]),
            captions=["", "a slow piano"],
            names=["a.wav", "b.wav"],
        )


@pytest.fixture
def run(mono_folder, make_pairs, fake_mode, tmp_path, monkeypatch) -> Session:
    """A session on the pretended GPU, whose backward pass and optimizer do nothing."""
    with unset_fake_temporarily():
        config = tiny_config(mono_folder, make_pairs(), tmp_path / "run", grad_acc=2)
        run = start(config, contextlib.ExitStack())
    to_cuda(run.model.lm, run.model.compression_model, run.text_encoder.conditioner.t5)
    run.trained = dict(run.model.lm.named_parameters())
    run.accelerator = SimpleNamespace(
        device=CUDA,
        process_index=0,
        num_processes=1,
        reduce=lambda tensor: tensor,
        no_sync=contextlib.nullcontext,
        autocast=contextlib.nullcontext,
        backward=lambda loss: None,
        clip_grad_norm_=lambda parameters, limit: torch.zeros((), device=CUDA),
    )
    return run


def last_statement(error: pytest.ExceptionInfo[BaseException]) -> str:
    """The line of the project, below the tests, that asked for values."""
    ours = [e for e in error.traceback if Path(e.path).parent in (ROOT, ROOT / "training")]
    return str(ours[-1].statement)


def test_a_training_step_comes_on_the_gpu_to_its_one_sync_point(run, monkeypatch):
    monkeypatch.setattr(train, "_do_what_is_due", lambda run, stop: None)
    with pytest.raises(DataDependentOutputException) as error:
        train._loop(run, stop.StopSignals(run.processes), batches())
    assert ".tolist()" in last_statement(error)


def test_validation_comes_on_the_gpu_to_its_one_sync_point(run, monkeypatch):
    monkeypatch.setattr(
        evaluate, "held_out_batches", lambda *_, **__: (batch for batch in [next(batches())])
    )
    with pytest.raises(DataDependentOutputException) as error, torch.no_grad():
        evaluate.validate(run, lambda: None)
    assert ".tolist()" in last_statement(error)
