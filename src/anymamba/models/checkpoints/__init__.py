"""Reading and writing models: `load_pretrained`, `save_pretrained`."""

from anymamba.models.checkpoints.errors import CheckpointError
from anymamba.models.checkpoints.huggingface import load_pretrained, save_pretrained

__all__ = ["CheckpointError", "load_pretrained", "save_pretrained"]
