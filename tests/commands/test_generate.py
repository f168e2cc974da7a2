"""generate.py: what it writes, how long, and which flags change it."""

import copy
import itertools
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
import torch
from conftest import tone

import generate
import run
from musicgen import codec, generation, load
from musicgen.load import Model
from musicgen.window import Windows
from recordings import growing
from recordings.audio import read_crop

HOP = 640  # samples in a frame, at 32 kHz and 50 frames/s
WINDOW_SEC = 2.0  # of the models here; 30 s of the published ones


def loaded(folder: Path) -> Model:
    model = load.load_model(str(folder), torch.device("cpu"))
    model.max_duration = WINDOW_SEC
    return model


@pytest.fixture(scope="module")
def mono(mono_folder: Path) -> Model:
    return loaded(mono_folder)


@pytest.fixture(scope="module")
def stereo(stereo_folder: Path) -> Model:
    return loaded(stereo_folder)


@pytest.fixture
def model(mono: Model) -> Model:
    return mono


def again(model: Model) -> Model:
    """Copy a model whose weights generate.py will replace by packed ones."""
    copied = copy.copy(model)
    copied.lm = copy.deepcopy(model.lm)
    return copied


@pytest.fixture
def asked_for(monkeypatch: pytest.MonkeyPatch, model: Model) -> list[str]:
    """The model ids that generate.py loads; it gets the small-windowed model for each."""
    ids: list[str] = []

    def load(model_id: str, *_: object) -> Model:
        ids.append(model_id)
        return again(model)

    monkeypatch.setattr("musicgen.load.load_model", load)
    return ids


@pytest.fixture
def play(cli, tmp_path: Path, asked_for: list[str]) -> Callable[..., list[Path]]:
    """`play(seed=3)` runs generate.py in a new folder -> the wavs that it says it wrote."""
    runs = []

    def call(**flags: object) -> list[Path]:
        runs.append(flags)
        here = {"output_dir": tmp_path / f"out{len(runs)}", "device": "cpu", "weights_path": None}
        tiny = {"prompt": "slow piano", "duration": 0.3, "overlap": 1, "model_id": "tiny"}
        result = cli(generate, **{**here, **tiny, **flags})
        assert result.code == 0, result.err
        return [Path(line) for line in result.out.splitlines()]

    return call


def sound(path: Path) -> np.ndarray:
    return sf.read(path, always_2d=True)[0]


def test_one_prompt_makes_one_16_bit_wav_named_after_it(play):
    (path,) = play(prompt="Slow piano, 90 bpm", seed=3)
    assert path.name == "slow-piano-90-bpm_3.wav"
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    info = sf.info(path)
    assert (info.samplerate, info.channels, info.subtype) == (32_000, 1, "PCM_16")
    assert info.frames == 15 * HOP
    assert sound(path).std() > 1e-3


def test_every_prompt_and_variation_is_a_piece_of_its_own(play):
    paths = play(prompt='["drums", "flute", "drums"]', variations=2)
    assert [path.name for path in paths] == [
        *("drums_0_1.wav", "drums_0_2.wav"),
        *("flute_0_1.wav", "flute_0_2.wav"),
        *("drums-3_0_1.wav", "drums-3_0_2.wav"),
    ]
    pieces = [sound(path).tobytes() for path in paths]
    assert len(set(pieces)) == 4  # the prompt that is given twice makes the same two
    assert pieces[:2] == pieces[4:]


def test_prompts_come_from_a_file_in_any_script(play, tmp_path):
    (tmp_path / "prompts.txt").write_text("café lent\n\n静かな夜\n???\n", encoding="utf-8")
    paths = play(prompt=tmp_path / "prompts.txt")
    assert [path.name for path in paths] == ["café-lent_0.wav", "静かな夜_0.wav", "empty_0.wav"]


def test_a_wav_name_is_taken_as_it_is(play, tmp_path):
    assert play(output_dir=tmp_path / "new" / "waltz.wav") == [tmp_path / "new" / "waltz.wav"]
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["waltz.wav"]


@pytest.mark.parametrize("duration", [0.3, 2 * WINDOW_SEC + 0.3])
def test_the_seed_alone_decides(play, duration):
    same, again, other = (play(seed=seed, duration=duration)[0].read_bytes() for seed in (7, 7, 8))
    assert same == again
    assert same != other


@pytest.mark.parametrize(
    ("duration", "overlap", "frames"),
    [
        (0.02, 1, 1),
        (0.61, 1, 30),  # 30.5 frames
        (1.98, 1, 99),
        (2.0, 1, 100),
        (2.02, 1, 101),
        (2.02, 1.98, 101),
        (5.3, 0.02, 265),
        (5.3, 1.5, 265),
    ],
)
def test_the_length_is_exact_to_the_frame(play, duration, overlap, frames):
    assert len(sound(play(duration=duration, overlap=overlap)[0])) == frames * HOP


def test_a_longer_piece_begins_like_the_shorter_and_goes_on(play):
    window, longer, less_overlap = (
        sound(play(duration=duration, overlap=overlap)[0])
        for duration, overlap in ((2.0, 1), (5.0, 1), (5.0, 0.5))
    )
    settled = 90 * HOP  # the codec's last frames depend on what follows
    np.testing.assert_allclose(longer[:settled], window[:settled], atol=2e-3)
    np.testing.assert_allclose(less_overlap[:settled], window[:settled], atol=2e-3)
    assert not np.allclose(longer[-HOP * 50 :], less_overlap[-HOP * 50 :], atol=1e-2)
    for second in range(5):
        assert longer[second * 32_000 : (second + 1) * 32_000].std() > 1e-3


def test_every_window_continues_the_last_seconds_of_the_one_before(model, monkeypatch):
    calls = []
    make = Windows.generate

    def recording(self, prefixes, context, frames, *rest):
        made = make(self, prefixes, context, frames, *rest)
        calls.append((context, frames, made))
        return made

    monkeypatch.setattr(Windows, "generate", recording)
    generation.generate(model, ["drums"], duration_sec=4.5, overlap_sec=0.5, seed=0)
    assert [length for _, length, _ in calls] == [100, 100, 75]  # 100 + (100 - 25) + (75 - 25)
    assert calls[0][0].shape[-1] == 0
    for (_, _, before), (prompt, _, made) in itertools.pairwise(calls):
        assert torch.equal(prompt, before[..., -25:])
        assert torch.equal(made[..., :25], prompt)


@pytest.mark.parametrize(("rate", "seconds", "kept"), [(44_100, 0.7, 0.7), (32_000, 3.0, 1.0)])
def test_a_recording_is_continued_from_its_last_seconds(rate, seconds, kept, play, model, tmp_path):
    recording = tmp_path / "opening.wav"
    sf.write(recording, 0.3 * tone(5, seconds, rate), rate, subtype="FLOAT")
    made = sound(play(prompt_audio=recording, overlap=1, duration=0.4)[0])
    opening = round(kept * 50) * HOP
    assert len(made) == opening + 20 * HOP  # and the duration that was asked for

    end = read_crop(recording, round((seconds - kept) * rate), round(kept * rate), 32_000, 1)
    heard = codec.encode_audio(model, torch.from_numpy(end)[None])
    decoded = codec.decode(model, heard)[0].T.numpy()
    settled = opening - 8 * HOP  # the codec's last frames depend on what follows
    assert np.abs(decoded).max() < growing.PEAK
    np.testing.assert_allclose(made[:settled], decoded[:settled], atol=5e-3)
    assert made[opening:].std() > 1e-3
    without = sound(play(duration=0.4)[0])
    assert not np.allclose(made[opening:], without, atol=1e-2)


def test_sampling_flags_take_effect(play):
    def piece(**flags):
        return play(duration=0.5, **flags)[0].read_bytes()

    usual = piece()
    likeliest = piece(temperature=0)
    assert likeliest != usual
    assert piece(temperature=0, seed=9) == likeliest
    assert piece(top_k=1, seed=9) == likeliest
    assert piece(top_p=1e-6) == likeliest
    for flags in ({"top_k": 3}, {"top_p": 0.3}, {"temperature": 0.3}, {"cfg_coef": 1}):
        assert piece(**flags) not in (usual, likeliest), flags
    assert piece(top_k=0) == piece(top_k=64)  # all of the codebook's 64


def test_guidance_follows_the_prompt(play):
    def piece(prompt, coefficient):
        how = {"cfg_coef": coefficient, "duration": 0.5, "temperature": 0}
        (path,) = play(prompt=prompt, **how)  # with a temperature, prompts have their own noise
        return sound(path).tobytes()

    assert piece("drums", 0) == piece("flute", 0)  # none: what the prompt says has no weight
    assert piece("drums", 3) != piece("flute", 3)


@pytest.fixture
def tuned(tmp_path: Path, model: Model) -> Path:
    """Other weights than the model's, as run.py leaves them, with the note of what they are of."""
    state = {k: v.clone() for k, v in model.lm.state_dict().items()}
    for name in state:
        if name.startswith("linears"):
            state[name] = -state[name]
    (tmp_path / "models").mkdir()
    torch.save(state, tmp_path / "models" / "lm_final.pt")
    (tmp_path / "models" / "run.json").write_text(json.dumps({"model_id": "the-noted-one"}))
    return tmp_path / "models" / "lm_final.pt"


@pytest.fixture
def untouched(model: Model):
    """The shared model gets its own weights back."""
    state = {k: v.clone() for k, v in model.lm.state_dict().items()}
    yield
    model.lm.load_state_dict(state)


def test_tuned_weights_are_used_with_the_model_that_was_noted(play, tuned, untouched, asked_for):
    base = sound(play(weights_path=None, model_id=None)[0])
    assert asked_for == ["small"]
    other = sound(play(weights_path=tuned, model_id=None)[0])
    assert asked_for == ["small", "the-noted-one"]
    assert not np.allclose(base, other, atol=1e-2)
    play(weights_path=tuned, model_id="another")
    assert asked_for[-1] == "another"
    (tuned.parent / "run.json").unlink()
    play(weights_path=tuned, model_id=None)
    assert asked_for[-1] == "small"


def test_what_was_trained_plays_from_any_folder(
    cli, mono_folder, make_pairs, tmp_path, monkeypatch
):
    """Also if run.py was given the model's place as seen from where it ran."""
    data = make_pairs(seconds=(1.0,))
    monkeypatch.chdir(mono_folder)
    flags = {"model_id": ".", "output_dir": tmp_path / "models", "duration": 1, "max_steps": 1}
    assert cli(run, dataset_path=data, device="cpu", num_workers=0, **flags).code == 0
    monkeypatch.chdir(tmp_path)
    done = cli(generate, prompt="a tune", duration=0.1, device="cpu")
    assert done.code == 0, done.err
    assert sf.info(tmp_path / "generated" / "a-tune_0.wav").frames == 5 * HOP


def test_a_loud_piece_is_lowered_not_clipped(play, model, monkeypatch):
    decode = model.compression_model.decode
    monkeypatch.setattr(model.compression_model, "decode", lambda codes: 0.1 * decode(codes))
    quiet = sound(play(duration=1.0)[0])
    assert np.abs(quiet).max() < 0.5
    monkeypatch.setattr(model.compression_model, "decode", lambda codes: 30 * decode(codes))
    loud = sound(play(duration=1.0)[0])
    assert np.abs(loud).max() == pytest.approx(growing.PEAK, abs=1e-3)
    np.testing.assert_allclose(loud / np.abs(loud).max(), quiet / np.abs(quiet).max(), atol=2e-3)


def test_an_existing_piece_is_replaced_only_when_asked_to(cli, asked_for, tmp_path):
    output = tmp_path / "waltz.wav"
    flags = {"prompt": "waltz", "duration": 0.1, "overlap": 1, "output_dir": output}
    flags |= {"weights_path": None, "model_id": "tiny", "device": "cpu"}
    output.write_bytes(b"precious")
    refused = cli(generate, **flags)
    assert refused.code == 1
    assert "waltz.wav exists" in refused.err
    assert output.read_bytes() == b"precious"
    assert asked_for == [], "refused before the model is loaded"
    done = cli(generate, **flags, overwrite=1)
    assert done.code == 0
    assert sf.info(output).frames == 5 * HOP


def test_progress_is_on_stderr_and_ends_full(cli, asked_for, tmp_path):
    done = cli(
        generate,
        **{"prompt": '["a", "b"]', "duration": 4.2, "overlap": 1, "variations": 2},
        **{"device": "cpu", "weights_path": None, "model_id": "x", "output_dir": tmp_path / "out"},
    )
    assert "generating" not in done.out
    bars = done.err.replace("\n", "\r").split("\r")
    assert "generating: 100%" in bars[-2]
    assert "16.8/16.8 s of music" in bars[-2]
    assert "x real time" in bars[-2]
    assert max(float(bar.split("%")[0].split()[-1]) for bar in bars if "%" in bar) == 100


@pytest.mark.parametrize("kind", ["mono", "stereo"])
def test_decoding_in_pieces_is_decoding_at_once(kind, request, monkeypatch):
    model = request.getfixturevalue(kind)
    wav = torch.from_numpy(tone(3, 12.0, 32_000, model.audio_channels)).T[None].float()
    codes = codec.encode_audio(model, wav)
    monkeypatch.setattr("musicgen.codec.DECODE_SEC", 12.0)
    at_once = codec.decode(model, codes)
    with torch.no_grad():
        assert torch.equal(at_once, model.compression_model.decode(codes))
    monkeypatch.setattr("musicgen.codec.DECODE_SEC", 3.0)
    in_pieces = codec.decode(model, codes)
    assert in_pieces.shape == at_once.shape
    error = (in_pieces - at_once).square().mean().sqrt() / at_once.square().mean().sqrt()
    assert error < 1e-3  # -60 dB
    seams = [(in_pieces - at_once)[..., s - 640 : s + 640].abs().max() for s in (96_000, 192_000)]
    assert max(seams) < 0.01 * at_once.abs().max()


def test_a_stereo_model_makes_stereo(stereo, play, monkeypatch, tmp_path):
    monkeypatch.setattr("musicgen.load.load_model", lambda *_: again(stereo))
    sf.write(tmp_path / "mono.wav", tone(1, 0.5), 32_000)
    for flags in ({}, {"prompt_audio": tmp_path / "mono.wav"}):
        wav = sound(play(duration=2.5, **flags)[0])
        assert wav.shape[1] == 2
        assert not np.allclose(wav[-32_000:, 0], wav[-32_000:, 1], atol=1e-2)


def test_int8_plays_the_same_alone_and_with_others(play):
    (alone,) = play(prompt="drums", int8=1)
    both = play(prompt='["a long prompt of many words", "drums"]', int8=1)
    assert both[1].read_bytes() == alone.read_bytes()
    exact = sound(play(prompt="drums", int8=0)[0])
    assert not np.array_equal(sound(alone), exact)


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("musicgen.device.torch.backends.mps.is_available", True, "--device=cpu"),
        ("musicgen.int8.ENGINES", (), "needs an Intel or AMD processor"),
    ],
)
def test_int8_is_refused_by_name_where_it_can_not_be_had(
    name, value, says, cli, asked_for, tmp_path, monkeypatch
):
    monkeypatch.setattr(name, (lambda: value) if value is True else value)
    device = "mps" if value is True else "cpu"
    flags = {"prompt": "waltz", "output_dir": tmp_path, "weights_path": None, "model_id": "tiny"}
    refused = cli(generate, **flags, int8=1, device=device)
    assert refused.code == 1
    assert "--int8=1" in refused.err
    assert says in refused.err
    assert asked_for == [], "refused before the model is loaded"
