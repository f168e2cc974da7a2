"""Generated codes: audiocraft's for the same random numbers, and each piece for itself.

Letters: B pieces, K codebooks, T token frames, R rows of a network.
"""

import copy
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from audiocraft.utils import utils
from conftest import tone

from errors import UserError
from musicgen import codec, generation, load, window
from musicgen.conditions import Conditions
from musicgen.generation import Piece
from musicgen.load import Model
from musicgen.melody import MelodyConditioner
from musicgen.network import Network
from musicgen.projection import Projector, packed, plain
from musicgen.sampling import Sampling, choose, draw, stream
from musicgen.window import Windows

CPU = torch.device("cpu")
FRAMES = 24
WINDOW_SEC = 1.0


@pytest.fixture(scope="module")
def models(mono_folder, stereo_folder, melody_folder) -> dict[str, Model]:
    folders = {"mono": mono_folder, "stereo": stereo_folder, "melody": melody_folder}
    return {kind: load.load_model(str(folder), CPU) for kind, folder in folders.items()}


def network_of(model: Model, project: Projector) -> Network:
    return Network(copy.deepcopy(model.lm) if project is packed else model.lm, project)


def pick(probs: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Pick by inverse CDF in the order of the codes: probs [..., card], noise [...]."""
    sums = probs.double().cumsum(-1)
    return (sums <= noise[..., None].double() * sums[..., -1:]).sum(-1, keepdim=True)


@pytest.fixture
def audiocraft_draws(monkeypatch) -> Callable[[torch.Tensor], None]:
    """`audiocraft_draws(table)`: its generate takes random numbers from a table [steps, B, K]."""
    their_top_p = utils.sample_top_p

    def use(table: torch.Tensor) -> None:
        rows = iter(table)

        def multinomial(probs: torch.Tensor, num_samples: int) -> torch.Tensor:
            return pick(probs, next(rows))

        def sample_top_p(probs: torch.Tensor, p: float) -> torch.Tensor:
            """Let audiocraft say how many codes it keeps, but pick in the order of the codes."""
            counts = []

            def count(kept: torch.Tensor, num_samples: int) -> torch.Tensor:
                counts.append((kept > 0).sum(-1, keepdim=True))
                return torch.zeros_like(counts[0])

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(utils, "multinomial", count)
                their_top_p(probs.clone(), p)
            ordered = probs.sort(-1, descending=True).values
            return pick(probs * (probs >= ordered.gather(-1, counts[0] - 1)), next(rows))

        monkeypatch.setattr(utils, "multinomial", multinomial)
        monkeypatch.setattr(utils, "sample_top_p", sample_top_p)

    return use


SAMPLINGS = {
    "greedy": Sampling(top_k=0, temperature=0),
    "all": Sampling(top_k=0),
    "top_k": Sampling(top_k=20),
    "top_p": Sampling(top_k=0, top_p=0.8),
    "cooler": Sampling(top_k=20, temperature=0.7),
    "unguided": Sampling(top_k=20, cfg_coef=1),
}


@pytest.mark.parametrize("project", [plain, packed])
@pytest.mark.parametrize("context", [0, 9])
@pytest.mark.parametrize(
    ("kind", "how"),
    [("mono", how) for how in SAMPLINGS]
    + [("stereo", "top_k"), ("melody", "top_k"), ("led", "top_k"), ("melody", "greedy")],
)
def test_the_same_random_numbers_give_audiocrafts_tokens(
    kind: str,
    how: str,
    context: int,
    project: Projector,
    models,
    audiocraft_draws,
    monkeypatch,
) -> None:
    # demucs takes long, and is not what is tested here
    monkeypatch.setattr(MelodyConditioner, "_get_stemmed_wav", lambda self, wav, rate: wav)
    model, sampling = models["melody" if kind == "led" else kind], SAMPLINGS[how]
    lm: Any = model.lm
    melody = torch.from_numpy(tone(3, 20.0)).T.float() if kind == "led" else None
    wavs = {"melody_wavs": [melody]} if kind in ("melody", "led") else {}
    generator = torch.Generator().manual_seed(4)
    table = torch.rand(FRAMES + 8, 1, lm.num_codebooks, generator=generator)
    given = torch.randint(64, (1, lm.num_codebooks, context), generator=generator)

    audiocraft_draws(table)
    attributes, _ = model._prepare_tokens_and_attributes(["slow piano"], None, **wavs)
    expected = lm.generate(
        given if context else None,
        attributes,
        max_gen_len=FRAMES,
        use_sampling=sampling.temperature > 0,
        temp=sampling.temperature,
        top_k=sampling.top_k,
        top_p=sampling.top_p,
        cfg_coef=sampling.cfg_coef,
    )
    condition = Conditions(model, melody, sampling.cfg_coef != 1).at("slow piano", 0)
    network, before = network_of(model, project), condition.prefix.shape[1]
    windows = Windows(network, [condition.cross], before, FRAMES, sampling)
    heard: list[int] = []
    made = windows.generate(
        [condition.prefix], given, FRAMES, lambda steps: table[:steps], lambda: heard.append(1)
    )
    assert torch.equal(made[..., :context], given)
    assert torch.equal(made, expected)
    assert len(heard) == FRAMES - context


def music(
    folder: Path, model: Model, project: Projector, pieces: list[Piece], **how: Any
) -> list[bytes]:
    """Generate pieces into wav files as generate.py does; return their bytes."""
    paths = [folder / f"{number}.wav" for number in range(len(pieces))]
    usual = {"duration_sec": 2.2, "overlap_sec": 0.5, "seed": 7}
    network = network_of(model, project)
    blocks = generation.generate_blocks(model, pieces, network=network, **{**usual, **how})
    assert sorted(generation.write(model, blocks, paths)) == list(range(len(pieces)))
    return [path.read_bytes() for path in paths]


@pytest.mark.parametrize("project", [plain, packed])
@pytest.mark.parametrize("kind", ["mono", "melody"])
def test_a_piece_is_the_same_alone_in_a_batch_and_after_any_split(
    kind: str, project: Projector, models, tmp_path
) -> None:
    """With rolling windows, mono continues a recording; melody's prefixes differ in length."""
    model = copy.copy(models[kind])
    how: dict[str, Any] = {"duration_sec": 0.5}
    if kind == "mono":  # the melody's window is that of its conditioner
        model.max_duration = WINDOW_SEC
        heard = codec.encode_audio(model, torch.from_numpy(tone(5, 0.4)).T[None].float())
        how = {"opening": heard}
    prompts = ["a", "drums", "slow piano", "soft drums and a bass", "flute", "piano", "b", "c d e"]
    pieces = [Piece(prompt) for prompt in prompts]
    conditions = Conditions(model, None, guided=True)
    widths = {sum(part.shape[1] for part in conditions.at(prompt, 0)) for prompt in prompts}
    assert len(widths) > 3
    together = music(tmp_path, model, project, pieces, **how)
    assert len(set(together)) == 8
    for number in (0, 3, 7):
        assert music(tmp_path, model, project, pieces[number : number + 1], **how) == [
            together[number]
        ]
    assert music(tmp_path, model, project, pieces, batch_size=3, **how) == together


def test_a_variation_does_not_depend_on_how_many_there_are(models, tmp_path) -> None:
    model, how = models["mono"], {"duration_sec": 0.4}
    three, five = (
        music(tmp_path, model, plain, [Piece("drums", n) for n in range(count)], **how)
        for count in (3, 5)
    )
    assert five[:3] == three
    assert len(set(five)) == 5


def test_a_batch_is_gone_before_the_next_one_is_made(models, monkeypatch) -> None:
    """Their caches may fill most of the memory."""
    alive: list[int] = []
    make = Windows.__init__

    def counted(self: Windows, *how: Any) -> None:
        alive[:] = [reference() is not None for reference in references]
        assert not any(alive)
        references.append(weakref.ref(self))
        make(self, *how)

    references: list[weakref.ref[Windows]] = []
    monkeypatch.setattr(Windows, "__init__", counted)
    pieces = [Piece(prompt) for prompt in ("a", "b", "c")]
    how = {"duration_sec": 0.1, "overlap_sec": 0.5, "seed": 0, "batch_size": 1}
    for _ in generation.generate_blocks(models["mono"], pieces, **how):
        pass
    assert len(references) == 3


@pytest.mark.parametrize("kind", ["mono", "stereo"])
@pytest.mark.parametrize("size", [1, 50, 333, 1000])
def test_codes_decoded_as_they_come_are_those_decoded_at_once(
    kind: str, size: int, models, monkeypatch
) -> None:
    monkeypatch.setattr("musicgen.codec.DECODE_SEC", 3.0)
    model = models[kind]
    total = 100 if size == 1 else 520
    codes = torch.randint(64, (model.lm.num_codebooks, total))
    decoding, wavs = codec.Decoding(model), []
    for start in range(0, total, size):
        part = codes[:, start : start + size]
        wavs += decoding.add(part, is_last=start + size >= total)
        assert decoding.codes.shape[-1] < max(size, 1) + 350  # a step and two margins are kept
    assert torch.equal(torch.cat(wavs, dim=-1), codec.decode(model, codes[None])[0])


def test_the_masked_step_that_cuda_replays_makes_the_same_music(models, monkeypatch) -> None:
    """In the place of a graph, the step that would be captured; all captions in one group."""
    model, pieces = models["mono"], [Piece("drums"), Piece("slow piano and a bass")]
    how = {"duration_sec": 1.4, "overlap_sec": 0.5, "seed": 3}
    model = copy.copy(model)
    model.max_duration = WINDOW_SEC

    def codes() -> list[torch.Tensor]:
        return [block.codes for block in generation.generate_blocks(model, pieces, **how)]

    expected = codes()

    def capture(advance: Callable[[None], None], device: torch.device) -> Any:
        advance(None)  # as the step outside, whose traces must not matter
        return SimpleNamespace(replay=lambda: advance(None))

    monkeypatch.setattr(window, "_capture", capture)
    make = Network.cache

    def one_group(self: Network, groups: list[list[torch.Tensor]], places: int) -> Any:
        return make(self, [[piece for group in groups for piece in group]], places)

    monkeypatch.setattr(Network, "cache", one_group)
    assert all(map(torch.equal, codes(), expected))
    assert len(expected) == 4


def frequencies(logits: torch.Tensor, options: Sampling, draws: int = 40_000) -> torch.Tensor:
    noise = torch.rand(draws, generator=torch.Generator().manual_seed(0))
    codes = choose(logits.expand(draws, -1), noise, options)
    return torch.bincount(codes, minlength=len(logits)) / draws


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        (Sampling(top_k=0), 16),
        (Sampling(top_k=16), 16),
        (Sampling(top_k=5), 5),
        (Sampling(top_k=5, temperature=0.5), 5),
        (Sampling(top_p=0.7), None),
        (Sampling(top_k=2, top_p=0.7, temperature=2), None),  # top_p goes first, as in audiocraft
        (Sampling(top_k=1), 1),
        (Sampling(top_p=1e-6), 1),
    ],
)
def test_codes_are_chosen_as_often_as_they_should(options: Sampling, kept: int | None) -> None:
    logits = torch.randn(16, generator=torch.Generator().manual_seed(5))
    probs = torch.softmax(logits / options.temperature, -1)
    ordered = sorted(probs.tolist(), reverse=True)
    if kept is None:
        kept = next(n for n in range(1, 17) if sum(ordered[:n]) > options.top_p)
        assert 1 < kept < 15
    expected = probs * (probs >= ordered[kept - 1])
    expected /= expected.sum()
    found = frequencies(logits, options)
    assert not found[expected == 0].any()
    allowed = expected > 0
    chi2 = 40_000 * ((found - expected).square()[allowed] / expected[allowed]).sum()
    assert chi2 < 45  # of at most 15 degrees of freedom: once in 10,000


@pytest.mark.parametrize("options", [Sampling(top_k=0), Sampling(top_k=9), Sampling(top_p=0.5)])
def test_the_largest_random_number_picks_a_code_that_is_allowed(options: Sampling) -> None:
    largest = draw([SimpleNamespace(random=almost_one)], 1, codebooks=1).item()  # type: ignore
    assert 1 - 2**-22 < largest < 1
    logits = 3 * torch.randn(5000, 50, generator=torch.Generator().manual_seed(6))
    codes = choose(logits, torch.full((5000,), largest), options)
    assert codes.max() < 50
    rank = (logits > logits.gather(-1, codes[:, None])).sum(-1)
    assert rank.max() < (options.top_k or 50)
    first = choose(logits, torch.zeros(5000), options)
    assert (first <= codes).all() and first.min() == 0


def almost_one(shape: tuple[int, int], dtype: Any) -> Any:
    return torch.full(shape, 1 - 2**-24).numpy()


def test_a_stream_is_the_pieces_own_however_its_steps_are_split() -> None:
    def streams() -> Iterator[Any]:
        return (stream(3, prompt, number) for prompt in ("a", "b") for number in (0, 1))

    whole = draw(list(streams()), 10, codebooks=4)  # [steps, B, K]
    assert whole.shape == (10, 4, 4)
    assert len(whole.unique()) == 160
    parts = list(streams())
    split = torch.cat([draw(parts, steps, codebooks=4) for steps in (1, 6, 3)])
    assert torch.equal(split, whole)
    for number, alone in enumerate(streams()):
        assert torch.equal(draw([alone], 10, codebooks=4)[:, 0], whole[:, number])
    assert not torch.equal(draw([stream(4, "a", 0)], 10, codebooks=4)[:, 0], whole[:, 0])


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(top_p=0.9), Sampling(temperature=0)])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_model_that_overflows_is_told(value: float, sampling: Sampling, models) -> None:
    model = copy.copy(models["mono"])
    model.lm = copy.deepcopy(model.lm)
    model.lm.transformer.layers[0].linear1.weight.data[0] = value
    how = {"duration_sec": 0.1, "overlap_sec": 0.5, "seed": 0, "sampling": sampling}
    with pytest.raises(UserError, match=r"not finite.*--device=cpu"):
        generation.generate(model, ["a"], **how)


def test_long_captions_count_in_the_memory_of_a_batch(models, monkeypatch) -> None:
    """Of short pieces, they take most of it."""
    model, taken, make = models["mono"], [], Windows.__init__

    def counted(self: Windows, *how: Any) -> None:
        make(self, *how)
        crosses = [tensor for layer in self.cache.crosses for cross in layer for tensor in cross]
        kept = [*self.cache.keys, *self.cache.values, *(t for t in crosses if t is not None)]
        taken.append(sum(tensor.nbytes for tensor in kept))

    monkeypatch.setattr(Windows, "__init__", counted)
    monkeypatch.setattr(generation, "free_memory", lambda: 1_000_000)
    pieces = [Piece("slow piano " * 60, number) for number in range(12)]
    how = {"duration_sec": 0.1, "overlap_sec": 0.5, "seed": 0}
    for _ in generation.generate_blocks(model, pieces, **how):
        pass
    assert 1 < len(taken) < 12
    assert max(taken) < 1_000_000
