"""Prepare a dataset for training: check it, clean it, encode it, put it into shards."""

import difflib
import sys
from pathlib import Path

import files
from commands import encode_files
from errors import UserError, plain_errors
from flags.parse import parse
from flags.prepare import CheckConfig, CleanConfig, EncodeConfig, ShardConfig

USAGE = """usage: python prepare.py check FOLDER [--flag=value ...]
       python prepare.py clean FOLDER OUT [--flag=value ...]
       python prepare.py encode FOLDER OUT [--flag=value ...]
       python prepare.py shard FOLDER OUT [--flag=value ...]

  check    show what training would see, and what is wrong with it
  clean    remove vocals, cut at silences, make equally loud: into a new folder
  encode   into files of tokens, for training without the recordings
  shard    into WebDataset shards (plain tars) of recordings or of files of tokens

`python prepare.py check --help` lists the flags of check, and so on."""


def main() -> None:
    with plain_errors("Close other programs: this needs little memory itself."):
        commands = {"check": _check, "clean": _clean, "encode": _encode, "shard": _shard}
        command = commands.get("".join(sys.argv[1:2]))
        if command is None:
            given = sys.argv[1:2]
            if given and not given[0].startswith("-"):
                close = difflib.get_close_matches(given[0], commands, n=1)
                did_you_mean = f"; did you mean {close[0]}?" if close else ""
                raise UserError(f"{given[0]}: no such command{did_you_mean}\n{USAGE}")
            print(USAGE)
            sys.exit(0 if {"--help", "-h"} & set(sys.argv[1:]) else 2)
        del sys.argv[1]
        if not command():
            sys.exit(1)


def _check() -> bool:
    config = parse(CheckConfig)
    from commands.check import check

    return check(config)


def _clean() -> bool:
    config = parse(CleanConfig)
    from commands.clean import clean

    return clean(config)


def _encode() -> bool:
    config = parse(EncodeConfig)
    out = Path(config.output_dir)
    files.check_outside(out, config.dataset_path, "--output_dir")
    with files.locked_folder(out, "--output_dir"):
        encoded = encode_files.check(config)
        from commands.encode import encode  # imports torch: only once all of this is good

        return encode(config, encoded)


def _shard() -> bool:
    config = parse(ShardConfig)
    from commands.shard import shard

    return shard(config)


if __name__ == "__main__":
    main()
