"""A run's clips, tokens and melodies.

Letters: T token frames.
"""

import math
from collections.abc import Callable
from functools import partial

from dataset import Clips
from errors import UserError
from flags.run import Config
from musicgen import codec, melody
from musicgen.load import Model
from musicgen.melody import melodies_of, melody_conditioner
from recordings.melodies import Melodies
from recordings.tokens import Tokens
from recordings.track import Track
from training.processes import Processes
from training.tracks import in_front_of


def crop_frames(config: Config, window_sec: float, frame_rate: float, tracks: list[Track]) -> int:
    """Return T: --duration in token frames, at most the longest file's. Raises: UserError."""
    if config.duration > window_sec:
        raise UserError(
            f"--duration={config.duration:g}: {config.model_id} takes clips of up to "
            f"{window_sec:g} s; give at most that"
        )
    longest = max(track.duration_sec for track in tracks)
    return min(round(config.duration * frame_rate), math.ceil(longest * frame_rate))


def find_melodies(
    config: Config, model: Model, tracks: list[Track], processes: Processes
) -> Melodies | None:
    """Find the melodies of all tracks, each process its share; None if none are wanted."""
    conditioner = melody_conditioner(model.lm)
    check_melody(config, conditioner is not None, tracks)
    if conditioner is None or config.drop_melody == 1:
        return None
    melodies = melodies_of(conditioner)
    _in_shares(partial(melody.fill, conditioner, melodies, tracks), processes)
    return melodies


def check_melody(config: Config, has_melody: bool, tracks: list[Track]) -> None:
    """Raise UserError if --drop_melody or the tracks don't go with the model."""
    if has_melody and config.drop_melody < 1 and tracks[0].codec:
        raise UserError(
            f"{tracks[0].place}: melodies can't be found in tokens: train on the recordings, or on "
            "captions only with --drop_melody=1"
        )
    if "drop_melody" in config.model_fields_set and not has_melody:
        raise UserError(
            f"--drop_melody does nothing with --model_id={config.model_id}, which takes no "
            "melodies: leave it out, or give a melody model"
        )


def find_tokens(
    config: Config, model: Model, tracks: list[Track], processes: Processes
) -> Tokens | None:
    """Read or encode all tracks' tokens, each process its share; None to encode each crop."""
    if not (config.cache_tokens or tracks[0].codec):
        return None
    tokens = codec.tokens_of(model)
    if tracks[0].codec:
        tokens.check(tracks, config.model_id)
    else:
        _in_shares(partial(codec.fill, model, tokens, tracks, config.batch_size), processes)
    codec.move(model, "encoder", "cpu")  # not needed any more
    return tokens


def _in_shares(prepare: Callable[..., None], processes: Processes) -> None:
    """Let all processes share the work; then those of a machine, what its own cache lacks."""
    with processes.together():
        prepare(rank=processes.rank, processes=processes.count)
    with processes.together():
        prepare(rank=processes.local_rank, processes=processes.local_count)


def make_clips(
    config: Config,
    model: Model,
    tracks: list[Track],
    frames: int,
    tokens: Tokens | None,
    melodies: Melodies | None,
    *,
    training: bool,
) -> Clips:
    return Clips(
        tracks,
        sample_rate=model.sample_rate,
        channels=model.audio_channels,
        samples=frames * round(model.sample_rate / model.frame_rate),
        seed=config.seed,
        by_length=config.crops_by_length,
        drop_caption=config.cfg_p if training and config.use_cfg else 0.0,
        merge_text_p=config.merge_text_p if training else 0.0,
        in_front=in_front_of(config),
        drop_word=config.word_dropout if training else 0.0,
        tokens=tokens,
        melodies=melodies,
        drop_melody=config.drop_melody if training else 0.0,
    )
