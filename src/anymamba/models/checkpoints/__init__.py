"""Reading and writing models in every published format: `load_pretrained`, `save_pretrained`, `convert`."""

from anymamba.base.errors import CheckpointError, CheckpointWarning
from anymamba.models.checkpoints.adapters import weights_digest
from anymamba.models.checkpoints.hub import local_path
from anymamba.models.checkpoints.reading import Checkpoint, load_pretrained, open_checkpoint
from anymamba.models.checkpoints.tokenizers import find_tokenizer, model_tokenizer
from anymamba.models.checkpoints.writing import FORMATS, convert, save_pretrained

__all__ = [
    "FORMATS",
    "Checkpoint",
    "CheckpointError",
    "CheckpointWarning",
    "convert",
    "find_tokenizer",
    "load_pretrained",
    "local_path",
    "model_tokenizer",
    "open_checkpoint",
    "save_pretrained",
    "weights_digest",
]
