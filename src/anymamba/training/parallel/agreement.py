"""What all ranks of a run must have in common, as values that are compared and named in an error."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np

from anymamba.data.table import TokenTable
from anymamba.training.config import TrainConfig, file_values

SAMPLED = 256
"""Tokens, spread over a table, that its digest is made of besides the lengths of the documents."""


def flat_values(config: TrainConfig) -> dict[str, Any]:
    """A config's values by their dotted names, as in its file. The device is not among them: each rank has its own."""

    def flat(values: dict[str, Any], prefix: str) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in values.items():
            found |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
        return found

    return {name: value for name, value in flat(file_values(config), "").items() if name != "device"}


def data_values(training: Any, held_out: Any) -> dict[str, Any]:
    """What tells the data of a run from other data."""
    found: dict[str, Any] = {}
    for name, data in (("training", training), ("held-out", held_out)):
        if data is not None:
            found |= {f"{name} {key}": value for key, value in _of_data(data).items()}
    return found


def _of_data(data: Any) -> dict[str, Any]:
    sizes = {"documents": data.n_documents, "tokens": data.n_tokens}
    if not isinstance(data, TokenTable):
        return sizes
    digest = hashlib.sha256(np.ascontiguousarray(data.lengths).tobytes())
    documents = np.flatnonzero(data.lengths)
    for document in documents[:: max(1, len(documents) // SAMPLED)]:
        digest.update(np.asarray(data.read(int(document), 0, 1), np.int64).tobytes())
    return {**sizes, "digest": digest.hexdigest()[:16]}
