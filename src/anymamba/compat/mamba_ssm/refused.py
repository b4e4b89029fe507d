"""Names of the published `mamba_ssm` that are refused: `hasattr` is False, and the error of an import gives the reason.

Every other name of the published modules exists here. A module with refused names takes its `__getattr__` from this
file. A finder that runs after all others stops the import of a refused module.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

PACKAGE = "mamba_ssm"
HOME = __name__.removesuffix(f"{PACKAGE}.refused")

ORIGINAL = "the original package has it"
MAMBA_2 = f"it belongs to Mamba-2; {ORIGINAL}"
MAMBA_3 = f"it belongs to Mamba-3; {ORIGINAL}"
ATTENTION = f"it is attention; {ORIGINAL}"
PARALLEL = f"it splits layers over processes; {ORIGINAL}"
SOFTPLUS = "it is code for use inside Triton kernels; use torch.nn.functional.softplus"
TUNING = "it tunes Triton kernels; there is nothing to tune here"
DECORATORS = "it is torch's; use custom_fwd and custom_bwd of torch.amp"
COMPILED = "it is the compiled module; use the Python functions, such as SelectiveScanFn and causal_conv1d_fn"

MODULES = {
    "distributed": PARALLEL,
    "modules.mamba2": MAMBA_2,
    "modules.mamba2_simple": MAMBA_2,
    "modules.mamba3": MAMBA_3,
    "modules.mha": ATTENTION,
    "modules.ssd_minimal": MAMBA_2,
    "ops.cute": MAMBA_3,
    "ops.tilelang": MAMBA_3,
    "ops.triton.mamba3": MAMBA_3,
    "ops.triton.softplus": SOFTPLUS,
    "ops.triton.ssd_bmm": MAMBA_2,
    "ops.triton.ssd_chunk_scan": MAMBA_2,
    "ops.triton.ssd_chunk_state": MAMBA_2,
    "ops.triton.ssd_combined": MAMBA_2,
    "ops.triton.ssd_state_passing": MAMBA_2,
    "utils.determinism": "it configures Triton kernels; results here are the same in every run, with nothing to set",
    "utils.torch": DECORATORS,
}
"""Refused modules, and why."""

NAMES = {
    "": {"Mamba2": MAMBA_2, "Mamba3": MAMBA_3},
    "models.mixer_seq_simple": {"Mamba2": MAMBA_2, "MHA": ATTENTION},
    "ops.selective_scan_interface": {
        "selective_scan_cuda": COMPILED,
        "causal_conv1d_cuda": COMPILED,
        "custom_fwd": DECORATORS,
        "custom_bwd": DECORATORS,
    },
    "ops.triton.k_activations": {"autotune_configs": TUNING},
    "ops.triton.layer_norm": {
        "autotune_configs": TUNING,
        "config_prune": TUNING,
        "configs_autotune": TUNING,
        "pruned_configs_autotune": TUNING,
        "custom_fwd": DECORATORS,
        "custom_bwd": DECORATORS,
    },
    "ops.triton.selective_state_update": {"softplus": SOFTPLUS},
    "utils.generation": {
        "allocate_inference_cache": "it makes caches of attention; use the method of MambaLMHeadModel or of the layer"
    },
}
"""Refused names inside modules that exist here, and why."""


def refusing(module: str) -> Callable[[str], Any]:
    """The `__getattr__` of a module: it raises an AttributeError that says why a name is refused.

    `from module import name` hides the message of an AttributeError. But if the module has a `__path__`, as packages
    do, Python then calls the finders for a submodule of that name. So the module gets a `__path__`, and the error of
    the finder is what the caller sees.
    """
    vars(sys.modules[module]).setdefault("__path__", [])

    def getattr_(name: str) -> Any:
        why = reason(f"{module}.{name}")
        raise AttributeError(why or f"module {module!r} has no attribute {name!r}", name=name, obj=sys.modules[module])

    return getattr_


def reason(full: str) -> str | None:
    """Why a name or a module is refused, by its full name under anymamba's or the published package; None if not."""
    inside = full.removeprefix(HOME).removeprefix(f"{PACKAGE}.")
    module, _, name = inside.rpartition(".")
    why = MODULES.get(inside) or NAMES.get(module, {}).get(name)
    if why is None:
        return None
    return f"{PACKAGE}.{inside} is not in anymamba's {PACKAGE}, which has Mamba (S6) only: {why}"


class RefusedFinder(MetaPathFinder):
    """Stops the import of refused names and modules; `importlib.util.find_spec` returns None for them."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        why = reason(fullname) if _is_ours(fullname) else None
        caller = sys._getframe(1).f_back
        if why is None or (caller is not None and caller.f_globals.get("__name__") == "importlib.util"):
            return None  # importlib.util.find_spec only checks whether there is such a module
        published = fullname.removeprefix(HOME)
        kind = ModuleNotFoundError if published.removeprefix(f"{PACKAGE}.") in MODULES else ImportError
        raise kind(why, name=published)


def _is_ours(fullname: str) -> bool:
    if fullname.startswith(f"{HOME}{PACKAGE}."):
        return True
    active = sys.modules.get(PACKAGE)
    return fullname.startswith(f"{PACKAGE}.") and active is not None and active.__name__ == f"{HOME}{PACKAGE}"


if not any(isinstance(finder, RefusedFinder) for finder in sys.meta_path):
    sys.meta_path.append(RefusedFinder())
