"""A new folder that a command fills, or continues to fill after it was stopped."""

from pathlib import Path
from typing import Any

import files
from errors import UserError


def begin(out: Path, name: str, new: dict[str, Any], *, key: str, suffixes: str) -> dict[str, Any]:
    """Start a new folder with a record, or read the record if the same work was stopped there.

    The folder is there, and locked.
    Args:
        name: the record's file name.
        new: the record of a new folder. Its entry `key` says what the folder is made from; the
            work is the same if that is equal.
        suffixes: of the files that go into the folder, as a regex; half-written ones are removed.

    Raises: UserError if the folder holds other files.
    """
    record = files.read_json(out / name)
    half_written = files.temporaries(out, rf".+\.({suffixes})", within=True)
    if set(out.iterdir()) <= {*half_written, out / files.LOCK}:
        record = new
        files.write_json(out / name, record)
    elif not isinstance(record, dict) or record.get(key) != new[key]:
        raise UserError(
            f"--output_dir={out}: holds files already that this command did not make with the "
            "same flags and recordings: name a new folder"
        )
    for path in half_written:
        path.unlink()
    return record
