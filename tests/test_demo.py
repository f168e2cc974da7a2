"""The demo's model plays what it is asked for, and fine-tuning teaches it a style it didn't know.

With wrong trainers the same checks fail: the last tests put the faults in that other trainers had.
"""

from pathlib import Path
from typing import NamedTuple

import pytest
import soundfile as sf
import soxr
import torch

import musicgen
import plan
from demo.build.report import codec_quality, prompts_told_apart

DEMO = Path(__file__).parent.parent / "demo"
STYLE, HELD_OUT = DEMO / "dataset" / "train", DEMO / "dataset" / "valid"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model() -> musicgen.MusicGen:
    return musicgen.load("demo", CPU)


def test_all_of_the_demo_is_small():
    shipped = [
        DEMO.glob("*"),
        *((DEMO / name).rglob("*") for name in ("model", "dataset", "build")),
    ]
    size = sum(path.stat().st_size for paths in shipped for path in paths if path.is_file())
    assert 10e6 < size < 20e6


def test_the_codec_keeps_the_notes_of_held_out_music(model):
    quality = codec_quality(model, sorted(HELD_OUT.glob("*.wav")))
    assert quality["notes within a semitone"] > 0.9
    assert quality["SI-SDR dB"] > 5


def test_prompts_for_different_instruments_sound_different(model):
    found = prompts_told_apart(model, takes=2, take_sec=4.0)
    assert found["share"] > 2 * found["chance"]


# Fine-tuning. The lessons are short, so that clips are padded, and of two kinds, so that captions
# matter: the style, and the same recordings an octave higher and twice as fast, as a "banjo".

LEAST_FALL, LEAST_TRUST = 0.14, 0.02
PIECE_SEC, CROP_SEC, HELD_OUT_SEC = 3.0, 6.0, 4.5
LESSON = {"duration": CROP_SEC, "batch_size": 8, "max_steps": 40, "lr": 1e-3, "warmup_steps": 4}


@pytest.fixture(scope="module")
def lessons(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lessons")
    for path in sorted(STYLE.glob("*.wav")):
        wav, rate = sf.read(path)
        caption = path.with_suffix(".txt").read_text()
        for speed, instrument in ((1, "ocarina"), (2, "banjo")):
            frames = int(PIECE_SEC * rate * speed)
            for piece in range(2):
                part = folder / f"{path.stem}_{instrument}_{piece}.wav"
                is_long = not list(folder.glob("*.wav"))  # the longest decides the crop's length
                start, length = piece * frames, 2 * frames if is_long else frames
                sf.write(part, wav[start : start + length], rate * speed)
                part.with_suffix(".txt").write_text(caption.replace("ocarina", instrument))
    return folder


@pytest.fixture(scope="module")
def exam(model: musicgen.MusicGen) -> list[tuple[torch.Tensor, str, str]]:
    """Held-out clips of both kinds: codes [1, K, T], their caption, the other kind's caption."""
    questions = []
    for path in sorted(HELD_OUT.glob("*.wav")):
        rate = sf.info(path).samplerate
        captions = [path.with_suffix(".txt").read_text().strip()]
        captions.append(captions[0].replace("ocarina", "banjo"))
        for speed in (1, 2):
            frames = int(HELD_OUT_SEC * rate * speed)
            wav = sf.read(path, frames, dtype="float32")[0]
            wav = soxr.resample(wav, rate * speed, model.sample_rate)
            codes = musicgen.encode_audio(model, torch.from_numpy(wav)[None, None])
            questions.append((codes, captions[speed - 1], captions[2 - speed]))
    return questions


class Marks(NamedTuple):
    """Nats a token on the exam before and after; and after, with the other kind's captions."""

    before: float
    after: float
    misled: float

    @property
    def fall(self) -> float:
        return 1 - self.after / self.before

    @property
    def trust(self) -> float:
        """How much the model relies on captions: what a wrong one costs, in nats a token."""
        return self.misled - self.after


def examine(output: Path, exam: list[tuple[torch.Tensor, str, str]]) -> Marks:
    model = musicgen.load("demo", CPU)

    @torch.no_grad()
    def loss(is_misled: bool) -> float:
        token_loss, text_encoder = musicgen.TokenLoss(model.lm), musicgen.TextEncoder(model.lm)
        sums, tokens = 0.0, 0
        for codes, caption, other in exam:
            valid = torch.tensor([codes.shape[-1]])
            text, mask = text_encoder([other if is_misled else caption], CPU)
            sums += float(token_loss(codes, valid, text, mask).sum())
            tokens += int(musicgen.token_counts(model.lm, valid, codes.shape[-1]).sum())
        return sums / tokens

    before = loss(is_misled=False)
    musicgen.load_weights(model.lm, str(output / "lm_final.pt"))
    return Marks(before, loss(is_misled=False), loss(is_misled=True))


def test_fine_tuning_teaches_a_style_and_its_words(fit, lessons, exam):
    marks = examine(fit("demo", lessons, **LESSON), exam)
    assert marks.fall > LEAST_FALL
    assert marks.trust > LEAST_TRUST


def test_a_loss_on_the_first_clip_of_the_batch_only_would_be_noticed(
    fit, lessons, exam, monkeypatch
):
    right = musicgen.TokenLoss.forward

    def only_first(self, codes, valid_frames, text, text_mask):
        losses = right(self, codes, valid_frames, text, text_mask)
        return losses * (torch.arange(len(losses)) == 0)[:, None]

    with monkeypatch.context() as patch:
        patch.setattr(musicgen.TokenLoss, "forward", only_first)
        output = fit("demo", lessons, **LESSON)
    assert examine(output, exam).fall < LEAST_FALL


def test_shuffled_captions_would_be_noticed(fit, lessons, exam, monkeypatch):
    right = plan.collate

    def shuffled(clips):
        batch = right(clips)
        return batch._replace(captions=[*batch.captions[1:], batch.captions[0]])

    monkeypatch.setattr(plan, "collate", shuffled)
    assert examine(fit("demo", lessons, **LESSON), exam).trust < LEAST_TRUST
