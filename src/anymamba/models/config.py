"""Configurations of models: frozen dataclasses, free of torch, and how any such dataclass is read from and written."""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

ConfigT = TypeVar("ConfigT")


@dataclass(frozen=True)
class MambaOptions:
    """Options of a Mamba layer; the defaults are those of the published models (arXiv:2312.00752, section 3)."""

    d_state: int = 16
    """N: state per channel."""
    d_conv: int = 4
    """Width of the short causal convolution."""
    expand: float = 2
    """E: d_inner = int(expand * d_model)."""
    dt_rank: int | None = None
    """R: rank of the step projection; absent means ceil(d_model / 16)."""
    dt_min: float = 0.001
    """Smallest initial step Δ."""
    dt_max: float = 0.1
    """Largest initial step Δ; the draw is log-uniform."""
    dt_init: Literal["random", "constant"] = "random"
    """How the weight of the step projection is drawn."""
    dt_scale: float = 1.0
    """Scale of that weight, in units of dt_rank ** -0.5."""
    dt_init_floor: float = 1e-4
    """Lower bound of the initial step."""
    conv_bias: bool = True
    """Bias of the convolution."""
    bias: bool = False
    """Bias of the input and output projections."""
    b_discretization: Literal["euler", "zoh"] = "euler"
    """Rule for B: Euler (published checkpoints) or exact zero-order hold."""
    selective_delta: bool = True
    """Δ depends on the input; else one step per channel."""
    selective_B: bool = True
    """B depends on the input; else constant (d_inner, d_state)."""
    selective_C: bool = True
    """C depends on the input; else constant (d_inner, d_state)."""
    A_init: Literal["s4d-real", "s4d-lin", "constant", "random"] = "s4d-real"
    """A at initialisation: -(n+1); -1/2 + πni (complex); -1/2; -exp(N(0, 1))."""
    output_norm: Literal["rmsnorm", "layernorm"] | None = None
    """Norm before the output projection."""
    inner_norms: bool = False
    """RMS norms on dt, B and C (as in Jamba and FalconMamba)."""
    inner_norm_weights: bool = True
    """The inner norms have weights (Jamba); else none (FalconMamba)."""
    norm_eps: float = 1e-6
    """Epsilon of the output and inner norms."""

    def __post_init__(self) -> None:
        for name in ("d_state", "d_conv"):
            require_at_least(name, getattr(self, name), 1)
        if self.dt_rank is not None:
            require_at_least("dt_rank", self.dt_rank, 1)
        for name in ("expand", "dt_min", "dt_scale", "dt_init_floor", "norm_eps"):
            require_positive(name, getattr(self, name))
        if self.dt_max < self.dt_min:
            raise ValueError(f"dt_max must be at least dt_min, got dt_min={self.dt_min} and dt_max={self.dt_max}")

    @property
    def is_complex(self) -> bool:
        """Whether A, B, C and the state are complex."""
        return self.A_init == "s4d-lin"


@dataclass(frozen=True)
class ModelConfig:
    """A language model: embedding, pre-norm residual blocks, norm, head."""

    d_model: int = 768
    """Width of the residual stream."""
    n_layers: int = 24
    """Number of residual blocks."""
    vocab_size: int = 50277
    """Ids that exist; a tokenizer decides it when one is given."""
    pad_vocab_multiple: int = 8
    """The embedding's rows are rounded up to a multiple of this; sampling never emits the padding."""
    tie_embeddings: bool = True
    """The head shares the embedding's weight."""
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    """Norm before each mixer and before the head."""
    norm_eps: float = 1e-5
    """Epsilon of those norms."""
    residual_in_fp32: bool = True
    """The residual stream is kept in float32 whatever the weights' dtype is."""
    mixers: tuple[str, ...] = ("mamba",)
    """The mixer of each block by name; a shorter tuple repeats."""
    mamba: MambaOptions = field(default_factory=MambaOptions)
    """Options of the Mamba mixers."""

    def __post_init__(self) -> None:
        for name in ("d_model", "n_layers", "vocab_size", "pad_vocab_multiple"):
            require_at_least(name, getattr(self, name), 1)
        require_positive("norm_eps", self.norm_eps)
        if not self.mixers:
            raise ValueError('mixers must name at least one mixer, got (); for example ("mamba",)')
        if self.d_inner < 1:
            raise ValueError(
                f"d_inner = int(expand * d_model) must be at least 1, got expand={self.mamba.expand} "
                f"and d_model={self.d_model}; raise either"
            )

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding and of the head."""
        return math.ceil(self.vocab_size / self.pad_vocab_multiple) * self.pad_vocab_multiple

    @property
    def d_inner(self) -> int:
        """Channels of the scan."""
        return int(self.mamba.expand * self.d_model)

    @property
    def dt_rank(self) -> int:
        """R: rank of the step projection."""
        return self.mamba.dt_rank or math.ceil(self.d_model / 16)

    @property
    def layer_mixers(self) -> tuple[str, ...]:
        """The mixer's name for each of the n_layers blocks."""
        return tuple(self.mixers[i % len(self.mixers)] for i in range(self.n_layers))


def require_at_least(name: str, value: int, minimum: int) -> None:
    """Raise ValueError unless value is an integer of at least minimum."""
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise ValueError(f"{name} must be an integer of at least {minimum}, got {value!r}")


def require_positive(name: str, value: float) -> None:
    """Raise ValueError unless value is a positive, finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not (0 < value < math.inf):
        raise ValueError(f"{name} must be a positive number, got {value!r}")


def config_to_dict(config: Any) -> dict[str, Any]:
    """A dataclass as JSON-able nested dictionaries (tuples become lists)."""

    def plain(value: Any) -> Any:
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        if isinstance(value, tuple | list):
            return [plain(v) for v in value]
        return value

    return plain(config)


def config_from_dict(cls: type[ConfigT], values: dict[str, Any], where: str = "") -> ConfigT:
    """Build a (nested) dataclass from a dictionary.

    Args:
        cls: the dataclass.
        values: its fields; absent ones take their defaults.
        where: the path of enclosing keys, for messages.
    Raises ValueError for an unknown key (naming the nearest one) and TypeError for a value of the wrong type.
    """
    if not isinstance(values, dict):
        raise TypeError(f"{where or cls.__name__} must be a table of keys and values, got {values!r}")
    hints = typing.get_type_hints(cls)
    names = [f.name for f in dataclasses.fields(cls) if f.init]  # type: ignore[arg-type]
    for key in values:
        if key not in names:
            raise ValueError(unknown_key(key, names, where or cls.__name__))
    converted = {key: _convert(hints[key], value, f"{where}.{key}".lstrip(".")) for key, value in values.items()}
    return cls(**converted)


def unknown_key(key: str, known: list[str], where: str) -> str:
    """The message for a key that no field has, with the nearest that exists."""
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else f"; it has {', '.join(sorted(known))}"
    return f"unknown key {key!r} in {where}{hint}"


def _convert(hint: Any, value: Any, where: str) -> Any:
    """Check one JSON value against a type hint and turn lists into tuples and tables into dataclasses."""
    if dataclasses.is_dataclass(hint):
        return value if isinstance(value, hint) else config_from_dict(hint, value, where)  # type: ignore[arg-type]
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        if value not in args:
            raise ValueError(f"{where} must be one of {', '.join(map(repr, args))}, got {value!r}")
        return value
    if origin in (typing.Union, types.UnionType):
        return _convert_union(args, value, where)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise TypeError(f"{where} must be a list, got {value!r}")
        return _convert_tuple(args, value, where)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return value
    if hint is Any or (isinstance(value, hint) and (hint is bool or not isinstance(value, bool))):
        return value
    raise TypeError(f"{where} must be {getattr(hint, '__name__', hint)}, got {value!r}")


def _convert_tuple(args: tuple[Any, ...], value: list[Any] | tuple[Any, ...], where: str) -> tuple[Any, ...]:
    if len(args) == 2 and args[1] is Ellipsis:
        return tuple(_convert(args[0], v, f"{where}[{i}]") for i, v in enumerate(value))
    if len(args) != len(value):
        raise ValueError(f"{where} must have {len(args)} entries, got {len(value)}: {value!r}")
    return tuple(_convert(a, v, f"{where}[{i}]") for i, (a, v) in enumerate(zip(args, value, strict=True)))


def _convert_union(args: tuple[Any, ...], value: Any, where: str) -> Any:
    if value is None and type(None) in args:
        return None
    errors: list[Exception] = []
    for arg in args:
        if arg is not type(None):
            try:
                return _convert(arg, value, where)
            except (TypeError, ValueError) as error:
                errors.append(error)
    raise errors[0]
