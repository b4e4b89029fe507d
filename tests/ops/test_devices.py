"""The choice of a device, and why another one is missing."""

from __future__ import annotations

import pytest
import torch

from anymamba.ops import devices


@pytest.fixture
def machine(monkeypatch):
    """A machine that has devices of these kinds."""

    def have(*kinds: str) -> None:
        for kind in ("cuda", "xpu"):
            monkeypatch.setattr(getattr(torch, kind), "is_available", lambda kind=kind: kind in kinds)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: "mps" in kinds)

    return have


@pytest.mark.parametrize(
    ("there", "best"),
    [
        (("cuda", "xpu", "mps"), "cuda"),
        (("xpu", "mps"), "xpu"),
        (("mps",), "mps"),
        ((), "cpu"),
    ],
)
def test_auto_takes_the_first_kind_that_is_there(machine, there, best):
    machine(*there)
    assert devices.best_device() == torch.device(best)
    assert devices.usable_device(None) == devices.usable_device("auto") == torch.device(best)


def test_every_kind_has_names_or_a_reason(machine):
    machine()
    found = {kind.kind: kind for kind in devices.device_kinds()}
    assert list(found) == ["cuda", "xpu", "mps", "cpu"]
    assert found["cpu"].names and found["cpu"].reason is None
    for name in ("cuda", "xpu", "mps"):
        assert not found[name].names and found[name].reason


@pytest.mark.parametrize(
    ("cuda", "hip", "message"),
    [
        (None, None, "is built without CUDA and ROCm; for an NVIDIA or AMD GPU see https://pytorch.org"),
        ("12.6", None, "Found no NVIDIA driver; install the GPU's driver, or check CUDA_VISIBLE_DEVICES"),
        (None, "6.4", "Found no NVIDIA driver; install the GPU's driver, or check CUDA_VISIBLE_DEVICES"),
    ],
)
def test_why_there_is_no_cuda(machine, monkeypatch, cuda, hip, message):
    def init():
        raise RuntimeError("Found no NVIDIA driver. Please check\n that you have one.")

    machine()
    monkeypatch.setattr(devices.platform, "system", lambda: "Linux")
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "init", init)
    assert message in devices.device_kinds()[0].reason


@pytest.mark.parametrize(
    ("system", "machine_type", "message"),
    [
        ("Linux", "x86_64", "only on Macs"),
        ("Darwin", "x86_64", "a Python for arm64; this one is for x86_64"),
        ("Darwin", "arm64", "needs macOS 14"),
    ],
)
def test_why_there_is_no_mps(machine, monkeypatch, system, machine_type, message):
    machine()
    monkeypatch.setattr(devices.platform, "system", lambda: system)
    monkeypatch.setattr(devices.platform, "machine", lambda: machine_type)
    assert message in devices.device_kinds()[2].reason


def test_a_device_that_cannot_be_used(machine):
    machine()
    with pytest.raises(ValueError, match=r"device 'cuda:63' cannot be used here \(.+\); leave it out, or take auto"):
        devices.usable_device("cuda:63")
    with pytest.raises(ValueError, match="device 'abacus' cannot be used here"):
        devices.usable_device("abacus")
    assert devices.usable_device("cpu") == torch.device("cpu")
