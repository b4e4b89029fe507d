"""The CUDA scan of a row in parts is that of the whole row, and does not repeat its first phase."""

from __future__ import annotations

import pytest
import torch
from scan_backends import arguments
from scan_cases import scan_inputs
from scan_parts import check_parts

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

CASES = {
    "three long parts": ((9000, 5000, 7001), {"batch": 1, "d_inner": 96, "d_state": 16}),
    "one chunk": ((40, 64, 1), {"batch": 2, "d_inner": 64, "d_state": 16}),
    "an empty part": ((3000, 0, 3000), {"batch": 1, "d_inner": 40, "d_state": 5}),
    "groups": ((4000, 4000), {"batch": 1, "d_inner": 80, "d_state": 16, "B": 2, "C": 2}),
    "many states": ((4000, 3000), {"batch": 1, "d_inner": 32, "d_state": 40}),
    "complex": ((2000, 1500), {"batch": 1, "d_inner": 32, "d_state": 8, "is_complex": True}),
    "packed": ((5000, 6000, 4000), {"batch": 1, "d_inner": 64, "d_state": 16, "lengths": [300, 11000, 0, 3700]}),
    "edges": ((5000, 6000), {"batch": 1, "d_inner": 64, "d_state": 16, "lengths": [5000, 5999, 1]}),
}


@pytest.mark.parametrize("name", CASES)
def test_parts_are_the_whole(name: str) -> None:
    lengths, options = CASES[name]
    a = arguments(scan_inputs(length=sum(lengths), dtype=torch.float32, seed=1, **options), "cuda")
    had_phases = check_parts(a, lengths, "cuda", 2e-5)
    if name in ("three long parts", "packed"):
        assert all(had_phases)
