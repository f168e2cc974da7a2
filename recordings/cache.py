"""What is computed once for each recording and kept in the user's cache folder, an .npy each."""

import functools
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

import files
from errors import UserError
from recordings.track import Track


class Cache:
    """Arrays of one kind, such as "melodies", made with `settings`; on disk once filled.

    A recording is known by its real path, size and time of change: a file that has changed since,
    or other settings, are another key, and what was kept for the old one stays as it is.
    """

    def __init__(self, kind: str, settings: list[Any]) -> None:
        self.kind = kind
        self.settings = settings
        self._names: dict[tuple[str, str], str] = {}  # of recordings -> of what is kept of them

    def fill(
        self,
        tracks: list[Track],
        find: Callable[[Track], np.ndarray],
        *,
        rank: int = 0,
        processes: int = 1,
    ) -> None:
        """`find` what is not there yet; each process its share, the caller waits for the others.

        Errors: UserError if a recording can't be read, or the folder not be written to.
        """
        try:
            self._names = {(track.root, track.name): self._name(track) for track in tracks}
        except OSError as error:
            raise UserError(f"{error.filename}: is no longer there ({error.strerror})") from None
        mine = {self._path(track): track for track in tracks}  # a file linked twice is one
        new = {path: mine[path] for path in list(mine)[rank::processes] if not path.exists()}
        if new:
            files.check_writable(files.cache_folder(self.kind), "XDG_CACHE_HOME")
        bar = tqdm(new.items(), desc=self.kind, unit="file", disable=rank > 0 or not new)
        for path, track in bar:
            try:
                array = find(track)
            except ValueError as error:
                raise UserError(f"{track.place}: {error}") from None
            files.write(path, functools.partial(np.save, arr=array))

    def __call__(self, track: Track) -> np.ndarray:
        """What is kept of a recording, read where it is looked at. Errors: OSError."""
        path = self._path(track)
        try:
            return np.lib.format.open_memmap(path, mode="r")
        except (OSError, ValueError) as error:
            raise OSError(
                f"{path}, one of the {self.kind} kept of recordings, can't be read ({error}): "
                "delete it if it is still there, and start again"
            ) from None

    def _path(self, track: Track) -> Path:
        return files.cache_folder(self.kind) / f"{self._names[track.root, track.name]}.npy"

    def _name(self, track: Track) -> str:
        key = [*self.settings, str(track.path.resolve()), *track.stamp()]
        return hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]
