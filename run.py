"""Fine-tune MusicGen: `python run.py --dataset_path=FOLDER` leaves `models/lm_final.pt`."""

from config import Config
from flags import parse, plain_errors

OUT_OF_MEMORY = (
    "Use less, in this order: --grad_checkpointing=1; a smaller --batch_size with a larger "
    "--grad_acc (the same result); a shorter --duration; a smaller --model_id; --tune_text=1."
)


def main() -> None:
    with plain_errors(OUT_OF_MEMORY):
        config = parse(Config, aliases={"dataset": "dataset_path"})
        from train import train  # torch and audiocraft: not before the flags are known to be good

        train(config)


if __name__ == "__main__":
    main()
