"""Read music in the public domain as plain notes, from the scores that music21 ships.

Bach's four-part chorales, and two printed collections of tunes: Ryan's Mammoth Collection (Boston,
1883) and O'Neill's Music of Ireland (Chicago, 1903). The sources' terms are in demo/README.md.
"""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

TRIADS = {"major": (0, 5, 7), "minor": (0, 5, 7, 8, 10)}  # roots over the tonic, in semitones
IS_MINOR_ROOT = {("minor", 0), ("minor", 5)}  # their thirds are minor too; the others' are major


@dataclass(frozen=True)
class Note:
    """One note; `start` and `length` in quarter notes, `pitch` in MIDI numbers."""

    start: float
    length: float
    pitch: int
    is_melody: bool = True


@dataclass(frozen=True)
class Piece:
    """A score: `tonic` is 0 for C to 11 for B, `kind` "chorale" or a dance such as "reel"."""

    title: str
    source: str
    kind: str
    tonic: int
    mode: str
    notes: tuple[Note, ...]
    bar_length: float  # quarter notes

    @property
    def length(self) -> float:
        """Quarter notes up to the end of the last bar."""
        end = max(note.start + note.length for note in self.notes)
        return self.bar_length * -(-end // self.bar_length)


def chorales() -> Iterator[Piece]:
    """Yield Bach's four-part chorales that music21 has as MusicXML, in order of BWV numbers."""
    from music21 import corpus

    for path in _corpus_files("bach", ".mxl"):
        score = corpus.parse(path)
        if len(score.parts) == 4:
            yield _piece(score, Path(path).stem, "Bach", "chorale")


def ryan() -> Iterator[Piece]:
    """Yield the tunes of Ryan's Mammoth Collection that music21 can read, by title."""
    from music21 import corpus

    for path in _corpus_files("ryansMammoth", ".abc"):
        if piece := _tune(lambda path=path: corpus.parse(path), Path(path).stem, "Ryan"):
            yield piece


def oneill_jigs() -> Iterator[Piece]:
    """Yield the double jigs (numbers 732 to 981) of O'Neill's Music of Ireland, in order."""
    from music21 import corpus

    names = ("0759-0810", "0811-0899", "0900-0950", "0951-0981")
    for name in names:
        for score in corpus.parse(f"oneills1850/{name}.abc").scores:
            piece = _tune(lambda score=score: score, "untitled", "O'Neill")
            if piece and piece.bar_length == 3:
                yield piece


def harmonise(piece: Piece) -> Piece:
    """Add bass and chords to a tune: per half bar, the triad with most of the melody's notes."""
    half = piece.bar_length / 2
    notes = list(piece.notes)
    previous = 0
    for index in range(int(piece.length / half)):
        start = index * half
        weights: dict[int, Fraction] = defaultdict(Fraction)
        for note in piece.notes:
            shared = min(note.start + note.length, start + half) - max(note.start, start)
            if shared > 0:
                weights[(note.pitch - piece.tonic) % 12] += Fraction(shared).limit_denominator(48)
        if not weights:  # a bar of rest
            continue
        ranked = [
            (sum(weights[tone % 12] for tone in _triad(piece.mode, root)), root == previous, -rank)
            for rank, root in enumerate(TRIADS[piece.mode])
        ]
        previous = TRIADS[piece.mode][-max(ranked)[2]]
        tones = [piece.tonic + tone for tone in _triad(piece.mode, previous)]
        notes.append(Note(start, half / 2, 36 + tones[0] % 12, is_melody=False))
        chord_start = start + (2 / 3 if half == 1.5 else 1 / 2) * half
        for tone in tones:
            notes.append(Note(chord_start, half / 4, 48 + tone % 12, is_melody=False))
    notes.sort(key=lambda note: (note.start, note.pitch))
    return Piece(**{**piece.__dict__, "notes": tuple(notes)})


def _corpus_files(folder: str, suffix: str) -> list[Path]:
    import music21

    return sorted((Path(music21.__file__).parent / "corpus" / folder).glob(f"*{suffix}"))


def _triad(mode: str, root: int) -> tuple[int, int, int]:
    return root, root + (3 if (mode, root) in IS_MINOR_ROOT else 4), root + 7


def _tune(parse: Any, name: str, source: str) -> Piece | None:
    from music21.exceptions21 import Music21Exception

    try:
        score = parse()
        kinds = ("reel", "hornpipe", "jig", "strathspey", "clog", "waltz", "polka", "fling")
        title = score.metadata.title or name
        kind = next((kind for kind in kinds if kind in f"{title} {name}".lower()), "tune")
        piece = _piece(score, title.split(" -- ")[0].strip(' "'), source, kind)
    except (Music21Exception, ValueError, IndexError, AttributeError, KeyError):
        return None
    return piece if piece.length >= 8 * piece.bar_length else None


def _piece(score: Any, title: str, source: str, kind: str) -> Piece:
    notes = []
    for part in score.parts:
        for element in part.flatten().stripTies().notes:
            if not element.duration.isGrace:
                start, length = float(element.offset), float(element.quarterLength)
                notes += [Note(start, length, pitch.midi) for pitch in element.pitches]
    notes.sort(key=lambda note: (note.start, note.pitch))
    key = score.analyze("key")
    meter = score.recurse().getElementsByClass("TimeSignature")[0]
    bar_length = float(meter.barDuration.quarterLength)
    return Piece(title, source, kind, key.tonic.pitchClass, key.mode, tuple(notes), bar_length)
