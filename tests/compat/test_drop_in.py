"""`mamba_ssm` and `causal_conv1d` without the originals: activated in a process, installed, and under transformers."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run(code: str, *paths: Path, check: bool = True) -> subprocess.CompletedProcess[str]:
    """A program in a process of its own, with folders on its path."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths))}
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=check, env=environment, timeout=300
    )


# ------------------------------------------------------------------------------------------ activate

IMPORTS = """
from mamba_ssm import Mamba, MambaLMHeadModel, mamba_inner_fn, selective_scan_fn
from mamba_ssm.modules.mamba_simple import Mamba as Layer, Block as Block1
from mamba_ssm.modules.block import Block
from mamba_ssm.ops.triton.layernorm import RMSNorm, layer_norm_fn, rms_norm_fn
from mamba_ssm.ops.triton.layer_norm import RMSNorm as Same
from mamba_ssm.ops.selective_scan_interface import mamba_inner_fn as inner, selective_scan_ref
from mamba_ssm.ops.triton.selective_state_update import selective_state_update
from mamba_ssm.models.mixer_seq_simple import MixerModel, _init_weights, create_block
from mamba_ssm.models.config_mamba import MambaConfig
from mamba_ssm.utils.generation import InferenceParams, GenerationMixin
from mamba_ssm.utils.hf import load_config_hf, load_state_dict_hf
from causal_conv1d import causal_conv1d_fn, causal_conv1d_update
from causal_conv1d.causal_conv1d_interface import causal_conv1d_ref
from causal_conv1d.causal_conv1d_varlen import causal_conv1d_varlen_states
from causal_conv1d.cpp_functions import causal_conv1d_fwd_function
import importlib.util, torch, mamba_ssm, causal_conv1d
assert Layer is Mamba and Same is RMSNorm and inner is mamba_inner_fn
assert importlib.util.find_spec("mamba_ssm") and importlib.util.find_spec("causal_conv1d")
assert importlib.util.find_spec("mamba_ssm.ops.triton.layer_norm")
assert mamba_ssm.ops.selective_scan_interface.selective_scan_fn is selective_scan_fn
print(tuple(Mamba(16)(torch.randn(2, 5, 16)).shape))
"""


def test_activate():
    result = run("import anymamba.compat\nanymamba.compat.activate()\nanymamba.compat.activate()\n" + IMPORTS)
    assert result.stdout.strip() == "(2, 5, 16)"


def test_nothing_is_there_without_it():
    result = run("import anymamba.compat, mamba_ssm", check=False)
    assert "ModuleNotFoundError: No module named 'mamba_ssm'" in result.stderr


@pytest.fixture
def original(tmp_path) -> Path:
    """A folder with something installed as mamba-ssm."""
    (tmp_path / "mamba_ssm").mkdir()
    (tmp_path / "mamba_ssm" / "__init__.py").write_text("__version__ = '2.2.4'\n")
    info = tmp_path / "mamba_ssm-2.2.4.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mamba-ssm\nVersion: 2.2.4\n")
    return tmp_path


def test_activate_after_an_imported_original(original):
    code = "import mamba_ssm, anymamba.compat\nanymamba.compat.activate()"
    error = run(code, original, check=False).stderr.strip().splitlines()[-1]
    assert error.startswith("RuntimeError: mamba_ssm from ") and "is already imported; call" in error
    code = "import anymamba.compat\nanymamba.compat.activate()\nimport mamba_ssm\nprint(mamba_ssm.__file__)"
    assert "anymamba" in run(code, original).stdout  # before it is imported, what was asked for is what comes


def test_transformers_that_cannot_be_patched(tmp_path):
    """A model's file that keeps the operators in another way, as version 4 does."""
    folder = tmp_path / "transformers" / "models" / "old"
    folder.mkdir(parents=True)
    for path in (folder, folder.parent, folder.parents[1]):
        (path / "__init__.py").touch()
    (folder / "modeling_old.py").write_text("try:\n    import mamba_ssm\nexcept ImportError:\n    mamba_ssm = None\n")
    code = "import transformers.models.old.modeling_old, anymamba.compat\nanymamba.compat.activate()"
    error = run(code, tmp_path, check=False).stderr.strip().splitlines()[-1]
    assert error.startswith("RuntimeError: transformers.models.old.modeling_old was imported before and")


# ------------------------------------------------------------------------------------------ the distribution


@pytest.fixture(scope="module")
def distribution(tmp_path_factory) -> Path:
    """A folder into which compat/ was installed."""
    target = tmp_path_factory.mktemp("site")
    source = shutil.copytree(
        ROOT / "compat", tmp_path_factory.mktemp("source") / "compat"
    )  # a build leaves files behind
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*command, "--target", str(target), str(source)], check=True, timeout=300)
    return target


def test_the_installed_packages(distribution):
    assert run(IMPORTS, distribution).stdout.strip() == "(2, 5, 16)"
    first = "import mamba_ssm.ops.triton.layernorm as a\nimport causal_conv1d\nprint(a.RMSNorm.__module__)"
    assert run(first, distribution).stdout.strip() == "anymamba.compat.mamba_ssm.ops.triton.layer_norm"


def test_the_original_beside_it_is_refused(distribution, original):
    result = run("import mamba_ssm", distribution, original, check=False)
    error = result.stderr.strip().splitlines()[-1]
    assert error.startswith("ImportError: mamba-ssm 2.2.4 and anymamba-compat are both installed")
    assert "pip uninstall mamba-ssm" in error and "pip uninstall anymamba-compat" in error


STATUS = "from anymamba.compat import drop_in\nprint(drop_in.status()['mamba_ssm'])"


def test_info_tells_which_is_active(distribution, original, tmp_path):
    assert run(STATUS).stdout.startswith("not installed; pip install ./compat, or anymamba.compat.activate()")
    assert run(STATUS, distribution).stdout.strip() == "anymamba's, by anymamba-compat 0.1.0.dev0"
    assert run(STATUS, original).stdout.strip() == "the original, 2.2.4"
    conflict = run(STATUS, distribution, original).stdout
    assert conflict.startswith("conflict: mamba-ssm 2.2.4 and anymamba-compat 0.1.0.dev0")
    active = f"import anymamba.compat\nanymamba.compat.activate()\n{STATUS}"
    assert run(active, distribution).stdout.strip() == "anymamba's, active"
    told = run("from anymamba.cli import main\nmain(['info', '--json'])", distribution).stdout
    assert json.loads(told)["drop-in"]["causal_conv1d"] == "anymamba's, by anymamba-compat 0.1.0.dev0"


# ------------------------------------------------------------------------------------------ transformers

transformers = pytest.importorskip("transformers", reason="the extra 'test' installs transformers")


def resolved(code: str, *paths: Path) -> dict[str, str]:
    """Which function transformers' Mamba took for each operator."""
    tail = """
import inspect, json
from transformers.models.mamba import modeling_mamba as m
names = [n for n, v in vars(m).items() if inspect.isfunction(v) and hasattr(v, "__wrapped__")]
found = {n: inspect.getclosurevars(getattr(m, n)).nonlocals.get("implementation") for n in names}
print(json.dumps({n: f"{f.__module__}.{f.__name__}" for n, f in found.items() if f is not None}))
"""
    return json.loads(run(code + tail, *paths).stdout.strip().splitlines()[-1])


OPERATORS = {
    "causal_conv1d_fn": "anymamba.compat.causal_conv1d.causal_conv1d_interface.causal_conv1d_fn",
    "causal_conv1d_update": "anymamba.compat.causal_conv1d.causal_conv1d_interface.causal_conv1d_update",
    "mamba_inner_fn": "anymamba.compat.mamba_ssm._declined",
    "mamba_selective_scan": "anymamba.compat.mamba_ssm.ops.selective_scan_interface.selective_scan_fn",
    "mamba_selective_state_update": (
        "anymamba.compat.mamba_ssm.ops.triton.selective_state_update.selective_state_update"
    ),
}


def test_transformers_takes_our_operators(distribution):
    """Installed, activated before its model is imported, and after."""
    activate = "import anymamba.compat; anymamba.compat.activate()\n"
    assert resolved("", distribution) == OPERATORS
    assert resolved(activate) == OPERATORS
    assert resolved("import transformers.models.mamba.modeling_mamba\n" + activate) == OPERATORS


def dropped_in(*arguments: str) -> dict:
    """What changes in a model of transformers when our operators come."""
    command = [sys.executable, str(Path(__file__).with_name("dropped_in.py")), *arguments]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True, timeout=300).stdout)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["mamba", "falcon_mamba", "jamba"])
def test_the_same_outputs(name, dtype):
    """Training and generation of a left-padded batch; in bfloat16 as near to float32 as without our operators."""
    pytest.importorskip("peft", reason="the extra 'test' installs peft")
    result = dropped_in(name, dtype, *(["lora"] if dtype == "float32" and name != "jamba" else []))
    kernels = result["kernels"]
    for op in ("selective_scan", "causal_conv1d"):
        assert {f"{op} cpu {part}" for part in ("forward", "backward", "step")} <= set(kernels), kernels
    for key in ("loss", "logits", "steps", "grads"):
        if dtype == "float32":
            assert result[key] < 1e-5, f"{key} differ by {result[key]:.1e}"
        else:
            got, before = result[f"{key} error"], result[f"{key} error before"]
            assert got < 1.5 * before + 1e-3, f"error of {key}: {got:.1e}, without our operators {before:.1e}"
    assert result["tokens"] or dtype == "bfloat16"
    if dtype == "float32" and name != "jamba":
        assert len(result["lora"]) == 4 and all(norm > 0 for norm in result["lora"].values())


@pytest.mark.parametrize("name", ["mamba gelu", "zamba relu2"])
def test_other_activations(name):
    """The convolution's activation is whatever transformers has a name for."""
    result = dropped_in(name, "float32")
    assert {"causal_conv1d cpu forward", "causal_conv1d cpu step", "selective_scan cpu step"} <= set(result["kernels"])
    assert all(result[key] < 1e-5 for key in ("loss", "logits", "steps", "grads")) and result["tokens"], result


def test_a_model_that_takes_some_of_our_operators():
    """Mamba-2 takes the convolution and the step, with heads and groups; its own scan stays."""
    result = dropped_in("mamba2", "float32")
    assert {"causal_conv1d cpu forward", "causal_conv1d cpu step", "selective_scan cpu step"} <= set(result["kernels"])
    assert all(result[key] < 1e-5 for key in ("loss", "logits", "steps", "grads")) and result["tokens"], result
