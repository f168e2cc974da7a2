"""A new folder that a command fills, or goes on filling after it was stopped."""

from pathlib import Path
from typing import Any

import files
from errors import UserError


def begin(out: Path, name: str, new: dict[str, Any], *, key: str, suffixes: str) -> dict[str, Any]:
    """Read the record of a folder that the same work was stopped in, or write the one of a new one.

    Args:
        name: of the record in the folder.
        new: the record of a new folder; under `key` it says what the folder is made of. It is the
            same work if that is the same.
        suffixes: of the files that go into it, as a regex; half-written ones are removed.

    Errors: UserError if the folder holds other files, or can't be written to.
    """
    files.check_writable(out, "--output_dir")
    record = files.read_json(out / name)
    half_written = files.temporaries(out, rf".+\.({suffixes})", within=True)
    if set(out.iterdir()) <= set(half_written):
        record = new
        files.write_json(out / name, record)
    elif not isinstance(record, dict) or record.get(key) != new[key]:
        raise UserError(
            f"--output_dir={out}: holds files already, and they were not made by this command with "
            "the same flags and recordings: name a new folder"
        )
    for path in half_written:
        path.unlink()
    return record
