"""Captions to embeddings: what is kept of them."""

import pytest
import torch

from musicgen import load, text
from musicgen.text import TextEncoder, text_conditioner

CPU = torch.device("cpu")


@pytest.fixture
def lm(mono_folder):
    return load.load_model(str(mono_folder), CPU).lm


def test_embeddings_are_kept_up_to_a_number_of_bytes_the_last_used_ones(lm, monkeypatch):
    """Room for three captions of equal length, and five of them in turn."""
    captions = ["slow piano", "fast piano", "warm piano", "dark piano", "happy piano"]
    expected = [TextEncoder(lm)([caption], CPU)[0] for caption in captions]
    one = expected[0].nbytes
    assert {embedding.nbytes for embedding in expected} == {one}
    monkeypatch.setattr(text, "CACHE_BYTES", 3 * one + 1, raising=False)
    encoder, encoded = TextEncoder(lm), []
    text_conditioner(lm).t5.register_forward_hook(lambda *_: encoded.append(asked))

    order = [0, 1, 2, 0, 3, 0, 2, 3, 4, 1, 0]
    for index in order:
        asked = index
        assert torch.equal(encoder([captions[index]], CPU)[0], expected[index])
    # 3 pushes out 1, which was not used for longest, 4 then 0, 1 then 2, and 0 then 3.
    assert encoded == [0, 1, 2, 3, 4, 1, 0]
    assert encoder._cached.nbytes == sum(kept.nbytes for kept in encoder._cached.kept.values())
    assert encoder._cached.nbytes == 3 * one


def test_a_caption_that_is_larger_than_all_that_may_be_kept_is_encoded(lm, monkeypatch):
    expected = TextEncoder(lm)(["slow piano"], CPU)[0]
    monkeypatch.setattr(text, "CACHE_BYTES", expected.nbytes - 1, raising=False)
    encoder, encoded = TextEncoder(lm), []
    text_conditioner(lm).t5.register_forward_hook(lambda *_: encoded.append(1))
    for _ in range(2):
        assert torch.equal(encoder(["slow piano"], CPU)[0], expected)
    assert len(encoded) == 2
    assert encoder._cached.nbytes == 0
