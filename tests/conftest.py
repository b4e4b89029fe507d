"""The surroundings of every test: two threads, no network, separate caches; and the shared data, if it is there.

Of several processes that share the tests each has one thread.
"""

from __future__ import annotations

import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before any test imports a Hugging Face library
os.environ["TORCHINDUCTOR_FX_GRAPH_CACHE"] = "0"  # cached graphs may be of an older version of the operators

import pytest
import torch


def pytest_addoption(parser):
    parser.addoption("--device", default="cpu", choices=("cpu", "cuda"), help="device of the tensors in tests/ops")


def pytest_configure(config):
    """Make tensors on the device by default. torch's default device would be a mode, which the operators would see."""
    if config.getoption("--device") == "cuda":
        torch.set_default_tensor_type(torch.cuda.FloatTensor)


SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(autouse=True, scope="session")
def own_surroundings(tmp_path_factory):
    """Tests do not use the caches of the user who runs them."""
    torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real texts, tokenizers and genomes next to the repository."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"needs the shared data in {SHARED_DATA}, which does not exist")
    return SHARED_DATA
