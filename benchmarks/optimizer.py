"""What the optimizers that take less memory learn, beside AdamW.

    python -m benchmarks.optimizer      # the demo's model and data, held-out cross entropy

From the project's root, on the CPU; trains as `make demo` does, but in bf16 and with the flags that
it prints.
"""

import fire

from benchmarks.lora import learn

WAYS = {
    name: {"precision": "bf16", "optimizer": name}
    for name in ("adamw", "adamw_8bit", "adamw_8bit_bf16")
}


def main(seeds: int = 1) -> None:
    learn(seeds, WAYS)


if __name__ == "__main__":
    fire.Fire(main)
