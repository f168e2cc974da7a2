"""A recording's caption, wherever it is written: beside it, in a table, in its own tags.

In this order, the first that is there: NAME.txt; NAME.json with audiocraft's fields; a row in a
metadata.csv or metadata.jsonl (Hugging Face's AudioFolder), in its folder or one above.
"""

import csv
import functools
import json
import math
import re
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np

import m4a
from flags import UserError

# audiocraft's MusicInfo; it merges these into the text, without the first two
# (augment_music_info_description), which here stand in for a missing description.
FIELDS = ("title", "artist", "genre", "moods", "instrument", "bpm", "key", "keywords")
TAGS = {  # what a file's own tags are called, by ffmpeg or in the file
    "description": ("description", "comment"),
    "title": ("title",),
    "artist": ("artist", "author"),
    "genre": ("genre",),
    "moods": ("mood", "tmoo"),
    "bpm": ("bpm", "tbpm", "tmpo"),
    "key": ("initialkey", "tkey", "key"),
}
TABLES = ("metadata.csv", "metadata.jsonl")
TEXT_COLUMNS = ("text", "caption")


class Caption(NamedTuple):
    """A caption, what else is known ("genre: jazz"), and where it is from (".txt files")."""

    source: str
    description: str
    fields: tuple[str, ...] = ()

    @property
    def plain(self) -> str:
        return self.description or ". ".join(self.fields)


class Merging(NamedTuple):
    """How fields get into the text; audiocraft's three probabilities."""

    merge_text_p: float = 0.0
    drop_desc_p: float = 0.0
    drop_other_p: float = 0.0

    def text(self, caption: Caption, rng: np.random.Generator) -> str:
        """The caption with some of its fields, in random order, or as it is. Never empty."""
        if rng.random() >= self.merge_text_p:
            return caption.plain
        fields = [field for field in caption.fields if rng.random() >= self.drop_other_p]
        rng.shuffle(fields)
        if not fields:
            return caption.plain
        if not caption.description or rng.random() < self.drop_desc_p:
            return ". ".join(fields)
        return ". ".join([caption.description.rstrip("."), *fields])


PLAIN = Merging()  # the captions as they are


def has(word: str, caption: str) -> bool:
    """Whether a caption holds the word by itself, as the tokenizer of placeholder.py will see it.

    Example: "jig" is in "a jig, fast" and not in "jigsaw"
    """
    return re.search(rf"(?<!\w){re.escape(word)}(?!\w)", caption) is not None


def put_in_front(word: str, caption: str) -> str:
    """The caption with the word, in front if it was not in it."""
    return caption if has(word, caption) else f"{word} {caption}"


def in_front(trigger: str | None, word: str | None, text: str) -> str:
    """A caption with --placeholder's word and --trigger.

    Example: "slow piano" -> "my-style, slow piano"
    """
    if word:
        text = put_in_front(word, text)
    if trigger and not re.match(rf"{re.escape(trigger)}(?!\w)", text):
        text = f"{trigger}, {text}"
    return text


class Captions:
    """The captions of the recordings below `root`; `one` is that of all of them."""

    def __init__(self, root: Path, *, one: str | None = None, from_tags: bool = False) -> None:
        self.root = root
        self.one = one
        self.from_tags = from_tags
        self._table = functools.cache(_read_table)

    def of(self, recording: Path) -> Caption:
        """Errors: ValueError with reason and remedy; UserError if a whole table can't be used."""
        if self.one:
            return Caption("--caption", self.one)
        if self.from_tags:
            return _from_tags(recording)
        if path := _beside(recording, ".txt"):
            text = " ".join(_read(path).split())
            if not text:
                raise ValueError(f"its caption {path.name} is empty: write what is heard in it")
            return Caption(".txt files", text)
        if path := _beside(recording, ".json"):
            return _from_json(path)
        for path in self._tables(recording):
            texts = self._table(path).get(recording.relative_to(path.parent).as_posix(), [])
            if len(set(texts)) > 1:
                raise ValueError(f"{path.name} has different captions for it: keep one")
            if texts and not texts[0]:
                raise ValueError(f"its caption in {path.name} is empty: write what is heard in it")
            if texts:
                return Caption(path.name, texts[0])
        raise ValueError(
            f"no caption: write {recording.with_suffix('.txt').name} or "
            f"{recording.with_suffix('.json').name} beside it, or a row with its file_name and "
            'text into metadata.csv or metadata.jsonl; or give --caption="..." for all, '
            "--caption_from=tags, or --no_label=1 for none"
        )

    def _tables(self, recording: Path) -> Iterator[Path]:
        """The tables that may name it, the nearest first."""
        for folder in (self.root / f for f in recording.relative_to(self.root).parents):
            yield from (path for name in TABLES if (path := folder / name).is_file())


def _beside(recording: Path, suffix: str) -> Path | None:
    paths = (recording.with_suffix(s) for s in (suffix, suffix.upper()))
    return next((path for path in paths if path.exists()), None)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"its caption {path.name} is not UTF-8 text: save it as UTF-8") from None


def _from_json(path: Path) -> Caption:
    try:
        content = json.loads(_read(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"its caption {path.name} is not JSON ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f'its caption {path.name} is not an object like {{"description": "..."}}')
    try:
        caption = _caption(".json files", content)
    except ValueError as error:
        raise ValueError(f"its caption {path.name}: {error}") from None
    if not caption.plain:
        names = ", ".join(("description", *FIELDS))
        raise ValueError(f"its caption {path.name} is empty: it has none of {names}")
    return caption


def _from_tags(recording: Path) -> Caption:
    tags = m4a.tags(recording)
    content: dict[str, Any] = {
        field: next((tags[name] for name in names if tags.get(name)), None)
        for field, names in TAGS.items()
    }
    if content["bpm"] and not _is_number(content["bpm"]):
        del content["bpm"]  # others' tags are no mistake of the user's
    caption = _caption("the files' tags", content)
    if not caption.plain:
        raise ValueError(
            f"has none of the tags {', '.join(TAGS)}: tag it, or leave out --caption_from=tags"
        )
    return caption


def _caption(source: str, content: dict[str, Any]) -> Caption:
    """From audiocraft's fields. Errors: ValueError if one's value is no text, number or list."""
    texts = {name: _text(name, content.get(name)) for name in ("description", *FIELDS)}
    if "," in texts["key"]:
        texts["key"] = ""  # of several keys audiocraft takes none
    known = FIELDS[2:] if texts["description"] else FIELDS
    fields = tuple(f"{name}: {texts[name]}" for name in known if texts[name])
    return Caption(source, texts["description"], fields)


def _text(name: str, value: Any) -> str:
    """A field's value as audiocraft writes it: 90 bpm is "90.0", genres are in lower case."""
    if value in (None, "", "None"):
        return ""
    if name == "bpm":
        if not _is_number(value):
            raise ValueError(f"bpm is {value!r}, not a number")
        return str(float(value)) if float(value) else ""
    items = value if isinstance(value, list) else [value]
    if not all(isinstance(item, str) or _is_number(item) for item in items):
        raise ValueError(f"{name} is {value!r}, not a text or a list of texts")
    text = ", ".join(words for item in items if (words := " ".join(str(item).split())))
    return text if name in ("description", "title", "artist") else text.lower()


def _is_number(value: Any) -> bool:
    try:
        return not isinstance(value, bool) and math.isfinite(float(value))
    except (TypeError, ValueError, OverflowError):
        return False


def _read_table(path: Path) -> dict[str, list[str]]:
    """A recording's name as seen from the table -> its captions. Errors: UserError.

    Rows of recordings that aren't there do no harm: one may have been moved out of the folder.
    """
    texts: dict[str, list[str]] = {}
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            for number, row in _rows_of(path, file):
                column = next((name for name in TEXT_COLUMNS if name in row), None)
                if "file_name" not in row or column is None:
                    raise ValueError(f"line {number} has no file_name, or no text (or caption)")
                name, text = row["file_name"], row[column] or ""
                if not isinstance(name, str) or not isinstance(text, str):
                    raise ValueError(f"line {number}: file_name and {column} must be texts")
                name = PurePosixPath(name.strip().replace("\\", "/")).as_posix()  # ./a.wav is a.wav
                texts.setdefault(name, []).append(" ".join(text.split()))
    except UnicodeDecodeError:
        raise UserError(f"{path}: is not UTF-8 text: save it as UTF-8") from None
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(
            f"{path}: can't be read as a table of captions ({error}); it needs file_name, as seen "
            "from its folder, and text"
        ) from None
    return texts


def _rows_of(path: Path, file: Iterable[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, row) of a .csv or .jsonl. Errors: ValueError, csv.Error."""
    if path.suffix == ".csv":
        table = csv.DictReader(file)
        yield from ((table.line_num, row) for row in table)
        return
    for number, line in enumerate(file, start=1):
        if line.strip():
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError(f"line {number} is not an object")
            yield number, row
