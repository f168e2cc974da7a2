"""Make a small dataset from nothing: songs synthesised with numpy, and their captions."""

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import soundfile

Audio = npt.NDArray[np.float32]
Voice = Callable[[float, float, int], Audio]


NOTES = ("C", "C#", "D", "Eb", "E", "F", "F#", "G", "Ab", "A", "Bb", "B")
SCALES = {"major": (0, 2, 4, 5, 7, 9, 11), "minor": (0, 2, 3, 5, 7, 8, 10)}  # semitones
PROGRESSIONS = {  # scale degrees of the chords' roots, 0 = tonic; one chord a bar
    "major": ((0, 4, 5, 3), (0, 5, 3, 4), (1, 4, 0, 5), (0, 3, 0, 4)),
    "minor": ((0, 5, 2, 6), (0, 3, 4, 0), (0, 6, 5, 6), (0, 3, 5, 4)),
}


def build_dataset(folder: Path, *, clips: int = 8, seconds: float = 35.0, seed: int = 0) -> Path:
    """Write `clips` pairs of .wav and .txt: synthesised music and a caption that describes it.

    44.1 kHz, 16-bit, peaks at -3 dBFS, every other clip mono; the same seed gives the same files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(clips):
        wav, caption = song(index, seconds, 44100, seed)
        if index % 2:
            wav = wav.mean(axis=0, keepdims=True)
        wav *= 10 ** (-3 / 20) / np.abs(wav).max()
        name = f"{index:02d} {list(LEADS)[index % 3]}".replace(" ", "_")
        soundfile.write(folder / f"{name}.wav", wav.T, 44100, subtype="PCM_16")
        (folder / f"{name}.txt").write_text(f"{caption}\n", encoding="utf-8")
    return folder


def song(index: int, seconds: float, rate: int, seed: int = 0) -> tuple[Audio, str]:
    """Compose and play one piece -> wav [2, samples] at `rate` Hz, peak 1, and its caption.

    `index` chooses lead and meter; key, tempo, chords and band are drawn from (seed, index).
    """
    rng = np.random.default_rng((seed, index))
    lead, meter = list(LEADS)[index % 3], (4, 3, 4, 4)[index % 4]
    mode, key = ("minor", "major")[rng.integers(2)], int(rng.integers(12))
    bpm, chords = int(rng.integers(68, 140)), PROGRESSIONS[mode][rng.integers(4)]
    has_pad, has_bass, has_drums = rng.random(3) < (0.6, 0.8, 0.6)
    has_arpeggios = not has_pad or lead == "plucked guitar"
    beat_sec = 60 / bpm
    mix = np.zeros((2, int(seconds * rate)), dtype=np.float32)

    def play(voice: Voice, degree: int, beat: float, beats: float, gain: float, pan: float) -> None:
        """Add a note, some ms late and a little softer, as hands do; pan -1 left to 1 right."""
        octave, step = divmod(degree, 7)  # degree 0 = the tonic between C3 and B3
        hz = 440 * 2 ** ((48 + key + 12 * octave + SCALES[mode][step] - 69) / 12)
        start = int((beat * beat_sec + rng.uniform(0, 0.008)) * rate)
        note = voice(hz, beats * beat_sec, rate)[: max(0, mix.shape[1] - start)]
        angle = (pan + 1) * np.pi / 4
        shares = np.array([[np.cos(angle)], [np.sin(angle)]], dtype=np.float32)
        mix[:, start : start + len(note)] += float(gain * rng.uniform(0.8, 1)) * shares * note

    tune = 9  # scale degree of the melody's last note
    for bar in range(int(seconds / (meter * beat_sec)) + 1):
        first, root = bar * meter, chords[bar % 4]
        triad = (root, root + 2, root + 4)
        for degree, pan in zip(triad if has_pad else (), (-0.8, 0.0, 0.8), strict=False):
            play(PAD, degree, first, meter + 1, 0.07, pan)
        for eighth in range(2 * meter):
            beat, on_beat = first + eighth / 2, eighth % 2 == 0
            strong = eighth in ((0, 4) if meter == 4 else (0,))
            if has_bass and strong:
                play(BASS, root - (7 if root < 5 else 14), beat, 1.5, 0.35, 0.0)
            if has_arpeggios:
                play(_pluck, (*triad, root + 7)[(0, 2, 1, 3)[eighth % 4]], beat, 2, 0.35, -0.4)
            if has_drums:
                play(KICK if strong else BRUSH if on_beat else HAT, 0, beat, 0.5, 0.3, 0.1)
            if rng.random() < (0.75 if on_beat else 0.25):
                tune = int(np.clip(tune + rng.integers(-2, 3), 6, 15))
                if on_beat:  # the nearest note of the chord
                    tune = min(
                        (d % 7 + 7 * o for d in triad for o in (0, 1, 2)),
                        key=lambda degree: abs(degree - tune),
                    )
                voice, octaves, beats = LEADS[lead]
                play(voice, tune + 7 * octaves, beat, beats, 0.5, 0.3)

    mix = _reverb(mix, rate)
    fade = int(min(2.0, seconds / 10) * rate)
    mix[:, -fade:] *= np.linspace(1, 0, fade, dtype=np.float32)
    speed = "slow" if bpm < 88 else "steady" if bpm < 115 else "lively"
    mood = {"minor": ("wistful", "dark"), "major": ("bright", "gentle")}[mode][index % 2]
    form = "waltz" if meter == 3 else "tune"
    band = {
        "guitar arpeggios": has_arpeggios and lead != "plucked guitar",
        "a warm synth pad": has_pad,
        "soft bass": has_bass,
        "brushed drums": has_drums,
    }
    players = ", ".join(name for name, plays in band.items() if plays)
    players = " and ".join(players.rsplit(", ", 1))
    caption = f"a {speed}, {mood} {lead} {form} in {NOTES[key]} {mode}, {bpm} bpm"
    return mix / np.abs(mix).max(), caption + (f", with {players}" if players else "")


# A voice plays one note: (frequency in Hz, length in seconds, sample rate in Hz) -> [samples].


@lru_cache(maxsize=64)
def _pluck(hz: float, sec: float, rate: int) -> Audio:
    """Play a string (Karplus-Strong): a burst of noise, repeated and averaged every period."""
    period, cycles = int(rate / hz), np.arange(int(hz * sec) + 2)[:, None]
    harmonics = np.arange(period // 2 + 1)
    burst = np.fft.rfft(np.random.default_rng(period).uniform(-1, 1, period))
    burst *= (harmonics > 0) / (1 + harmonics / 12)  # no DC, a soft fingertip
    loss = np.cos(np.pi * harmonics / period) * 10 ** (-3 / (2 * hz))  # -60 dB in 2 s or less
    wave = np.fft.irfft(burst * loss**cycles, n=period).ravel()
    wave *= 0.3 / wave[:period].std()
    # A period of whole samples is a little sharp: read it more slowly, to be in tune.
    times = np.arange(int(sec * rate)) * (period * hz / rate)
    return _shape(np.interp(times, np.arange(len(wave)), wave), rate)


@lru_cache(maxsize=64)
def _bell(hz: float, sec: float, rate: int) -> Audio:
    """Play a bell: frequency modulation with an inharmonic ratio."""
    t = np.arange(int(sec * rate)) / rate
    modulator = 1.2 * np.exp(-4 * t) * np.sin(2 * np.pi * 3.5 * hz * t)
    return _shape(0.6 * np.sin(2 * np.pi * hz * t + modulator) * np.exp(-2.5 * t), rate)


def _tone(partials: tuple[float, ...], decay: float, attack: float, vibrato: float = 0) -> Voice:
    """Return a voice of harmonics; `decay` per second, `attack` in seconds, vibrato in radians."""

    @lru_cache(maxsize=64)
    def voice(hz: float, sec: float, rate: int) -> Audio:
        t = np.arange(int(sec * rate)) / rate
        phase = 2 * np.pi * hz * t + vibrato * np.sin(2 * np.pi * 5 * t)
        wave = sum(gain * np.sin((i + 1) * phase) for i, gain in enumerate(partials))
        return _shape(wave * np.exp(-decay * t), rate, attack)

    return voice


def _drum(hz: float, brightness: int, decay: float) -> Voice:
    """Return a drum: a sine falling to `hz`, or for 0 Hz, noise high-passed `brightness` times."""

    @lru_cache(maxsize=4)
    def voice(_: float, sec: float, rate: int) -> Audio:
        t = np.arange(int(sec * rate)) / rate
        noise = np.diff(np.random.default_rng(0).normal(size=len(t) + brightness), brightness)
        fall = np.sin(2 * np.pi * hz * (t + (1 - np.exp(-30 * t)) / 30))
        wave = fall if hz else 0.25 * noise / noise.std()
        return _shape(wave * np.exp(-decay * t), rate)

    return voice


def _shape(wave: Any, rate: int, attack_sec: float = 0.002) -> Audio:
    """Ramp both ends, so that no note clicks."""
    t = np.arange(len(wave)) / rate
    ends = np.minimum(t / attack_sec, (t[-1] - t) / max(0.04, attack_sec))
    return np.asarray(wave * np.minimum(ends, 1), dtype=np.float32)


def _reverb(mix: Audio, rate: int, length_sec: float = 1.2, wet: float = 0.25) -> Audio:
    """Add a room: convolve each channel [2, samples] with its own decaying noise."""
    t = np.arange(int(length_sec * rate)) / rate
    room = np.random.default_rng(0).normal(size=(2, len(t))) * np.exp(-6 * t)
    room *= wet / np.sqrt((room**2).sum(axis=1, keepdims=True))
    size = 1 << (mix.shape[1] + len(t)).bit_length()
    echo = np.fft.irfft(np.fft.rfft(mix, size) * np.fft.rfft(room, size), size)
    return np.asarray(mix + echo[:, : mix.shape[1]], dtype=np.float32)


PAD = _tone((1, 0.5, 0.3, 0.2, 0.1), decay=0, attack=0.5)
BASS = _tone((1, 0.3, 0.1), decay=2, attack=0.01)
FLUTE = _tone((0.5, 0.2, 0.06), decay=0.5, attack=0.05, vibrato=0.3)
KICK, BRUSH, HAT = _drum(50, 0, 12), _drum(0, 1, 25), _drum(0, 2, 80)
LEADS: dict[str, tuple[Voice, int, int]] = {  # voice, octaves up, beats
    "plucked guitar": (_pluck, 0, 3),
    "bell": (_bell, 1, 3),
    "flute": (FLUTE, 0, 1),
}
