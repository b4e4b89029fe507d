"""Windows of bytes, the corpus of the standard library, and the loss on it."""

from __future__ import annotations

from math import log

import pytest
import torch

from anymamba.lab.byte_windows import fixed_windows, random_windows, standard_library_bytes
from anymamba.lab.learning import evaluate


def test_windows_are_bytes_and_those_that_follow():
    text = torch.arange(50, dtype=torch.uint8)
    ids, labels = random_windows(text, 7)(torch.Generator().manual_seed(0), 400)
    assert ids.shape == labels.shape == (400, 7)
    assert torch.equal(labels, ids + 1) and torch.equal(ids, ids[:, :1] + torch.arange(7))
    assert ids[:, 0].min() == 0 and ids[:, 0].max() == 42  # first and last that fit
    ids, labels = fixed_windows(text, 7, 4)
    assert ids[:, 0].tolist() == [0, 14, 28, 42] and labels[-1, -1] == 49


def test_both_sides_of_the_corpus_are_files_of_their_own():
    training, held_out = standard_library_bytes(False), standard_library_bytes(True)
    assert len(training) > 5_000_000 and len(held_out) > 100_000 and training.dtype == torch.uint8
    piece = bytes(held_out[1000:1200].tolist())
    assert piece not in training.numpy().tobytes()


def test_a_text_without_room_for_a_window():
    with pytest.raises(ValueError, match="longer than a window of 7 bytes, got 7 bytes; shorten the window"):
        random_windows(torch.zeros(7, dtype=torch.uint8), 7)


class NextByte(torch.nn.Module):
    """Gives the byte one above that it reads the probability p, all others the same."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p, self.config = p, type("Config", (), {"vocab_size": 256})

    def hidden(self, ids):
        right = torch.nn.functional.one_hot((ids + 1) % 256, 256)
        return right * log(255 * self.p / (1 - self.p)), None  # the sum of exponentials is nearly exact

    def logits(self, x):
        return x


def test_the_loss_is_nats_a_byte():
    rows = fixed_windows(torch.arange(50, dtype=torch.uint8), 7, 4)
    assert evaluate(NextByte(0.5), rows).loss == pytest.approx(
        log(2), rel=1e-5
    )  # exponentials of 256 logits, in float32
    assert evaluate(NextByte(1 / 256), rows).loss == pytest.approx(log(256))
    assert evaluate(NextByte(0.999), rows).tokens == 1 and evaluate(NextByte(0.001), rows).tokens == 0
