"""Compare what AdamW and the optimizers that take less memory learn.

    python -m benchmarks.optimizer      # the demo's model and data, held-out cross entropy

Run it in the project's root; it uses the CPU. It trains as `make demo` does, but in bf16 and with
the flags that it prints.
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
