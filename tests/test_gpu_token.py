"""The benchmark of a token on a GPU, without a GPU: the limit, and rows that fail."""

from __future__ import annotations

from typing import Any

from anymamba.models.config import ModelConfig
from anymamba.models.inference import InferenceModel
from benchmarks import gpu_token


def test_the_limit_counts_weights_once_and_states_twice():
    config = ModelConfig(vocab_size=64, d_model=16, n_layers=1, tie_embeddings=False)
    model = InferenceModel.random(config, "bfloat16")
    weights = sum(t.nbytes for t in (*model.parameters(), *model.buffers())) - 2 * 64 * 16
    states = 2 * 3 * 4 * (32 * 16 + 3 * 32)
    assert gpu_token.limit_of(model, 3, gpu_token.Rates(10.0, 5.0)) == weights / 10 + states / 5


def test_a_row_that_fails_does_not_stop_the_others(monkeypatch, capsys):
    def measured(row: gpu_token.Row, rates: Any) -> list[str]:
        if row.batch == 256:
            raise RuntimeError("out of memory")
        return [row.preset, "0.30", "0.06", "0.20", "0.36", "900", row.wanted]

    monkeypatch.setattr(gpu_token, "measured", measured)
    monkeypatch.setattr(gpu_token, "measured_rates", lambda: gpu_token.Rates(4.4e9, 4.2e9))
    monkeypatch.setattr(gpu_token, "machine", lambda: "a GPU")
    monkeypatch.setattr(gpu_token.torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr("sys.argv", ["gpu_token", "--rows", "1.4b-256", "130m"])
    gpu_token.main()
    printed = capsys.readouterr().out
    assert "read 4.40, read and written 4.20 TB/s" in printed
    assert "| 1.4b-256 | failed: RuntimeError: out of memory |" in printed and "| mamba-130m | 0.30 |" in printed
