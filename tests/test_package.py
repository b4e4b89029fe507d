"""The installed package: typed, quick to import, quick to answer --help."""

from __future__ import annotations

import ast
import builtins
import dis
import importlib
import importlib.metadata
import pkgutil
import subprocess
import sys
import time
from importlib import resources
from pathlib import Path
from types import CodeType, ModuleType

import pytest

import anymamba

ROOT = Path(__file__).resolve().parents[1]


def test_typed():
    assert (resources.files(anymamba) / "py.typed").is_file()


def test_license_is_the_whole_text_and_travels_with_the_package():
    text = (ROOT / "LICENSE").read_text()
    assert "Version 2.0, January 2004" in text and "END OF TERMS AND CONDITIONS" in text
    assert importlib.metadata.metadata("anymamba")["License-Expression"] == "Apache-2.0"


PUBLIC = {
    "anymamba": """
        ConvOutput LanguageModel Mamba MambaOptions MambaState ModelConfig SamplingConfig ScanOutput __version__ backend
        causal_conv1d causal_conv1d_step generate load_tokenizer preset selective_scan selective_scan_step stream
        stream_text""",
    "anymamba.layers": """
        Attention BiMamba GAU H3 Hyena HyenaFilter LayerNorm LearnedPositions LinearAttention MLP Mamba MambaBlock
        NoGate RMSNorm RWKVChannelMix RWKVTimeMix Retention S4 S4D S6 SequenceLayer SharedStrands ShortConvolution
        StrandEmbedding StrandHead""",
    "anymamba.parallel": """
        SequenceGroup clip_gradients context_parallel copy_from_first_rank parallelize reduce_gradients sequence_group
        sum_over_ranks whole_tensors""",
}
"""The names that a release promises: a name is deprecated before it is removed."""


@pytest.mark.parametrize("package", PUBLIC)
def test_public_names(package):
    module = importlib.import_module(package)
    assert sorted(module.__all__) == sorted(PUBLIC[package].split())
    assert all(getattr(module, name) is not None for name in module.__all__)
    assert set(dir(module)) == set(module.__all__) - {"__version__"}
    with pytest.raises(AttributeError, match=f"module '{package}' has no attribute 'nothing'"):
        module.nothing  # noqa: B018


@pytest.mark.parametrize("package", PUBLIC)
def test_type_checkers_see_the_same_names(package):
    tree = ast.parse(Path(importlib.import_module(package).__file__).read_text(encoding="utf-8"))
    imports = {n.name: node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for n in node.names}
    homes = importlib.import_module(package)._HOMES
    assert {name: home for name, home in imports.items() if name in homes} == homes


def test_every_layer_is_public():
    """Every SequenceLayer in `anymamba.layers` can be imported from there."""
    import anymamba.layers as layers
    from anymamba.models.mixers import MIXERS

    for found in pkgutil.iter_modules(layers.__path__, "anymamba.layers."):
        module = importlib.import_module(found.name)
        own = {n for n, v in vars(module).items() if isinstance(v, type) and issubclass(v, layers.SequenceLayer)}
        assert {n for n in own if vars(module)[n].__module__ == found.name and n[0] != "_"} <= set(layers.__all__) | {
            "GatedBlock"
        }
    assert MIXERS


def test_one_version():
    text = (ROOT / "compat" / "pyproject.toml").read_text()
    assert f'version = "{anymamba.__version__}"' in text
    assert importlib.metadata.version("anymamba") == anymamba.__version__


def undefined_names(module: ModuleType) -> set[str]:
    """Names that functions of a module look up and that neither the module nor builtins define."""
    assert module.__file__ is not None
    code = [compile(Path(module.__file__).read_text(encoding="utf-8"), module.__file__, "exec")]
    names: set[str] = set()
    while code:
        block = code.pop()
        names |= {i.argval for i in dis.get_instructions(block) if i.opname == "LOAD_GLOBAL"}
        code += [constant for constant in block.co_consts if isinstance(constant, CodeType)]
    return {name for name in names if not hasattr(module, name) and not hasattr(builtins, name)}


def test_every_name_is_defined(tmp_path):
    """Linters do not check names, because shapes in annotations look like names, and some branches run in no test."""
    for found in pkgutil.walk_packages(anymamba.__path__, f"{anymamba.__name__}."):
        if found.name.rsplit(".", 1)[-1] == "__main__" or found.name == "anymamba._native":
            continue
        try:
            module = importlib.import_module(found.name)
        except ModuleNotFoundError as error:
            assert error.name == "triton", f"{found.name} imports {error.name}"
            continue  # kernels in Triton, which is not installed everywhere
        undefined = undefined_names(module)
        assert not undefined, f"{found.name}: {undefined}"
    example = ModuleType("example")
    example.__file__ = str(tmp_path / "example.py")
    Path(example.__file__).write_text("def f():\n    raise ValueError(X)\n")
    assert undefined_names(example) == {"X"}


def test_import_does_not_import_torch():
    code = "import sys, anymamba, anymamba.cli, anymamba.models.presets, anymamba.training.config"
    script = f"{code}\nassert not {{'torch', 'datasets', 'transformers'}} & set(sys.modules), 'imported'"
    subprocess.run([sys.executable, "-c", script], check=True)


IMPORTS = """
import time
start = time.process_time()
import torch
middle = time.process_time()
import anymamba
[getattr(anymamba, name) for name in anymamba.__all__]
print((time.process_time() - middle) / (middle - start))
"""


def test_importing_everything_takes_less_than_two_fifths_of_the_time_of_importing_torch():
    assert min(float(printed(IMPORTS)) for _ in range(3)) < 0.4


def test_help_answers_in_a_fifth_of_the_time_of_importing_torch():
    command = [str(Path(sys.executable).with_name("anymamba")), "--help"]
    assert fastest(command) < fastest([sys.executable, "-c", "import torch"]) / 5


def printed(code: str) -> str:
    """What code prints in a fresh interpreter."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def fastest(command: list[str]) -> float:
    """The shortest time of three runs in seconds."""
    times = []
    for _ in range(3):
        start = time.perf_counter()
        subprocess.run(command, capture_output=True, check=True)
        times.append(time.perf_counter() - start)
    return min(times)
