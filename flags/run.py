"""The flags of run.py."""

from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, Field

from flags.captions import CaptionFlags
from flags.types import (
    AnyPath,
    Dataset,
    Device,
    Prompts,
    SaveDtype,
    SwitchOrAuto,
    Words,
    one_word,
)


class Config(CaptionFlags):
    """Fine-tune MusicGen on a folder of recordings and captions; writes models/lm_final.pt.

    Example: python run.py --dataset_path=my_music --epochs=20 --use_cfg=1
    Several GPUs: torchrun --nproc_per_node=2 run.py --dataset_path=my_music
    """

    ALIASES: ClassVar[dict[str, str]] = {"dataset": "dataset_path"}
    REMOVED: ClassVar[dict[str, str]] = {
        "drop_desc_p": "leave it out; descriptions are dropped with probability 0.5",
        "drop_other_p": "leave it out; each other field is dropped with probability 0.5",
        "lora_rslora": "give a larger --lora_alpha; adapters are multiplied by alpha / rank",
    }
    GROUPS: ClassVar[dict[str, tuple[str, ...]]] = {
        "The seven most people need": (
            "dataset_path",
            "model_id",
            "output_dir",
            "epochs",
            "lr",
            "lora_rank",
            "valid_split",
        ),
        "Data": (
            "no_label",
            "caption_from",
            "caption",
            "trigger",
            "merge_text_p",
            "use_cfg",
            "cfg_p",
            "word_dropout",
            "drop_melody",
            "duration",
            "crops_by_length",
            "cache_tokens",
            "num_workers",
        ),
        "Training": (
            "batch_size",
            "grad_acc",
            "max_steps",
            "warmup_steps",
            "weight_decay",
            "lr_scheduler",
            "max_grad_norm",
            "ema_decay",
            "tune_text",
            "placeholder",
            "placeholder_init",
            "seed",
        ),
        "Memory": (
            "dry_run",
            "grad_checkpointing",
            "optimizer",
            "precision",
            "device",
        ),
        "LoRA": (
            "lora_alpha",
            "lora_dropout",
            "lora_embeddings",
        ),
        "Validation and samples": (
            "valid_path",
            "valid_step",
            "sample_step",
            "sample_prompts",
            "sample_duration",
        ),
        "Output": (
            "save_step",
            "keep_checkpoints",
            "save_dtype",
            "resume",
            "overwrite",
            "use_wandb",
            "wandb_project",
            "wandb_name",
        ),
    }

    dataset_path: Dataset = Field(
        description="folder of recordings and captions, or of tokens, or shards (docs/data.md)"
    )
    model_id: str = Field(
        "small",
        min_length=1,
        description="small, medium, large, melody, melody-large; stereo-small and so on; demo "
        "(tiny, included); a Hugging Face id, or a folder in audiocraft's exported "
        "format",
    )
    output_dir: AnyPath = Field("models", description="folder for everything the run writes")
    epochs: int = Field(
        100,
        ge=1,
        description="passes over the dataset; each takes one random crop of every file, or more "
        "with crops_by_length",
    )
    lr: float = Field(1e-5, gt=0, le=1, description="learning rate after the warm-up")
    lora_rank: int = Field(
        0,
        ge=0,
        description="train adapters of this rank on all attention and feed-forward layers, "
        "instead of the weights; 0 = off",
    )
    valid_split: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="share of the dataset's files held out for the validation loss; 0 = off",
    )

    # Data
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
    use_cfg: bool = Field(
        False,
        description="drop captions, and their melodies, at random (see cfg_p), so that "
        "classifier-free guidance keeps working; 0 = off",
    )
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
        description="melody models: probability of training a clip without its melody; 1 = "
        "captions only, demucs not needed",
    )
    duration: float = Field(
        30.0, ge=1, description="length of a crop in seconds; shorter clips are padded"
    )
    crops_by_length: bool = Field(
        False,
        description="take one crop an epoch for each full duration in a file, at least one, "
        "instead of one from each file; 0 = off",
    )
    cache_tokens: bool = Field(
        False,
        description="encode every recording once, before the first step, and train on the tokens; "
        "0 = off",
    )
    num_workers: int | None = Field(
        None, ge=0, description="processes that read audio; None = up to 4, 0 = the main process"
    )

    # Training
    batch_size: int = Field(4, ge=1, description="clips in a batch, on each GPU")
    grad_acc: int = Field(2, ge=1, description="batches accumulated for one optimizer step")
    max_steps: int | None = Field(
        None, ge=0, description="stop after this many optimizer steps; None or 0 = by epochs"
    )
    warmup_steps: int = Field(16, ge=0, description="steps of linear warm-up; 0 = off")
    weight_decay: float = Field(
        1e-5, ge=0, description="AdamW weight decay, except on biases and norms; 0 = off"
    )
    lr_scheduler: Literal["cosine", "constant"] = Field(
        "cosine", description="after the warm-up: cosine falls to 0 at the last step; or constant"
    )
    max_grad_norm: float = Field(1.0, ge=0, description="gradient norm limit; 0 = off")
    ema_decay: float = Field(
        0.0, ge=0, lt=1, description="average the weights; lm_final.pt holds the average; 0 = off"
    )
    tune_text: bool = Field(
        False, description="train the text conditioning only (lm.condition_provider)"
    )
    placeholder: Annotated[str, AfterValidator(one_word)] | None = Field(
        None,
        description="train a vector for this new word of the text encoder, such as `<my-style>`, "
        "instead of the weights; it is put in front of captions that lack it; None = off",
    )
    placeholder_init: str = Field(
        "music",
        min_length=1,
        description="word, or words, whose mean vector it starts from",
    )
    seed: int = Field(0, ge=0, lt=2**63, description="of crops, order, dropout and samples")

    # Memory
    dry_run: bool = Field(
        False,
        description="train nothing, but print how much GPU memory the run will need and what would "
        "lower it; 0 = off",
    )
    grad_checkpointing: bool = Field(
        False, description="recompute activations: less memory, slower steps; 0 = off"
    )
    optimizer: Literal["adamw", "adamw_8bit", "adamw_8bit_bf16"] = Field(
        "adamw",
        description="adamw_8bit keeps its two moments in 8 bits instead of 32; adamw_8bit_bf16 "
        "also keeps the layers' weights and gradients in bf16, with stochastic rounding",
    )
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto", description="auto = bf16 on a GPU that supports it, else fp16 on CUDA, else fp32"
    )
    device: Device = Field("auto", description="auto, cuda, mps or cpu")

    # LoRA
    lora_alpha: float | None = Field(
        None, gt=0, description="the adapters are multiplied by alpha / rank; None = twice the rank"
    )
    lora_dropout: float = Field(
        0.0, ge=0, lt=1, description="probability of dropping an adapter's inputs; 0 = off"
    )
    lora_embeddings: bool = Field(
        False, description="train adapters on token embeddings and output heads too; 0 = off"
    )

    # Validation and samples
    valid_path: Dataset | None = Field(
        None,
        description="folder or shards of held-out recordings, with captions, for the validation "
        "loss; None = off",
    )
    valid_step: int | None = Field(
        None, ge=1, description="steps between validations; None = ten per run"
    )
    sample_step: int | None = Field(
        None,
        ge=0,
        description="steps between samples (wav), with the first before training; None or 0 = off",
    )
    sample_prompts: Prompts | None = Field(
        None,
        description='a prompt, a list ["one", "two"], or a .txt file with one per line; '
        "None = the first two captions",
    )
    sample_duration: float = Field(10.0, gt=0, description="length of a sample in seconds")

    # Output
    save_step: int | None = Field(
        None,
        ge=0,
        description="steps between checkpoints (`lm_<step>.pt`) and resume states; None or 0 = off",
    )
    keep_checkpoints: int = Field(
        0, ge=0, description="how many of the newest `lm_<step>.pt` to keep; 0 = all"
    )
    save_dtype: SaveDtype = Field(
        "fp32", description="number format of lm_*.pt; 16-bit formats halve the file"
    )
    resume: SwitchOrAuto = Field(
        False,
        description="1 = continue the stopped run in output_dir; auto = start it if it isn't "
        "there, and end at once if it is finished; 0 = off",
    )
    overwrite: bool = Field(False, description="replace an earlier run's files in output_dir")
    use_wandb: bool = Field(False, description="log to Weights & Biases; 0 = off")
    wandb_project: str = Field("musicgen-trainer", min_length=1, description="wandb project")
    wandb_name: str | None = Field(None, description="wandb run name; None = wandb chooses")

    def _problems(self) -> list[str]:
        problems = [
            *super()._problems(),
            *self._excluded("no_label", "trigger", "merge_text_p"),
            *self._excluded("caption", "merge_text_p"),
            *self._excluded("overwrite", "resume"),
            *self._excluded("valid_split", "valid_path"),
            *self._excluded("lora_rank", "tune_text"),
            *self._excluded("placeholder", "tune_text", "lora_rank", "no_label"),
        ]
        if self.tune_text and self.no_label:
            problems.append(
                "--tune_text=1 with --no_label=1 leaves nothing to train: empty captions have no "
                "gradient; leave out one of them"
            )
        if self.optimizer == "adamw_8bit_bf16":
            problems += self._bf16_problems()
        has_held_out = bool(self.valid_path or self.valid_split)
        needs = {
            "cfg_p": (self.use_cfg, "--use_cfg=1"),
            "lora_alpha": (self.lora_rank > 0, "--lora_rank"),
            "lora_dropout": (self.lora_rank > 0, "--lora_rank"),
            "lora_embeddings": (self.lora_rank > 0, "--lora_rank"),
            "placeholder_init": (bool(self.placeholder), "--placeholder"),
            "valid_step": (has_held_out, "--valid_path or --valid_split"),
            "sample_prompts": (bool(self.sample_step), "--sample_step"),
            "sample_duration": (bool(self.sample_step), "--sample_step"),
            "keep_checkpoints": (bool(self.save_step), "--save_step"),
            "wandb_project": (self.use_wandb, "--use_wandb=1"),
            "wandb_name": (self.use_wandb, "--use_wandb=1"),
        }
        return problems + self._idle(needs)

    def _bf16_problems(self) -> list[str]:
        problems = []
        if self.precision in ("fp32", "fp16"):
            problems.append(
                f"--optimizer=adamw_8bit_bf16 and --precision={self.precision} exclude each other: "
                "give --precision=bf16, or --optimizer=adamw_8bit"
            )
        if self.ema_decay:
            problems.append(
                "--optimizer=adamw_8bit_bf16 and --ema_decay exclude each other: an average kept "
                "in bf16 would hardly move; leave out one of them"
            )
        return problems + [
            f"--optimizer=adamw_8bit_bf16 does nothing with --{name}, which doesn't train the "
            "layers: use --optimizer=adamw_8bit"
            for name in ("lora_rank", "tune_text", "placeholder")
            if getattr(self, name)
        ]
