"""The wording of captions: fields merged in, a trigger or a new word put in front."""

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
    """Return whether a caption has the word by itself, as placeholder.py's tokenizer sees it.

    Example: "jig" is in "a jig, fast", but not in "jigsaw".
    """
    return re.search(rf"(?<!\w){re.escape(word)}(?!\w)", caption) is not None


def put_in_front(word: str, caption: str) -> str:
    """Return the caption, with the word in front unless it has it already."""
    return caption if has(word, caption) else f"{word} {caption}"


def in_front(trigger: str | None, word: str | None, text: str) -> str:
    """Put --placeholder's word and --trigger in front of a caption that lacks them.

    Example: "slow piano" -> "my-style, slow piano"
    """
    has_trigger = not trigger or re.match(rf"{re.escape(trigger)}(?!\w)", text)
    if word:
        text = put_in_front(word, text)
    return text if has_trigger else f"{trigger}, {text}"
