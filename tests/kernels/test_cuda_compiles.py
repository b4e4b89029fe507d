"""Every variant of the CUDA kernels compiles for every generation of GPUs, without a GPU, and has enough registers."""

from __future__ import annotations

import os
import re
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest

from anymamba.kernels import nvrtc
from anymamba.kernels.selective_scan.cuda import plan

if nvrtc.cannot_compile():
    pytest.skip(f"no CUDA C++ here: {nvrtc.cannot_compile()}", allow_module_level=True)

ARCHITECTURES = (80, 90, 100, 120)
MOST_VARIANTS = 60
SPILLED = 1024
"""Bytes a thread may keep in memory for want of registers: rare paths do, the loop over tokens does not."""


def compiled(variant: nvrtc.Variant, architecture: int) -> tuple[str, int]:
    """A variant's name, and the most bytes that a kernel of it spills."""
    cubin, said = nvrtc.compile_anew(variant, architecture, "--ptxas-options=-v")
    assert cubin.startswith(b"\x7fELF")
    spilled = [int(n) for n in re.findall(r"(\d+) bytes spill loads", said)]
    assert spilled, said
    return f"{variant.source.name} {dict(variant.options)} for sm_{architecture}", max(spilled)


def test_there_are_few_variants():
    found = {(variant.source, variant.options) for variant in plan.variants()}
    assert len(found) == len(plan.variants()) <= MOST_VARIANTS


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_variant_compiles(architecture):
    variants = plan.variants()
    with ProcessPoolExecutor(min(4, os.cpu_count() or 1), mp_context=get_context("spawn")) as pool:
        spilled = dict(pool.map(compiled, variants, [architecture] * len(variants)))
    assert {name: n for name, n in spilled.items() if n > SPILLED} == {}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_smallest_compiles_everywhere(architecture):
    """The headers are fine; the slow test compiles the rest."""
    assert compiled(plan.variants()[0], architecture)[1] == 0
