"""Fine-tune MusicGen: `python run.py --dataset_path=FOLDER` writes `models/lm_final.pt`."""

from errors import plain_errors
from flags.parse import parse
from flags.run import Config
from training.tracks import first_checks, scan_dataset

OUT_OF_MEMORY = (
    "Use less, in this order: --grad_checkpointing=1; a smaller --batch_size with a larger "
    "--grad_acc (the same result); --optimizer=adamw_8bit; --optimizer=adamw_8bit_bf16; "
    "--lora_rank=16 --lr=1e-4 with --optimizer=adamw_8bit; a shorter --duration; a smaller "
    "--model_id; --tune_text=1. --dry_run=1 shows how much each saves."
)


def main() -> None:
    with plain_errors(OUT_OF_MEMORY):
        config = parse(Config)
        # Importing torch and audiocraft takes 10 s: only once all of this is known to be good.
        if config.dry_run:
            tracks, _ = scan_dataset(config)
            from commands.dry_run import dry_run

            print(dry_run(config, tracks))
        else:
            scanned = first_checks(config)
            from train import train

            train(config, scanned)


if __name__ == "__main__":
    main()
