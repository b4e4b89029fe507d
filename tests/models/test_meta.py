"""Models on the meta device: shapes alone, at no cost."""

from __future__ import annotations

import subprocess
import sys

BUILD_ALL = """
import sys
from anymamba import LanguageModel, ModelConfig
from anymamba.models.mixers import MIXERS, growing_mixers
for name in MIXERS:
    config = ModelConfig(d_model=16, n_layers=1, vocab_size=11, mixers=(name,))
    model = LanguageModel(config, device="meta")
    assert all(p.is_meta for p in model.parameters()), name
    growing_mixers(config)
print([name for name in sys.modules if name in ("sympy", "torch._dynamo")])
"""


def test_shapes_of_every_mixer_are_found_without_torchs_compiler():
    done = subprocess.run([sys.executable, "-c", BUILD_ALL], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
