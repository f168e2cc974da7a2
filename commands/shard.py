"""Put a dataset into WebDataset shards: `python prepare.py shard my_music my_shards`.

Shards are plain tars of recordings or files of tokens, with their captions, in the folder's order.
Training reads anywhere in them and sees what it would see in the folder; programs that read in
sequence do their own shuffling.
"""

import hashlib
import io
import json
import tarfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from tqdm import tqdm

import files
from commands.folder import begin
from errors import UserError, count
from flags.prepare import ShardConfig
from recordings import captions, scan, shards
from recordings.audio import Source
from recordings.track import Track

RECORD = ".shards.json"  # in the new folder: a hash of the shards' content, and their name
MB = 10**6

Part = dict[str, tuple[Track, dict[str, bytes]]]  # one shard's content: key -> recording, captions


def shard(config: ShardConfig) -> bool:
    """Write the shards that are not there yet; return True.

    Raises: UserError that names what can't be used, or a file in the way.
    """
    out = Path(config.output_dir)
    files.check_outside(out, config.dataset_path, "--output_dir")
    tracks = scan.scan(config.dataset_path, **config.captions)
    plan = _plan(tracks, config.shard_mb * MB)
    with files.locked_folder(out, "--output_dir"):
        _write_all(config, out, plan)
    return True


def _write_all(config: ShardConfig, out: Path, plan: list[Part]) -> None:
    name = _start(out, plan)
    made = {out / f"{name}-{i:06d}.tar": part for i, part in enumerate(plan)}
    new = {path: part for path, part in made.items() if not _is_whole(path, part)}
    for path, part in tqdm(new.items(), unit="shard", desc="writing"):
        files.write(path, partial(_write, part=part))
    recordings = sum(map(len, plan))
    print(f"recordings {recordings}, in {count(len(plan), 'shard')} of up to {config.shard_mb} MB")
    print(f"shards     {len(new)} written now, {len(plan) - len(new)} were there, in {out}")


def _plan(tracks: list[Track], size: int) -> list[Part]:
    """Return what goes into each shard of `size` bytes, or of one recording. Raises: UserError."""
    plan, first, room = list[Part](), dict[str, Track](), 0
    for track in tracks:
        key = _key(track)
        other = first.setdefault(key, track)
        if other is not track:
            raise UserError(
                f"{other.place} and {track.place}: would both be {key} in the shards, where a name "
                "ends at its first dot: rename one"
            )
        try:
            beside = captions.files(track.source, track.written) if track.written else {}
        except (ValueError, OSError) as error:
            raise UserError(f"{track.place}: {error}") from None
        sizes = [_size(track), *map(len, beside.values())]
        needs = sum(512 + length + -length % 512 for length in sizes)
        if needs > room or not plan:
            plan.append({})
            room = size
        plan[-1][key] = track, beside
        room -= needs
    return plan


def _key(track: Track) -> str:
    """Return a recording's name in a shard, without suffix and characters we refuse in tars."""
    path = PurePosixPath(track.key)
    name = path.with_name(path.stem.replace(".", "_")).as_posix()
    return "".join("_" if c in "\\:" or shards.is_control(c) else c for c in name)


def _size(track: Track) -> int:
    return track.member.size if track.member else track.path.stat().st_size


def _start(out: Path, plan: list[Part]) -> str:
    """Start or continue a folder of shards; return their name. Raises: UserError.

    A folder is continued if it was started for the same plan.
    """
    digest = hashlib.sha256()
    for part in plan:
        facts = [
            (key, track.source.suffix, track.stamp(), {k: v.hex() for k, v in beside.items()})
            for key, (track, beside) in part.items()
        ]
        digest.update(json.dumps(facts).encode())
    new = {"plan": digest.hexdigest(), "name": out.resolve().name.lstrip(".") or "shard"}
    return str(begin(out, RECORD, new, key="plan", suffixes="tar|json")["name"])


def _files(part: Part) -> Iterator[tuple[str, int, Source | bytes]]:
    """Yield (name, size, content) of a shard's members."""
    for key, (track, beside) in part.items():
        yield key + track.source.suffix, _size(track), track.source
        for suffix, content in beside.items():
            yield key + suffix, len(content), content


def _is_whole(path: Path, part: Part) -> bool:
    if not path.exists():
        return False
    members, problems = shards.members(path)
    there = {name: member.size for name, member in members.items()}
    return not problems and there == {name: size for name, size, _ in _files(part)}


def _write(file: BinaryIO, part: Part) -> None:
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, size, content in _files(part):
            info = tarfile.TarInfo(name)  # no owner, dated 1970: the same in every run
            info.size = size
            if isinstance(content, bytes):
                tar.addfile(info, io.BytesIO(content))
                continue
            with content.open("rb") if isinstance(content, Path) else content.open() as source:
                tar.addfile(info, source)
