"""The caption of a recording: from a file beside it, a table, or its own tags.

The first of these that exists: NAME.txt; NAME.json with audiocraft's fields; a row in a
metadata.csv or metadata.jsonl (Hugging Face's AudioFolder), in its folder or one above.
"""

import csv
import functools
import io
import json
import math
import reprlib
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from recordings import audio, shards
from recordings.audio import Source
from recordings.shards import Member

# audiocraft's MusicInfo. All but the first two are merged into the text, as its
# augment_music_info_description does; those two only stand in for a missing description.
FIELDS = ("title", "artist", "genre", "moods", "instrument", "bpm", "key", "keywords")
TAGS = {  # field -> names of the tag, in ffmpeg or in the file
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
MAX_TOKENS = 512  # of T5; longer captions are cut


class Caption(NamedTuple):
    """A caption: where it is from (".txt files"), its text, and other fields ("genre: jazz")."""

    source: str
    description: str
    fields: tuple[str, ...] = ()

    @property
    def plain(self) -> str:
        return self.description or ". ".join(self.fields)


class Captions:
    """The captions of the recordings among `files`; `one` is the caption of all of them.

    The keys of `files` are names below the dataset's folder.
    """

    def __init__(
        self, files: Mapping[str, Source], *, one: str | None = None, from_tags: bool = False
    ) -> None:
        self.files = files
        self.one = one
        self.from_tags = from_tags
        self._table = functools.cache(self._table_or_error)

    def of(self, recording: str) -> Caption:
        """Return the caption of a recording, by its key in `files`.

        Raises: ValueError with a reason that other recordings can share, and a remedy.
        """
        if self.one:
            return Caption("--caption", self.one)
        if self.from_tags:
            return _from_tags(self.files[recording])
        if source := self._beside(recording, ".txt"):
            text = " ".join(_read(source).split())
            if not text:
                raise ValueError("its .txt is empty: write what is heard in it")
            return Caption(".txt files", text)
        if source := self._beside(recording, ".json"):
            return _from_json(source)
        for folder, name in self._tables(recording):
            table = self._table(folder + name)
            if isinstance(table, ValueError):
                raise ValueError(str(table))  # a new one, as tracebacks grow
            texts = table.get(_normal(recording.removeprefix(folder)), [])
            if len(set(texts)) > 1:
                raise ValueError(f"{name} has different captions for it: keep one")
            if texts and not texts[0]:
                raise ValueError(f"its caption in {name} is empty: write what is heard in it")
            if texts:
                return Caption(name, texts[0])
        raise ValueError(
            "no caption: write NAME.txt or NAME.json beside NAME.wav, or a row with file_name and "
            'text in metadata.csv or metadata.jsonl; or give --caption="..." for all, '
            "--caption_from=tags, or --no_label=1 for none"
        )

    def _beside(self, recording: str, suffix: str) -> Source | None:
        stem = recording[: recording.rindex(".")]
        names = (stem + s for s in (suffix, suffix.upper()))
        return next((self.files[name] for name in names if name in self.files), None)

    def _tables(self, recording: str) -> Iterator[tuple[str, str]]:
        """Yield folder ("album/") and name of the tables that may name it, nearest first."""
        folder = recording
        while folder:
            folder = folder[: folder.rfind("/", 0, -1) + 1]
            for name in TABLES:
                if folder + name in self.files:
                    yield folder, name

    def _table_or_error(self, name: str) -> dict[str, list[str]] | ValueError:
        try:
            return _read_table(name, self.files[name])
        except ValueError as error:
            return error


def files(recording: Source, caption: Caption) -> dict[str, bytes]:
    """Return {suffix: content} of the caption file to put beside a copy of a recording.

    Raises: OSError; ValueError.
    """
    for suffix in (".txt", ".json"):
        if caption.source == f"{suffix} files":
            return {suffix: _beside(recording, suffix).read_bytes()}
    if caption.fields:
        pairs = (field.split(": ", 1) for field in caption.fields)
        content = {"description": caption.description, **dict(pairs)}
        return {".json": json.dumps(content, ensure_ascii=False).encode() + b"\n"}
    return {".txt": f"{caption.description}\n".encode()}


def _beside(recording: Source, suffix: str) -> Source:
    stem = recording.name[: recording.name.rindex(".")]
    for name in (stem + suffix, stem + suffix.upper()):
        if isinstance(recording, Path):
            if (path := recording.with_name(name)).is_file():
                return path
        elif name in (members := _members(recording.tar)):
            return members[name]
    raise ValueError(f"its caption {stem}{suffix} no longer exists")


@functools.lru_cache(maxsize=1)  # recordings are asked for shard by shard
def _members(tar: Path) -> dict[str, Member]:
    members, _ = shards.members(tar)
    return members


def _read(source: Source) -> str:
    try:
        return _bytes(source).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"its {source.suffix} is not UTF-8 text: save it as UTF-8") from None
    except OSError as error:
        raise ValueError(f"its {source.suffix} can't be read ({error.strerror or error})") from None


def _bytes(source: Source) -> bytes:
    """Read a file. Raises: OSError."""
    if isinstance(source, Member):
        return source.read_bytes()
    if not source.is_file():
        raise OSError("it is not a plain file")
    with source.open("rb", buffering=0) as file:  # takes half the time, as captions are short
        return file.read()


def _from_json(source: Source) -> Caption:
    text = _read(source)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"its .json is not JSON ({error})") from None
    if not isinstance(content, dict):
        raise ValueError('its .json is not a JSON object like {"description": "..."}')
    try:
        caption = _caption(".json files", content)
    except ValueError as error:
        raise ValueError(f"its .json: {error}") from None
    if not caption.plain:
        names = ", ".join(("description", *FIELDS))
        raise ValueError(f"its .json is empty: it has none of {names}")
    return caption


def _from_tags(recording: Source) -> Caption:
    tags = audio.tags(recording)
    content: dict[str, Any] = {
        field: next((tags[name] for name in names if tags.get(name)), None)
        for field, names in TAGS.items()
    }
    if content["bpm"] and not _is_number(content["bpm"]):
        del content["bpm"]  # tags are often others' work, so bad ones are no error
    caption = _caption("the files' tags", content)
    if not caption.plain:
        raise ValueError(
            f"has none of the tags {', '.join(TAGS)}: tag it, or leave out --caption_from=tags"
        )
    return caption


def _caption(source: str, content: dict[str, Any]) -> Caption:
    """Build a caption from audiocraft's fields. Raises: ValueError if a value has a wrong type."""
    texts = {name: _text(name, content.get(name)) for name in ("description", *FIELDS)}
    if "," in texts["key"]:
        texts["key"] = ""  # audiocraft ignores a list of keys
    known = FIELDS[2:] if texts["description"] else FIELDS
    fields = tuple(f"{name}: {texts[name]}" for name in known if texts[name])
    return Caption(source, texts["description"], fields)


def _text(name: str, value: Any) -> str:
    """Format a field's value as audiocraft does: 90 bpm as "90.0", genres in lower case."""
    if value in (None, "", "None"):
        return ""
    if name == "bpm":
        if not _is_number(value):
            raise ValueError(f"bpm is {reprlib.repr(value)}, not a number")
        return str(float(value)) if float(value) else ""
    items = value if isinstance(value, list) else [value]
    if not all(isinstance(item, str) or _is_number(item) for item in items):
        raise ValueError(f"{name} is {reprlib.repr(value)}, not text or a list of texts")
    words = [" ".join(str(item).split()) for item in items]
    text = ", ".join(word for word in words if word not in ("", "None"))
    return text if name in ("description", "title", "artist") else text.lower()


def _is_number(value: Any) -> bool:
    try:
        return not isinstance(value, bool) and math.isfinite(float(value))
    except (TypeError, ValueError, OverflowError):
        return False


def _read_table(name: str, source: Source) -> dict[str, list[str]]:
    """Return {recording's name relative to the table: its captions}. Raises: ValueError.

    Rows of missing recordings are no error: one may have been moved out of the folder.
    """
    texts: dict[str, list[str]] = {}
    try:
        table = io.StringIO(_bytes(source).decode("utf-8-sig"), newline="")
        for number, row in _rows_of(source.suffix, table):
            column = next((name for name in TEXT_COLUMNS if name in row), None)
            if "file_name" not in row or column is None:
                raise ValueError(f"line {number} has no file_name, or no text (or caption)")
            recording, text = row["file_name"], row[column] or ""
            if not isinstance(recording, str) or not isinstance(text, str):
                raise ValueError(f"line {number}: file_name and {column} must be text")
            texts.setdefault(_normal(recording), []).append(" ".join(text.split()))
    except UnicodeDecodeError:
        raise ValueError(f"{name} is not UTF-8 text: save it as UTF-8") from None
    except (OSError, ValueError, RecursionError, csv.Error) as error:
        raise ValueError(
            f"{name} can't be read as a table of captions ({error}); it needs the columns "
            "file_name, relative to its folder, and text"
        ) from None
    return texts


def _normal(name: str) -> str:
    """Normalize a file name: ./a.wav is a.wav; macOS writes é as two characters."""
    name = PurePosixPath(name.strip().replace("\\", "/")).as_posix()
    return unicodedata.normalize("NFC", name)


def _rows_of(suffix: str, file: Iterable[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number, row) of a .csv or .jsonl. Raises: ValueError, csv.Error."""
    if suffix == ".csv":
        table = csv.DictReader(file, strict=True)
        for row in table:
            if None in row:
                raise ValueError(
                    f"line {table.line_num} has more columns than the first: put text with "
                    'commas in quotes, "like, this"'
                )
            yield table.line_num, row
        return
    for number, line in enumerate(file, start=1):
        if line.strip():
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError(f"line {number} is not a JSON object")
            yield number, row
