"""The files of prepare.py encode, checked before torch and audiocraft are imported."""

from pathlib import Path
from typing import NamedTuple

from errors import UserError
from flags.prepare import EncodeConfig
from recordings import captions, scan, token_file
from recordings.token_file import SUFFIX, Header
from recordings.track import Track


class Encoded(NamedTuple):
    """The file of tokens to make of each recording, and the headers of those made earlier."""

    made: dict[Path, Track]
    earlier: dict[Path, Header]


def check(config: EncodeConfig) -> Encoded:
    """Return what to encode into a folder that is there and locked.

    Raises: UserError that names what can't be used, or is in the way.
    """
    out = Path(config.output_dir)
    tracks = scan.scan(config.dataset_path, **config.captions)
    made = {path: track for track in tracks for path in [_path(out, track)]}
    _check_names(tracks, out)
    _check_captions(made)
    return Encoded(made, {path: there for path in made if (there := _there(path))})


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


def captions_of(path: Path, track: Track) -> dict[Path, bytes]:
    """Return the caption files to write beside the tokens in `path`."""
    if not track.written:
        return {}
    beside = captions.files(track.source, track.written)
    return {path.with_suffix(suffix): content for suffix, content in beside.items()}


def _check_captions(made: dict[Path, Track]) -> None:
    """Raise UserError if another caption is there, perhaps written by hand."""
    for path, track in made.items():
        try:
            wanted = captions_of(path, track)
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
