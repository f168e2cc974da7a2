"""The flags of prepare.py's commands."""

from pydantic import Field, model_validator

from flags.parse import Flags
from flags.types import AnyPath, CaptionFrom, Dataset, Device, Folder, Words


class CheckConfig(Flags):
    """What training would see of a dataset, and what is wrong with it; exit code 1 if it is.

    Example: python prepare.py check my_music --fix=my_music_usable
    """

    folder: Dataset = Field(description="folder or shards to look at, as --dataset_path of run.py")
    fix: AnyPath | None = Field(
        None,
        description="new folder to copy what is usable to: not broken, not silent, no duplicates; "
        "None = off",
    )
    caption_from: CaptionFrom = Field(
        "auto", description="as for run.py: auto = files beside them, tags = their own tags"
    )
    caption: Words | None = Field(None, description="as for run.py: one for all; None = off")
    no_label: bool = Field(False, description="as for run.py: captions are not needed")
    duration: float = Field(30.0, ge=1, description="as for run.py: seconds of a crop")
    batch_size: int = Field(4, ge=1, description="as for run.py: clips in a batch")
    grad_acc: int = Field(2, ge=1, description="as for run.py: batches for one optimizer step")
    picture: AnyPath = Field("check.png", description="where the picture goes")

    @model_validator(mode="after")
    def _fit_together(self) -> "CheckConfig":
        _check_caption_flags(self)
        return self


class EncodeConfig(Flags):
    """Encode the recordings of a dataset once, into a folder of files of tokens and captions.

    run.py trains from that folder as from the recordings with --cache_tokens=1.
    Example: python prepare.py encode my_music my_tokens --model_id=small
    """

    folder: Dataset = Field(description="folder or shards, as --dataset_path of run.py")
    out: AnyPath = Field(
        description="folder for the files of tokens, outside of it; what is encoded there already "
        "is kept, unless the recording has changed"
    )
    model_id: str = Field(
        "small", min_length=1, description="the model whose EnCodec it takes, as for run.py"
    )
    batch_size: int = Field(4, ge=1, description="windows of 30 s encoded at a time, on a GPU")
    device: Device = Field("auto", description="auto, cuda, mps or cpu")
    caption_from: CaptionFrom = Field(
        "auto", description="as for run.py; those from tables or tags get files of their own"
    )
    caption: Words | None = Field(None, description="one caption for all recordings; None = off")
    no_label: bool = Field(False, description="without captions; none are read")

    @model_validator(mode="after")
    def _fit_together(self) -> "EncodeConfig":
        _check_caption_flags(self)
        return self


class ShardConfig(Flags):
    """Put a dataset into WebDataset shards: tars of recordings, or files of tokens, and captions.

    Example: python prepare.py shard my_music my_shards
    """

    folder: Dataset = Field(description="folder or shards, as --dataset_path of run.py")
    out: AnyPath = Field(
        description="new folder for the shards, NAME-000000.tar and so on by its own name, outside "
        "of it; a stopped run goes on there"
    )
    shard_mb: int = Field(500, ge=1, description="size of a shard in MB; a larger file has its own")
    caption_from: CaptionFrom = Field(
        "auto", description="as for run.py; those from tables or tags get files of their own"
    )
    caption: Words | None = Field(None, description="one caption for all recordings; None = off")
    no_label: bool = Field(False, description="without captions; none are read")

    @model_validator(mode="after")
    def _fit_together(self) -> "ShardConfig":
        _check_caption_flags(self)
        return self


def _check_caption_flags(config: CheckConfig | EncodeConfig | ShardConfig) -> None:
    given = [n for n in ("caption_from", "caption", "no_label") if n in config.model_fields_set]
    if len(given) > 1:
        raise ValueError(f"--{given[0]} and --{given[1]} exclude each other: give one of them")


class CleanConfig(Flags):
    """Clean a dataset's recordings before training: a new folder of flac files and captions.

    Example: python prepare.py clean my_music my_music_clean --split_silences=1 --loudness=-14
    """

    folder: Folder = Field(description="folder of recordings, as --dataset_path of run.py")
    out: AnyPath = Field(
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
    caption_from: CaptionFrom = Field(
        "auto", description="as for run.py; those from tables or tags get files of their own"
    )
    no_label: bool = Field(False, description="as for run.py: captions are not needed")
    device: Device = Field("auto", description="of demucs: auto, cuda, mps or cpu")

    @model_validator(mode="after")
    def _fit_together(self) -> "CleanConfig":
        problems = []
        if not (self.remove_vocals or self.split_silences or self.loudness is not None):
            problems.append(
                "nothing to do: give --remove_vocals=1, --split_silences=1 or --loudness=-14"
            )
        if self.no_label and "caption_from" in self.model_fields_set:
            problems.append("--caption_from and --no_label exclude each other: give one of them")
        needs = [
            ("silence_db", self.split_silences, "--split_silences=1"),
            ("piece_sec", self.split_silences, "--split_silences=1"),
            ("device", self.remove_vocals, "--remove_vocals=1"),
        ]
        for name, has_it, need in needs:
            if name in self.model_fields_set and not has_it:
                problems.append(f"--{name} does nothing without {need}: add that, or leave it out")
        if problems:
            raise ValueError("\n".join(problems))
        return self
