"""Which model a state belongs to: its name, for messages, and a digest of its weights."""

from __future__ import annotations

import hashlib
from typing import NamedTuple

from anymamba.models.checkpoints import Checkpoint, weights_digest


class ModelIdentity(NamedTuple):
    """A model's name and the digest of its weights."""

    name: str
    digest: str

    def __str__(self) -> str:
        return f"{self.name!r} (weights {self.digest[:12]})"


def model_identity(name: str, checkpoint: Checkpoint) -> ModelIdentity:
    """Read all weights of a checkpoint once and return the model's identity.

    It does not depend on the device, on the format of the files, or on how the weights are packed after loading.
    """
    parts = sorted(f"{key} {weights_digest([tensor])}" for key, tensor in checkpoint.tensors())
    return ModelIdentity(name, hashlib.sha256("\n".join(parts).encode()).hexdigest())
