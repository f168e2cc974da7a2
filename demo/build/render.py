"""Play scores: FluidSynth and a soundfont turn a `Piece` into sound, with a caption."""

import ctypes.util
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import soundfile
import soxr

from demo.build.scores import Note, Piece

RATE = 32000  # Hz, the codec's
SOUNDFONTS = [  # where Debian, Fedora and Arch put the free soundfont FluidR3
    Path("/usr/share/sounds/sf2/FluidR3_GM.sf2"),
    Path("/usr/share/soundfonts/FluidR3_GM.sf2"),
]
KEYS = ("C", "C#", "D", "Eb", "E", "F", "F#", "G", "Ab", "A", "Bb", "B")


@dataclass(frozen=True)
class Instrument:
    """A General MIDI program (from 0) and the semitones that bring music into its best range."""

    name: str
    program: int
    shift: int = 0


INSTRUMENTS = (  # what the language model is pretrained on
    Instrument("piano", 0),
    Instrument("harpsichord", 6),
    Instrument("music box", 10, 12),
    Instrument("organ", 19),
    Instrument("guitar", 24),
    Instrument("strings", 48),
    Instrument("trumpet", 56),
    Instrument("flute", 73, 12),
)
STYLE = Instrument("ocarina", 79)  # the demo's: neither codec nor language model was trained on it
CODEC_ONLY = (
    Instrument("accordion", 21),
    Instrument("vibraphone", 11),
    Instrument("marimba", 12),
    Instrument("electric guitar", 27),
    Instrument("violin", 40),
    Instrument("cello", 42),
    Instrument("harp", 46),
    Instrument("choir", 52),
    Instrument("saxophone", 65),
    Instrument("oboe", 68),
    Instrument("clarinet", 71),
    Instrument("banjo", 105),
)


@dataclass(frozen=True)
class Performance:
    """A piece with everything that its sound and its caption depend on."""

    piece: Piece
    instrument: Instrument
    bpm: int  # quarter notes a minute; dotted quarters in a jig
    transpose: int = 0  # semitones
    seed: int = 0

    @property
    def caption(self) -> str:
        """A sentence with instrument, kind, mood, key and tempo, worded by the seed."""
        rng = np.random.default_rng((self.seed, 1))
        key = f"{KEYS[(self.piece.tonic + self.transpose) % 12]} {self.piece.mode}"
        if self.piece.kind == "chorale":
            what, moods = "chorale", ("calm", "stately", "solemn")
        else:
            what, moods = self.piece.kind, ("lively", "merry", "bright")
            if self.piece.source == "O'Neill":
                what = f"Irish {what}"
        mood, name = moods[rng.integers(len(moods))], self.instrument.name
        return (
            f"a {mood} {what} for {name} in {key}, {self.bpm} bpm",
            f"{name} solo, {mood} {what}, {key}, {self.bpm} bpm",
            f"{what} played on the {name}, {mood}, {self.bpm} bpm, in {key}",
        )[rng.integers(3)]


def perform(performance: Performance, seconds: float) -> npt.NDArray[np.float32]:
    """Play a piece's first seconds, repeating it if it is short -> wav [samples] at 32 kHz, mono.

    Like hands, it plays each note some ms late and a little louder or softer. The level is -20
    dBFS RMS, or less where peaks would pass -1 dBFS.
    """
    piece, rng = performance.piece, np.random.default_rng((performance.seed, 2))
    shift = performance.transpose + performance.instrument.shift
    quarter_sec = 60 / performance.bpm / (1.5 if piece.kind == "jig" else 1)
    events: list[tuple[int, int, int, int]] = []  # sample, order, pitch, velocity (0 = off)

    def add(note: Note, start: float) -> None:
        accent = 8 if note.start % piece.bar_length == 0 else 0
        velocity = int(rng.integers(78, 92)) + accent if note.is_melody else rng.integers(58, 68)
        begin = int((start * quarter_sec + rng.uniform(0, 0.012)) * RATE)
        end = int((start + 0.95 * note.length) * quarter_sec * RATE)
        pitch = note.pitch + shift
        events.append((begin, 1, pitch, int(velocity)))
        events.append((max(end, begin + 1), 0, pitch, 0))

    total = int(seconds * RATE)
    offset = 0.0
    while offset * quarter_sec < seconds:
        for note in piece.notes:
            add(note, offset + note.start)
        offset += piece.length
    synth, font = _open_synth()
    synth.system_reset()  # silence, and piano on every channel
    synth.program_select(0, font, 0, performance.instrument.program)
    blocks, now = [], 0
    for sample, _, pitch, velocity in sorted(event for event in events if event[0] < total):
        if sample > now:
            blocks.append(synth.get_samples(sample - now))
            now = sample
        synth.noteon(0, pitch, velocity)  # velocity 0 ends the note
    blocks.append(synth.get_samples(max(0, total - now)))
    wav = np.concatenate(blocks).reshape(-1, 2).mean(axis=1) / 32768
    rms, peak = np.sqrt(np.mean(wav**2)), np.abs(wav).max()
    return (wav * min(0.1 / rms, 0.89 / peak)).astype(np.float32)


def write_pair(
    folder: Path, name: str, performance: Performance, seconds: float, rate: int = RATE
) -> None:
    """Write a performance to folder/name.wav (mono, 16-bit) and its caption to name.txt."""
    wav = soxr.resample(perform(performance, seconds), RATE, rate)
    soundfile.write(folder / f"{name}.wav", wav, rate, subtype="PCM_16")
    (folder / f"{name}.txt").write_text(f"{performance.caption}\n", encoding="utf-8")


@lru_cache(maxsize=1)
def _open_synth() -> tuple[Any, int]:
    soundfont = next((path for path in SOUNDFONTS if path.exists()), None)
    if not soundfont or not ctypes.util.find_library("fluidsynth"):
        raise SystemExit(
            "playing the scores needs FluidSynth and its soundfont FluidR3: install them, "
            "on Debian and Ubuntu with: apt-get install fluidsynth fluid-soundfont-gm"
        )
    import fluidsynth

    synth = fluidsynth.Synth(gain=0.5, samplerate=RATE)
    synth.setting("synth.reverb.active", 0)
    synth.setting("synth.chorus.active", 0)
    return synth, synth.sfload(str(soundfont))
