"""Names of parameters: ours, and those of the formats that we read and write."""

from __future__ import annotations

LAYER_NAMES = {
    "norm.weight": "norm.weight",
    "norm.bias": "norm.bias",
    "mixer.in_proj.weight": "mixer.in_proj.weight",
    "mixer.in_proj.bias": "mixer.in_proj.bias",
    "mixer.conv.weight": "mixer.conv1d.weight",
    "mixer.conv.bias": "mixer.conv1d.bias",
    "mixer.x_proj.weight": "mixer.x_proj.weight",
    "mixer.dt_proj.weight": "mixer.dt_proj.weight",
    "mixer.ssm.delta_bias": "mixer.dt_proj.bias",
    "mixer.ssm.A_log": "mixer.A_log",
    "mixer.ssm.D": "mixer.D",
    "mixer.out_proj.weight": "mixer.out_proj.weight",
    "mixer.out_proj.bias": "mixer.out_proj.bias",
}
"""Our names inside a block, and those of Hugging Face and state-spaces."""

HUGGINGFACE_TOP = {
    "embedding.weight": "backbone.embeddings.weight",
    "norm.weight": "backbone.norm_f.weight",
    "norm.bias": "backbone.norm_f.bias",
    "head.weight": "lm_head.weight",
}
STATE_SPACES_TOP = HUGGINGFACE_TOP | {"embedding.weight": "backbone.embedding.weight"}

GGUF_LAYER = {
    "norm.weight": "attn_norm.weight",
    "mixer.in_proj.weight": "ssm_in.weight",
    "mixer.conv.weight": "ssm_conv1d.weight",
    "mixer.conv.bias": "ssm_conv1d.bias",
    "mixer.x_proj.weight": "ssm_x.weight",
    "mixer.dt_proj.weight": "ssm_dt.weight",
    "mixer.ssm.delta_bias": "ssm_dt.bias",
    "mixer.ssm.A_log": "ssm_a",
    "mixer.ssm.D": "ssm_d",
    "mixer.out_proj.weight": "ssm_out.weight",
}
GGUF_TOP = {
    "embedding.weight": "token_embd.weight",
    "norm.weight": "output_norm.weight",
    "head.weight": "output.weight",
}


def to_huggingface(name: str) -> str:
    """Hugging Face's name of one of our parameters (`mamba` and `falcon_mamba` models)."""
    return HUGGINGFACE_TOP.get(name) or "backbone.layers.{}.{}".format(*_layer(name, LAYER_NAMES))


def huggingface_spellings(key: str) -> tuple[str, ...]:
    """Hugging Face's name, and those that its readers take for it: an older one, and that of a model without a head."""
    return key, key.replace("backbone.embeddings.", "backbone.embedding."), key.removeprefix("backbone.")


def to_state_spaces(name: str) -> str:
    """The name of one of our parameters in the original format."""
    return STATE_SPACES_TOP.get(name) or "backbone.layers.{}.{}".format(*_layer(name, LAYER_NAMES))


def to_gguf(name: str) -> str:
    """The name of one of our parameters in GGUF; its A is -exp(A_log)."""
    return GGUF_TOP.get(name) or "blk.{}.{}".format(*_layer(name, GGUF_LAYER))


def _layer(name: str, table: dict[str, str]) -> tuple[str, str]:
    _, index, rest = name.split(".", 2)
    return index, table[rest]


def is_wide(name: str) -> bool:
    """Whether one of our parameters is never narrower than float32: A_log, D, the step's bias."""
    return ".ssm." in name
