"""Check a dataset before training: show what training would see, and what is wrong with it."""

import hashlib
import math
import os
import re
import shutil
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from huggingface_hub import try_to_load_from_cache
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from tqdm import tqdm

import files
from errors import Problem, UserError, by_reason, count, first_lines
from flags.prepare import CheckConfig
from recordings import audio, captions, scan, shards
from recordings.captions import MAX_TOKENS
from recordings.track import Track
from training.report import format_seconds

BLOCK_SEC = 30
SILENT_DB, CLIPPED = -60.0, 0.999  # of full scale: peaks below are silent, from here on clipped
QUIET_DB = -40.0
NOT_READ = re.compile(r"\.(ac3|amr|ape|au|caf|dsf|m4b|mid|mov|mp2|oga|tta|wv)$", re.I)
MAKER = {"Software": "MusicGen Trainer"}  # stored in the picture, to recognise our own


class Sound(NamedTuple):
    """The sound of a recording: its level, and the shares of it that clip or are silent."""

    level_db: float  # RMS, of full scale
    clipped: float
    silent: float
    digest: str  # hash of the decoded samples, to find copies


class _Duplicate(NamedTuple):
    """A recording that sounds exactly like an earlier one."""

    name: str
    original: str


def check(config: CheckConfig) -> bool:
    """Print what training would see; return whether it would start.

    Raises: UserError if there is nothing to check, or --fix or --picture can't be written.
    """
    if not config.fix:
        return _check(config, None)
    target = Path(config.fix)
    files.check_outside(target, config.dataset_path, "--fix")
    with files.locked_folder(target, "--fix"):
        if set(target.iterdir()) - {target / files.LOCK}:
            raise UserError(f"--fix={target}: holds files already; name a new folder")
        return _check(config, target)


def _check(config: CheckConfig, target: Path | None) -> bool:
    _check_picture(Path(config.picture))
    found, problems = scan.find(config.dataset_path, **config.captions)
    encoded = [track for track in found if track.codec]
    tracks, sounds = [], dict[str, Sound]()
    recordings = [track for track in found if not track.codec]
    for track, result in zip(recordings, _listen_to_all(recordings), strict=True):
        if isinstance(result, str):
            problems.append(Problem(track.name, result))
        else:
            tracks.append(track)
            sounds[track.name] = result

    duplicates = _duplicates(tracks, sounds)
    silent = [track.name for track in tracks if sounds[track.name].silent == 1]
    tracks += encoded
    unit, lengths = _caption_lengths([track.caption for track in tracks])
    print("\n".join(_facts(config, tracks, unit, lengths)))
    if encoded:
        print(f"tokens     {count(len(encoded), 'file')} of tokens among them, not listened to")
    if problems:
        lines = by_reason(problems, all_names=True)
        print(f"\n{len(problems)} can't be trained on:\n{first_lines(lines, limit=len(lines))}")
    copies = [f"{copy.name}: as {copy.original}" for copy in duplicates]
    _print_list("silent from start to end", silent, limit=len(silent))
    _print_list("identical to another", copies, limit=len(copies))
    for what, names in _warnings(config, tracks, sounds, unit, lengths).items():
        _print_list(what, names, limit=20)
    if tracks:
        draw(tracks, list(sounds.values()), unit, lengths, Path(config.picture))
        print(f"\npicture    {config.picture}")
    if target:
        left_out = {*silent, *(duplicate.name for duplicate in duplicates)}
        usable = [track for track in tracks if track.name not in left_out]
        _copy(usable, target, shards.is_shards(config.dataset_path))
        print(f"fixed      {count(len(usable), 'recording')} copied to {target}")
    would_start = bool(tracks) and not problems
    print("\n" + _verdict(would_start, is_fixed=target is not None))
    return would_start


def _warnings(
    config: CheckConfig,
    tracks: list[Track],
    sounds: dict[str, Sound],
    unit: str,
    lengths: list[int],
) -> dict[str, list[str]]:
    """Return what may be wrong with recordings that can be trained on, and which ones it is."""
    return {
        "in a format that can't be read; convert it, perhaps to flac": _not_read(
            Path(config.dataset_path)
        ),
        "with less than 1 s missing at the end, used as is": [
            track.name for track in tracks if track.ends_early
        ],
        "clipping (distorted at full scale) for more than a tenth of its length": [
            f"{name}: {sound.clipped:.0%}" for name, sound in sounds.items() if sound.clipped > 0.1
        ],
        f"quieter than {QUIET_DB:g} dB": [
            f"{name}: {sound.level_db:.0f} dB"
            for name, sound in sounds.items()
            if sound.level_db < QUIET_DB and sound.silent < 1
        ],
        "silent for more than a third of its length": [
            f"{name}: {sound.silent:.0%}"
            for name, sound in sounds.items()
            if 1 / 3 < sound.silent < 1
        ],
        "with the caption of another recording": [] if config.caption else _shared_captions(tracks),
        f"with a caption of more than {MAX_TOKENS} {unit}; training reads the first "
        f"{MAX_TOKENS} tokens": [
            f"{track.name}: {length}"
            for track, length in zip(tracks, lengths, strict=True)
            if length > MAX_TOKENS
        ],
    }


def _print_list(what: str, names: list[str], limit: int) -> None:
    if names:
        print(f"\n{count(len(names), 'recording')} {what}:\n{first_lines(names, limit)}")


def _verdict(would_start: bool, *, is_fixed: bool) -> str:
    if would_start:
        return "Training would start."
    if is_fixed:
        return "Training would not start here: train on the folder of --fix instead."
    remedy = "fix these files, or move them out, or let --fix=NEW_FOLDER copy what is usable"
    return f"Training would not start: {remedy}."


def _listen_to_all(tracks: list[Track]) -> Iterator[Sound | str]:
    """Yield what each recording sounds like, or why it can't be read. Raises: UserError."""
    with ProcessPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        results = pool.map(_listen_or_say, tracks)
        for track in tqdm(tracks, unit="file", desc="listening", disable=not tracks):
            try:
                yield next(results)
            except BrokenProcessPool:
                raise UserError(
                    f"{track.place}: this file, or one soon after it, ended the process that "
                    "listened to it (memory full, or a crash of its decoder): move it out"
                ) from None


def _listen_or_say(track: Track) -> Sound | str:
    """Return what a recording sounds like, or why it can't be read."""
    try:
        return listen(track)
    except ValueError as error:
        return str(error)


def listen(track: Track) -> Sound:
    """Decode a whole recording, in blocks. Raises: ValueError if it can't be read."""
    digest = hashlib.blake2b(digest_size=16)
    energy, samples, clipped, silent, seconds = 0.0, 0, 0, 0, 0
    for block in _blocks(track):  # [C, samples]
        digest.update(block.tobytes())
        energy += float(np.square(block, dtype=np.float64).sum())
        samples += block.size
        for second in np.array_split(block, max(1, block.shape[1] // track.sample_rate), axis=1):
            peak = float(np.abs(second).max())
            clipped += bool((np.abs(second) >= CLIPPED).sum() > 2)
            silent += _db(peak) < SILENT_DB
            seconds += 1
    level = _db(math.sqrt(energy / samples))
    return Sound(level, clipped / seconds, silent / seconds, digest.hexdigest())


def _blocks(track: Track) -> Iterator[np.ndarray]:
    for start in range(0, track.frames, BLOCK_SEC * track.sample_rate):
        frames = min(BLOCK_SEC * track.sample_rate, track.frames - start)
        yield audio.read_crop(track.source, start, frames, track.sample_rate, channels=2)


def _db(amplitude: float) -> float:
    return 20 * math.log10(max(amplitude, 1e-10))


def _not_read(root: Path) -> list[str]:
    """List the recordings in a folder whose formats can't be read."""
    return sorted(
        path.relative_to(root).as_posix() for path in root.rglob("*") if NOT_READ.search(path.name)
    )


def _duplicates(tracks: list[Track], sounds: dict[str, Sound]) -> list[_Duplicate]:
    first: dict[str, str] = {}
    duplicates = []
    for track in tracks:
        original = first.setdefault(sounds[track.name].digest, track.name)
        if original != track.name:
            duplicates.append(_Duplicate(track.name, original))
    return duplicates


def _shared_captions(tracks: list[Track]) -> list[str]:
    names = defaultdict(list)
    for track in tracks:
        names[track.caption].append(track.name)
    shared = {caption: who for caption, who in names.items() if caption and len(who) > 1}
    return [f"{name}: {caption}" for caption, who in shared.items() for name in who[1:]]


def _caption_lengths(texts: list[str]) -> tuple[str, list[int]]:
    """Return the unit that captions are measured in, and the length of each.

    Every MusicGen reads T5's tokens, but the tokenizer comes with the first model downloaded.
    Without it, words are counted: each is at least one token, so too many are too many tokens.
    """
    names = ("tokenizer.json", "spiece.model")  # without either, transformers invents a tokenizer
    if not any(isinstance(try_to_load_from_cache("t5-base", name), str) for name in names):
        return "words (counted in T5's tokens once a model is downloaded)", [
            len(c.split()) for c in texts
        ]
    from transformers import T5Tokenizer

    tokenizer = T5Tokenizer.from_pretrained("t5-base", local_files_only=True)
    return "tokens", [len(tokenizer(c, verbose=False)["input_ids"]) for c in texts]


def _facts(config: CheckConfig, tracks: list[Track], unit: str, lengths: list[int]) -> list[str]:
    if not tracks:
        return ["data       nothing that can be trained on"]
    seconds = [track.duration_sec for track in tracks]
    total, middle = format_seconds(sum(seconds)), format_seconds(float(np.median(seconds)))
    short = sum(length < config.duration for length in seconds)
    steps = -(-len(tracks) // (config.batch_size * config.grad_acc))
    return [
        f"data       {count(len(tracks), 'recording')}, {total} in all",
        f"length     {format_seconds(min(seconds))} to {format_seconds(max(seconds))}, median "
        f"{middle}; {short} shorter than {config.duration:g} s, to be padded",
        f"rate       {_counted(f'{track.sample_rate} Hz' for track in tracks)}",
        "captions   none, as no_label=1"
        if config.no_label
        else f"captions   {min(lengths)} to {max(lengths)} {unit}, median {np.median(lengths):g}; "
        f"{len({track.caption for track in tracks})} different",
        f"steps      {steps} an epoch at --batch_size={config.batch_size} "
        f"--grad_acc={config.grad_acc}",
    ]


def _counted(values: Iterable[str]) -> str:
    return ", ".join(f"{value} ({count})" for value, count in Counter(values).most_common())


def draw(
    tracks: list[Track], sounds: list[Sound], unit: str, lengths: list[int], path: Path
) -> None:
    """Draw histograms of lengths, levels and caption lengths, as a png."""
    figure = Figure(figsize=(10, 3.2), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    left.hist([track.duration_sec for track in tracks], bins=30)
    left.set_xlabel("length (s)")
    levels = [max(sound.level_db, -80) for sound in sounds]
    middle.hist(levels, bins=list(range(-80, 1, 2)), color="tab:green")
    middle.set_xlabel("level (dB of full scale, RMS)")
    right.hist(lengths, bins=30, color="tab:orange")
    right.set_xlabel(f"{unit.split()[0]} in the caption")
    for axes in (left, middle, right):
        axes.set_ylabel("recordings")
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
    files.write(path, lambda file: figure.savefig(file, format="png", metadata=MAKER))


def _check_picture(path: Path) -> None:
    """Raise UserError if a file that is not our own picture has this name."""
    from PIL import Image, UnidentifiedImageError

    if not path.exists():
        return files.check_writable(path.resolve().parent, "--picture")
    try:
        with Image.open(path) as picture:
            ours = picture.info.get("Software") == MAKER["Software"]
    except (OSError, UnidentifiedImageError):
        ours = False
    if not ours:
        raise UserError(f"--picture={path}: another file has this name; give another")
    return None


def _copy(tracks: list[Track], target: Path, are_shards: bool) -> None:
    """Copy recordings and captions, in the same folders or in a folder for each shard.

    Raises: UserError.
    """
    numbers: dict[Path, int] = {}  # of shards, whose own paths could lead anywhere
    for track in tracks:
        to = target / track.name
        if track.member and are_shards:
            number = numbers.setdefault(track.path, len(numbers))
            to = target / f"shard_{number:06d}" / track.member.name
        try:
            to.parent.mkdir(parents=True, exist_ok=True)
            with track.member.open() if track.member else track.path.open("rb") as source:
                files.write(to, partial(shutil.copyfileobj, source))
            if track.written:
                for suffix, content in captions.files(track.source, track.written).items():
                    files.write_bytes(to.with_suffix(suffix), content)
        except (OSError, ValueError) as error:
            raise UserError(f"{track.place}: can't be copied to {to} ({error})") from None
