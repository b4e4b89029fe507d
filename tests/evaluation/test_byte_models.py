"""The order-k byte model against a plain implementation, and the compressors against their own one-call forms."""

from __future__ import annotations

import lzma
import math
import time
import zlib
from collections import Counter, defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anymamba.evaluation import byte_models
from anymamba.evaluation.byte_models import OrderKByteModel, xz_bits_per_byte, zlib_bits_per_byte


class NaiveModel:
    """Witten-Bell interpolation byte by byte."""

    def __init__(self, documents: list[bytes], order: int) -> None:
        self.order, self.counts = order, defaultdict(Counter)
        for document in documents:
            for i, byte in enumerate(document):
                for k in range(min(i, order) + 1):
                    self.counts[document[i - k : i]][byte] += 1

    def probability(self, context: bytes, byte: int) -> float:
        context = context[max(0, len(context) - self.order) :]
        p = 1 / 256
        for k in range(len(context) + 1):
            seen = self.counts.get(context[len(context) - k :])
            if seen:
                p = (seen[byte] + len(seen) * p) / (seen.total() + len(seen))
        return p

    def bits_per_byte(self, documents: list[bytes]) -> float:
        bits = [-math.log2(self.probability(d[:i], byte)) for d in documents for i, byte in enumerate(d)]
        return sum(bits) / len(bits)


def random_text(rng, n: int) -> bytes:
    return bytes(rng.choice([97, 98, 99, 0, 255], p=[0.5, 0.2, 0.1, 0.1, 0.1], size=n).astype(np.uint8))


documents = st.lists(st.binary(max_size=12) | st.text("ab\x00", max_size=20).map(str.encode), min_size=1, max_size=6)


@settings(max_examples=60, deadline=None)
@given(documents.filter(any), documents.filter(any), st.integers(0, 7))
def test_equals_the_naive_model(training, held_out, order):
    model, naive = OrderKByteModel(training, order), NaiveModel(training, order)
    assert model.n_training_bytes == sum(map(len, training))
    assert model.bits_per_byte(held_out) == pytest.approx(naive.bits_per_byte(held_out), rel=1e-9)
    for context in (b"", *held_out):
        p = model.probabilities(context)
        assert p.sum() == pytest.approx(1, abs=1e-12) and p.min() > 0
        np.testing.assert_allclose(p, [naive.probability(context, byte) for byte in range(256)], rtol=1e-9)


@pytest.mark.parametrize("order", [0, 1, 3, 5])
def test_blocks_change_nothing(order, monkeypatch):
    rng = np.random.default_rng(0)
    training = [random_text(rng, n) for n in (1, 2, 300, 0, 5, 64, 129, 3)]
    held_out = [random_text(rng, n) for n in (200, 1, 30)]
    wanted = NaiveModel(training, order).bits_per_byte(held_out)
    for size in (8, 16, 64, 100, 10_000):
        blocks = byte_models._blocks.__defaults__
        monkeypatch.setattr(byte_models._blocks, "__defaults__", (size,))
        assert OrderKByteModel(iter(training), order).bits_per_byte(iter(held_out)) == pytest.approx(wanted, rel=1e-9)
        monkeypatch.setattr(byte_models._blocks, "__defaults__", blocks)


def test_contexts_do_not_reach_over_documents():
    model = OrderKByteModel([b"ab"] * 50 + [b"cd"] * 50, 2)
    assert model.probabilities(b"")[ord("a")] == model.probabilities(b"")[ord("c")]
    assert model.probabilities(b"b")[ord("c")] == pytest.approx(model.probabilities(b"")[ord("c")])


def test_megabytes_take_seconds():
    rng = np.random.default_rng(0)
    words = [random_text(rng, n) for n in rng.integers(2, 12, 5000)]
    training = [b" ".join(words[i] for i in rng.integers(0, 5000, 5000)) for _ in range(100)]  # 4 MB
    start = time.perf_counter()
    bits = OrderKByteModel(training).bits_per_byte(training[:10])
    assert time.perf_counter() - start < 10
    assert 0 < bits < 4


def test_more_context_predicts_better():
    text = b"the quick brown fox jumps over the lazy dog. " * 40
    bits = [OrderKByteModel([text], order).bits_per_byte([text[:300]]) for order in range(4)]
    assert bits == sorted(bits, reverse=True)


def test_compressors_measure_the_documents_as_one_stream():
    rng = np.random.default_rng(1)
    parts = [random_text(rng, n) for n in (1000, 0, 7, 5000)]
    whole = b"".join(parts)
    assert zlib_bits_per_byte(iter(parts)) == 8 * len(zlib.compress(whole, 9)) / len(whole)
    wanted = lzma.compress(whole, preset=9 | lzma.PRESET_EXTREME)
    assert xz_bits_per_byte(iter(parts)) == 8 * len(wanted) / len(whole)
    assert zlib_bits_per_byte(parts) < 8


def test_misuse():
    for measure in (zlib_bits_per_byte, xz_bits_per_byte, OrderKByteModel, OrderKByteModel([b"a"]).bits_per_byte):
        for nothing in ([], [b""]):
            with pytest.raises(ValueError, match="no bytes"):
                measure(nothing)
    for order in (-1, 8, 2.0, True):
        with pytest.raises(ValueError, match="order must be an integer from 0 to 7"):
            OrderKByteModel([b"a"], order)
