"""Reading and writing models in every published format: `load_pretrained`, `save_pretrained`, `convert`."""

from typing import TYPE_CHECKING

from anymamba.base import lazy_names

__all__ = [
    "FORMATS",
    "Checkpoint",
    "CheckpointError",
    "CheckpointWarning",
    "StoredTensor",
    "convert",
    "find_tokenizer",
    "load_pretrained",
    "local_path",
    "model_tokenizer",
    "open_checkpoint",
    "save_pretrained",
    "save_weights",
    "stored_formats",
    "weights_digest",
]

_HOMES = {
    "FORMATS": "anymamba.models.checkpoints.writing",
    "Checkpoint": "anymamba.models.checkpoints.reading",
    "CheckpointError": "anymamba.base.errors",
    "CheckpointWarning": "anymamba.base.errors",
    "StoredTensor": "anymamba.models.checkpoints.formats.tensors",
    "convert": "anymamba.models.checkpoints.writing",
    "find_tokenizer": "anymamba.models.checkpoints.tokenizers",
    "load_pretrained": "anymamba.models.checkpoints.reading",
    "local_path": "anymamba.models.checkpoints.hub",
    "model_tokenizer": "anymamba.models.checkpoints.tokenizers",
    "open_checkpoint": "anymamba.models.checkpoints.reading",
    "save_pretrained": "anymamba.models.checkpoints.writing",
    "save_weights": "anymamba.models.checkpoints.writing",
    "stored_formats": "anymamba.models.checkpoints.reading",
    "weights_digest": "anymamba.models.checkpoints.adapters",
}

__getattr__, __dir__ = lazy_names(__name__, _HOMES)

if TYPE_CHECKING:
    from anymamba.base.errors import CheckpointError, CheckpointWarning
    from anymamba.models.checkpoints.adapters import weights_digest
    from anymamba.models.checkpoints.formats.tensors import StoredTensor
    from anymamba.models.checkpoints.hub import local_path
    from anymamba.models.checkpoints.reading import Checkpoint, load_pretrained, open_checkpoint, stored_formats
    from anymamba.models.checkpoints.tokenizers import find_tokenizer, model_tokenizer
    from anymamba.models.checkpoints.writing import FORMATS, convert, save_pretrained, save_weights
