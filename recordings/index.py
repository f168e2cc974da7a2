"""An index of the recordings checked so far, so that the next start opens only new ones."""

import contextlib
import hashlib
import os
import re
import time
from collections.abc import Iterable

import av
import soundfile as sf

import files
from errors import UserError
from recordings import audio
from recordings.audio import Source
from recordings.facts import Facts
from recordings.shards import Member

# Increase the 2 when audio.check's results change; another library version may change them too.
VERSION = f"2, libsndfile {sf.__libsndfile_version__}, PyAV {av.__version__}"
ROW = re.compile(r"\d+ \d+ \d+ [01] \d+ -?\d+( \d+ \d+)?")
JUST_NOW_SEC = 2  # step of mtime on some file systems, within which a second change goes unseen


class Index:
    """The findings of `audio.check` in one dataset's recordings, in the user's cache folder.

    A row holds the facts, size and mtime in ns of the file on disk and, in a shard, offset and
    size. Rows are strings, which take a third of the memory.
    """

    def __init__(self, dataset_path: str) -> None:
        name = hashlib.sha256(os.fsencode(os.path.realpath(dataset_path))).hexdigest()[:32]
        self.path = files.cache_folder("index") / f"{name}.json"
        self.rows: dict[str, str] = {}
        self.has_changed = False
        with contextlib.suppress(LookupError, TypeError, AttributeError):  # another format
            content = files.read_json(self.path)
            if content["version"] == VERSION and all(map(ROW.fullmatch, content["rows"].values())):
                self.rows = content["rows"]

    def check(self, name: str, source: Source) -> Facts:
        """Return what `audio.check` returns, calling it only for new or changed recordings."""
        status = (source.tar if isinstance(source, Member) else source).stat()
        state = f"{status.st_size} {status.st_mtime_ns}"
        if isinstance(source, Member):
            state += f" {source.offset} {source.size}"
        if name in self.rows:
            rate, channels, frames, ends_early, known_state = self.rows[name].split(" ", 4)
            if known_state == state:
                return Facts(int(rate), int(channels), int(frames), ends_early == "1")
            del self.rows[name]
            self.has_changed = True
        facts = audio.check(source)
        if status.st_mtime < time.time() - JUST_NOW_SEC:
            self.rows[name] = " ".join(map(str, map(int, facts))) + f" {state}"
            self.has_changed = True
        return facts

    def save(self, names: Iterable[str]) -> None:
        """Write the rows of the recordings `names`, dropping others.

        They only save time, so a cache folder that can't be written to is no reason to stop.
        Several processes may save at once: they write the same content.
        """
        rows = {name: self.rows[name] for name in names if name in self.rows}
        if self.has_changed or len(rows) < len(self.rows):
            with contextlib.suppress(OSError, UserError):
                self.path.parent.mkdir(parents=True, exist_ok=True)
                files.write_json(self.path, {"version": VERSION, "rows": rows}, indent=None)
