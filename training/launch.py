"""Read from the environment how torchrun or Accelerate has launched a run."""

import os

from errors import UserError

# What a saved Accelerate config may ask for. Each divides the weights among the processes, and
# a loop that knows nothing of it would train on old weights and save a part of them.
DIVIDED = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism config",
}


def process_count() -> int:
    """Return how many processes train together."""
    return int(os.environ.get("WORLD_SIZE", 1))


def local_process_count() -> int:
    """Return how many of them are on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def check_launch() -> None:
    """Raise UserError if the run was launched in a way that would train wrongly."""
    for name, what in DIVIDED.items():
        if os.environ.get(name, "").lower() not in ("", "0", "false", "no", "off"):
            raise UserError(
                f"this run was launched with {what} ({name}, as a saved Accelerate config sets "
                "it), which divides the model among processes; run.py can't train that way. "
                f"Launch it with torchrun --nproc_per_node={max(2, local_process_count())} "
                "run.py ..., or with accelerate launch --multi_gpu run.py ..."
            )
