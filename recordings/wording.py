"""How a caption is phrased: its fields merged into it, a trigger or a new word in front."""

import re

import numpy as np

from recordings.captions import Caption

DROP_P = 0.5  # of the description, and of each field: audiocraft's drop_desc_p and drop_other_p


def merged(caption: Caption, merge_text_p: float, rng: np.random.Generator) -> str:
    """Return a caption with some of its fields in random order, or as it is; never empty.

    Source: audiocraft's augment_music_info_description.
    """
    if rng.random() >= merge_text_p:
        return caption.plain
    fields = [field for field in caption.fields if rng.random() >= DROP_P]
    rng.shuffle(fields)
    if not fields:
        return caption.plain
    if not caption.description or rng.random() < DROP_P:
        return ". ".join(fields)
    return ". ".join([caption.description.rstrip("."), *fields])


def has(word: str, caption: str) -> bool:
    """Whether a caption holds the word by itself, as the tokenizer of placeholder.py will see it.

    Example: "jig" is in "a jig, fast" and not in "jigsaw"
    """
    return re.search(rf"(?<!\w){re.escape(word)}(?!\w)", caption) is not None


def put_in_front(word: str, caption: str) -> str:
    """The caption with the word, in front if it was not in it."""
    return caption if has(word, caption) else f"{word} {caption}"


def in_front(trigger: str | None, word: str | None, text: str) -> str:
    """A caption with --placeholder's word and --trigger.

    Example: "slow piano" -> "my-style, slow piano"
    """
    has_trigger = not trigger or re.match(rf"{re.escape(trigger)}(?!\w)", text)
    if word:
        text = put_in_front(word, text)
    return text if has_trigger else f"{trigger}, {text}"
