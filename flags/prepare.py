"""The flags of prepare.py's commands."""

from typing import ClassVar

from pydantic import Field

from flags.captions import CaptionFlags
from flags.types import AnyPath, Dataset, Device, Folder


class CheckConfig(CaptionFlags):
    """What training would see of a dataset, and what is wrong with it; exit code 1 if it is.

    Example: python prepare.py check my_music --fix=my_music_usable
    """

    POSITIONAL: ClassVar[tuple[str, ...]] = ("dataset_path",)
    ALIASES: ClassVar[dict[str, str]] = {"folder": "dataset_path"}

    dataset_path: Dataset = Field(
        description="folder or shards to look at, as --dataset_path of run.py"
    )
    fix: AnyPath | None = Field(
        None,
        description="new folder to copy what is usable to: not broken, not silent, no duplicates; "
        "None = off",
    )
    duration: float = Field(30.0, ge=1, description="as for run.py: seconds of a crop")
    batch_size: int = Field(4, ge=1, description="as for run.py: clips in a batch")
    grad_acc: int = Field(2, ge=1, description="as for run.py: batches for one optimizer step")
    picture: AnyPath = Field("check.png", description="where the picture goes")


class EncodeConfig(CaptionFlags):
    """Encode the recordings of a dataset once, into a folder of files of tokens and captions.

    run.py trains from that folder as from the recordings with --cache_tokens=1.
    Example: python prepare.py encode my_music my_tokens --model_id=small
    """

    POSITIONAL: ClassVar[tuple[str, ...]] = ("dataset_path", "output_dir")
    ALIASES: ClassVar[dict[str, str]] = {"folder": "dataset_path", "out": "output_dir"}

    dataset_path: Dataset = Field(description="folder or shards, as --dataset_path of run.py")
    output_dir: AnyPath = Field(
        description="folder for the files of tokens, outside of it; what is encoded there already "
        "is kept, unless the recording has changed"
    )
    model_id: str = Field(
        "small", min_length=1, description="the model whose EnCodec it takes, as for run.py"
    )
    batch_size: int = Field(4, ge=1, description="windows of 30 s encoded at a time, on a GPU")
    device: Device = Field("auto", description="auto, cuda, mps or cpu")


class ShardConfig(CaptionFlags):
    """Put a dataset into WebDataset shards: tars of recordings, or files of tokens, and captions.

    Example: python prepare.py shard my_music my_shards
    """

    POSITIONAL: ClassVar[tuple[str, ...]] = ("dataset_path", "output_dir")
    ALIASES: ClassVar[dict[str, str]] = {"folder": "dataset_path", "out": "output_dir"}

    dataset_path: Dataset = Field(description="folder or shards, as --dataset_path of run.py")
    output_dir: AnyPath = Field(
        description="new folder for the shards, NAME-000000.tar and so on by its own name, outside "
        "of it; a stopped run goes on there"
    )
    shard_mb: int = Field(500, ge=1, description="size of a shard in MB; a larger file has its own")


class CleanConfig(CaptionFlags):
    """Clean a dataset's recordings before training: a new folder of flac files and captions.

    Example: python prepare.py clean my_music my_music_clean --split_silences=1 --loudness=-14
    """

    POSITIONAL: ClassVar[tuple[str, ...]] = ("dataset_path", "output_dir")
    ALIASES: ClassVar[dict[str, str]] = {"folder": "dataset_path", "out": "output_dir"}

    dataset_path: Folder = Field(description="folder of recordings, as --dataset_path of run.py")
    output_dir: AnyPath = Field(
        description="new folder for the cleaned ones, outside of it; a stopped run goes on there"
    )
    remove_vocals: bool = Field(
        False, description="take the singing out, with demucs (stereo or mono); 0 = off"
    )
    split_silences: bool = Field(
        False, description="cut at silences of 1 s or more, into NAME_001 and so on; 0 = off"
    )
    silence_db: float = Field(
        -50.0, lt=0, ge=-120, description="what counts as silence: RMS below this, of full scale"
    )
    piece_sec: float = Field(
        30.0,
        ge=1,
        description="seconds; a shorter piece is joined to the next one, unless as much silence "
        "lies between them",
    )
    loudness: float | None = Field(
        None,
        ge=-60,
        lt=0,
        description="bring every file to this loudness (LUFS, such as -14), less where its peak "
        "would go beyond -1 dBFS; None = off",
    )
    device: Device = Field("auto", description="of demucs: auto, cuda, mps or cpu")

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
