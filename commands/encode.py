"""Encode recordings into files of tokens: `python prepare.py encode my_music my_tokens`.

Training on these equals training with --cache_tokens=1, but does not need the recordings.

Letters: K codebooks, T token frames.
"""

import json
from functools import partial
from pathlib import Path

from tqdm import tqdm

import files
from errors import UserError, first_lines
from flags.prepare import EncodeConfig
from musicgen import codec, load
from musicgen.codec import codec_hash
from musicgen.device import choose_device
from musicgen.hub import portable_id
from recordings import captions, scan, token_file
from recordings.token_file import SUFFIX, Facts, Header
from recordings.track import Track
from training.report import format_seconds


def encode(config: EncodeConfig) -> bool:
    """Encode what is not encoded yet; return True.

    Raises: UserError that names what can't be used, or a file in the way.
    """
    out = Path(config.output_dir)
    files.check_outside(out, config.dataset_path, "--output_dir")
    tracks = scan.scan(config.dataset_path, **config.captions)
    made = {path: track for track in tracks for path in [_path(out, track)]}
    _check_names(tracks, out)
    _check_captions(made)
    earlier = {path: there for path in made if (there := _there(path))}

    model = load.load_codec(config.model_id, choose_device(config.device))
    digest, model_id = codec_hash(model), portable_id(config.model_id)
    name = token_file.codec_name(digest, model.lm.num_codebooks)
    for path, there in earlier.items():
        if there.codec != name:
            raise UserError(
                f"{path}: holds tokens of {there.facts.model_id}, whose EnCodec differs from that "
                f"of --model_id={config.model_id}: name a new folder"
            )
    files.check_writable(out, "--output_dir")
    for path in files.temporaries(out, r".+\.(safetensors|txt|json)", within=True):
        path.unlink()

    new, replaced = 0, list[str]()
    for path, track in tqdm(made.items(), unit="file", desc="encoding"):
        try:
            facts = Facts(
                digest,
                model_id,
                round(model.frame_rate),
                track.sample_rate,
                track.frames,
                json.dumps(track.stamp()),
            )
            path.parent.mkdir(parents=True, exist_ok=True)
            for beside, content in _captions_of(path, track).items():
                if not beside.exists():
                    files.write_bytes(beside, content)
            if path in earlier and earlier[path].facts._replace(model_id=model_id) == facts:
                continue  # several models may share one EnCodec
            codes = codec.encode_track(model, track, config.batch_size)
            files.write(path, partial(token_file.write, codes=codes, facts=facts))
            new += 1
            if path in earlier:
                replaced.append(path.relative_to(out).as_posix())
        except (ValueError, OSError) as error:
            raise UserError(f"{track.place}: {error}") from None

    seconds = sum(track.duration_sec for track in tracks)
    print(f"recordings {len(tracks)}, {format_seconds(seconds)} in all")
    print(f"tokens     {new} encoded now, {len(tracks) - new} were there, in {out}")
    if replaced:
        print(
            f"\n{len(replaced)} of them in place of others, whose recordings have changed or were "
            f"another folder's:\n{first_lines(replaced)}"
        )
    others = [
        path.relative_to(out).as_posix() for path in out.rglob(f"*{SUFFIX}") if path not in made
    ]
    if others:
        print(
            f"\n{len(others)} files of tokens in {out} belong to no recording in "
            f"{config.dataset_path}, but will be trained on:\n{first_lines(sorted(others))}"
        )
    return True


def _path(out: Path, track: Track) -> Path:
    return (out / track.key).with_suffix(SUFFIX)


def _check_names(tracks: list[Track], out: Path) -> None:
    """Raise UserError if two recordings would get the same file, or one is tokens already."""
    first: dict[Path, Track] = {}
    for track in tracks:
        if track.codec:
            raise UserError(f"{track.place}: is a file of tokens already")
        other = first.setdefault(_path(out, track), track)
        if other is not track:  # in two shards
            raise UserError(
                f"{other.place} and {track.place}: have the same name; encode them into two folders"
            )


def _captions_of(path: Path, track: Track) -> dict[Path, bytes]:
    """Return the caption files to write beside the tokens in `path`."""
    if not track.written:
        return {}
    beside = captions.files(track.source, track.written)
    return {path.with_suffix(suffix): content for suffix, content in beside.items()}


def _check_captions(made: dict[Path, Track]) -> None:
    """Raise UserError if another caption is there, perhaps written by hand."""
    for path, track in made.items():
        try:
            wanted = _captions_of(path, track)
            for there in map(path.with_suffix, (".txt", ".json")):
                if there.exists() and wanted and there.read_bytes() != wanted.get(there):
                    raise UserError(
                        f"{there}: differs from the caption of {track.place}: delete it if that "
                        "caption has changed, or name a new folder"
                    )
        except (ValueError, OSError) as error:
            raise UserError(f"{track.place}: {error}") from None


def _there(path: Path) -> Header | None:
    """Read the header of tokens that exist already. Raises: UserError if they are unusable."""
    try:
        if not path.exists():
            return None
        return token_file.read_header(path)
    except (ValueError, OSError) as error:
        raise UserError(f"{path}: {error}; move it away, the tokens belong there") from None
