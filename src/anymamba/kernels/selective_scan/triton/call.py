"""Launch the kernels of the Triton scan: their arguments, strides, scratch tensors and variants."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from anymamba.kernels import triton
from anymamba.kernels.selective_scan.arguments import ScanArguments
from anymamba.kernels.selective_scan.triton import plan

CARRY_LANES = 128
STEP_ELEMENTS, STEP_STATES = 1024, 128
"""Of a block of the one-token kernel: numbers, and states of a channel."""


class Call:
    """The arguments of the kernels of one call, which is not empty."""

    def __init__(self, a: ScanArguments) -> None:
        self.a = a
        self.slabs = plan.slabs(a.d_state)
        self.rows = {name: triton.dense(t) for name, t in (("u", a.u), ("delta", a.delta), ("z", a.z))}
        self.matrices = {"B": self._matrix(a.B), "C": self._matrix(a.C)}
        self.initial_state = self._own(a.initial_state)
        self.vectors = {"A": self._own(a.A), "D": self._own(a.D), "bias": self._own(a.delta_bias)}
        self.sequence_of = None if a.cu_seqlens is None else triton.sequences(a.cu_seqlens, a.length)[1]
        self.block = plan.block(a)
        per_group = a.d_inner // a.n_groups
        self.n_blocks = a.n_groups * -(-per_group // self.block)
        self.chunk = plan.chunk(a, self.n_blocks * a.batch)
        self.n_chunks = -(-a.length // self.chunk)
        self.tokens = plan.tokens(a)
        self.fast = triton.is_nvidia(a.u) and a.dtype == torch.float32
        self.flags: dict[str, Any] = {
            "BLOCK": self.block,
            "TOKENS": self.tokens,
            "SOFTPLUS": a.delta_softplus,
            "WHOLE": a.length % self.tokens == 0 and per_group % self.block == 0,
            "FAST": self.fast,
            "num_warps": 1,
        }
        self.selective: dict[str, Tensor] = {}
        self.sizes = {
            "length": a.length,
            "d_inner": a.d_inner,
            "d_state": a.d_state,
            "batch": a.batch,
            "per_group": per_group,
            "n_groups": a.n_groups,
            "chunk": self.chunk,
            "n_chunks": self.n_chunks,
        }

    def _own(self, tensor: Tensor | None) -> Tensor | None:
        """A dense tensor of the state's dtype."""
        return None if tensor is None else tensor.to(self.a.dtype).contiguous()

    def _matrix(self, matrix: Tensor) -> Tensor | None:
        return self._own(matrix) if matrix.ndim == 2 else triton.dense(matrix)

    def gradient_of(self, dy: Tensor) -> None:
        """Add dy to the rows."""
        self.rows["dy"] = triton.dense(dy)

    def new_chunks(self) -> None:
        """Scratch for the states and the sums of steps of chunks."""
        a, like = self.a, {"dtype": self.a.dtype, "device": self.a.u.device}
        self.chunk_states = torch.empty(a.batch, self.n_chunks, a.d_state, a.d_inner, **like)
        self.chunk_steps = torch.empty(a.batch, self.n_chunks, a.d_inner, **like)

    def _passed(self, rows: tuple[str, ...], matrices: tuple[str, ...], words: bool = True) -> dict[str, Any]:
        """Rows and matrices with their strides; matrices in words of four numbers where they can be read so."""
        found: dict[str, Any] = {}
        for name in rows:
            tensor = self.rows[name]
            row, token = (0, 0) if tensor is None else tensor.stride()[:2]
            found |= {name: tensor, f"{name}_row": row, f"{name}_token": token}
        words = words and self._words(matrices)
        for name in matrices:
            tensor = self.matrices[name]
            assert tensor is not None
            is_constant = tensor.ndim == 2
            tensor = tensor.view(torch.int64) if words and not is_constant else tensor
            strides = (0, 0, 0) if is_constant else tensor.stride()[:3]
            found |= {f"{name}_{k}": s for k, s in zip(("row", "token", "group"), strides, strict=True)}
            found |= {name: tensor, f"CONSTANT_{name}": is_constant}
        return found | {"PACKED_WORDS": words}

    def _words(self, matrices: tuple[str, ...]) -> bool:
        """Whether the selective ones of B and C can be read as words of four bfloat16."""
        selective = [t for name in matrices if (t := self.matrices[name]) is not None and t.ndim == 4]
        return all(
            t.dtype == torch.bfloat16
            and t.stride(-1) == 1
            and t.data_ptr() % 8 == 0
            and self.a.d_state % plan.SLAB == 0
            and all(stride % 4 == 0 for stride in (*t.stride()[:3], t.storage_offset()))
            for t in selective
        )

    def _launch(self, kernel: Any, n_programs: int, **arguments: Any) -> None:
        with triton.on_device(self.a.u):
            kernel[(n_programs,)](**arguments)

    def _programs(self, n_chunks: int) -> int:
        return self.n_blocks * self.a.batch * n_chunks

    def scan(self, slab: plan.Slab, summary: bool, **results: Tensor | None) -> None:
        """The forward kernel of one slab."""
        from anymamba.kernels.selective_scan.triton.forward_kernels import scan

        several = self.n_chunks > 1
        self._launch(
            scan,
            self._programs(self.n_chunks - summary),
            **self._passed(("u", "delta", "z"), ("B", "C")),
            **self.vectors | self.sizes | self.flags | results,
            initial=self.initial_state,
            sequence_of=self.sequence_of,
            chunk_states=self.chunk_states if several else None,
            chunk_steps=self.chunk_steps if summary else None,
            first_chunk=0,
            first_state=slab.first,
            N=slab.n,
            SAVED_EVERY=plan.SAVED_EVERY,
            SUMMARY=summary,
            ARRIVES=several and not summary,
            ZOH=self.a.zoh,
            FIRST=slab.is_first,
            LAST=slab.is_last,
        )

    def carry(self, initial: Tensor | None, reverse: bool) -> None:
        """Pass states on from chunk to chunk."""
        from anymamba.kernels.selective_scan.triton.forward_kernels import carry

        sizes = {k: v for k, v in self.sizes.items() if k not in ("per_group", "n_groups")}
        self._launch(
            carry,
            self.a.batch * -(-self.a.d_inner * self.a.d_state // CARRY_LANES),
            **sizes,
            A=self.vectors["A"],
            states=self.chunk_states,
            steps=self.chunk_steps,
            sequence_of=self.sequence_of,
            initial=initial,
            BLOCK=CARRY_LANES,
            REVERSE=reverse,
        )

    def reverse_summary(self, slab: plan.Slab, dlast_state: Tensor) -> None:
        """What arrives at chunks on the way back, of one slab."""
        from anymamba.kernels.selective_scan.triton.backward_kernels import reverse_summary

        self._launch(
            reverse_summary,
            self._programs(self.n_chunks - 1),
            **self._passed(("dy", "delta", "z"), ("C",)),
            **self.sizes | self.flags,
            A=self.vectors["A"],
            bias=self.vectors["bias"],
            dlast=dlast_state,
            sequence_of=self.sequence_of,
            chunk_states=self.chunk_states,
            chunk_steps=self.chunk_steps,
            first_chunk=1,
            first_state=slab.first,
            N=slab.n,
        )

    def new_parts(
        self, saved: Tensor, du: Tensor | None, ddelta: Tensor | None, dz: Tensor | None, dinitial: Tensor | None
    ) -> dict[str, Tensor | None]:
        """Results and scratch of the backward kernel."""
        a, n_parts = self.a, self.a.batch * self.n_chunks

        def scratch(*shape: int) -> Tensor:
            return a.u.new_empty(shape, dtype=a.dtype)

        of_matrix = (n_parts, a.d_state, a.d_inner)
        n_checkpoints = n_parts * (plan.SAVED_EVERY // self.tokens)
        return {
            "saved": saved,
            "du": du,
            "ddelta": ddelta,
            "dz": dz,
            "dinitial": dinitial,
            "dA_parts": scratch(*of_matrix),
            "dB_parts": scratch(*of_matrix) if a.B.ndim == 2 else None,
            "dC_parts": scratch(*of_matrix) if a.C.ndim == 2 else None,
            "dD_parts": None if a.D is None else scratch(n_parts, a.d_inner),
            "dbias_parts": None if a.delta_bias is None else scratch(n_parts, a.d_inner),
            "checkpoints": scratch(n_checkpoints * min(plan.SLAB, a.d_state) * a.d_inner),
            "partial": scratch(3, *a.u.shape) if len(self.slabs) > 1 else None,
        }

    def scan_backward(self, slab: plan.Slab, dlast_state: Tensor, parts: dict[str, Tensor | None]) -> None:
        """The backward kernel of one slab; sums of selective B and C are kept for `sums`."""
        from anymamba.kernels.selective_scan.triton.backward_kernels import scan_backward

        a, width = self.a, 1 << (slab.n - 1).bit_length()
        own = dict(parts)
        for name, matrix in (("dB", a.B), ("dC", a.C)):
            if matrix.ndim == 4:
                own[f"{name}_parts"] = a.u.new_empty(self.n_blocks, a.batch, a.length, width, dtype=a.dtype)
        self._launch(
            scan_backward,
            self._programs(self.n_chunks),
            **self._passed(("u", "delta", "z", "dy"), ("B", "C")),
            **self.vectors | self.sizes | self.flags | own,
            initial=self.initial_state,
            dlast=dlast_state,
            sequence_of=self.sequence_of,
            chunk_states=self.chunk_states if self.n_chunks > 1 else None,
            first_state=slab.first,
            N=slab.n,
            WIDTH=width,
            SAVED_EVERY=plan.SAVED_EVERY,
            ARRIVES=self.n_chunks > 1,
            ZOH=a.zoh,
            FIRST=slab.is_first,
            LAST=slab.is_last,
        )
        for name, matrix in (("dB", a.B), ("dC", a.C)):
            if matrix.ndim == 4:
                self._sum_blocks(name, matrix, own[f"{name}_parts"], slab)

    def _sum_blocks(self, name: str, matrix: Tensor, parts: Tensor | None, slab: plan.Slab) -> None:
        """Add up the blocks of channels of a group, in order, into the slab of dB or dC."""
        assert parts is not None
        n_groups = self.a.n_groups
        sums = parts.view(n_groups, -1, *parts.shape[1:])[..., : slab.n].sum(1)  # (groups, batch, length, states)
        total = self.selective.setdefault(name, matrix.new_empty(matrix.shape))
        total[..., slab.first : slab.first + slab.n] = sums.permute(1, 2, 0, 3)

    def sums(self, parts: dict[str, Tensor | None]) -> list[Tensor | None]:
        """The gradients of A, B, C, D and delta_bias."""
        a = self.a
        found: list[Tensor | None] = []
        for name, like in (("dA", a.A), ("dB", a.B), ("dC", a.C), ("dD", a.D), ("dbias", a.delta_bias)):
            if like is None or like.ndim == 4:
                found.append(self.selective.get(name))
                continue
            part = parts[f"{name}_parts"]
            assert part is not None
            total = part.sum(0).to(like.dtype)
            found.append(total.T.contiguous() if total.ndim == 2 else total)
        return found

    def step(self, y: Tensor, state: Tensor) -> None:
        """The one-token kernel."""
        from anymamba.kernels.selective_scan.triton.step_kernel import step

        a = self.a
        unused = {"PACKED_WORDS", *(f"{name}_token" for name in ("u", "delta", "z", "B", "C"))}
        passed = self._passed(("u", "delta", "z"), ("B", "C"), words=False)
        states = min(STEP_STATES, 1 << (a.d_state - 1).bit_length())
        block = STEP_ELEMENTS // states
        self._launch(
            step,
            a.batch * -(-a.d_inner // block),
            **{k: v for k, v in passed.items() if k not in unused},
            **self.vectors,
            **{k: self.sizes[k] for k in ("d_inner", "d_state", "per_group")},
            initial=self.initial_state,
            y=y,
            last=state,
            BLOCK=block,
            STATES=states,
            SOFTPLUS=a.delta_softplus,
            ZOH=a.zoh,
            FAST=self.fast,
        )
