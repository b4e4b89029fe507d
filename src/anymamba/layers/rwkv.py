"""RWKV-4: an average of all values so far with weights that decay per channel, and a feed-forward layer. Both also see
the previous token.

    wkv[t] = (Σ_{i<t} exp(k[i] - (t-1-i) w) v[i] + exp(u + k[t]) v[t]) / (the same sum without v),   w = exp(time_decay)

The state is the average before t and the logarithm of its weight:

    weight[t] = log(exp(weight[t-1] - w) + exp(k[t]))
    average[t] = average[t-1] + sigmoid(k[t] - weight[t-1] + w) (v[t] - average[t-1])

These cannot overflow for any k. The second line is a selective scan with A = -1, B = C = 1, exact zero-order hold and
the step softplus(k[t] - weight[t-1] + w): theorem 1 of the Mamba paper.

Source: RWKV (arXiv:2305.13048), section 3 and appendix on initialisation; Mamba (arXiv:2312.00752), section 3.5.1.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from anymamba.ops.selective_scan import selective_scan
from anymamba.parts.derivatives import as_operations
from anymamba.parts.padding import Rows
from anymamba.parts.parameters import WideParameters
from anymamba.parts.sequence import SequenceLayer

EMPTY = -1e30  # the log weight before the first token; with -inf, differences would be NaN
CHUNK = 32  # steps of the loop over time, which runs on all chunks at once


class RWKVTimeMixState(NamedTuple):
    """State of the time mix; its size does not depend on how many tokens it has seen."""

    previous: Float[Tensor, "batch d_model"]
    """The last input."""
    average: Float[Tensor, "batch d_model"]
    """The weighted average of the values so far, in float32 or wider."""
    log_weight: Float[Tensor, "batch d_model"]
    """The logarithm of the sum of its weights, in float32 or wider."""


class RWKVChannelMixState(NamedTuple):
    """State of the channel mix."""

    previous: Float[Tensor, "batch d_model"]
    """The last input."""


class WKVParameters(WideParameters):
    """The decay of each channel, exp(time_decay) per step, and the bonus u = time_first of the present token."""

    def __init__(self, d_model: int, depth: float, device=None, dtype=None) -> None:
        super().__init__()
        self.depth = depth
        self.time_decay = nn.Parameter(torch.empty(d_model, device=device, dtype=self.wide(dtype)))
        self.time_first = nn.Parameter(torch.empty(d_model, device=device, dtype=self.wide(dtype)))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Channel h: time_decay = -5 + 8 (h / (d_model - 1))^(0.7 + 1.3 depth), time_first = log 0.3 + (-½, 0 or ½)."""
        if self.time_decay.is_meta:
            return
        d_model = self.time_decay.shape[0]
        channel = torch.arange(d_model, device=self.time_decay.device)
        self.time_decay.copy_(8 * (channel / max(d_model - 1, 1)) ** (0.7 + 1.3 * self.depth) - 5)
        self.time_first.copy_(math.log(0.3) + 0.5 * ((channel + 1) % 3 - 1))


class RWKVTimeMix(SequenceLayer):
    """The time mix of RWKV-4: output(sigmoid(r) * wkv(k, v)), where r, k and v see x[t] and x[t-1].

    Key, receptance and output start at zero, so a new layer returns zeros. They are marked, so that a model's own
    initialisation does not change them.

    Args:
        d_model: width of the input and output.
        layer: index of the layer in the model, from 0; the initialisation depends on it.
        n_layers: layers of the model.
    Raises ValueError for invalid sizes.
    """

    state_type = RWKVTimeMixState

    def __init__(self, d_model: int, *, layer: int = 0, n_layers: int = 1, device=None, dtype=None) -> None:
        super().__init__()
        _require_sizes(d_model, d_model, layer, n_layers)
        self.d_model, self.layer, self.n_layers = d_model, layer, n_layers
        self.mix_receptance = nn.Parameter(torch.empty(d_model, device=device, dtype=dtype))
        self.mix_key = nn.Parameter(torch.empty(d_model, device=device, dtype=dtype))
        self.mix_value = nn.Parameter(torch.empty(d_model, device=device, dtype=dtype))
        self.receptance, self.key, self.value, self.output = (
            nn.Linear(d_model, d_model, bias=False, device=device, dtype=dtype) for _ in range(4)
        )
        self.wkv = WKVParameters(d_model, layer / max(n_layers - 1, 1), device, dtype)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Key, receptance and output are zero, the value is orthogonal; the rest depends on channel and depth."""
        if self.mix_key.is_meta:
            return
        channel = _channels(self.mix_key)
        rest = 1 - self.layer / self.n_layers
        self.mix_receptance.copy_(channel ** (0.5 * rest))
        self.mix_key.copy_(channel**rest)
        self.mix_value.copy_(channel**rest + 0.3 * self.wkv.depth)
        _orthogonal(self.value)
        for projection in (self.receptance, self.key, self.output):
            _start_at_zero(projection)
        self.wkv.reset_parameters()

    def init_state(self, batch: int, dtype: torch.dtype | None = None) -> RWKVTimeMixState:
        """No token seen: the previous input is zero, and the average has no weight."""
        decay = self.wkv.time_decay
        average = torch.zeros(batch, self.d_model, device=decay.device, dtype=decay.dtype)
        return RWKVTimeMixState(
            torch.zeros_like(average, dtype=dtype or self.mix_key.dtype),
            average,
            torch.full_like(average, EMPTY),
        )

    def run(
        self, x: Float[Tensor, "rows length d_model"], state: RWKVTimeMixState | None, rows: Rows | None
    ) -> tuple[Float[Tensor, "rows length d_model"], RWKVTimeMixState]:
        """All tokens; see `SequenceLayer.run`. Padding comes after the real tokens, so it does not reach them."""
        state = state or self.init_state(x.shape[0], x.dtype)
        r, k, v = self._projected(x, _before(x, state.previous))
        w, u = torch.exp(self.wkv.time_decay), self.wkv.time_first
        weight = decayed_logcumsumexp(k, w, state.log_weight)
        weight_before = _before(weight, state.log_weight)
        average = _running_average(v, k - weight_before + w, state.average)
        average_before = _before(average, state.average)
        y = self._output(r, u + k - weight_before, v, average_before)
        after = (_last(x, state.previous, rows), _last(average, state.average, rows))
        return y, RWKVTimeMixState(*after, _last(weight, state.log_weight, rows))

    def run_step(
        self, x: Float[Tensor, "batch d_model"], state: RWKVTimeMixState
    ) -> tuple[Float[Tensor, "batch d_model"], RWKVTimeMixState]:
        """One token, in constant time and memory."""
        r, k, v = self._projected(x, state.previous.to(x.dtype))
        faded = state.log_weight - torch.exp(self.wkv.time_decay)
        y = self._output(r, self.wkv.time_first + k - state.log_weight, v, state.average)
        average = state.average + torch.sigmoid(k - faded) * (v - state.average)
        return y, RWKVTimeMixState(x, average, _logaddexp(faded, k))

    def _projected(self, x: Tensor, previous: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """r in the dtype of x; k and v in float32 or wider."""
        r = self.receptance(_mix(x, previous, self.mix_receptance))
        k = self.key(_mix(x, previous, self.mix_key))
        v = self.value(_mix(x, previous, self.mix_value))
        wide = self.wkv.time_decay.dtype
        return r, k.to(wide), v.to(wide)

    def _output(self, r: Tensor, log_share: Tensor, v: Tensor, average: Tensor) -> Tensor:
        """Output of the average with the present token; log_share is the log of its weight over that of the average."""
        wkv = average + torch.sigmoid(log_share) * (v - average)
        return self.output(torch.sigmoid(r) * wkv.to(r.dtype))


class RWKVChannelMix(SequenceLayer):
    """The channel mix of RWKV-4: sigmoid(r) * value(relu(key(x))^2), where r and the key see x[t] and x[t-1].

    Receptance and value start at zero, so a new layer returns zeros. They are marked, so that a model's own
    initialisation does not change them.

    Args:
        d_model: width of the input and output.
        d_hidden: width between key and value; defaults to 4 d_model.
        layer: index of the layer in the model, from 0; the initialisation depends on it.
        n_layers: layers of the model.
    Raises ValueError for invalid sizes.
    """

    state_type = RWKVChannelMixState

    def __init__(
        self,
        d_model: int,
        *,
        d_hidden: int | None = None,
        layer: int = 0,
        n_layers: int = 1,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        d_hidden = 4 * d_model if d_hidden is None else d_hidden
        _require_sizes(d_model, d_hidden, layer, n_layers)
        self.d_model, self.d_hidden, self.layer, self.n_layers = d_model, d_hidden, layer, n_layers
        self.mix_receptance = nn.Parameter(torch.empty(d_model, device=device, dtype=dtype))
        self.mix_key = nn.Parameter(torch.empty(d_model, device=device, dtype=dtype))
        self.receptance = nn.Linear(d_model, d_model, bias=False, device=device, dtype=dtype)
        self.key = nn.Linear(d_model, d_hidden, bias=False, device=device, dtype=dtype)
        self.value = nn.Linear(d_hidden, d_model, bias=False, device=device, dtype=dtype)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Receptance and value are zero, the key orthogonal, both mixes (channel / d_model)^(1 - layer / n_layers)."""
        if self.mix_key.is_meta:
            return
        for mix in (self.mix_receptance, self.mix_key):
            mix.copy_(_channels(mix) ** (1 - self.layer / self.n_layers))
        _orthogonal(self.key)
        _start_at_zero(self.receptance)
        _start_at_zero(self.value)

    def init_state(self, batch: int, dtype: torch.dtype | None = None) -> RWKVChannelMixState:
        """The previous input is zero."""
        return RWKVChannelMixState(self.mix_key.new_zeros(batch, self.d_model, dtype=dtype))

    def run(
        self, x: Float[Tensor, "rows length d_model"], state: RWKVChannelMixState | None, rows: Rows | None
    ) -> tuple[Float[Tensor, "rows length d_model"], RWKVChannelMixState]:
        """All tokens; see `SequenceLayer.run`."""
        state = state or self.init_state(x.shape[0], x.dtype)
        return self._mixed(x, _before(x, state.previous)), RWKVChannelMixState(_last(x, state.previous, rows))

    def run_step(
        self, x: Float[Tensor, "batch d_model"], state: RWKVChannelMixState
    ) -> tuple[Float[Tensor, "batch d_model"], RWKVChannelMixState]:
        """One token."""
        return self._mixed(x, state.previous.to(x.dtype)), RWKVChannelMixState(x)

    def _mixed(self, x: Tensor, previous: Tensor) -> Tensor:
        hidden = F.relu(self.key(_mix(x, previous, self.mix_key))).square()
        r = self.receptance(_mix(x, previous, self.mix_receptance))
        return torch.sigmoid(r) * self.value(hidden)


def decayed_logcumsumexp(
    k: Float[Tensor, "batch length d_model"], w: Float[Tensor, " d_model"], start: Float[Tensor, "batch d_model"]
) -> Float[Tensor, "batch length d_model"]:
    """log(exp(start - (t+1) w) + Σ_{i<=t} exp(k[i] - (t-i) w)) at each t.

    A loop over time inside the chunks, for all chunks at once, is followed by a loop over the chunks: CHUNK +
    length / CHUNK sequential steps. Only positions within a chunk are multiplied by w, so float32 keeps its precision
    at any length.
    """
    length = k.shape[1]
    if length == 0:
        return k
    n_chunks, chunk = math.ceil(length / CHUNK), min(CHUNK, length)
    first, *others = F.pad(k, (0, 0, 0, n_chunks * chunk - length)).unflatten(1, (n_chunks, chunk)).unbind(2)
    inside = [first]
    for k_t in others:
        inside.append(_logaddexp(inside[-1] - w, k_t))
    carried = [start]
    for end in inside[-1].unbind(1)[:-1]:
        carried.append(_logaddexp(carried[-1] - chunk * w, end))
    steps = torch.arange(1, chunk + 1, device=k.device, dtype=k.dtype)
    before = torch.stack(carried, 1)[:, :, None] - steps[:, None] * w
    return _logaddexp(torch.stack(inside, 2), before).flatten(1, 2)[:, :length]


def _logaddexp(a: Float[Tensor, "..."], b: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """log(exp(a) + exp(b)), with finite derivatives of any order even if a and b are far apart.

    The second derivative of torch.logaddexp is NaN if exp(a - b) overflows, as it does if b is `EMPTY`.
    """
    if as_operations(a, b):
        return torch.where(a > b, a + F.softplus(b - a), b + F.softplus(a - b))
    once = torch.compiler.is_compiling() or not torch.is_grad_enabled()  # compiled code has no second derivatives
    return torch.logaddexp(a, b) if once else _LogAddExp.apply(a, b)


class _LogAddExp(torch.autograd.Function):
    """logaddexp whose backward pass, the share of exp(a) in the sum, can be differentiated again."""

    @staticmethod
    def forward(ctx, a: Tensor, b: Tensor) -> Tensor:
        assert a.shape == b.shape
        ctx.save_for_backward(a, b)
        return torch.logaddexp(a, b)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, Tensor]:
        a, b = ctx.saved_tensors
        da = dy * torch.sigmoid(a - b)
        return da, dy - da


def _running_average(
    v: Float[Tensor, "batch length d_model"],
    log_share: Float[Tensor, "batch length d_model"],
    start: Float[Tensor, "batch d_model"],
) -> Float[Tensor, "batch length d_model"]:
    """average[t] = average[t-1] + sigmoid(log_share[t]) (v[t] - average[t-1]), as a selective scan."""
    one = torch.ones(v.shape[-1], 1, device=v.device, dtype=v.dtype)
    return selective_scan(
        v,
        log_share,
        -one,
        one,
        one,
        delta_softplus=True,
        b_discretization="zoh",
        initial_state=start[..., None],
    ).y


def _mix(x: Float[Tensor, "... d_model"], previous: Tensor, share: Float[Tensor, " d_model"]) -> Tensor:
    """share x + (1 - share) previous, in the dtype of x."""
    return (previous + share * (x - previous)).to(x.dtype)


def _before(x: Float[Tensor, "batch length width"], start: Float[Tensor, "batch width"]) -> Tensor:
    """x shifted by one step: start, x[0], x[1], ..."""
    return torch.cat([start[:, None].to(x.dtype), x], 1)[:, :-1]


def _last(x: Tensor, start: Float[Tensor, "rows width"], rows: Rows | None) -> Float[Tensor, "rows width"]:
    """The last real token of each row, or start for a row without tokens."""
    if rows is not None:
        return rows.last(x, start[:, None], 1)[:, 0]
    return x[:, -1] if x.shape[1] else start


def _channels(mix: Float[Tensor, " d_model"]) -> Float[Tensor, " d_model"]:
    """0, 1/d_model, 2/d_model, ... in float32."""
    return torch.arange(mix.shape[0], device=mix.device) / mix.shape[0]


def _orthogonal(projection: nn.Linear) -> None:
    """Set an orthogonal matrix, scaled by sqrt(outputs / inputs) if there are more outputs than inputs."""
    outputs, inputs = projection.weight.shape
    weight = torch.empty_like(projection.weight, dtype=torch.float32)  # torch has no QR decomposition in 16 bits
    nn.init.orthogonal_(weight, gain=math.sqrt(max(outputs / inputs, 1)))
    projection.weight.copy_(weight)


def _start_at_zero(projection: nn.Linear) -> None:
    """Set zeros, and mark the projection so that a model's own initialisation does not change it."""
    nn.init.zeros_(projection.weight)
    projection.starts_at_zero = True  # type: ignore[assignment]


def _require_sizes(d_model: int, d_hidden: int, layer: int, n_layers: int) -> None:
    if d_model < 1 or d_hidden < 1:
        raise ValueError(f"d_model and d_hidden must be at least 1, got {d_model} and {d_hidden}")
    if not 0 <= layer < n_layers:
        raise ValueError(
            f"layer must be between 0 and n_layers - 1, got layer {layer} of {n_layers}; layers count from 0"
        )
