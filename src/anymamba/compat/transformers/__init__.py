"""Our models as models of `transformers`: `AutoModelForCausalLM`, `generate()`, `Trainer`, pipelines, PEFT, TRL.

Importing this package registers `model_type: "anymamba"`. Folders keep the names of our parameters, so anymamba loads
what transformers saves, and the reverse. `wrap` makes any `LanguageModel`, a published Mamba included, usable with
these tools.
"""

try:
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
except ImportError as error:
    raise ImportError(
        f'anymamba.compat.transformers needs transformers 5 or newer ({error}); pip install "transformers>=5"'
    ) from error

from anymamba.compat.transformers.backbone import AnyMambaModel, AnyMambaModelOutput
from anymamba.compat.transformers.config import AnyMambaConfig
from anymamba.compat.transformers.generating import AnyMambaCache
from anymamba.compat.transformers.model import AnyMambaForCausalLM, AnyMambaOutput, wrap

__all__ = [
    "AnyMambaCache",
    "AnyMambaConfig",
    "AnyMambaForCausalLM",
    "AnyMambaModel",
    "AnyMambaModelOutput",
    "AnyMambaOutput",
    "wrap",
]

AutoConfig.register(AnyMambaConfig.model_type, AnyMambaConfig, exist_ok=True)
AutoModel.register(AnyMambaConfig, AnyMambaModel, exist_ok=True)
AutoModelForCausalLM.register(AnyMambaConfig, AnyMambaForCausalLM, exist_ok=True)
# `Trainer` shifts the labels of label smoothing only for the classes of this list, and pipelines warn about others.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[AnyMambaConfig.model_type] = AnyMambaForCausalLM.__name__
