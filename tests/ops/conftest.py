"""The backends that tests run on: the compiled kernels once for each instruction set that this machine has.

`python -m pytest tests/ops --device cuda` runs them on a GPU, for the backends that serve one.
"""

from __future__ import annotations

import pytest
from gloo_group import Ranks

from anymamba.kernels.backends import BACKENDS
from anymamba.runtimes import native, triton


@pytest.fixture(scope="session")
def ranks():
    """Four processes with gloo. They start when the first test needs them."""
    pool = Ranks(4)
    yield pool
    pool.close()


def served(device: str) -> list[str]:
    """Every backend but the reference that serves an op on a device."""
    if device == "cpu":
        found = native.module().instruction_sets() if native.load() else []
        interpreted = ["triton"] if triton.unavailable("cpu") is None else []  # with TRITON_INTERPRET=1
        return ["portable", *(f"cpu {name}" for name in found), *interpreted]
    names = dict.fromkeys(m.NAME for modules in BACKENDS.values() for m in modules if m.unavailable(device) is None)
    return [name for name in names if name != "reference"]


def pytest_generate_tests(metafunc):
    """`fast` is every backend but the reference, `backend` is every one; a file may have a fixture of its own."""
    names = served(metafunc.config.getoption("--device"))
    for fixture, params in (("fast", names), ("backend", [*names, "reference"])):
        if fixture in metafunc.fixturenames and not hasattr(metafunc.module, fixture):
            metafunc.parametrize(fixture, params, indirect=True)


def serve(request):
    """The backend's name, with its instruction set chosen while the test runs."""
    name, _, instruction_set = request.param.partition(" ")
    if "conv" in request.node.nodeid and name not in {m.NAME for m in BACKENDS["causal_conv1d"]}:
        pytest.skip(f"{name} is no backend of the convolution")
    if not instruction_set:
        yield name
        return
    before = native.module().instruction_set()
    native.module().choose_instruction_set(instruction_set)
    yield name
    native.module().choose_instruction_set(before)


@pytest.fixture
def fast(request):
    yield from serve(request)


@pytest.fixture
def backend(request):
    yield from serve(request)


def pytest_collection_modifyitems(config, items):
    """A complex A is not for the compiled kernels nor for Triton, as `dispatch.report` says."""
    apart = [item for item in items if for_real_A(item) and is_complex(item)]
    if apart:
        config.hook.pytest_deselected(items=apart)
        items[:] = [item for item in items if item not in set(apart)]


def parameters(item) -> dict:
    """What a test is parametrized with."""
    return item.callspec.params if hasattr(item, "callspec") else {}


def for_real_A(item) -> bool:
    """Whether a test runs on a backend that supports only real A."""
    names = [str(parameters(item).get(name, "")) for name in ("fast", "backend")]
    return any(name.startswith("cpu ") or name == "triton" for name in names)


def is_complex(item) -> bool:
    """Whether a test's A is complex."""
    values = parameters(item).values()
    return bool(parameters(item).get("is_complex")) or any(isinstance(v, dict) and v.get("is_complex") for v in values)
