"""Every flag once: name, type, default, unit, help and checks. Imports nothing heavy."""

import ast
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from flags import Flags


def _existing_folder(value: str) -> str:
    path = Path(value).expanduser()
    if not path.exists():
        raise ValueError("no such folder")
    if not path.is_dir():
        raise ValueError("is a file, not a folder")
    return str(path)


def _dataset(value: str) -> str:
    """A folder; or shards, such as shards/train-{000..099}.tar, which are looked for later."""
    is_shards = "://" in value or value.endswith(".tar")
    if "://" in value:
        return value
    return _expanded(value) if is_shards else _existing_folder(value)


def _existing_file(value: str) -> str:
    path = Path(value).expanduser()
    if not path.is_file():
        raise ValueError("no such file")
    return str(path)


def _one_word(value: str) -> str:
    if len(value.split()) != 1 or value != value.strip():
        raise ValueError("must be one word, without spaces")
    return value


def _expanded(value: str) -> str:
    """~ is the home folder; a shell doesn't see it after --flag=."""
    return str(Path(value).expanduser())


def _one_or_list(value: Any) -> Any:
    """A value, or a list of them written ["one", "two"]."""
    if not isinstance(value, str):
        return value
    if not value.startswith("["):
        return [value]
    try:
        values = [str(item) for item in ast.literal_eval(value)]
    except (SyntaxError, ValueError):
        values = []
    if not values:
        raise ValueError('is not a list like ["one", "two"]')
    return values


def _prompts(value: Any) -> Any:
    """A prompt, a list of them, or a .txt file with one a line."""
    if isinstance(value, str) and value.endswith(".txt"):
        try:
            lines = Path(value).expanduser().read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"cannot be read ({error})") from None
        return [line.strip() for line in lines if line.strip()]
    return _one_or_list(value)


def _some_words(value: str) -> str:
    words = " ".join(value.split())
    if not words:
        raise ValueError("needs a value")
    return words


Words = Annotated[str, AfterValidator(_some_words)]
Folder = Annotated[str, AfterValidator(_existing_folder)]
Dataset = Annotated[str, AfterValidator(_dataset)]
AnyPath = Annotated[str, Field(min_length=1), AfterValidator(_expanded)]
Prompts = Annotated[list[str], BeforeValidator(_prompts), Field(min_length=1)]
Files = Annotated[
    list[Annotated[str, AfterValidator(_existing_file)]],
    BeforeValidator(_one_or_list),
    Field(min_length=1),
]
Folders = Annotated[list[Folder], BeforeValidator(_one_or_list), Field(min_length=1)]
Scales = Annotated[
    list[float],
    BeforeValidator(_one_or_list),
    Field(
        min_length=1,
        description="how strongly: 0 = not at all, 1 = as trained; or [0.7, 0.3], one for each",
    ),
]
SaveDtype = Literal["fp32", "bf16", "fp16"]
Device = Literal["auto", "cpu", "cuda", "mps"]
CaptionFrom = Literal["auto", "tags"]


class Config(Flags):
    """Fine-tune MusicGen on a folder of recordings and captions; leaves models/lm_final.pt.

    Example: python run.py --dataset_path=my_music --epochs=20 --use_cfg=1
    Several GPUs: torchrun --nproc_per_node=2 run.py --dataset_path=my_music
    """

    # The flags of the original trainer.
    dataset_path: Dataset = Field(
        description="folder of recordings (wav, flac, mp3, ogg, opus, aiff, m4a) and captions: "
        "NAME.txt, NAME.json, metadata.csv or metadata.jsonl; or tokens of them, from prepare.py "
        "encode; or WebDataset shards of either: such a folder, shards/train-{000..099}.tar, or "
        "that as a URL"
    )
    model_id: str = Field(
        "small",
        min_length=1,
        description="small, medium, large, melody, melody-large; stereo-small and so on; demo "
        "(tiny, comes with the project); a Hugging Face id, or a folder in audiocraft's exported "
        "format",
    )
    lr: float = Field(1e-5, gt=0, le=1, description="learning rate after the warm-up")
    epochs: int = Field(
        100, ge=1, description="passes over the dataset; each takes one random crop of every file"
    )
    use_wandb: bool = Field(False, description="log to Weights & Biases; 0 = off")
    save_step: int | None = Field(
        None,
        ge=0,
        description="steps between checkpoints lm_<step>.pt and the resume state; None or 0 = off",
    )
    no_label: bool = Field(False, description="train with empty captions; none are read")
    tune_text: bool = Field(
        False, description="train the text conditioning only (lm.condition_provider)"
    )
    weight_decay: float = Field(
        1e-5, ge=0, description="AdamW weight decay, not on biases and norms; 0 = off"
    )
    grad_acc: int = Field(2, ge=1, description="batches accumulated for one optimizer step")
    warmup_steps: int = Field(16, ge=0, description="steps of linear warm-up; 0 = off")
    batch_size: int = Field(4, ge=1, description="clips in a batch, on each GPU")
    use_cfg: bool = Field(
        False,
        description="drop captions, and melodies with them, at random (see cfg_p), so that "
        "classifier-free guidance keeps working; 0 = off",
    )

    # The run.
    duration: float = Field(
        30.0, ge=1, description="length of a crop in seconds; shorter clips are padded"
    )
    max_steps: int | None = Field(
        None, ge=0, description="stop after this many optimizer steps; None or 0 = by epochs"
    )
    seed: int = Field(0, ge=0, lt=2**63, description="of crops, order, dropout and samples")
    output_dir: AnyPath = Field("models", description="folder for everything it writes")
    dry_run: bool = Field(
        False,
        description="train nothing: say how much memory the run will take on a GPU, and what would "
        "lower it; 0 = off",
    )
    resume: bool = Field(False, description="go on with the stopped run in output_dir")
    overwrite: bool = Field(False, description="replace an earlier run's files in output_dir")

    # Captions.
    caption_from: CaptionFrom = Field(
        "auto",
        description="auto = of each recording the first that is there: NAME.txt, NAME.json, a row "
        "of metadata.csv or metadata.jsonl; tags = the files' own title, artist, genre, comment",
    )
    caption: Words | None = Field(None, description="one caption for all recordings; None = off")
    trigger: Words | None = Field(
        None, description="words put in front of every caption, such as my-style; None = off"
    )
    merge_text_p: float = Field(
        0.25,
        ge=0,
        le=1,
        description="captions from .json files or tags: probability of adding the other fields "
        "(genre, moods, instrument, bpm, key, keywords); 0 = off",
    )
    drop_desc_p: float = Field(
        0.5, ge=0, le=1, description="probability of leaving out the description where they are"
    )
    drop_other_p: float = Field(
        0.5, ge=0, le=1, description="probability of leaving out each of those fields"
    )

    # Training.
    cfg_p: float = Field(
        0.2, ge=0, le=1, description="probability of dropping a caption when use_cfg=1"
    )
    word_dropout: float = Field(
        0.0, ge=0, lt=1, description="probability of dropping each word of a caption; 0 = off"
    )
    drop_melody: float = Field(
        0.5,
        ge=0,
        le=1,
        description="melody models: probability of training a clip without its melody; 1 = on "
        "captions alone, without demucs",
    )
    optimizer: Literal["adamw", "adamw_8bit", "adamw_8bit_bf16"] = Field(
        "adamw",
        description="adamw_8bit keeps its two moments in 8 bit instead of 32; adamw_8bit_bf16 also "
        "keeps the layers' weights and gradients in bf16, and rounds the weights at random",
    )
    max_grad_norm: float = Field(1.0, ge=0, description="gradient norm limit; 0 = off")
    lr_scheduler: Literal["cosine", "linear", "constant"] = Field(
        "cosine", description="after the warm-up: to 0 at the last step, or constant"
    )
    ema_decay: float = Field(
        0.0, ge=0, lt=1, description="average the weights; lm_final.pt holds the average; 0 = off"
    )
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto", description="auto = bf16 on a GPU that has it, else fp16 on CUDA, else fp32"
    )
    device: Device = Field("auto", description="auto, cuda, mps or cpu")
    grad_checkpointing: bool = Field(
        False, description="recompute activations: less memory, slower steps; 0 = off"
    )
    num_workers: int | None = Field(
        None, ge=0, description="processes that read audio; None = up to 4, 0 = the main one"
    )
    cache_tokens: bool = Field(
        False,
        description="encode every recording once, before the first step, and train from the "
        "tokens; 0 = off",
    )

    # LoRA.
    lora_rank: int = Field(
        0,
        ge=0,
        description="train adapters of this rank on all attention and feed-forward layers, "
        "instead of the weights; 0 = off",
    )
    lora_alpha: float | None = Field(
        None, gt=0, description="the adapters are multiplied by alpha / rank; None = twice the rank"
    )
    lora_dropout: float = Field(
        0.0, ge=0, lt=1, description="probability of dropping an adapter's inputs; 0 = off"
    )
    lora_rslora: bool = Field(
        False, description="multiply them by alpha / sqrt(rank), for high ranks; 0 = off"
    )
    lora_embeddings: bool = Field(
        False, description="adapters on token embeddings and output heads too; 0 = off"
    )

    # Textual inversion.
    placeholder: Annotated[str, AfterValidator(_one_word)] | None = Field(
        None,
        description="train the vector of this new word of the text encoder, such as `<my-style>`, "
        "instead of the weights; captions without it get it in front; None = off",
    )
    placeholder_init: str = Field(
        "music", min_length=1, description="the word, or words, whose mean vector it starts from"
    )

    # Validation and samples.
    valid_path: Dataset | None = Field(
        None,
        description="folder or shards of held-out recordings, with captions, for the validation "
        "loss; None = off",
    )
    valid_split: float = Field(
        0.0, ge=0, lt=1, description="share of the dataset's files held out instead; 0 = off"
    )
    valid_step: int | None = Field(
        None, ge=1, description="steps between validations; None = ten times a run"
    )
    sample_step: int | None = Field(
        None,
        ge=0,
        description="steps between samples (wav), the first before training; None or 0 = off",
    )
    sample_prompts: Prompts | None = Field(
        None,
        description='a prompt, a list ["one", "two"], or a .txt file with one a line; '
        "None = the first two captions",
    )
    sample_duration: float = Field(10.0, gt=0, description="length of a sample in seconds")

    # Output.
    keep_checkpoints: int = Field(
        0, ge=0, description="how many of the newest lm_<step>.pt to keep; 0 = all"
    )
    save_dtype: SaveDtype = Field(
        "fp32", description="number format of lm_*.pt; the 16 bit ones halve the file"
    )
    wandb_project: str = Field("musicgen-trainer", min_length=1, description="wandb project")
    wandb_name: str | None = Field(None, description="wandb run name; None = wandb chooses")

    @model_validator(mode="after")
    def _fit_together(self) -> "Config":
        given = self.model_fields_set
        problems = []
        if self.resume and self.overwrite:
            problems.append("--resume and --overwrite exclude each other: give one of them")
        if self.valid_path and self.valid_split:
            problems.append("--valid_path and --valid_split exclude each other: give one of them")
        if self.tune_text and self.no_label:
            problems.append(
                "--tune_text=1 with --no_label=1 leaves nothing to train: empty captions have no "
                "gradient; leave one of them out"
            )
        if self.tune_text and self.lora_rank:
            problems.append("--tune_text and --lora_rank exclude each other: give one of them")
        for name in ("tune_text", "lora_rank", "no_label"):
            if self.placeholder and getattr(self, name):
                problems.append(f"--placeholder and --{name} exclude each other: give one of them")
        if self.optimizer == "adamw_8bit_bf16":
            if self.precision in ("fp32", "fp16"):
                problems.append(
                    f"--optimizer=adamw_8bit_bf16 and --precision={self.precision} exclude each "
                    "other: give --precision=bf16, or --optimizer=adamw_8bit"
                )
            if self.ema_decay:
                problems.append(
                    "--optimizer=adamw_8bit_bf16 and --ema_decay exclude each other: an average "
                    "kept in bf16 would hardly move; leave one of them out"
                )
            for name in ("lora_rank", "tune_text", "placeholder"):
                if getattr(self, name):
                    problems.append(
                        f"--optimizer=adamw_8bit_bf16 does nothing with --{name}, which leaves the "
                        "layers as they are: use --optimizer=adamw_8bit"
                    )
        how_to_merge = ("merge_text_p", "drop_desc_p", "drop_other_p")
        for name in ("caption_from", "caption", "trigger", *how_to_merge):
            if name in given and self.no_label:
                problems.append(f"--{name} and --no_label exclude each other: give one of them")
            elif name in given and self.caption and name not in ("caption", "trigger"):
                problems.append(f"--{name} and --caption exclude each other: give one of them")
        has_valid = bool(self.valid_path or self.valid_split)
        needs = [
            ("cfg_p", self.use_cfg, "--use_cfg=1"),
            ("drop_desc_p", self.merge_text_p > 0, "--merge_text_p"),
            ("drop_other_p", self.merge_text_p > 0, "--merge_text_p"),
            *(
                (f"lora_{name}", self.lora_rank > 0, "--lora_rank")
                for name in ("alpha", "dropout", "rslora", "embeddings")
            ),
            ("placeholder_init", bool(self.placeholder), "--placeholder"),
            ("valid_step", has_valid, "--valid_path or --valid_split"),
            ("sample_prompts", bool(self.sample_step), "--sample_step"),
            ("sample_duration", bool(self.sample_step), "--sample_step"),
            ("keep_checkpoints", bool(self.save_step), "--save_step"),
            ("wandb_project", self.use_wandb, "--use_wandb=1"),
            ("wandb_name", self.use_wandb, "--use_wandb=1"),
        ]
        for name, has_it, need in needs:
            if name in given and not has_it:
                problems.append(f"--{name} does nothing without {need}: add that, or leave it out")
        if problems:
            raise ValueError("\n".join(problems))
        return self


def _one_scale_each(folders: list[str], scales: list[float]) -> list[float]:
    if len(scales) not in (1, len(folders)):
        raise ValueError(
            f"--lora_scale has {len(scales)} numbers for {len(folders)} adapters of --lora: give "
            "one, or one for each"
        )
    return scales * len(folders) if len(scales) == 1 else scales


class GenerateConfig(Flags):
    """Generate music of any length with a fine-tuned MusicGen.

    Example: python generate.py --prompt="slow piano waltz" --duration=60
    """

    prompt: Prompts = Field(
        description='what to play: a prompt, a list ["one", "two"], or a .txt file with one a line'
    )
    weights_path: AnyPath | None = Field(
        "models/lm_final.pt", description="fine-tuned weights; None = the model as it was"
    )
    model_id: str | None = Field(
        None,
        description="the model that was tuned, as for run.py; None = what run.py noted beside "
        "the weights, in the adapter or in the embedding, else small",
    )
    lora: Folders | None = Field(
        None,
        description='LoRA adapter: the lora_final folder that run.py left; or ["a", "b"] to add '
        "several. They go onto the base model unless weights_path is given too",
    )
    lora_scale: Scales = Field([1.0])
    embedding: Files | None = Field(
        None,
        description="learned word for the prompt: the learned_embeds.safetensors that run.py left; "
        'or ["a", "b"] for several. They go with the base model unless weights_path is given too',
    )
    duration: float = Field(30.0, gt=0, description="seconds to generate")
    overlap: float | None = Field(
        None,
        gt=0,
        description="beyond the model's window (30 s), the seconds that each further window "
        "starts from; more = more coherent and slower; None = 12, or half a window under 24 s",
    )
    melody: AnyPath | None = Field(
        None, description="recording whose melody to follow, with a melody model; needs demucs"
    )
    prompt_audio: AnyPath | None = Field(
        None, description="recording to continue; its last `overlap` seconds open the result"
    )
    top_k: int = Field(250, ge=0, description="sample among the k likeliest codes; 0 = all")
    top_p: float = Field(
        0.0, ge=0, le=1, description="sample among codes of this total probability; 0 = use top_k"
    )
    temperature: float = Field(
        1.0, ge=0, description="of sampling; lower = more predictable, 0 = always the likeliest"
    )
    cfg_coef: float = Field(
        3.0, ge=0, description="classifier-free guidance: how closely to follow the prompt"
    )
    seed: int = Field(0, ge=0, lt=2**63, description="same seed, same music (on the same machine)")
    variations: int = Field(1, ge=1, description="pieces for each prompt, made together")
    output: AnyPath = Field("generated", description="folder, or a .wav name if there is one piece")
    overwrite: bool = Field(False, description="replace existing files of the same name")
    device: Device = Field("auto", description="auto, cuda, mps or cpu")

    @property
    def scales(self) -> list[float]:
        """Of each adapter in `lora`."""
        return _one_scale_each(self.lora or [], self.lora_scale)

    @property
    def full_weights(self) -> str | None:
        """--weights_path; its default only without --lora, as run.py merges into that file.

        Nor with --embedding, which was trained on the base model.
        """
        is_default = "weights_path" not in self.model_fields_set
        return None if (self.lora or self.embedding) and is_default else self.weights_path

    @model_validator(mode="after")
    def _fit_together(self) -> "GenerateConfig":
        if self.lora:
            _one_scale_each(self.lora, self.lora_scale)
        elif "lora_scale" in self.model_fields_set:
            raise ValueError("--lora_scale does nothing without --lora: add that, or leave it out")
        return self


class MergeConfig(Flags):
    """Merge LoRA adapters into plain weights that any audiocraft script loads.

    Example: python lora.py --lora=models/lora_final --lora_scale=0.7
    """

    lora: Folders = Field(
        description='the lora_final folder that run.py left; or ["a", "b"] to add several'
    )
    lora_scale: Scales = Field([1.0])
    model_id: str | None = Field(
        None, description="the model that was tuned; None = what the adapter names, else small"
    )
    output: AnyPath = Field("merged.pt", description="the file to write")
    save_dtype: SaveDtype = Field("fp32", description="number format of the file")
    overwrite: bool = Field(False, description="replace an existing file")

    @property
    def scales(self) -> list[float]:
        """Of each adapter in `lora`."""
        return _one_scale_each(self.lora, self.lora_scale)

    @model_validator(mode="after")
    def _fit_together(self) -> "MergeConfig":
        _one_scale_each(self.lora, self.lora_scale)
        return self


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
