"""anymamba: selective state space models that install anywhere and run at the speed of the hardware they are on.

The public names resolve when they are first used, so that importing the package costs nothing.
"""

from anymamba.base import __version__, lazy_names

TYPE_CHECKING = False  # as typing has it, whose import takes longer than all of this

__all__ = [
    "ConvOutput",
    "LanguageModel",
    "Mamba",
    "MambaOptions",
    "MambaState",
    "ModelConfig",
    "SamplingConfig",
    "ScanOutput",
    "__version__",
    "backend",
    "causal_conv1d",
    "causal_conv1d_step",
    "generate",
    "load_tokenizer",
    "preset",
    "selective_scan",
    "selective_scan_step",
    "stream",
    "stream_text",
]

_HOMES = {
    "ConvOutput": "anymamba.ops.causal_conv1d",
    "LanguageModel": "anymamba.models.language_model",
    "Mamba": "anymamba.layers.mamba",
    "MambaOptions": "anymamba.parts.options",
    "MambaState": "anymamba.parts.state",
    "ModelConfig": "anymamba.models.config",
    "SamplingConfig": "anymamba.generation.sampling",
    "ScanOutput": "anymamba.ops.selective_scan",
    "backend": "anymamba.ops.dispatch",
    "causal_conv1d": "anymamba.ops.causal_conv1d",
    "causal_conv1d_step": "anymamba.ops.causal_conv1d",
    "generate": "anymamba.generation.generate",
    "load_tokenizer": "anymamba.models.checkpoints.tokenizers",
    "preset": "anymamba.models.presets",
    "selective_scan": "anymamba.ops.selective_scan",
    "selective_scan_step": "anymamba.ops.selective_scan",
    "stream": "anymamba.generation.generate",
    "stream_text": "anymamba.generation.generate",
}

__getattr__, __dir__ = lazy_names(__name__, _HOMES)

if TYPE_CHECKING:
    from anymamba.generation.generate import generate, stream, stream_text
    from anymamba.generation.sampling import SamplingConfig
    from anymamba.layers.mamba import Mamba
    from anymamba.models.checkpoints.tokenizers import load_tokenizer
    from anymamba.models.config import ModelConfig
    from anymamba.models.language_model import LanguageModel
    from anymamba.models.presets import preset
    from anymamba.ops.causal_conv1d import ConvOutput, causal_conv1d, causal_conv1d_step
    from anymamba.ops.dispatch import backend
    from anymamba.ops.selective_scan import ScanOutput, selective_scan, selective_scan_step
    from anymamba.parts.options import MambaOptions
    from anymamba.parts.state import MambaState
