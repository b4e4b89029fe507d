"""Makes `import mamba_ssm` and `import causal_conv1d` import anymamba's modules in this process.

There are two ways. The packages of the distribution in `compat/` call `provide` when they are imported. Without it, a
program calls `activate`. Both give the modules of `anymamba.compat` these names.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import sys
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import PackageNotFoundError, distribution
from types import ModuleType
from typing import Any

HOME = "anymamba.compat"
PACKAGES = ("mamba_ssm", "causal_conv1d")
REAL = {"mamba_ssm": "mamba-ssm", "causal_conv1d": "causal-conv1d"}
"""For each package, the distribution of the original."""
OURS = "anymamba-compat"
CONVOLUTIONS = ("causal_conv1d_fn", "causal_conv1d_update")
COMPILED = ("causal_conv1d_fwd_function", "causal_conv1d_bwd_function", "causal_conv1d_update_function")
HANDED_ON = {
    "mamba_ssm.modules.mamba_simple": CONVOLUTIONS,
    "mamba_ssm.ops.selective_scan_interface": ("causal_conv1d_fn", *COMPILED),
    "causal_conv1d.causal_conv1d_interface": COMPILED,
}
"""Names of causal_conv1d that programs also import from these modules."""


def provide(package: str) -> None:
    """Replace a package that is being imported by anymamba's modules.

    Raises ImportError if the original is installed too, and says how to remove either of them.
    """
    real = installed(REAL[package])
    if real is not None:
        raise ImportError(
            f"{REAL[package]} {real} and {OURS} are both installed and share the folder {package}; to keep anymamba's: "
            f"pip uninstall {REAL[package]}, then install {OURS} again; to keep the original: pip uninstall {OURS}, "
            f"then install {REAL[package]} again"
        )
    _alias(package)


def activate() -> None:
    """Make `mamba_ssm` and `causal_conv1d` import anymamba's modules from now on in this process, installed or not.

    Models of transformers that were imported before are patched to use our operators.
    Raises RuntimeError if an original was imported before, or if the version of transformers cannot be patched.
    """
    for package in PACKAGES:
        module = sys.modules.get(package)
        if module is not None and not is_ours(module):
            place = getattr(module, "__file__", None)
            raise RuntimeError(
                f"{package} from {place} is already imported; call anymamba.compat.activate() before that"
            )
    for package in PACKAGES:
        _alias(package)
    patch_transformers()


def is_ours(module: ModuleType) -> bool:
    """Whether a module is anymamba's, under either name."""
    return module.__name__.startswith(f"{HOME}.")


def status() -> dict[str, str]:
    """For each package, a phrase that says which one `import` would give; nothing is imported."""
    return {package: _status(package) for package in PACKAGES}


def installed(name: str) -> str | None:
    """The version of an installed distribution, or None."""
    try:
        return distribution(name).version
    except PackageNotFoundError:
        return None


def _status(package: str) -> str:
    module = sys.modules.get(package)
    if module is not None:
        return "anymamba's, active" if is_ours(module) else "the original, active"
    real, ours = installed(REAL[package]), installed(OURS)
    if real is not None and ours is not None:
        return f"conflict: {REAL[package]} {real} and {OURS} {ours} are both installed; remove one"
    if real is not None:
        return f"the original, {real}"
    if ours is not None:
        return f"anymamba's, by {OURS} {ours}"
    return "not installed; pip install ./compat, or anymamba.compat.activate() in a process, gives anymamba's"


def _alias(package: str) -> None:
    root = importlib.import_module(f"{HOME}.{package}")
    found = pkgutil.walk_packages(root.__path__, prefix=f"{root.__name__}.")
    for name in (root.__name__, *(entry.name for entry in found)):
        sys.modules[name.removeprefix(f"{HOME}.")] = importlib.import_module(name)
    _hand_on(package)


def _hand_on(package: str) -> None:
    convolutions = importlib.import_module(f"{HOME}.causal_conv1d")
    compiled = importlib.import_module(f"{HOME}.causal_conv1d.cpp_functions")
    for name, wanted in HANDED_ON.items():
        if name.startswith(f"{package}."):
            module = importlib.import_module(f"{HOME}.{name}")
            for function in wanted:
                setattr(module, function, getattr(compiled if function in COMPILED else convolutions, function))


# ------------------------------------------------------------------------------------------ transformers


def patch_transformers() -> list[str]:
    """Look up the operators of transformers' imported models again; returns the names `module.function` that changed.

    transformers looks for the packages when a model's file is imported and keeps what it finds.
    Raises RuntimeError if an imported model keeps such operators in another way.
    """
    changed = []
    for module in _models_imported():
        functions = dict(_resolved_operators(module))
        if not functions:
            raise RuntimeError(
                f"{module.__name__} was imported before and this version of transformers cannot be patched; call "
                "anymamba.compat.activate() before importing its models"
            )
        for name, resolve in functions.items():
            setattr(module, name, resolve())
            changed.append(f"{module.__name__}.{name}")
    return changed


def _models_imported() -> Iterator[ModuleType]:
    """The imported files of transformers' models whose source names one of the packages."""
    for name, module in list(sys.modules.items()):
        if name.startswith("transformers.models.") and ".modeling_" in name and module is not None:
            source = inspect.getsource(module)
            if any(f'"{package}"' in source or f"import {package}" in source for package in PACKAGES):
                yield module


def _resolved_operators(module: ModuleType) -> Iterator[tuple[str, Callable[[], Any]]]:
    """The functions that transformers' decorator has made, each with a call that makes it again."""
    try:
        from transformers.integrations.hub_kernels import use_kernel_func_from_hub_with_fallback as decorator
    except ImportError:  # before version 5
        return
    for name, value in list(vars(module).items()):
        original = getattr(value, "__wrapped__", None)
        if original is None or not inspect.isfunction(value):
            continue
        kept = inspect.getclosurevars(value).nonlocals
        if kept.get("package") in PACKAGES and "func_name" in kept:
            yield name, partial(decorator(kept["func_name"], kept["package"]), original)
