"""Generate music with a fine-tuned MusicGen: `python generate.py --prompt="slow piano waltz"`."""

from commands.pieces import check
from errors import plain_errors
from flags.generate import GenerateConfig
from flags.parse import parse

OUT_OF_MEMORY = "Use less: a smaller --model_id; a --duration shorter than the model's window."


def main() -> None:
    with plain_errors(OUT_OF_MEMORY):
        config = parse(GenerateConfig)
        paths = check(config)
        from commands.generate import generate  # imports torch: only once all of this is good

        generate(config, paths)


if __name__ == "__main__":
    main()
