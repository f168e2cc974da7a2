"""The files of generate.py's pieces, checked before torch and audiocraft are imported."""

import re
from pathlib import Path

from errors import UserError
from flags.generate import GenerateConfig
from recordings.growing import part_path


def check(config: GenerateConfig) -> list[list[Path]]:
    """Return a wav path for each variation of each prompt.

    Raises: UserError if a file is missing, or one would be overwritten: with --overwrite=1, a
    recording that the flags name.
    """
    paths = _output_paths(config)
    written: set[Path] = set()
    for path in (path for group in paths for path in group):
        written |= {path.resolve(), part_path(path).resolve()}
        if path.exists() and not config.overwrite:
            raise UserError(f"{path} exists: give another --output_dir or --seed, or --overwrite=1")
        if (part := part_path(path)).exists() and not config.overwrite:
            raise UserError(
                f"{part} exists, of a piece that was stopped: move it away to keep its music, or "
                "give --overwrite=1"
            )
    if config.full_weights and not Path(config.full_weights).is_file():
        raise UserError(
            f"--weights_path={config.full_weights}: no such file; give the lm_final.pt that run.py "
            "wrote, or --weights_path=None for the untuned model"
        )
    for flag in ("prompt_audio", "melody"):
        recording = getattr(config, flag)
        if recording and not Path(recording).is_file():
            raise UserError(f"--{flag}={recording}: no such file")
        if recording and Path(recording).resolve() in written:
            raise UserError(
                f"--{flag}={recording}: would be overwritten; give another --output_dir or --seed"
            )
    return paths


def _output_paths(config: GenerateConfig) -> list[list[Path]]:
    """Return a wav path for each variation of each prompt.

    Example: "Slow piano, 90 bpm", seed 3 -> slow-piano-90-bpm_3_1.wav, slow-piano-90-bpm_3_2.wav
    """
    output = Path(config.output_dir)
    if output.suffix.lower() == ".wav":
        if len(config.prompt) * config.variations > 1:
            raise UserError(
                f"--output_dir={config.output_dir}: one file for "
                f"{len(config.prompt) * config.variations} pieces; name a folder"
            )
        return [[output]]
    if output.is_file():
        raise UserError(
            f"--output_dir={config.output_dir}: is a file; name a folder or a .wav file"
        )
    groups: list[list[Path]] = []
    taken: set[str] = set()
    for number, prompt in enumerate(config.prompt, start=1):
        words = re.findall(r"\w+", prompt.lower())
        slug = "-".join(words)[:60].strip("-") or "empty"
        while slug in taken:
            slug = f"{slug}-{number}"
        taken.add(slug)
        stem = f"{slug}_{config.seed}"
        numbered = [f"{stem}_{n + 1}.wav" for n in range(config.variations)]
        groups.append(
            [output / n for n in (numbered if config.variations > 1 else [f"{stem}.wav"])]
        )
    return groups
