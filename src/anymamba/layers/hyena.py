"""Hyena: gates and long convolutions, whose filters are functions of the position.

    h[c](t) = (MLP(features(t))[c]) (exp(-t |decay[c]|) + shift)          the implicit filter
    y[t] = sum over s <= t of h[t - s] x[s] + bias x[t]                   the long convolution

A convolution with an arbitrary filter has no recurrence: its state is all inputs so far.

Source: Hyena (arXiv:2302.10866), section 3; the filter's features and sizes are those of its published models.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any, NamedTuple, TypedDict, Unpack

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from anymamba.base.sizes import require_at_least, require_sizes
from anymamba.ops.causal_conv1d import causal_conv1d
from anymamba.ops.dispatch import without_autocast
from anymamba.ops.observers import plain
from anymamba.parts import diagonal
from anymamba.parts.conv import ShortConvolution
from anymamba.parts.fft_conv import fft_conv
from anymamba.parts.gated import gated
from anymamba.parts.linear import linear
from anymamba.parts.options import HyenaOptions
from anymamba.parts.padding import Rows
from anymamba.parts.parameters import KernelParameters
from anymamba.parts.sequence import SequenceLayer


class FilterOptions(TypedDict, total=False):
    """Options of `ImplicitFilter`; its docstring has their meanings and defaults."""

    max_length: int
    emb_dim: int
    d_filter: int
    n_inner: int
    w: float
    learn_positions: bool
    slow_decay: float
    fast_decay: float
    decay_target: float
    shift: float


class _Dense(nn.Module):
    """A linear map inside a filter. It is not an `nn.Linear`, because quantisation libraries replace those."""

    def __init__(self, inputs: int, outputs: int, *, bias: bool = True, device=None, dtype=None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(outputs, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """torch's default for linear layers."""
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        if self.bias is not None:
            bound = self.weight.shape[1] ** -0.5
            nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x: Float[Tensor, "... inputs"]) -> Float[Tensor, "... outputs"]:
        return F.linear(x, self.weight, self.bias)


class ImplicitFilter(KernelParameters):
    """n_filters filters of `width` channels, functions of t = n / (max_length - 1) in [0, 1].

        features(n) = [t, cos(f θ), -sin(f θ)],  θ = 2 π n / max_length,  f = linspace(1e-4, K - 1, K)
        h(n) = Linear(sin(a Linear(... sin(a Linear(features))))) * (exp(-t |decay|) + shift)

    K = (emb_dim - 1) / 2. The frequencies a, one per unit, are shared by all layers. decay goes from log(target) / slow
    to log(target) / fast over the channels of each filter. The bias of the convolution is a parameter of this module.

    Args:
        width: channels of each filter.
        n_filters: filters that share the network.
        max_length: positions on which the filters are defined: the most tokens of a sequence, including its state.
        emb_dim: features of a position, odd.
        d_filter: width of the network.
        n_inner: layers between the first and the last.
        w: initial frequency a of the sines.
        learn_positions: make the features parameters (max_length, emb_dim), initialised as above.
        slow_decay, fast_decay: fraction of max_length after which the window of the slowest and the fastest channel has
            fallen to decay_target.
        decay_target: see slow_decay.
        shift: lower bound of the window.
    """

    def __init__(
        self,
        width: int,
        n_filters: int = 1,
        *,
        max_length: int = HyenaOptions.max_length,
        emb_dim: int = HyenaOptions.emb_dim,
        d_filter: int = HyenaOptions.d_filter,
        n_inner: int = 2,
        w: float = HyenaOptions.w,
        learn_positions: bool = HyenaOptions.learn_positions,
        slow_decay: float = 1.5,
        fast_decay: float = 0.3,
        decay_target: float = 0.01,
        shift: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        like: dict[str, Any] = {"device": device, "dtype": self.wide(dtype)}
        require_sizes(width=width, max_length=max_length, d_filter=d_filter)
        if emb_dim < 3 or emb_dim % 2 == 0:
            raise ValueError(f"emb_dim must be odd and at least 3 (t, cosines, sines), got {emb_dim}")
        require_at_least("n_inner", n_inner, 0)
        if not (slow_decay > 0 and fast_decay > 0 and 0 < decay_target < 1):
            raise ValueError(
                "slow_decay and fast_decay must be positive and decay_target between 0 and 1, "
                f"got {slow_decay}, {fast_decay} and {decay_target}"
            )
        self.width, self.n_filters, self.max_length, self.emb_dim, self.w = width, n_filters, max_length, emb_dim, w
        self.decay_range = (math.log(decay_target) / slow_decay, math.log(decay_target) / fast_decay)
        self.shift = shift
        sizes = [emb_dim, *[d_filter] * (n_inner + 1)]
        self.layers = nn.ModuleList([_Dense(a, b, **like) for a, b in pairwise(sizes)])
        self.output = _Dense(d_filter, n_filters * width, bias=False, **like)
        self.frequency = nn.Parameter(torch.empty(d_filter, **like))
        self.positions = nn.Parameter(torch.empty(max_length, emb_dim, **like)) if learn_positions else None
        self.bias = nn.Parameter(torch.empty(n_filters, width, **like))
        self._reset_vectors()

    def reset_parameters(self) -> None:
        """torch's default for linear layers, a = w, features as in the equation, bias standard normal."""
        for layer in (*self.layers, self.output):
            layer.reset_parameters()
        self._reset_vectors()

    @torch.no_grad()
    def _reset_vectors(self) -> None:
        if self.bias.is_meta:
            return
        self.frequency.fill_(self.w)
        if self.positions is not None:
            self.positions.copy_(self._features(self.max_length, diagonal.exact_dtype(self.bias.device)))
        self.bias.normal_()

    def _times(self, length: int, dtype: torch.dtype) -> Float[Tensor, " length"]:
        return torch.arange(length, device=self.bias.device, dtype=dtype) / max(1, self.max_length - 1)

    def _features(self, length: int, dtype: torch.dtype) -> Float[Tensor, "length emb_dim"]:
        n_bands = (self.emb_dim - 1) // 2
        like: dict[str, Any] = {"device": self.bias.device, "dtype": dtype}
        angle = torch.arange(length, **like)[:, None] * (2 * math.pi / self.max_length)
        angle = angle * torch.linspace(1e-4, n_bands - 1, n_bands, **like)
        return torch.cat([self._times(length, dtype)[:, None], torch.cos(angle), -torch.sin(angle)], 1)

    def forward(self, length: int) -> Float[Tensor, "n_filters width length"]:
        """The first `length` values of every filter, in float32 or wider, even under autocast.

        The sines are computed in float64. A sine of frequency a multiplies earlier rounding errors by up to a; in
        float32 a filter would be off by 1e-4 and would depend on the length that is requested.
        """
        with without_autocast(self.bias.device.type):
            exact = diagonal.exact_dtype(self.bias.device)
            x = self._features(length, exact) if self.positions is None else self.positions[:length].to(exact)
            frequency = self.frequency.to(exact)
            for layer in self.layers:  # the frequencies multiply the small weights in place of the long outputs
                weight, bias = (parameter.to(exact) for parameter in layer.parameters())
                x = torch.sin(F.linear(x, frequency[:, None] * weight, frequency * bias))
            x = self.output(x.to(self.bias.dtype))
            slowest, fastest = self.decay_range
            decay = torch.linspace(slowest, fastest, self.width, device=x.device, dtype=x.dtype).abs()
            window = torch.exp(-decay[:, None] * self._times(length, x.dtype)) + self.shift
            return x.T.unflatten(0, (self.n_filters, self.width)) * window


class HyenaFilterState(NamedTuple):
    """State of a long convolution: all inputs so far. May share memory with the inputs."""

    inputs: Float[Tensor, "batch most_filled width"]
    """Oldest first; zeros after the first `filled` entries of a row."""
    filled: Int[Tensor, " batch"]
    """Number of inputs of each row."""


class HyenaFilter(SequenceLayer):
    """The long convolution of Hyena by itself: `width` channels in and out, each with its own implicit filter.

    Args:
        width: channels of the input and output.
        filter_options: max_length and the other options of `ImplicitFilter`.
    Raises ValueError for invalid sizes and for sequences longer than max_length.
    """

    state_type = HyenaFilterState

    def __init__(self, width: int, *, device=None, dtype=None, **filter_options: Unpack[FilterOptions]) -> None:
        super().__init__()
        self.width = width
        self.filter = ImplicitFilter(width, device=device, dtype=dtype, **filter_options)

    @property
    def grows(self) -> bool:
        return True

    def reset_parameters(self) -> None:
        """Redraw all parameters."""
        self.filter.reset_parameters()

    def init_state(self, batch: int, dtype: torch.dtype | None = None) -> HyenaFilterState:
        """No inputs."""
        return _nothing_yet(batch, self.width, self.filter.bias, dtype)

    def run(
        self, x: Float[Tensor, "rows length width"], state: HyenaFilterState | None, rows: Rows | None
    ) -> tuple[Tensor, HyenaFilterState]:
        """The convolution over the inputs so far and x."""
        state = self.init_state(x.shape[0], x.dtype) if state is None else state
        needed = _tokens(x, state, rows, self.filter.max_length)
        return _convolve(x, self.filter(needed)[0], self.filter.bias[0], state, rows)


class HyenaState(NamedTuple):
    """State of a Hyena operator."""

    conv: Float[Tensor, "batch short_width_minus_1 all_channels"]
    """The last inputs of the short convolution, (order + 1) * d_model channels, oldest first."""
    filters: tuple[HyenaFilterState, ...]
    """The state of each long convolution, in the order in which they run."""


class Hyena(SequenceLayer):
    """The Hyena operator of any order: gates and long convolutions in turn.

        [x_0, ..., x_(order - 1), v] = short_conv(in_proj(input))
        v = long_conv(v * x_i)    for i = order - 1, ..., 1
        y = out_proj(v * x_0)

    Args:
        d_model: width of the input and output.
        order: gates, at least 2; there are order - 1 long convolutions. One network makes all their filters.
        short_width: width of the depthwise causal convolution after the input projection.
        bias: whether the projections and the short convolution have biases.
        filter_options: max_length and the other options of `ImplicitFilter`.
    Raises ValueError for invalid sizes and for sequences longer than max_length.
    """

    state_type = HyenaState
    projects_input = True

    def __init__(
        self,
        d_model: int,
        *,
        order: int = HyenaOptions.order,
        short_width: int = 3,
        bias: bool = True,
        device=None,
        dtype=None,
        **filter_options: Unpack[FilterOptions],
    ) -> None:
        super().__init__()
        require_sizes(d_model=d_model, short_width=short_width)
        if order < 2:
            raise ValueError(f"order must be at least 2 (two gates around one long convolution), got {order}")
        like: dict[str, Any] = {"device": device, "dtype": dtype}
        self.d_model, self.order, self.short_width = d_model, order, short_width
        self.in_proj = nn.Linear(d_model, (order + 1) * d_model, bias=bias, **like)
        self.conv = ShortConvolution((order + 1) * d_model, short_width, bias, **like)
        self.filter = ImplicitFilter(d_model, order - 1, **like, **filter_options)
        self.out_proj = nn.Linear(d_model, d_model, bias=bias, **like)

    @property
    def grows(self) -> bool:
        return True

    def reset_parameters(self) -> None:
        """Redraw all parameters, in the order of construction."""
        for module in (self.in_proj, self.conv, self.filter, self.out_proj):
            module.reset_parameters()

    def init_state(self, batch: int, dtype: torch.dtype | None = None) -> HyenaState:
        """Zeros for the short convolution, no inputs for the long ones."""
        weight, channels = self.conv.weight, (self.order + 1) * self.d_model
        conv = torch.zeros(batch, self.short_width - 1, channels, device=weight.device, dtype=dtype or weight.dtype)
        return HyenaState(conv, (_nothing_yet(batch, self.d_model, weight, dtype),) * (self.order - 1))

    def run(
        self, x: Float[Tensor, "rows length d_model"], state: HyenaState | None, rows: Rows | None
    ) -> tuple[Tensor, HyenaState]:
        """The operator over rows of real tokens."""
        u = linear(self.in_proj, x)
        u = u if rows is None else rows.zero_padding(u)
        state = self.init_state(u.shape[0], u.dtype) if state is None else state
        needed = _tokens(u, state.filters[0], rows, self.filter.max_length)
        short = causal_conv1d(u, self.conv.weight, self.conv.bias, initial_state=state.conv)
        *gates, v = short.y.chunk(self.order + 1, dim=-1)
        kernels, after = self.filter(needed), []
        for gate, kernel, bias, before in zip(gates[:0:-1], kernels, self.filter.bias, state.filters, strict=True):
            v, inputs = _convolve(gated(v, gate), kernel, bias, before, rows)
            after.append(inputs)
        conv = short.last_state if rows is None else rows.last(u, state.conv, self.short_width - 1)
        return linear(self.out_proj, gated(v, gates[0])), HyenaState(conv, tuple(after))


# ------------------------------------------------------------------------- a convolution whose state is all its inputs


def _nothing_yet(batch: int, width: int, like: Tensor, dtype: torch.dtype | None) -> HyenaFilterState:
    inputs = torch.zeros(batch, 0, width, device=like.device, dtype=dtype or like.dtype)
    return HyenaFilterState(inputs, torch.zeros(batch, device=like.device, dtype=torch.int64))


def _tokens(x: Tensor, state: HyenaFilterState, rows: Rows | None, max_length: int) -> int:
    """The tokens of the longest row, including those before x: this many values of the filter are needed.

    Raises ValueError if there are more than max_length. Where the values of tensors cannot be read, `_convolve` instead
    sets the outputs after max_length to NaN.
    """
    batch, length = x.shape[:2]
    needed = int(state.inputs.shape[1] + length)
    exact = rows is None and not state.inputs.shape[1]  # otherwise the shapes give only an upper bound
    if batch and not exact and (rows is not None or needed > max_length):
        if not plain(state.filled, x):
            return min(needed, max_length)
        after = state.filled + (length if rows is None else rows.lengths)
        needed = max(1, int(after.max()))
    if needed > max_length:
        raise ValueError(
            f"the filter is defined on max_length = {max_length} positions, got a sequence of {needed}; "
            f"build the layer with a max_length of at least {needed}"
        )
    return needed


def _convolve(
    x: Float[Tensor, "rows length width"],
    kernel: Float[Tensor, "width needed"],
    bias: Float[Tensor, " width"],
    state: HyenaFilterState,
    rows: Rows | None,
) -> tuple[Tensor, HyenaFilterState]:
    """y at the tokens of x, in the dtype of x, and the new state: the inputs so far followed by x."""
    if not x.numel():
        return x, state
    x = x if rows is None else rows.zero_padding(x)
    stream, place = _append(state, x)
    if x.shape[1] == 1:  # one output is a single sum
        lag = (state.filled[:, None] - torch.arange(stream.shape[1], device=x.device)).clamp(0, kernel.shape[1] - 1)
        y = (kernel.T[lag] * stream).sum(1, keepdim=True) + bias * x  # the stream is zero after the present token
    else:
        y = fft_conv(stream, torch.cat([kernel[:, :1] + bias[:, None], kernel[:, 1:]], 1))
        y = y if place is None else y.gather(1, place)
    filled = state.filled + (x.shape[1] if rows is None else rows.lengths)
    after = HyenaFilterState(stream[:, : kernel.shape[1]].contiguous(), filled)
    if stream.shape[1] > kernel.shape[1] and not plain(state.filled, x):  # the filter may be shorter than the tokens
        late = _places(state, x) >= kernel.shape[1]
        y = y.masked_fill((late if rows is None else late & rows.mask)[..., None], math.nan)
    return y.to(x.dtype), after


def _append(
    state: HyenaFilterState, x: Float[Tensor, "rows length width"]
) -> tuple[Float[Tensor, "rows stream width"], Int[Tensor, "rows length width"] | None]:
    """Each row's inputs so far, then x, then zeros; and the indices of x's tokens, or None if x is at the start."""
    if not state.inputs.shape[1]:
        return x, None
    place = _places(state, x)[..., None].expand(x.shape)
    return F.pad(state.inputs.to(x.dtype), (0, 0, 0, x.shape[1])).scatter(1, place, x), place


def _places(state: HyenaFilterState, x: Float[Tensor, "rows length width"]) -> Int[Tensor, "rows length"]:
    """Positions of the tokens of x in their rows."""
    return state.filled[:, None] + torch.arange(x.shape[1], device=x.device)
