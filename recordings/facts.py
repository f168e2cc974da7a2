"""The facts of a recording's sound, and checks that it can be trained on."""

from typing import NamedTuple

MIN_CLIP_SEC = 0.5
SAMPLE_RATES_HZ = (4_000, 768_000)  # outside these a header is damaged, not unusual
MAX_CHANNELS = 32


class Facts(NamedTuple):
    """Sample rate in Hz, channels and frames; whether the end that its header promises is missing.

    `frames` are those that can be decoded.
    """

    sample_rate: int
    channels: int
    frames: int
    ends_early: bool = False


def missing_allowed(declared: int, sample_rate: int) -> int:
    """Return how many of the declared frames may be missing: less than 1 s and less than 1 %."""
    return max(0, min(sample_rate, -(-declared // 100)) - 1)


def truncated(declared: int, sample_rate: int) -> ValueError:
    """Return the error of a recording that ends too early."""
    return ValueError(
        f"truncated or damaged: its header says {declared / sample_rate:.2f} s of audio, but its "
        "end can't be read"
    )


def check_header(sample_rate: int, channels: int) -> None:
    """Raise ValueError if the rate or channels are impossible."""
    low, high = SAMPLE_RATES_HZ
    if not low <= sample_rate <= high or channels > MAX_CHANNELS:
        raise ValueError(f"damaged: its header says {sample_rate} Hz and {channels} channels")


def check_facts(sample_rate: int, channels: int, frames: int) -> None:
    """Raise ValueError if the rate, channels or length are impossible, or it is too short."""
    check_header(sample_rate, channels)
    if frames == 0:
        raise ValueError("its header says that it contains no audio (zero length)")
    if frames < MIN_CLIP_SEC * sample_rate:
        raise ValueError(f"too short: less than {MIN_CLIP_SEC} s")
