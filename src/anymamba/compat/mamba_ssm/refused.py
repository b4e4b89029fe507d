"""Names of the published `mamba_ssm` that are refused: `hasattr` says no, and an import says why and what to do.

Everything of the published modules that is not here is offered. A module with refused names takes its `__getattr__`
from here; the import of a refused module is stopped by a finder that is asked after all others.
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
SOFTPLUS = "it is code for the inside of Triton kernels; torch.nn.functional.softplus does its work outside"
TUNING = "it tunes Triton kernels; there is nothing to tune here"
DECORATORS = "it is torch's; take custom_fwd and custom_bwd of torch.amp"
COMPILED = (
    "it is the compiled module; the functions beside it, SelectiveScanFn and causal_conv1d_fn among them, do its work"
)

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
    "utils.determinism": "it steers Triton kernels; results here are the same in every run, with nothing to set",
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
        "allocate_inference_cache": "it makes caches of attention; take that of MambaLMHeadModel or of the layer"
    },
}
"""Refused names inside modules that are offered, and why."""


def refusing(module: str) -> Callable[[str], Any]:
    """The `__getattr__` of a module: an AttributeError that says why a name is refused.

    `from module import name` hides an AttributeError's message, but asks the finders for a module of that name where
    the module has a `__path__`, as packages do. So the module gets one, and the finder has the last word.
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
    """Stops imports of what is refused. It answers the question whether a module exists with no."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        why = reason(fullname) if _is_ours(fullname) else None
        asker = sys._getframe(1).f_back
        if why is None or (asker is not None and asker.f_globals.get("__name__") == "importlib.util"):
            return None  # importlib.util.find_spec asks whether there is such a module
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
