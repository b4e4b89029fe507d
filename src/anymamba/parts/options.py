"""Options of the layers that a model can use: frozen dataclasses that do not import torch.

Each field has the name of the layer's argument in `anymamba.layers`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from anymamba.base.sizes import require_at_least, require_positive


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
    """R: rank of the step projection; defaults to ceil(d_model / 16)."""
    dt_min: float = 0.001
    """Smallest initial step Δ."""
    dt_max: float = 0.1
    """Largest initial step Δ; the draw is log-uniform."""
    dt_init: Literal["random", "constant"] = "random"
    """How the weight of the step projection is drawn."""
    dt_scale: float = 1.0
    """Scale of the step projection's weight, in units of dt_rank ** -0.5."""
    dt_init_floor: float = 1e-4
    """Lower bound of the initial step."""
    conv_bias: bool = True
    """Bias of the convolution."""
    bias: bool = False
    """Bias of the input and output projections."""
    b_discretization: Literal["euler", "zoh"] = "euler"
    """Rule for B: Euler (published checkpoints) or exact zero-order hold."""
    selective_delta: bool = True
    """Δ depends on the input; otherwise each channel has a constant step."""
    selective_B: bool = True
    """B depends on the input; otherwise it is a constant (d_inner, d_state)."""
    selective_C: bool = True
    """C depends on the input; otherwise it is a constant (d_inner, d_state)."""
    A_init: Literal["s4d-real", "s4d-lin", "constant", "random"] = "s4d-real"
    """A at initialisation: -(n+1); -1/2 + πni (complex); -1/2; -exp(N(0, 1))."""
    output_norm: Literal["rmsnorm", "layernorm"] | None = None
    """Norm before the output projection."""
    inner_norms: bool = False
    """RMS norms on dt, B and C (as in Jamba and FalconMamba)."""
    inner_norm_weights: bool = True
    """The inner norms have weights (Jamba) or not (FalconMamba)."""
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
class S4Options:
    """Options of S4 (arXiv:2111.00396)."""

    d_state: int = 64
    """N: real numbers of state per channel; they are d_state / 2 conjugate pairs."""
    n_ssm: int | None = None
    """Number of different A, B and P; channel d uses number d % n_ssm. Defaults to one for each channel."""
    dt_min: float = 0.001
    """Smallest initial step Δ."""
    dt_max: float = 0.1
    """Largest initial step Δ; the draw is log-uniform."""

    def __post_init__(self) -> None:
        require_at_least("d_state", self.d_state, 2)
        for name in ("dt_min", "dt_max"):
            require_positive(name, getattr(self, name))


@dataclass(frozen=True)
class S4DOptions:
    """Options of S4D (arXiv:2206.11893)."""

    d_state: int = 64
    """N: real numbers of state per channel; for a complex A they are d_state / 2 conjugate pairs."""
    init: Literal["s4d-lin", "s4d-inv", "s4d-real"] = "s4d-lin"
    """A at initialisation: -1/2 + πni; -1/2 + N/π (N/(2n+1) - 1) i; -(n+1)."""
    discretization: Literal["zoh", "bilinear"] = "zoh"
    """Rule for A and B."""
    dt_min: float = 0.001
    """Smallest initial step Δ."""
    dt_max: float = 0.1
    """Largest initial step Δ; the draw is log-uniform."""

    def __post_init__(self) -> None:
        require_at_least("d_state", self.d_state, 1)
        for name in ("dt_min", "dt_max"):
            require_positive(name, getattr(self, name))


@dataclass(frozen=True)
class HyenaOptions:
    """Options of `Hyena` and `HyenaFilter` (arXiv:2302.10866)."""

    order: int = 2
    """Number of gates of `Hyena`; `HyenaFilter` has none."""
    max_length: int = 2048
    """Longest sequence; the filter's positions are fractions of it."""
    emb_dim: int = 33
    """Positional features: the time, and (emb_dim - 1) / 2 pairs of cosine and sine."""
    d_filter: int = 64
    """Width of the network that makes the filter."""
    w: float = 14.0
    """Initial frequency of that network's sines."""
    learn_positions: bool = False
    """Whether the positional features are learned."""

    def __post_init__(self) -> None:
        for name, least in (("order", 2), ("max_length", 1), ("emb_dim", 3), ("d_filter", 1)):
            require_at_least(name, getattr(self, name), least)
        require_positive("w", self.w)


@dataclass(frozen=True)
class H3Options:
    """Options of H3 (arXiv:2212.14052)."""

    d_head: int = 1
    """Size of a head; each head has d_head x d_head products of a key channel and a value channel."""
    d_shift: int = 64
    """Length of the learned filter (the shift SSM) on the keys."""
    bias: bool = True
    """Biases of the projections."""

    def __post_init__(self) -> None:
        for name in ("d_head", "d_shift"):
            require_at_least(name, getattr(self, name), 1)


@dataclass(frozen=True)
class AttentionOptions:
    """Options of multi-head attention."""

    n_heads: int = 8
    """Heads of the queries."""
    n_kv_heads: int | None = None
    """Heads of the keys and values, each shared by n_heads / n_kv_heads; defaults to n_heads."""
    d_head: int | None = None
    """Size of a head; defaults to d_model / n_heads."""
    positions: Literal["none", "absolute", "rotary", "xpos"] = "rotary"
    """Absolute positions are a learned table that is added to the embeddings, also in models without attention. Rotary
    and xPos rotate queries and keys."""
    max_positions: int = 2048
    """Length of the table of absolute positions; a longer sequence is an error."""
    rotary_base: float = 10000.0
    """Base of the rotations' frequencies."""
    d_conv: int | None = None
    """Width of a short causal convolution of queries, keys and values; defaults to none."""
    window: int | None = None
    """How many keys a query sees, including its own; defaults to all."""
    bias: bool = False
    """Biases of the projections."""

    def __post_init__(self) -> None:
        for name in ("n_heads", "max_positions"):
            require_at_least(name, getattr(self, name), 1)
        for name in ("n_kv_heads", "d_head", "d_conv", "window"):
            if getattr(self, name) is not None:
                require_at_least(name, getattr(self, name), 1)
        require_positive("rotary_base", self.rotary_base)


@dataclass(frozen=True)
class MLPOptions:
    """Options of the MLP between other mixers."""

    kind: Literal["gelu", "swiglu", "geglu", "glu"] = "swiglu"
    """GELU of one projection, or one projection times SiLU, GELU or sigmoid of another."""
    d_hidden: int | None = None
    """Hidden width; defaults to 4 d_model for gelu, 8/3 d_model rounded up to a multiple of 128 for the others."""
    bias: bool | None = None
    """Biases of the projections; defaults to True for gelu and False for the others."""

    def __post_init__(self) -> None:
        if self.d_hidden is not None:
            require_at_least("d_hidden", self.d_hidden, 1)


@dataclass(frozen=True)
class GAUOptions:
    """Options of the gated attention unit (arXiv:2202.10447)."""

    expand: float = 2
    """Width of values and gate, as a multiple of d_model."""
    d_key: int = 128
    """Size of the queries and keys."""
    max_distance: int = 128
    """Entries of the learned bias by distance; tokens further away share the last entry."""

    def __post_init__(self) -> None:
        require_positive("expand", self.expand)
        for name in ("d_key", "max_distance"):
            require_at_least(name, getattr(self, name), 1)


@dataclass(frozen=True)
class LinearAttentionOptions:
    """Options of linear attention (arXiv:2006.16236)."""

    n_heads: int = 8
    """Heads."""

    def __post_init__(self) -> None:
        require_at_least("n_heads", self.n_heads, 1)


@dataclass(frozen=True)
class RetentionOptions:
    """Options of RetNet's retention (arXiv:2307.08621)."""

    n_heads: int = 4
    """Heads; each has its own decay."""
    d_value: int | None = None
    """Width of values and gate; defaults to 2 d_model."""

    def __post_init__(self) -> None:
        require_at_least("n_heads", self.n_heads, 1)
        if self.d_value is not None:
            require_at_least("d_value", self.d_value, 1)
