"""What every test runs under: two threads, no network, caches of its own; and the shared data where there is any."""

from __future__ import annotations

import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before any test imports a Hugging Face library
os.environ["TORCHINDUCTOR_FX_GRAPH_CACHE"] = "0"  # a graph of an older version of the operators must not be taken

import pytest
import torch


def pytest_addoption(parser):
    parser.addoption("--device", default="cpu", choices=("cpu", "cuda"), help="where tests/ops has its tensors")


def pytest_configure(config):
    """Tensors without a device are made there. A default device of torch is a mode, which the operators would see."""
    if config.getoption("--device") == "cuda":
        torch.set_default_tensor_type(torch.cuda.FloatTensor)


SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(autouse=True, scope="session")
def own_surroundings(tmp_path_factory):
    """Tests neither read nor write the caches of who runs them."""
    torch.set_num_threads(2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real texts, tokenizers and genomes beside the repository."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"needs the shared data in {SHARED_DATA}, which is not here")
    return SHARED_DATA
