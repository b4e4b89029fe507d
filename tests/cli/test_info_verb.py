"""`anymamba info`."""

from __future__ import annotations

import json

import torch

from anymamba.cli import main
from anymamba.ops import dispatch


def test_json_is_one_object_with_everything(capsys):
    assert main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["packages"]["torch"] == torch.__version__
    assert facts["threads"]["torch"] == torch.get_num_threads()
    assert facts["devices"][-1].startswith("cpu")
    assert [tuple(line.values()) for line in facts["backends"]] == [tuple(line) for line in dispatch.report()]


def test_text_names_each_backend_and_why_one_is_missing(capsys):
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    for line in dispatch.report():
        assert f"{line.op} {line.backend}" in out
        assert line.reason in out
