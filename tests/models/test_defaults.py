"""A layer's defaults are those of its options, which live in one place."""

from __future__ import annotations

import inspect

import pytest

from anymamba import layers
from anymamba.parts import options

DIFFERENT = {("Attention", "positions")}  # the layer has no table of positions; the model adds one
PAIRS = [
    *(("Mamba", "MambaOptions"), ("S6", "MambaOptions"), ("MambaBlock", "MambaOptions"), ("S4", "S4Options")),
    *(("S4D", "S4DOptions"), ("Hyena", "HyenaOptions"), ("H3", "H3Options"), ("Attention", "AttentionOptions")),
    *(("MLP", "MLPOptions"), ("GAU", "GAUOptions"), ("LinearAttention", "LinearAttentionOptions")),
    ("Retention", "RetentionOptions"),
]


@pytest.mark.parametrize(("layer", "kind"), PAIRS)
def test_defaults_of_a_layer_are_those_of_its_options(layer, kind):
    values = getattr(options, kind)()
    parameters = inspect.signature(getattr(layers, layer).__init__).parameters
    shared = {name for name in parameters if hasattr(values, name)}
    assert shared
    for name in shared:
        if parameters[name].default is not inspect.Parameter.empty and (layer, name) not in DIFFERENT:
            assert parameters[name].default == getattr(values, name), name
