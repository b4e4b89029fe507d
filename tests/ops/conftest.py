"""The backends that tests run on: the compiled kernels once for each instruction set that this machine has."""

from __future__ import annotations

import pytest

from anymamba.kernels import native

FAST = ["portable", *(f"cpu {name}" for name in (native.module().instruction_sets() if native.load() else []))]


def serve(param: str):
    """The backend's name, with its instruction set chosen while the test runs."""
    name, _, instruction_set = param.partition(" ")
    if not instruction_set:
        yield name
        return
    before = native.module().instruction_set()
    native.module().choose_instruction_set(instruction_set)
    yield name
    native.module().choose_instruction_set(before)


@pytest.fixture(params=FAST)
def fast(request):
    """Every backend but the reference."""
    yield from serve(request.param)


@pytest.fixture(params=[*FAST, "reference"])
def backend(request):
    """Every backend."""
    yield from serve(request.param)


def pytest_collection_modifyitems(config, items):
    """A complex A is not for the compiled kernels, as `dispatch.report` says."""
    apart = [item for item in items if for_cpu(item) and is_complex(item)]
    if apart:
        config.hook.pytest_deselected(items=apart)
        items[:] = [item for item in items if item not in set(apart)]


def parameters(item) -> dict:
    """What a test is parametrized with."""
    return item.callspec.params if hasattr(item, "callspec") else {}


def for_cpu(item) -> bool:
    """Whether a test runs on the compiled kernels."""
    return any(str(parameters(item).get(name, "")).startswith("cpu ") for name in ("fast", "backend"))


def is_complex(item) -> bool:
    """Whether a test's A is complex."""
    values = parameters(item).values()
    return bool(parameters(item).get("is_complex")) or any(isinstance(v, dict) and v.get("is_complex") for v in values)
