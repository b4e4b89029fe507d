"""The arguments of every backend of the selective scan: the op's tensors and options in one record, already checked."""

from __future__ import annotations

import bisect
from typing import Any, NamedTuple

import torch
from jaxtyping import Complex, Float, Int
from torch import Tensor

Activations = Float[Tensor, "batch length d_inner"]
"""u, delta, z and y."""
StateMatrix = Float[Tensor, "d_inner d_state"] | Complex[Tensor, "d_inner d_state"]
"""A, and a constant B or C."""
StepMatrix = (
    StateMatrix | Float[Tensor, "batch length n_groups d_state"] | Complex[Tensor, "batch length n_groups d_state"]
)
"""B and C: constant, or different for each token and group of channels."""
PerChannel = Float[Tensor, " d_inner"]
"""D and delta_bias."""
State = Float[Tensor, "n_sequences d_inner d_state"] | Complex[Tensor, "n_sequences d_inner d_state"]
"""h of each sequence, in float32 or wider."""
Offsets = Int[Tensor, " n_sequences_plus_1"]
"""cu_seqlens: the offset at which each packed sequence begins, and the length. The first offset is 0."""


N_TENSORS = 10


class ScanArguments(NamedTuple):
    """Tensors and options of `anymamba.selective_scan`, in the order in which torch's registered op takes them."""

    u: Activations
    delta: Activations
    A: StateMatrix
    B: StepMatrix
    C: StepMatrix
    D: PerChannel | None = None
    z: Activations | None = None
    delta_bias: PerChannel | None = None
    initial_state: State | None = None
    cu_seqlens: Offsets | None = None
    delta_softplus: bool = False
    b_discretization: str = "euler"

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        fields: tuple[Any, ...] = self
        return fields[:N_TENSORS]

    @property
    def options(self) -> tuple[Any, ...]:
        return self[N_TENSORS:]

    @property
    def batch(self) -> int:
        return self.u.shape[0]

    @property
    def length(self) -> int:
        return self.u.shape[1]

    @property
    def d_inner(self) -> int:
        return self.u.shape[2]

    @property
    def d_state(self) -> int:
        return self.A.shape[1]

    @property
    def n_groups(self) -> int:
        """Number of groups of channels that share B and C; 1 if both are constant."""
        for M in (self.B, self.C):
            if M.ndim == 4:
                return M.shape[2]
        return 1

    @property
    def n_sequences(self) -> int:
        """Rows of the states: the batch size, or the number of packed sequences."""
        return self.batch if self.cu_seqlens is None else self.cu_seqlens.numel() - 1

    @property
    def zoh(self) -> bool:
        return self.b_discretization == "zoh"

    @property
    def real_dtype(self) -> torch.dtype:
        """The dtype of values other than states: float64 if u, delta or A is float64, otherwise float32."""
        narrow = torch.promote_types(self.u.dtype, self.delta.dtype)
        wide = torch.promote_types(torch.float32, narrow)
        return wide if self.A.dtype == wide else torch.promote_types(wide, self.A.real.dtype)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the state: `real_dtype`, or its complex dtype if A is complex."""
        real = self.real_dtype
        return real if self.A.dtype == real else torch.promote_types(real, self.A.dtype)

    def state_gradient(self, given: Tensor | None) -> Tensor:
        """The gradient of the last state; zeros in place of None."""
        shape = (self.n_sequences, self.d_inner, self.d_state)
        return self.u.new_zeros(shape, dtype=self.dtype) if given is None else given

    def range_of(self, token: int) -> tuple[int, int, int]:
        """The index, start and stop of the packed sequence that has a token. It reads the offsets."""
        assert self.cu_seqlens is not None
        offsets = self.cu_seqlens.tolist()
        index = bisect.bisect_right(offsets, token) - 1
        return index, offsets[index], offsets[index + 1]

    def of_sequence(self, index: int, start: int, stop: int) -> ScanArguments:
        """The arguments of a single packed sequence."""
        tokens = slice(start, stop)
        state = None if self.initial_state is None else self.initial_state[index : index + 1]
        return self._replace(
            u=self.u[:, tokens],
            delta=self.delta[:, tokens],
            B=self.B if self.B.ndim == 2 else self.B[:, tokens],
            C=self.C if self.C.ndim == 2 else self.C[:, tokens],
            z=None if self.z is None else self.z[:, tokens],
            initial_state=state,
            cu_seqlens=None,
        )
