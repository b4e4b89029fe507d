"""Our models as models of `transformers`: `AutoModelForCausalLM`, `generate()`, `Trainer`, pipelines, PEFT.

Importing this package registers `model_type: "anymamba"`. Folders keep our parameters' names, so that what either side
saves the other loads. `wrap` gives any `LanguageModel`, a published Mamba included, to the same tools.
"""

try:
    from transformers import AutoConfig, AutoModelForCausalLM
except ImportError as error:
    raise ImportError(
        f'anymamba.compat.transformers needs transformers 5 or newer ({error}); pip install "transformers>=5"'
    ) from error

from anymamba.compat.transformers.config import AnyMambaConfig
from anymamba.compat.transformers.generating import AnyMambaCache
from anymamba.compat.transformers.model import AnyMambaForCausalLM, AnyMambaOutput, wrap

__all__ = ["AnyMambaCache", "AnyMambaConfig", "AnyMambaForCausalLM", "AnyMambaOutput", "wrap"]

AutoConfig.register(AnyMambaConfig.model_type, AnyMambaConfig, exist_ok=True)
AutoModelForCausalLM.register(AnyMambaConfig, AnyMambaForCausalLM, exist_ok=True)
