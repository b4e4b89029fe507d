"""Vectors of regions: the same in any batch and in pieces, and those of the model's hidden vectors."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from anymamba.data.dna import Interval
from anymamba.evaluation.dna import embed

COMPLEMENT = (0, 1, 2, 3, 4, 5, 6, 10, 9, 8, 7, 11)
REGIONS = [
    Interval("chr1", 0, 50),
    Interval("chr1", 10, 11, "-"),
    Interval("chr2", 5, 38, "-"),
    Interval("chr1", 190, 300),
]


@torch.no_grad()
@pytest.mark.parametrize("mixers", [("mamba",), ("mamba", "attention"), ("bimamba",)], ids=str)
@pytest.mark.parametrize("complement", [(), COMPLEMENT], ids=["one strand", "both"])
def test_vectors_are_the_models(genome, tokenizer, model_of, mixers, complement):
    model = model_of(*mixers, complement=complement)
    expected = {"mean": [], "last": [], "positions": []}
    for region in REGIONS:
        text = genome.fetch(region.name, region.start, region.end, strand=region.strand)
        hidden = model.hidden(torch.tensor([tokenizer.encode(text)]))[0][0]
        last = hidden[-1]
        if complement:
            given, other = hidden.chunk(2, dim=-1)
            hidden, last = (given + other) / 2, (given[-1] + other[0]) / 2
        expected["positions"].append(hidden.numpy())
        expected["mean"].append(hidden.mean(0).numpy())
        expected["last"].append(last.numpy())
    for pooling, wanted in expected.items():
        for batch_size, chunk in ((1, 1000), (3, 23)):
            found = list(embed(model, tokenizer, genome, REGIONS, pooling=pooling, batch_size=batch_size, chunk=chunk))
            assert len(found) == len(REGIONS)
            for got, want in zip(found, wanted, strict=True):
                np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
                assert got.dtype == np.float32


@torch.no_grad()
@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_a_model_of_both_strands_gives_both_the_same_vector(genome, tokenizer, model_of, pooling):
    model = model_of("mamba", complement=COMPLEMENT)
    plus, minus = embed(model, tokenizer, genome, [Interval("chr2", 0, 40, s) for s in "+-"], pooling=pooling)
    np.testing.assert_allclose(plus, minus, rtol=1e-6, atol=1e-6)


def test_refusals(genome, tokenizer, model_of):
    with pytest.raises(ValueError, match="pooling must be one of mean, last, positions, got 'max'"):
        list(embed(model_of("mamba"), tokenizer, genome, REGIONS, pooling="max"))
    with pytest.raises(ValueError, match="the region chr1:5-5 has no base"):
        list(embed(model_of("mamba"), tokenizer, genome, [Interval("chr1", 5, 5)]))
