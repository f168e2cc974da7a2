"""A dataset's folder or shards -> checked tracks."""

import contextlib
import gc
import os
import posixpath
from collections.abc import Iterator, Mapping
from pathlib import Path

from errors import Problem, UserError, by_reason, count, first_lines
from recordings import audio, shards, token_file
from recordings.audio import SUFFIXES, Source
from recordings.captions import Caption, Captions
from recordings.facts import Facts
from recordings.index import Index
from recordings.shards import Member
from recordings.track import Track, as_wav


def scan(
    folder: str,
    *,
    with_captions: bool = True,
    caption: str | None = None,
    from_tags: bool = False,
) -> list[Track]:
    """Find and check the recordings of a dataset; decode only those that may hold NaN.

    Recordings that an earlier scan has checked are not opened again; see index.py.
    `caption` is for all, `from_tags` takes the files' own tags; else see captions.py.
    Raises: UserError that says what can't be used, and why.
    """
    tracks, problems = find(
        folder,
        with_captions=with_captions,
        caption=caption,
        from_tags=from_tags,
        index=Index(folder),
    )
    if problems:
        every = " (prepare.py check names them all)" if len(problems) > 3 else ""
        raise UserError(
            f"{folder}: {len(problems)} of {count(len(tracks) + len(problems), 'recording')} can't "
            f"be trained on; fix them or move them out of the folder{every}:\n"
            + first_lines(by_reason(problems))
        )
    return tracks


@contextlib.contextmanager
def _without_gc() -> Iterator[None]:
    """Turn off garbage collection, which takes long while many objects are made."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@_without_gc()
def find(
    folder: str,
    *,
    with_captions: bool = True,
    caption: str | None = None,
    from_tags: bool = False,
    index: Index | None = None,
) -> tuple[list[Track], list[Problem]]:
    """Return the usable recordings, and a problem for each unusable one.

    All are opened, except those that `index` knows.
    Raises: UserError if there are none of either kind.
    """
    files, problems = _files(folder)
    names = sorted(
        (name for name in files if _is_recording(name)),
        # The same order for wav and flac twins; a folder's recordings stay together.
        key=lambda name: (as_wav(name).replace("/", "\0"), name),
    )
    if not names and not problems:
        raise UserError(
            f"{folder}: no recordings in this folder ({' '.join(SUFFIXES)}); put each there as "
            "NAME.wav beside its caption NAME.txt"
        )
    captions = Captions(files, one=caption, from_tags=from_tags)
    tracks, seen = [], dict[str, str]()
    for name in names:
        try:
            _check_name(name)
            twin = seen.setdefault(name[: name.rindex(".")], name)
            if twin != name:  # mostly one recording twice, which would count twice
                raise ValueError(f"has the same name as {twin}, and so the same caption: keep one")
            written = captions.of(name) if with_captions else None
            _check_text(written)
            source = files[name]
            facts, codec = _check(name, source, index)
        except (OSError, ValueError) as error:  # ours, and soundfile's
            reason = error.strerror if isinstance(error, OSError) else None  # without the path
            problems.append(Problem(name, reason or str(error)))
        else:
            text = written.plain if written else ""
            member = source if isinstance(source, Member) else None
            rate, _, frames, ends_early = facts
            tracks.append(
                Track(folder, name, member, text, rate, frames, written, codec, ends_early)
            )
    if index:
        index.save(names)
    return tracks, problems


def _check(name: str, source: Source, index: Index | None) -> tuple[Facts, str | None]:
    """Return the facts, and the codec of a file of tokens. Raises: ValueError."""
    if source.suffix.lower() == token_file.SUFFIX:
        header = token_file.read_header(source)
        return Facts(header.facts.sample_rate, 1, header.facts.frames), header.codec
    return (index.check(name, source) if index else audio.check(source)), None


class _Files(Mapping[str, Source]):
    """All files of a dataset by name: on disk below `root`, or in its shards."""

    def __init__(self, root: str) -> None:
        self.root = root
        self.names: set[str] = set()  # on disk
        self.members: dict[str, Member] = {}

    def __getitem__(self, name: str) -> Source:
        if name in self.names:
            return Path(self.root, name)
        return self.members[name]

    def __contains__(self, name: object) -> bool:
        return name in self.names or name in self.members

    def __iter__(self) -> Iterator[str]:
        yield from self.names
        yield from self.members

    def __len__(self) -> int:
        return len(self.names) + len(self.members)


def _files(dataset_path: str) -> tuple[_Files, list[Problem]]:
    """Return the files of a folder or of shards, and what is wrong with a shard."""
    files, problems = _Files(dataset_path), list[Problem]()
    if shards.is_shards(dataset_path):
        tars = shards.find(dataset_path)
    else:
        files.names.update(_walk(Path(dataset_path)))
        tars = {n: Path(dataset_path, n) for n in files.names if _is_tar(n)}
    for name, tar in sorted(tars.items()):
        members, wrong = shards.members(tar)
        files.members.update((f"{name}/{member.name}", member) for member in members.values())
        again = f"; delete {tar} to have it downloaded again" if "://" in name else ""
        problems += [
            Problem(f"{name}/{member}" if member else name, reason + again)
            for member, reason in wrong
        ]
    return files, problems


def _is_recording(name: str) -> bool:
    is_one = name.lower().endswith((*SUFFIXES, token_file.SUFFIX))
    return is_one and not posixpath.basename(name).startswith(".")


def _is_tar(name: str) -> bool:
    return name.lower().endswith(".tar") and not posixpath.basename(name).startswith(".")


def _walk(root: Path) -> Iterator[str]:
    """Yield the names of all files below a folder, following links, each folder once."""
    seen = set()
    for folder, folders, names in os.walk(root, onerror=_refuse, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders.sort()  # a folder that is also linked gets the same name on each machine
        below = Path(folder).relative_to(root).as_posix()
        prefix = "" if below == "." else f"{below}/"
        yield from (prefix + name for name in names)


def _refuse(error: OSError) -> None:
    raise UserError(
        f"{error.filename}: can't be opened ({error.strerror}): make it readable, or move it out"
    )


def _check_text(caption: Caption | None) -> None:
    try:
        " ".join([caption.description, *caption.fields] if caption else []).encode()
    except UnicodeEncodeError:
        raise ValueError("its caption contains half a character (a lone surrogate)") from None


def _check_name(name: str) -> None:
    try:
        name.encode()
    except UnicodeEncodeError:
        raise ValueError("its name is not UTF-8: rename it") from None
