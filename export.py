"""Merge LoRA adapters into plain weights: `python export.py --lora=models/lora_final`."""

from errors import plain_errors
from flags.generate import ExportConfig
from flags.parse import parse


def main() -> None:
    with plain_errors("Close other programs, or merge on a machine with more memory."):
        config = parse(ExportConfig)
        from commands.export import export  # imports torch: only once the flags are good

        export(config)


if __name__ == "__main__":
    main()
