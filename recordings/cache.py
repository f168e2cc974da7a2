"""Arrays computed once per recording and kept as .npy files in the user's cache folder."""

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

    The settings and a recording's real path, size and mtime are an array's key. When one changes,
    a new array is made, and the old one stays on disk.
    """

    def __init__(self, kind: str, settings: list[Any]) -> None:
        self.kind = kind
        self.settings = settings
        self._names: dict[tuple[str, str], str] = {}  # (root, name) of a track -> stem of its file

    def fill(
        self,
        tracks: list[Track],
        find: Callable[[Track], np.ndarray],
        *,
        rank: int = 0,
        processes: int = 1,
    ) -> None:
        """`find` the missing arrays, each process its share; the caller waits for the others.

        Raises: UserError if a recording can't be read, or the folder can't be written to.
        """
        try:
            self._names = {(track.root, track.name): self._name(track) for track in tracks}
        except OSError as error:
            raise UserError(f"{error.filename}: no longer exists ({error.strerror})") from None
        by_path = {self._path(track): track for track in tracks}  # a file linked twice counts once
        new = {path: by_path[path] for path in list(by_path)[rank::processes] if not path.exists()}
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
        """Return a recording's array, memory-mapped. Raises: OSError."""
        path = self._path(track)
        try:
            return np.lib.format.open_memmap(path, mode="r")
        except (OSError, ValueError) as error:
            raise OSError(
                f"{path}: this file of cached {self.kind} can't be read ({error}): delete it if "
                "it still exists, and start again"
            ) from None

    def _path(self, track: Track) -> Path:
        return files.cache_folder(self.kind) / f"{self._names[track.root, track.name]}.npy"

    def _name(self, track: Track) -> str:
        key = [*self.settings, str(track.path.resolve()), *track.stamp()]
        return hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]
