"""The step of a whole model on an NVIDIA GPU, as CUDA graphs: one for each bucket of row counts.

A graph finds states, logits and the number of rows in a record that the step writes first, so nothing is copied in or
out, and a state may have any number of rows up to the bucket's. Up to 8 rows run in kernels that fuse everything
between two products into them; more run in cuBLAS, with kernels between.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from anymamba.kernels.model_step import cuda as kernels
from anymamba.models.inference.gpu_states import StateShapes, addresses
from anymamba.models.inference.gpu_weights import (
    Layer,
    Projections,
    StepWeights,
    activation_dtype,
    gather,
    obstacles,
    padded,
)
from anymamba.models.inference.graphs import Graphs, bucket_of
from anymamba.models.language_model import LanguageModel, LanguageModelOutput, LanguageModelState
from anymamba.ops import dispatch, observers
from anymamba.parts.norm import norm_of_sum


class Bucket(NamedTuple):
    """A recorded step of up to so many rows."""

    start: kernels.Start
    replay: Callable[[], object]
    run: object
    """What was recorded; it holds the memory of activations."""
    ids: Tensor | None
    """Where the graph reads ids, if it looks up rows of a packed embedding."""
    hidden: Tensor | None
    """(bucket, d_model), the normed output of the last block, if logits are not computed in the graph."""


class GpuStep:
    """The step of a whole model on a GPU. Make it with `GpuStep.of`.

    It holds the addresses of the weights, which must not change. States are float32.
    """

    @classmethod
    def of(cls, model: LanguageModel) -> GpuStep | dict[int, str]:
        """The step of a model, or the reasons why it has none: by block index, or WHOLE for the model."""
        return obstacles(model) or cls(model)

    def __init__(self, model: LanguageModel) -> None:
        self._model = model
        self._weights = gather(model)
        self._device = next(model.parameters()).device
        self._shapes = StateShapes.of(model)
        self._record = kernels.new_record(self._device)
        self._n_logits = model.config.padded_vocab_size
        self._graphs = Graphs(self._device)
        self._buckets: dict[int, Bucket] = {}

    def serves(self, token_ids: Tensor, state: LanguageModelState) -> bool:
        """Whether `step` can take these arguments: one dense row of ids on the GPU and a state of this model, without
        transforms, tracers and a graph that is being captured, and with CUDA kernels allowed by `anymamba.backend`."""
        return (
            type(token_ids) is Tensor
            and token_ids.device == self._device
            and token_ids.ndim == 1
            and token_ids.shape[0] > 0
            and token_ids.dtype in (torch.int64, torch.int32)
            and type(state) is LanguageModelState
            and observers.plain(token_ids)
            and self._shapes.fit(state.layers, token_ids.shape[0], self._device)
            and not torch.cuda.is_current_stream_capturing()
            and dispatch.resolve("selective_scan", "cuda", None) == "cuda"
        )

    @torch.no_grad()
    def step(
        self, token_ids: Int[Tensor, " batch"], state: LanguageModelState, *, reuse: bool = False
    ) -> LanguageModelOutput:
        """`LanguageModel.step`, for arguments that it `serves`. An id outside the vocabulary gives NaN.

        Args:
            token_ids: (batch,).
            state: one row per sequence. One that a step returned is read where it is; another is copied once.
            reuse: write the new state into the memory of the given one.
        """
        rows, token_ids = token_ids.shape[0], token_ids.contiguous()
        with self._graphs.turn():
            bucket = self._bucket(bucket_of(rows))
            old = self._shapes.joined(state.layers, rows, self._device)
            new = old if reuse or old is not state.layers else self._shapes.new(rows, self._device)
            logits = None if bucket.hidden is not None else torch.empty(rows, self._n_logits, device=self._device)
            bucket.start(token_ids, addresses(old), addresses(new), logits)
            if bucket.ids is not None:
                bucket.ids[:rows].copy_(token_ids)
            bucket.replay()
            if bucket.hidden is not None:
                logits = self._model.logits(bucket.hidden[:rows])
        assert logits is not None
        return LanguageModelOutput(logits, LanguageModelState(new, state.positions))

    @property
    def recorded(self) -> list[int]:
        """The buckets that have a graph: up to how many rows each takes."""
        return sorted(self._buckets)

    # --------------------------------------------------------------------------------------------- recording

    def _bucket(self, rows: int) -> Bucket:
        if rows not in self._buckets:
            self._buckets[rows] = self._record_bucket(rows)
        return self._buckets[rows]

    def _record_bucket(self, rows: int) -> Bucket:
        weights, d_model, index = self._weights, self._model.config.d_model, self._device.index or 0
        residual, ids, hidden = self._zeros(rows, d_model), None, None
        start = kernels.Start(self._record, weights.table, residual)
        self._start_of_no_rows(start)
        if weights.table is None:
            ids = torch.zeros(rows, dtype=torch.int64, device=self._device)
        is_fused = rows <= kernels.MOST_ROWS and weights.fit(index, rows)
        if weights.head is None or not is_fused:
            hidden = torch.zeros(rows, d_model, device=self._device)
        run: _FusedStep | _ManyRows
        if is_fused:
            kernels.prepare(index, weights.matrices(), rows, weights.layers[0].recurrence)
            run = _FusedStep(self._model, weights, self._record, residual, ids, hidden)
        else:
            run = _ManyRows(self._model, weights, self._record, residual, ids, hidden)
        return Bucket(start, self._graphs.capture(run, rows), run, ids, hidden)

    def _start_of_no_rows(self, start: kernels.Start) -> None:
        """Kernels that run while they are recorded then touch no states."""
        start(torch.zeros(0, dtype=torch.int64, device=self._device), (0, 0), (0, 0), None)

    def _zeros(self, rows: int, size: int) -> Tensor:
        return torch.zeros(rows, padded(size), device=self._device)


class _FusedStep:
    """Queues a step of up to 8 rows: four kernels a layer, and one for the head.

    Args:
        residual: (rows, padded d_model), the embedded tokens.
        ids, hidden: as for `_ManyRows`; None: the head's kernel computes logits.
    """

    def __init__(
        self,
        model: LanguageModel,
        weights: StepWeights,
        record: Tensor,
        residual: Tensor,
        ids: Tensor | None,
        hidden: Tensor | None,
    ) -> None:
        self._model, self._weights, self._record, self._residual = model, weights, record, residual
        self._ids, self._hidden = ids, hidden
        mixer: Any = model.blocks[0].mixer
        rows = residual.shape[0]
        self._u, self._z, self._y = (residual.new_zeros(rows, padded(mixer.d_inner)) for _ in range(3))
        self._projected = None if mixer.x_proj is None else residual.new_zeros(rows, mixer.x_proj.n_out)

    @torch.no_grad()
    def __call__(self) -> None:
        embedded = self._residual[:, : self._model.config.d_model]
        if self._ids is not None:
            embedded.copy_(self._model.embedding(self._ids))
        for index, layer in enumerate(self._weights.layers):
            assert layer.projections is not None
            self._run_layer(index, layer, layer.projections)
        if self._hidden is not None:
            self._hidden.copy_(norm_of_sum(self._model.norm, None, embedded)[0])
            return
        head = self._weights.head
        assert head is not None
        kernels.product(self._record, self._residual, head, self._weights.norm, None, kernels.LOGITS)

    def _run_layer(self, index: int, layer: Layer, matrices: Projections) -> None:
        record, residual, u, z, y = self._record, self._residual, self._u, self._z, self._y
        kernels.in_proj(record, index, residual, matrices.in_proj, layer.norm, layer.short, u, z)
        if matrices.x_proj is not None:
            kernels.product(record, u, matrices.x_proj, None, self._projected)
        kernels.recur(record, index, layer.recurrence, u, z, self._projected, y)
        kernels.product(record, y, matrices.out_proj, matrices.output_norm, residual, kernels.ADD)


class _ManyRows:
    """Queues a step of any number of rows: the model's own modules for products and norms, and two kernels a layer.

    Args:
        residual: (rows, padded d_model), the embedded tokens.
        ids: (rows,), which are looked up first; None if `residual` has them already.
        hidden: (rows, d_model), where the result goes.
    """

    def __init__(
        self,
        model: LanguageModel,
        weights: StepWeights,
        record: Tensor,
        residual: Tensor,
        ids: Tensor | None,
        hidden: Tensor | None,
    ) -> None:
        assert hidden is not None
        self._model, self._weights, self._record = model, weights, record
        self._residual, self._ids, self._hidden = residual[:, : model.config.d_model], ids, hidden
        self._dtype = activation_dtype(model)

    @torch.no_grad()
    def __call__(self) -> None:
        residual, update = self._residual if self._ids is None else self._model.embedding(self._ids), None
        for index, block in enumerate(self._model.blocks):
            terms = (residual, None) if update is None else (update, residual)
            x, residual = block.norm.of_sum(*terms, self._dtype)
            update = self._mix(index, block.mixer, x)
        x, _ = norm_of_sum(self._model.norm, update, residual)
        self._hidden.copy_(x)

    def _mix(self, index: int, mixer: Any, x: Tensor) -> Tensor:
        layer, dtype = self._weights.layers[index], self._dtype
        inputs, z = mixer.in_proj(x).chunk(2, dim=-1)
        u, y = torch.empty_like(inputs), torch.empty_like(inputs)
        kernels.convolve_rows(self._record, index, inputs, layer.short, u)
        projected = u.new_empty(len(u), 0) if mixer.x_proj is None else mixer.x_proj(u)
        dt, B, C = projected.split(mixer.x_proj_rows, dim=-1)
        norms = (mixer.dt_norm, mixer.B_norm, mixer.C_norm)
        dt, B, C = (
            m if norm is None else norm.of_sum(m, dtype=dtype).y for m, norm in zip((dt, B, C), norms, strict=True)
        )
        selected = (B if mixer.selective_B else None, C if mixer.selective_C else None)
        delta, weights = None, layer.recurrence
        if mixer.dt_proj is None:
            dt = None
        elif not kernels.projects(weights, u, z, dt, *selected):
            dt, delta = None, mixer.dt_proj(dt)
        kernels.recur_rows(self._record, index, weights, u, z, dt, delta, *selected, y)
        return mixer.out_proj(y if mixer.output_norm is None else mixer.output_norm.of_sum(y, dtype=dtype).y)
