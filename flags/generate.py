"""The flags of generate.py and export.py."""

from pathlib import Path
from typing import ClassVar

from pydantic import Field

from flags.parse import Flags
from flags.types import AnyPath, Device, Files, Folders, Prompts, SaveDtype, Scales


def _scale_problems(folders: list[str], scales: list[float]) -> list[str]:
    if len(scales) in (1, len(folders)):
        return []
    return [
        f"--lora_scale has {len(scales)} numbers for {len(folders)} adapters of --lora: give one, "
        "or one for each"
    ]


def _one_scale_each(folders: list[str], scales: list[float]) -> list[float]:
    return scales * len(folders) if len(scales) == 1 else scales


class GenerateConfig(Flags):
    """Generate music of any length with a fine-tuned MusicGen.

    Example: python generate.py --prompt="slow piano waltz" --duration=60
    """

    ALIASES: ClassVar[dict[str, str]] = {"weights": "weights_path", "output": "output_dir"}

    prompt: Prompts = Field(
        description='what to play: a prompt, a list ["one", "two"], or a .txt file with one per '
        "line"
    )
    weights_path: AnyPath | None = Field(
        "models/lm_final.pt", description="fine-tuned weights; None = the model before fine-tuning"
    )
    model_id: str | None = Field(
        None,
        description="the model that was fine-tuned, as for run.py; None = the one that run.py "
        "recorded with the weights, adapter or embedding, else small",
    )
    lora: Folders | None = Field(
        None,
        description='LoRA adapter: the lora_final folder that run.py wrote; or ["a", "b"] to add '
        "several. They are added to the base model unless weights_path is given too",
    )
    lora_scale: Scales = Field([1.0])
    embedding: Files | None = Field(
        None,
        description="learned word for the prompt: the learned_embeds.safetensors that run.py "
        'wrote; or ["a", "b"] for several. They use the base model unless weights_path is given '
        "too",
    )
    duration: float = Field(30.0, gt=0, description="seconds to generate")
    overlap: float | None = Field(
        None,
        gt=0,
        description="for music longer than the model's window (30 s): seconds that each further "
        "window continues from; more = more coherent and slower; None = 12, or half of a window "
        "under 24 s",
    )
    melody: AnyPath | None = Field(
        None, description="recording whose melody to follow, with a melody model; needs demucs"
    )
    prompt_audio: AnyPath | None = Field(
        None, description="recording to continue; the result begins with its last `overlap` seconds"
    )
    top_k: int = Field(250, ge=0, description="sample from the k most likely codes; 0 = all")
    top_p: float = Field(
        0.0,
        ge=0,
        le=1,
        description="sample from the most likely codes of this total probability; 0 = use top_k",
    )
    temperature: float = Field(
        1.0,
        ge=0,
        description="of sampling; lower = more predictable, 0 = always the most likely code",
    )
    cfg_coef: float = Field(
        3.0, ge=0, description="classifier-free guidance: how closely to follow the prompt; 1 = off"
    )
    seed: int = Field(
        0,
        ge=0,
        lt=2**63,
        description="the same seed gives the same music on the same machine; on the CPU also "
        "whatever else is generated with it",
    )
    variations: int = Field(
        1,
        ge=1,
        description="pieces for each prompt; all prompts and variations are generated at once",
    )
    output_dir: AnyPath = Field(
        "generated", description="folder, or a .wav file if there is only one piece"
    )
    overwrite: bool = Field(False, description="replace existing files of the same name")
    device: Device = Field("auto", description="auto, cuda, mps or cpu")
    int8: bool = Field(
        False,
        description="on the CPU, weights of 8 bits: faster, and a little less accurate",
    )

    @property
    def scales(self) -> list[float]:
        """The scale of each adapter in `lora`."""
        return _one_scale_each(self.lora or [], self.lora_scale)

    @property
    def full_weights(self) -> str | None:
        """`weights_path`, but not its default if `lora` or `embedding` is given.

        run.py has merged the adapter into that file; an embedding was trained on the base model.
        """
        is_default = "weights_path" not in self.model_fields_set
        return None if (self.lora or self.embedding) and is_default else self.weights_path

    def _problems(self) -> list[str]:
        if not self.lora:
            return self._idle({"lora_scale": (False, "--lora")})
        return _scale_problems(self.lora, self.lora_scale)


class ExportConfig(Flags):
    """Merge LoRA adapters into plain weights that any audiocraft script loads.

    Example: python export.py --lora=models/lora_final --lora_scale=0.7
    """

    lora: Folders = Field(
        description='the lora_final folder that run.py wrote; or ["a", "b"] to add several'
    )
    lora_scale: Scales = Field([1.0])
    model_id: str | None = Field(
        None, description="the model that was fine-tuned; None = the adapter's, else small"
    )
    output: AnyPath = Field("merged.pt", description="file to write")
    save_dtype: SaveDtype = Field("fp32", description="number format of the file")
    overwrite: bool = Field(False, description="replace an existing file")

    @property
    def scales(self) -> list[float]:
        """The scale of each adapter in `lora`."""
        return _one_scale_each(self.lora, self.lora_scale)

    def _problems(self) -> list[str]:
        problems = _scale_problems(self.lora, self.lora_scale)
        if Path(self.output).exists() and not self.overwrite:
            problems.append(f"--output={self.output}: exists; give another name, or --overwrite=1")
        return problems
