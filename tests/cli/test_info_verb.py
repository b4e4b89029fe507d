"""`anymamba info`."""

from __future__ import annotations

import json

import torch

from anymamba.cli import main
from anymamba.ops import devices, dispatch


def test_json_is_one_object_with_everything(capsys):
    assert main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["packages"]["torch"] == torch.__version__
    assert facts["threads"]["torch"] == torch.get_num_threads()
    assert [device["kind"] for device in facts["devices"]] == list(devices.ORDER)
    assert facts["device"] in next(device["kind"] for device in facts["devices"] if device["names"])
    assert [tuple(line.values()) for line in facts["backends"]] == [tuple(line) for line in dispatch.report()]


def test_text_names_each_backend_and_why_one_is_missing(capsys):
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    for line in dispatch.report():
        assert f"{line.op} {line.backend}" in out
        assert line.reason in out


def test_each_kind_of_device_has_a_line(capsys):
    assert main(["info"]) == 0
    lines = {line.split()[1]: line for line in capsys.readouterr().out.splitlines() if line.startswith("device ")}
    assert list(lines) == ["cuda", "xpu", "mps", "cpu"]
    for kind in devices.device_kinds():
        assert (kind.reason or kind.names[0]) in lines[kind.kind]
        assert ("missing" in lines[kind.kind]) == (kind.reason is not None)
    assert sum("chosen" in line for line in lines.values()) == 1
