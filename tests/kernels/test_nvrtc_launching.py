"""Compiled kernels are loaded and launched by a driver that stands in for NVIDIA's."""

from __future__ import annotations

import threading
import types
from contextlib import nullcontext

import pytest
import torch
from nvrtc_stand_ins import CUBIN, VARIANT, Driver, compiler

from anymamba.runtimes import nvrtc

SHARED = "CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES"
CLUSTERS = "CU_FUNC_ATTRIBUTE_CLUSTER_SCHEDULING_POLICY_PREFERENCE"


class Launching(Driver):
    """A driver that also loads and launches kernels of one GPU."""

    def __init__(self, loads: str = "CUDA_SUCCESS", gets: str = "CUDA_SUCCESS", cuda: int = 13000) -> None:
        super().__init__([90], cuda)
        self.CUstreamCaptureMode = types.SimpleNamespace(CU_STREAM_CAPTURE_MODE_RELAXED="relaxed")
        self.CUfunction_attribute = types.SimpleNamespace(**{name: name for name in (SHARED, CLUSTERS)})
        policy = types.SimpleNamespace(CU_CLUSTER_SCHEDULING_POLICY_LOAD_BALANCING=2)
        self.CUclusterSchedulingPolicy = policy
        self.loads, self.gets, self.mode, self.allowed, self.n_set = loads, gets, "global", 48 << 10, 0
        self.policies = []

    def status(self, name):
        success = self.CUresult.CUDA_SUCCESS
        return success if name == success.name else types.SimpleNamespace(name=name)

    def cuCtxGetCurrent(self):
        return self.status("CUDA_SUCCESS"), 1

    def cuThreadExchangeStreamCaptureMode(self, mode):
        before, self.mode = self.mode, mode
        return self.status("CUDA_SUCCESS"), before

    def cuModuleLoadData(self, cubin):
        return self.status(self.loads), None

    def cuModuleGetFunction(self, module, name):
        return self.status(self.gets), None

    def cuFuncSetAttribute(self, function, attribute, value):
        if attribute == CLUSTERS:
            self.policies.append(value)
        else:
            self.allowed, self.n_set = value, self.n_set + 1
        return (self.status("CUDA_SUCCESS"),)

    def cuLaunchKernel(self, function, *sizes_and_more):
        return (self.status("CUDA_SUCCESS" if sizes_and_more[6] <= self.allowed else "CUDA_ERROR_INVALID_VALUE"),)


@pytest.fixture
def made(bindings, monkeypatch):
    """Makes a kernel of a driver that stands in for NVIDIA's."""

    def make(driver: Launching, variant: nvrtc.Variant = VARIANT) -> nvrtc.Kernel:
        bindings(nvrtc=compiler(), driver=driver)
        monkeypatch.setattr(torch.cuda, "device", lambda index: nullcontext())
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: types.SimpleNamespace(cuda_stream=0))
        monkeypatch.setattr(nvrtc, "_raw_stream", lambda index: 0)
        monkeypatch.setattr(nvrtc, "_thread", threading.local())
        return nvrtc.Kernel(variant, 0, CUBIN)

    return make


def test_a_driver_too_old_for_the_compiler_is_said(made):
    with pytest.raises(
        RuntimeError, match=r"by NVRTC 13\.0 .*is for CUDA 12\.4, install one at least as new.*portable"
    ):
        made(Launching(loads="CUDA_ERROR_UNSUPPORTED_PTX_VERSION", cuda=12040))


def test_a_full_gpu_is_said_and_not_blamed_on_the_driver(made):
    with pytest.raises(
        RuntimeError, match=r"the memory of cuda:0 is full.*one\.cu.*OUT_OF_MEMORY.*; free some"
    ) as error:
        made(Launching(loads="CUDA_ERROR_OUT_OF_MEMORY"))
    assert "install" not in str(error.value)


@pytest.mark.parametrize("fails", ["loads", "gets", None])
def test_the_capture_mode_of_a_thread_is_put_back(fails, made):
    driver = Launching(**({fails: "CUDA_ERROR_INVALID_IMAGE"} if fails else {}))
    with pytest.raises(RuntimeError, match="INVALID_IMAGE") if fails else nullcontext():
        made(driver)
    assert driver.mode == "global"


def test_clusters_are_balanced(made):
    driver = Launching()
    made(driver)
    assert driver.policies == []
    source = VARIANT.source._replace(
        text=VARIANT.source.text + "\nCLUSTERED_KERNEL(4, 32, 1) one(PARAMETER Parameters p) {}"
    )
    made(driver, VARIANT._replace(source=source))
    assert driver.policies == [2] and driver.n_set == 0


def test_threads_may_launch_a_kernel_with_different_shared_memory(made):
    """While the driver allows one thread more, another asks for less."""
    small, large = 60000, 120000
    driver = Launching()
    kernel = made(driver)
    allowed, go_on = threading.Event(), threading.Event()
    set_attribute, launched, errors = driver.cuFuncSetAttribute, [], []

    def slowly(function, attribute, value):
        status = set_attribute(function, attribute, value)
        if value == large and not allowed.is_set():
            allowed.set()
            go_on.wait(10)
        return status

    def launch(shared):
        try:
            kernel.launch(1, 32, shared, bytes(8))
            launched.append(shared)
        except RuntimeError as error:
            errors.append(error)

    driver.cuFuncSetAttribute = slowly
    threads = [threading.Thread(target=launch, args=(shared,)) for shared in (large, small)]
    threads[0].start()
    assert allowed.wait(10)
    threads[1].start()
    threads[1].join(0.3)  # without a lock it ends here
    go_on.set()
    for thread in threads:
        thread.join(10)
    launch(large)
    assert not errors and sorted(launched) == [small, large, large]
    assert driver.allowed == large and driver.n_set == 1


def test_shared_memory_is_asked_for_once_and_without_waiting(made, monkeypatch):
    driver = Launching()
    kernel = made(driver)
    for shared in (100, 48 << 10, 60000, 50000, 60000):
        kernel.launch(1, 32, shared, bytes(8))
    assert driver.n_set == 1
    monkeypatch.setattr(nvrtc, "_shared_lock", None)  # nothing is to be set, so no lock is taken
    kernel.launch(1, 32, 60000, bytes(8))
