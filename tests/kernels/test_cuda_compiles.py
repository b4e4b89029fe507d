"""Every variant of the CUDA kernels compiles for every generation of GPUs, without a GPU, and has enough registers."""

from __future__ import annotations

import os
import re
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest

from anymamba.kernels.add_norm.cuda import call as add_norm
from anymamba.kernels.causal_conv1d.cuda import call as causal_conv1d
from anymamba.kernels.column_sums import cuda as column_sums
from anymamba.kernels.embedding_gradient import cuda as embedding_gradient
from anymamba.kernels.fft_conv import cuda as fft_conv
from anymamba.kernels.fft_conv.cuda import products
from anymamba.kernels.gated import cuda as gated
from anymamba.kernels.head_products import cuda as head_products
from anymamba.kernels.linear_cross_entropy import cuda as linear_cross_entropy
from anymamba.kernels.model_step.cuda import call as model_step
from anymamba.kernels.packed_linear import cuda as packed_linear
from anymamba.kernels.rotary import cuda as rotary
from anymamba.kernels.selective_scan.cuda import plan
from anymamba.runtimes import nvrtc

needs_compiler = pytest.mark.skipif(nvrtc.cannot_compile() is not None, reason=str(nvrtc.cannot_compile()))

ARCHITECTURES = (80, 90, 100, 120)
MOST_VARIANTS = 60
VARIANTS = [variant for op in (plan, add_norm, causal_conv1d, linear_cross_entropy) for variant in op.variants()]
OF_LAYERS = (fft_conv, products, head_products, gated, rotary, column_sums, embedding_gradient)
OTHERS = [v for op in (packed_linear, model_step, *OF_LAYERS) for v in op.variants()]
"""Of inference, and of layers that Mamba is compared with."""
AT_THE_SPEED_OF_MEMORY = (add_norm, causal_conv1d, linear_cross_entropy, packed_linear, model_step, *OF_LAYERS)
SPILLED = 1024
"""Bytes a thread may keep in memory for lack of registers: rare paths do, the loop over tokens does not."""


def ptx_of(variant: nvrtc.Variant) -> str:
    """What the compiler makes of a variant before it is turned into machine code."""
    compiler = nvrtc._require(nvrtc._compiler())
    headers = [(name.encode(), body.encode()) for name, body in variant.source.headers]
    names, bodies = [name for name, _ in headers], [body for _, body in headers]
    _, program = compiler.nvrtcCreateProgram(variant.source.text.encode(), b"a.cu", len(headers), bodies, names)
    options = [b"--gpu-architecture=compute_90", *(flag.encode() for flag in variant.flags())]
    compiler.nvrtcCompileProgram(program, len(options), options)
    _, size = compiler.nvrtcGetPTXSize(program)
    text = bytes(size + 2)
    compiler.nvrtcGetPTX(program, text)
    compiler.nvrtcDestroyProgram(program)
    return text[:size].decode()


def compiled(variant: nvrtc.Variant, architecture: int) -> tuple[str, int]:
    """A variant's name, and the most bytes that a kernel of it spills."""
    cubin, said = nvrtc.compile_anew(variant, architecture, "--ptxas-options=-v")
    assert cubin.startswith(b"\x7fELF")
    spilled = [int(n) for n in re.findall(r"(\d+) bytes spill loads", said)]
    assert spilled, said
    return f"{variant.source.name} {dict(variant.options)} for sm_{architecture}", max(spilled)


def test_there_are_few_variants():
    found = {(variant.source, variant.options) for variant in VARIANTS}
    assert len(found) == len(VARIANTS) <= MOST_VARIANTS


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_variant_compiles(architecture):
    """A minute and a half of processor time each; `.ci/run` runs it on its own."""
    with ProcessPoolExecutor(os.cpu_count() or 1, mp_context=get_context("spawn")) as pool:
        variants = VARIANTS + OTHERS
        spilled = dict(pool.map(compiled, variants, [architecture] * len(variants)))
    assert {name: n for name, n in spilled.items() if n > SPILLED} == {}


STORE = r"st\.global\.[bfu]32\s+\[{}\], \S+\s+"
SPLIT = re.compile(STORE.format(r"(%rd\d+)\+?\d*") + STORE.format(r"\1\+?\d*"))
"""Stores to neighbouring places, one directly after the other: they were one in the source."""


@needs_compiler
@pytest.mark.parametrize("op", AT_THE_SPEED_OF_MEMORY, ids=lambda op: op.__name__.removeprefix("anymamba.kernels."))
def test_the_compiler_does_not_split_stores(op):
    """It made four stores of a float4, each with a quarter of every 16 bytes."""
    for variant in op.variants():
        text = ptx_of(variant)
        assert ".entry" in text and not SPLIT.search(text), variant


@needs_compiler
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_smallest_compiles_everywhere(architecture):
    """The headers are fine; the slow test compiles the rest."""
    assert compiled(VARIANTS[0], architecture)[1] == 0
