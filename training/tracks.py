"""The tracks of a run, and what else is checked before torch and audiocraft are imported."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import files
from errors import UserError
from flags.run import Config
from recordings import scan
from recordings.track import Track, stable_hash
from recordings.wording import in_front
from training import output
from training.launch import check_launch, process_count

Tracks = tuple[list[Track], list[Track]]  # training, held out


def first_checks(config: Config) -> Tracks | None:
    """Return the dataset's tracks; check the launch and the output folder too.

    Returns None if several processes train: one that ended here would leave the others waiting,
    so they do this once they can tell each other.
    Raises: UserError for what the user can fix; Finished if --resume=auto finds nothing to do.
    """
    check_launch()
    if process_count() > 1:
        return None
    tracks = scan_dataset(config)
    folder = Path(config.output_dir)
    with files.locked_folder(folder, "--output_dir"):  # train() locks it, and looks again
        output.check_output(folder, resume=config.resume, overwrite=config.overwrite)
    return tracks


def scan_dataset(config: Config) -> Tracks:
    """Return the training and held-out tracks. Raises: UserError naming unusable files."""
    tracks = _scan(config, config.dataset_path)
    held_out: list[Track] = []
    if config.valid_path:
        held_out = _scan(config, config.valid_path)
    elif config.valid_split:
        tracks, held_out = split(tracks, config.valid_split, config.seed)
    kinds = {bool(track.codec): track for track in tracks + held_out}
    if len(kinds) > 1:
        raise UserError(
            f"{kinds[True].place} is a file of tokens, {kinds[False].place} is audio: give one "
            "kind only, also for held-out recordings; prepare.py encode turns audio into tokens"
        )
    return tracks, held_out


def _scan(config: Config, folder: str) -> list[Track]:
    tracks = scan.scan(folder, **config.captions)
    if config.no_label or not (config.trigger or config.placeholder):
        return tracks
    words_in_front = in_front_of(config)
    return [replace(track, caption=words_in_front(track.caption)) for track in tracks]


def in_front_of(config: Config) -> Callable[[str], str]:
    """Return a function that puts --trigger and --placeholder in front of a caption."""
    return partial(in_front, config.trigger, config.placeholder)


def split(tracks: list[Track], share: float, seed: int) -> Tracks:
    """Return (training, held out) tracks: `share` of them, at least one, is held out by seed."""
    count = max(1, round(len(tracks) * share))
    if count >= len(tracks):
        raise UserError(
            f"--valid_split={share} of {len(tracks)} files leaves none to train on: "
            "add files or lower it"
        )
    ranked = sorted(tracks, key=lambda track: stable_hash(f"{seed} {track.key}"))
    held_out = {track.name for track in ranked[:count]}
    return (
        [track for track in tracks if track.name not in held_out],
        [track for track in tracks if track.name in held_out],
    )
