"""Encode recordings into files of tokens: `python prepare.py encode my_music my_tokens`.

Training on these equals training with --cache_tokens=1, but does not need the recordings.

Letters: K codebooks, T token frames.
"""

import json
from functools import partial
from pathlib import Path

from tqdm import tqdm

import files
from commands.encode_files import Encoded, captions_of
from errors import UserError, count, first_lines
from flags.prepare import EncodeConfig
from musicgen import codec, load
from musicgen.codec import codec_hash
from musicgen.device import choose_device
from musicgen.hub import portable_id
from recordings import token_file
from recordings.token_file import SUFFIX, Facts
from training.report import format_seconds


def encode(config: EncodeConfig, encoded: Encoded) -> bool:
    """Encode what is not encoded yet, into a folder that is there and locked; return True.

    `encoded` is from commands/encode_files.py.
    Raises: UserError that names what can't be used, or a file in the way.
    """
    out = Path(config.output_dir)
    made, earlier = encoded
    model = load.load_codec(config.model_id, choose_device(config.device))
    digest, model_id = codec_hash(model), portable_id(config.model_id)
    name = token_file.codec_name(digest, model.lm.num_codebooks)
    for path, there in earlier.items():
        if there.codec != name:
            raise UserError(
                f"{path}: holds tokens of {there.facts.model_id}, whose EnCodec differs from that "
                f"of --model_id={config.model_id}: name a new folder"
            )
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
            for beside, content in captions_of(path, track).items():
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

    seconds = sum(track.duration_sec for track in made.values())
    print(f"recordings {len(made)}, {format_seconds(seconds)} in all")
    print(f"tokens     {new} encoded now, {len(made) - new} were there, in {out}")
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
            f"\n{count(len(others), 'file')} of tokens in {out} without a recording in "
            f"{config.dataset_path}, but to be trained on:\n{first_lines(sorted(others))}"
        )
    return True
