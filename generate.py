"""Generate music with a fine-tuned MusicGen: `python generate.py --prompt="slow piano waltz"`."""

from errors import plain_errors
from flags.generate import GenerateConfig
from flags.parse import parse

OUT_OF_MEMORY = "Use less: fewer --variations; a shorter --overlap; a smaller --model_id."


def main() -> None:
    with plain_errors(OUT_OF_MEMORY):
        config = parse(GenerateConfig)
        from commands.generate import generate  # imports torch: only once the flags are good

        generate(config)


if __name__ == "__main__":
    main()
