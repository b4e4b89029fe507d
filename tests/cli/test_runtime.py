"""Which kind of model the verbs load, by device and flags."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from anymamba.console.runtime import Runtime, load_model
from anymamba.models import checkpoints
from anymamba.models.inference import InferenceModel


@pytest.mark.parametrize(
    ("device", "flags", "in_blocks", "packed"),
    [
        ("cpu", {}, False, False),
        ("cpu", {}, True, True),
        ("cpu", {"weights": "bfloat16"}, False, True),
        ("cuda", {}, False, True),
        ("cuda", {"dtype": "bfloat16"}, True, False),
        ("mps", {"weights": "bfloat16"}, False, False),
    ],
)
def test_packed_models_are_loaded_where_they_are_faster(device, flags, in_blocks, packed, monkeypatch):
    """On CUDA by default, since they step in graphs there."""
    found: list[Any] = []
    plain = SimpleNamespace(eval=lambda: found.append("plain"))
    monkeypatch.setattr("anymamba.ops.devices.usable_device", torch.device)
    monkeypatch.setattr("anymamba.kernels.packed_linear.cuda.unavailable", lambda device_type: None)
    monkeypatch.setattr(checkpoints, "load_pretrained", lambda *args, **options: plain)
    monkeypatch.setattr(InferenceModel, "from_pretrained", lambda *args: found.append(args))
    checkpoint: Any = SimpleNamespace(in_blocks=in_blocks, config=SimpleNamespace(is_causal=True))
    load_model(checkpoint, Runtime(device=device, **flags))
    assert found == ([(checkpoint, flags.get("weights"), torch.device(device))] if packed else ["plain"])
