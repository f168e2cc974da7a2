"""Measure what music sounds like, for the demo, its tests and the making of its model.

Sounds are float arrays [samples], mono, at 32 kHz.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import librosa
import numpy as np
import numpy.typing as npt
import scipy.linalg
from matplotlib.figure import Figure

RATE = 32000
FRAME = 1600  # samples: 50 ms
BANDS = 32
WINDOW_SEC = 2.0  # what the judge hears at a time
JUDGE = Path(__file__).parent / "judge.json"

Audio = npt.NDArray[np.float32]
Array = npt.NDArray[np.float64]


def read(path: Path) -> Audio:
    """Read a wav file as this module needs it: mono, 32 kHz."""
    return librosa.load(path, sr=RATE, res_type="soxr_hq")[0]


def log_mel(wav: Audio, bands: int = BANDS, hop: int = 2 * FRAME) -> Array:
    """Return the mel spectrogram in dB below its loudest value [frames, bands], floor -60."""
    power = librosa.feature.melspectrogram(
        y=wav, sr=RATE, n_fft=4096, hop_length=hop, n_mels=bands, fmin=60, fmax=12000
    )
    return librosa.power_to_db(power, ref=np.max, top_db=60).T.astype(np.float64)


def frechet_distance(one: Sequence[Audio], other: Sequence[Audio]) -> float:
    """Return the Fréchet distance of two sets of clips, in dB²; 0 for equal sets.

    It compares means and covariances of log-mel spectra of 100 ms. Unlike the codec's latents,
    these don't depend on the model that is judged, and they reflect timbre and register.
    """
    (mean, cov), (other_mean, other_cov) = (
        (frames.mean(axis=0), np.cov(frames.T))
        for frames in (np.concatenate([log_mel(wav) for wav in wavs]) for wavs in (one, other))
    )
    root = scipy.linalg.sqrtm(cov @ other_cov).real
    return float(np.sum((mean - other_mean) ** 2) + np.trace(cov + other_cov - 2 * root))


def si_sdr(wav: Audio, reference: Audio) -> float:
    """Return the scale-invariant signal-to-distortion ratio in dB (Le Roux et al., 2019)."""
    target = np.dot(wav, reference) / np.dot(reference, reference) * reference
    return float(10 * np.log10(np.sum(target**2) / np.sum((wav - target) ** 2)))


def log_mel_distance(wav: Audio, reference: Audio) -> float:
    """Return the mean absolute difference of 64-band log-mel spectra of 50 ms, in dB."""
    one, other = (log_mel(sound, 64, FRAME) for sound in (wav, reference))
    return float(np.abs(one - other).mean())


def notes_kept(wav: Audio, reference: Audio) -> tuple[int, int]:
    """Count the 50 ms frames whose strongest pitch is within a semitone of the reference's.

    Return that count, and the count of all frames in which the reference has a pitch: a spectral
    peak within 40 dB of its loudest.
    """
    (pitch, _), (other, level) = (_strongest_pitch(sound) for sound in (wav, reference))
    voiced = (other > 0) & (level > 0.01 * level.max())
    near = (pitch > 0) & (np.abs(np.log2(np.maximum(pitch, 1) / np.maximum(other, 1))) < 1 / 12)
    return int((near & voiced).sum()), int(voiced.sum())


def _strongest_pitch(wav: Audio) -> tuple[Array, Array]:
    """Return the frequency in Hz and magnitude of the highest spectral peak of each 50 ms."""
    pitches, levels = librosa.piptrack(
        y=wav, sr=RATE, n_fft=4096, hop_length=FRAME, fmin=60, fmax=2500, threshold=0.0
    )
    best = levels.argmax(axis=0)[None]
    return np.take_along_axis(pitches, best, 0)[0], np.take_along_axis(levels, best, 0)[0]


def features(wav: Audio) -> Array:
    """Return the timbre of each two seconds [windows, features]: MFCCs, spread and changes."""
    length = int(WINDOW_SEC * RATE)
    rows = []
    for start in range(0, max(1, len(wav) - length // 2), length):
        mfcc = librosa.feature.mfcc(
            y=wav[start : start + length], sr=RATE, n_mfcc=20, n_fft=2048, hop_length=512
        )
        changes = np.abs(np.diff(mfcc, axis=1)).mean(axis=1)
        rows.append(np.concatenate([mfcc[1:].mean(axis=1), mfcc[1:].std(axis=1), changes]))
    return np.array(rows)


def draw_before_after(
    before: Sequence[Audio], after: Sequence[Audio], style: Sequence[Audio], path: Path
) -> None:
    """Draw spectrograms side by side into one picture, a row for each of up to four pieces."""
    count = min(4, len(before))
    figure = Figure(figsize=(13, 2.4 * count), layout="constrained")
    axes = figure.subplots(count, 3, squeeze=False, sharey=True)
    picks = [round(index * len(before) / count) for index in range(count)]
    columns = (
        ("before", [before[pick] for pick in picks]),
        ("after, same prompt and seed", [after[pick] for pick in picks]),
        ("held-out recordings of the style", [style[pick % len(style)] for pick in range(count)]),
    )
    for column, (title, wavs) in enumerate(columns):
        axes[0, column].set_title(title)
        axes[-1, column].set_xlabel("seconds")
        for row, wav in enumerate(wavs):
            axes[row, column].specgram(
                wav + 1e-6, NFFT=2048, Fs=RATE, noverlap=1536, scale="dB", vmin=-120, vmax=-40
            )
            axes[row, column].set_yscale("symlog", linthresh=100)
            axes[row, column].set_ylim(100, 10000)
            axes[row, column].set_yticks([100, 1000, 10000], ["100 Hz", "1 kHz", "10 kHz"])
    figure.savefig(path, dpi=110)


class Judge:
    """A linear classifier that hears which instrument plays; fitted by demo/build/judge.py."""

    def __init__(self) -> None:
        state = json.loads(JUDGE.read_text())
        self.instruments: list[str] = state["instruments"]
        self._mean, self._scale, self._weights, self._bias = (
            np.array(state[name]) for name in ("mean", "scale", "weights", "bias")
        )

    def __call__(self, wav: Audio) -> Array:
        """Return each instrument's probability [instruments], averaged over windows of 2 s."""
        scores = (features(wav) - self._mean) / self._scale @ self._weights + self._bias
        odds = np.exp(scores - scores.max(axis=1, keepdims=True))
        return (odds / odds.sum(axis=1, keepdims=True)).mean(axis=0)

    def verdict(self, wav: Audio) -> str:
        """Return the most likely instrument."""
        return self.instruments[int(self(wav).argmax())]
