"""accelerate's FSDP2, which `Trainer` uses, shards a wrapped model; tests/gpu tries it with Accelerator itself."""

from __future__ import annotations

import pytest

from tests.training.parallel import cases
from tests.training.parallel.ranks import Pool

pytest.importorskip("accelerate")
pytest.importorskip("transformers")


def test_accelerate_shards_a_wrapped_model() -> None:
    """Its losses are those of one process. A policy that would narrow A_log is an error with the way out."""
    pool = Pool(2)
    try:
        for precision in ("no", "bf16"):
            for loss, want, names in pool.run(2, cases.under_accelerate, precision, False):
                assert loss == pytest.approx(want, rel=1e-6)
                assert {"FSDPAnyMambaForCausalLM", "FSDPBlock"} <= set(names)
        for message in pool.run(2, cases.under_accelerate, "bf16", True):
            assert message.startswith("A_log must be float32 or wider, got torch.bfloat16")
    finally:
        pool.close()
