"""Merge LoRA adapters into plain weights."""

from pathlib import Path

import files
from flags.generate import ExportConfig
from musicgen import lora
from musicgen.weights import portable, read_lm_state, save_tensors


def export(config: ExportConfig) -> Path:
    """Write the base model's weights with the adapters merged in. Raises: UserError."""
    path = Path(config.output)
    adapters = [lora.read(folder) for folder in config.lora]
    model_id = config.model_id or adapters[0].config.base_model_name_or_path or "small"

    files.check_writable(path.parent, "--output")
    with files.locked(path, "--output"):
        state = read_lm_state(model_id)
        for adapter, scale in zip(adapters, config.scales, strict=True):
            lora.merge(state, adapter, scale)
        save_tensors(path, portable(state, config.save_dtype))
    print(path)
    return path
