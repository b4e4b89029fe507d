"""Launch the kernels of the Triton scan: their arguments, strides, scratch tensors and variants."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from anymamba.kernels.selective_scan.arguments import ScanArguments
from anymamba.kernels.selective_scan.triton import plan
from anymamba.runtimes import triton

CARRY_LANES = 128
STEP_ELEMENTS, STEP_STATES = 1024, 128
"""Of a block of the one-token kernel: numbers, and states of a channel."""


class Call:
    """The arguments of the kernels of one call, which is not empty."""

    def __init__(self, a: ScanArguments, programs: int = plan.FORWARD_PROGRAMS) -> None:
        self.a = a
        self.slabs = plan.slabs(a.d_state)
        self.rows = {name: triton.dense(t) for name, t in (("u", a.u), ("delta", a.delta), ("z", a.z))}
        self.initial_state = self._own(a.initial_state)
        self.vectors = {"A": self._own(a.A), "D": self._own(a.D), "bias": self._own(a.delta_bias)}
        self.sequence_of = None if a.cu_seqlens is None else triton.sequences(a.cu_seqlens, a.length)[1]
        self.block = plan.block(a)
        per_group = a.d_inner // a.n_groups
        self.n_blocks = a.n_groups * -(-per_group // self.block)
        self.chunk = plan.chunk(a, self.n_blocks * a.batch, programs)
        self.n_chunks = -(-a.length // self.chunk)
        self.n_leaving = self.n_chunks - 1  # chunks of which is computed first what leaves them
        self.fast = triton.is_nvidia(a.u) and a.dtype == torch.float32
        self.flags: dict[str, Any] = {
            "BLOCK": self.block,
            "SOFTPLUS": a.delta_softplus,
            "FAST": self.fast,
            "num_warps": 1,
        }
        self.is_whole = per_group % self.block == 0
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

    def _in_groups(self, tokens: int) -> dict[str, Any]:
        """The flags of kernels that work on groups of so many tokens."""
        return self.flags | {"TOKENS": tokens, "WHOLE": self.is_whole and self.a.length % tokens == 0}

    def _own(self, tensor: Tensor | None) -> Tensor | None:
        """A dense tensor of the state's dtype."""
        return None if tensor is None else tensor.to(self.a.dtype).contiguous()

    def gradient_of(self, dy: Tensor) -> None:
        """Add dy to the rows."""
        self.rows["dy"] = triton.dense(dy)

    def new_chunks(self) -> None:
        """Scratch for the states and the sums of steps of chunks."""
        a = self.a
        self.chunk_states = a.u.new_empty(a.batch, self.n_chunks, a.d_state, a.d_inner, dtype=a.dtype)
        self.chunk_steps = a.u.new_empty(a.batch, self.n_chunks, a.d_inner, dtype=a.dtype)

    def _rows(self, *names: str) -> dict[str, Any]:
        """Rows with their strides."""
        found: dict[str, Any] = {}
        for name in names:
            tensor = self.rows[name]
            row, token = (0, 0) if tensor is None else tensor.stride()[:2]
            found |= {name: tensor, f"{name}_row": row, f"{name}_token": token}
        return found

    def _matrices(self, *names: str) -> dict[str, Any]:
        """Matrices of the state's dtype; selective ones as words of two float32 if they can be read so."""
        given = {name: self._own(getattr(self.a, name)) for name in names}
        return self._in_words(given, 2 if self.a.dtype == torch.float32 else 1)

    def _forward_matrices(self) -> dict[str, Any]:
        """B and C for the forward kernels, which wait for these reads: bfloat16 in words of four."""
        given = {name: getattr(self.a, name) for name in "BC"}
        if any(t.ndim == 2 or t.dtype != torch.bfloat16 for t in given.values()):
            return self._matrices("B", "C")
        return self._in_words({name: t.contiguous() for name, t in given.items()}, 4)

    def _in_words(self, given: dict[str, Any], word: int) -> dict[str, Any]:
        fits = all(t.ndim == 2 or t.data_ptr() % 8 == 0 for t in given.values())
        word = word if fits and self.a.d_state % word == 0 else 1
        found = {k: t.flatten().view(torch.int64) if word > 1 and t.ndim == 4 else t for k, t in given.items()}
        return found | {"WORD": word} | {f"CONSTANT_{name}": t.ndim == 2 for name, t in given.items()}

    def _launch(self, kernel: Any, n_programs: int, **arguments: Any) -> None:
        triton.launch(kernel, self.a.u, n_programs, **arguments)

    def _programs(self, n_chunks: int) -> int:
        return self.n_blocks * self.a.batch * n_chunks

    def scan(self, slab: plan.Slab, summary: bool, **results: Tensor | None) -> None:
        """The forward kernel of one slab."""
        from anymamba.kernels.selective_scan.triton.forward_kernels import scan

        several = self.n_chunks > 1
        self._launch(
            scan,
            self._programs(self.n_leaving if summary else self.n_chunks),
            **self._rows("u", "delta", "z"),
            **self._forward_matrices(),
            **self.vectors | self.sizes | self._in_groups(plan.forward_tokens(self.a)) | results,
            initial=self.initial_state,
            sequence_of=self.sequence_of,
            chunk_states=self.chunk_states if several or summary else None,
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

    def scan_split(self, **results: Tensor | None) -> None:
        """The forward kernel that splits the states of a channel over lanes."""
        from anymamba.kernels.selective_scan.triton.split_forward_kernel import scan_split

        a = self.a
        matrices = {k: v for k, v in self._forward_matrices().items() if not k.startswith("CONSTANT")}
        tiles = plan.SPLIT_TILES if matrices["WORD"] == 4 else 1
        block = triton.lanes(a.u) // plan.SPLIT_LANES
        flags = {"BLOCK": block, "TILES": tiles, "WHOLE": a.length % (tiles * plan.SPLIT_LANES) == 0}
        self._launch(
            scan_split,
            a.batch * a.d_inner // block,
            **self._rows("u", "delta", "z"),
            **matrices | self.vectors | results,
            **{k: self.sizes[k] for k in ("length", "d_inner", "d_state", "per_group", "n_groups")},
            **self.flags | flags,
            initial=self.initial_state,
            N=a.d_state // plan.SPLIT_LANES,
            OF_TOKEN=a.n_groups * a.d_state // matrices["WORD"],
            SAVED_EVERY=plan.SAVED_EVERY,
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
            self._programs(self.n_leaving),
            **self._rows("dy", "delta", "z"),
            **self._matrices("C"),
            **self.sizes | self._in_groups(plan.forward_tokens(self.a)),
            A=self.vectors["A"],
            bias=self.vectors["bias"],
            dlast=dlast_state,
            sequence_of=self.sequence_of,
            chunk_states=self.chunk_states,
            chunk_steps=self.chunk_steps,
            first_chunk=self.n_chunks - self.n_leaving,
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
        n_checkpoints = self._programs(self.n_chunks) * (plan.SAVED_EVERY // plan.backward_tokens(a)) * self.block
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
            "checkpoints": scratch(n_checkpoints * min(plan.SLAB, a.d_state)),
            "partial": scratch(3, *a.u.shape) if len(self.slabs) > 1 else None,
        }

    def scan_backward(self, slab: plan.Slab, dlast_state: Tensor, parts: dict[str, Tensor | None]) -> None:
        """The backward kernel of one slab; sums of selective B and C are kept for `sums`."""
        from anymamba.kernels.selective_scan.triton.backward_kernels import scan_backward

        a, width = self.a, 1 << (slab.n - 1).bit_length()
        selective = [(name, m) for name, m in (("dB", a.B), ("dC", a.C)) if m.ndim == 4]
        count = width * len(selective)
        token_parts = a.u.new_empty(self.n_blocks, a.batch, a.length, count, dtype=a.dtype) if count else None
        self._launch(
            scan_backward,
            self._programs(self.n_chunks),
            **self._rows("u", "delta", "z", "dy"),
            **self._matrices("B", "C"),
            **self.vectors | self.sizes | self._in_groups(plan.backward_tokens(a)) | parts,
            initial=self.initial_state,
            dlast=dlast_state,
            sequence_of=self.sequence_of,
            chunk_states=self.chunk_states if self.n_chunks > 1 else None,
            first_state=slab.first,
            N=slab.n,
            WIDTH=width,
            COUNT=count,
            LEVELS=max(count - 1, 0).bit_length(),
            token_parts=token_parts,
            SAVED_EVERY=plan.SAVED_EVERY,
            ARRIVES=self.n_chunks > 1,
            ZOH=a.zoh,
            FIRST=slab.is_first,
            LAST=slab.is_last,
        )
        for k, (name, matrix) in enumerate(selective):
            assert token_parts is not None
            self._sum_blocks(name, matrix, token_parts[..., k * width : k * width + slab.n], slab)

    def _sum_blocks(self, name: str, matrix: Tensor, parts: Tensor, slab: plan.Slab) -> None:
        """Add up the blocks of channels of a group, in order, into the slab of dB or dC."""
        sums = parts.unflatten(0, (self.a.n_groups, -1)).sum(1)  # (groups, batch, length, states)
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
        matrices = {name: self._own(getattr(a, name)) for name in "BC"}
        states = min(STEP_STATES, 1 << (a.d_state - 1).bit_length())
        block = STEP_ELEMENTS // states
        self._launch(
            step,
            a.batch * -(-a.d_inner // block),
            **{k: v for k, v in self._rows("u", "delta", "z").items() if not k.endswith("_token")},
            **matrices | self.vectors,
            **{f"CONSTANT_{name}": t is not None and t.ndim == 2 for name, t in matrices.items()},
            **{k: self.sizes[k] for k in ("d_inner", "d_state", "per_group", "n_groups")},
            initial=self.initial_state,
            y=y,
            last=state,
            BLOCK=block,
            STATES=states,
            SOFTPLUS=a.delta_softplus,
            ZOH=a.zoh,
            FAST=self.fast,
        )
