"""The flags of prepare.py's commands."""

from typing import ClassVar

from pydantic import Field

from flags.captions import CaptionFlags
from flags.types import AnyPath, Dataset, Device, Folder


class CheckConfig(CaptionFlags):
    """Show what training would see of a dataset, and its faults; exit code 1 if it would not start.

    Example: python prepare.py check my_music --fix=my_music_usable
    """

    POSITIONAL: ClassVar[tuple[str, ...]] = ("dataset_path",)
    ALIASES: ClassVar[dict[str, str]] = {"folder": "dataset_path"}

    dataset_path: Dataset = Field(description="folder or shards to check, as for run.py")
    fix: AnyPath | None = Field(
        None,
        description="new folder to copy the usable recordings to: not broken, silent or duplicate; "
        "None = off",
    )
    duration: float = Field(30.0, ge=1, description="length of a crop in seconds, as for run.py")
    batch_size: int = Field(4, ge=1, description="clips in a batch, as for run.py")
    grad_acc: int = Field(2, ge=1, description="batches for one optimizer step, as for run.py")
    picture: AnyPath = Field("check.png", description="file for the picture")


class EncodeConfig(CaptionFlags):
    """Encode a dataset's recordings once, into a folder of files of tokens and captions.

    run.py trains on that folder as it does on the recordings with --cache_tokens=1.
    Example: python prepare.py encode my_music my_tokens --model_id=small
    """

    POSITIONAL: ClassVar[tuple[str, ...]] = ("dataset_path", "output_dir")
    ALIASES: ClassVar[dict[str, str]] = {"folder": "dataset_path", "out": "output_dir"}

    dataset_path: Dataset = Field(description="folder or shards, as for run.py")
    output_dir: AnyPath = Field(
        description="folder for the files of tokens, outside the dataset; files already there are "
        "kept unless their recording has changed"
    )
    model_id: str = Field(
        "small", min_length=1, description="model whose EnCodec to use, as for run.py"
    )
    batch_size: int = Field(4, ge=1, description="windows of 30 s encoded at a time on a GPU")
    device: Device = Field("auto", description="auto, cuda, mps or cpu")


class ShardConfig(CaptionFlags):
    """Put a dataset into WebDataset shards: tars of recordings, or files of tokens, and captions.

    Example: python prepare.py shard my_music my_shards
    """

    POSITIONAL: ClassVar[tuple[str, ...]] = ("dataset_path", "output_dir")
    ALIASES: ClassVar[dict[str, str]] = {"folder": "dataset_path", "out": "output_dir"}

    dataset_path: Dataset = Field(description="folder or shards, as for run.py")
    output_dir: AnyPath = Field(
        description="new folder for the shards, outside the dataset; the shards are called by its "
        "name, NAME-000000.tar and so on; a stopped run continues there"
    )
    shard_mb: int = Field(
        500, ge=1, description="size of a shard in MB; larger files get their own"
    )


class CleanConfig(CaptionFlags):
    """Clean a dataset's recordings into a new folder of flac files and captions.

    Example: python prepare.py clean my_music my_music_clean --split_silences=1 --loudness=-14
    """

    POSITIONAL: ClassVar[tuple[str, ...]] = ("dataset_path", "output_dir")
    ALIASES: ClassVar[dict[str, str]] = {"folder": "dataset_path", "out": "output_dir"}

    dataset_path: Folder = Field(description="folder of recordings, as for run.py")
    output_dir: AnyPath = Field(
        description="new folder for the results, outside the dataset; a stopped run continues there"
    )
    remove_vocals: bool = Field(
        False, description="remove vocals with demucs (stereo or mono); 0 = off"
    )
    split_silences: bool = Field(
        False, description="cut at silences of 1 s or more, into NAME_001 and so on; 0 = off"
    )
    silence_db: float = Field(
        -50.0, lt=0, ge=-120, description="what counts as silence: RMS below this, in dBFS"
    )
    piece_sec: float = Field(
        30.0,
        ge=1,
        description="shortest piece in seconds; a shorter one is joined to the next, unless the "
        "silence between them is at least this long",
    )
    loudness: float | None = Field(
        None,
        ge=-60,
        lt=0,
        description="bring every file to this loudness (LUFS, such as -14), or less if its peak "
        "would exceed -1 dBFS; None = off",
    )
    device: Device = Field("auto", description="for demucs: auto, cuda, mps or cpu")

    def _problems(self) -> list[str]:
        problems = super()._problems()
        if not (self.remove_vocals or self.split_silences or self.loudness is not None):
            problems.append(
                "nothing to do: give --remove_vocals=1, --split_silences=1 or --loudness=-14"
            )
        needs = {
            "silence_db": (self.split_silences, "--split_silences=1"),
            "piece_sec": (self.split_silences, "--split_silences=1"),
            "device": (self.remove_vocals, "--remove_vocals=1"),
        }
        return problems + self._idle(needs)
