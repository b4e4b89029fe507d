"""A language model with packed weights, for reading and generating only."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from anymamba.models.config import ModelConfig
from anymamba.models.inference.captured_step import CapturedStep
from anymamba.models.inference.gpu_step import GpuStep
from anymamba.models.inference.gpu_weights import activation_dtype, require_bfloat16
from anymamba.models.inference.gpu_weights import obstacles as gpu_obstacles
from anymamba.models.inference.invariance import obstacle
from anymamba.models.inference.native_reading import read_sequences
from anymamba.models.inference.native_step import NativeStep, obstacles
from anymamba.models.inference.obstacles import WHOLE
from anymamba.models.inference.packing import (
    PackedModelWeights,
    PackedParts,
    packed_checkpoint,
    packed_copy,
    packed_random,
)
from anymamba.models.language_model import LanguageModel, LanguageModelOutput, LanguageModelState
from anymamba.models.weight_formats import WEIGHTS, Weights, format_table
from anymamba.ops import dispatch
from anymamba.ops.devices import usable_device
from anymamba.ops.linear_cross_entropy.chunks import sum_over_chunks
from anymamba.ops.packed_linear import PackedWeight
from anymamba.parts.derived import KeptTensors
from anymamba.parts.packed import PackedEmbedding, PackedLinear, pack_modules
from anymamba.parts.state import map_state

if TYPE_CHECKING:
    from anymamba.data.tokenizer import Tokenizer
    from anymamba.models.checkpoints import Checkpoint


FEW_TOKENS = 64
"""Read token by token in one compiled call: mamba-130m reads one token 2 to 3 times as fast as block by block, 16
tokens 1.5 times and 64 tokens 1.1 times, and a small model 64 tokens 3 to 4 times."""


class BlockReport(NamedTuple):
    """How one block of a model runs when it generates."""

    mixer: str
    native: bool
    """Whether it is part of the one compiled call per token; otherwise it runs its own step."""
    reason: str
    """Why it is not; empty if it is."""


class InferenceModel(LanguageModel):
    """A language model with packed matrices. It reads, steps and scores as `LanguageModel` does, without gradients.

    `LanguageModel.for_inference` and `InferenceModel.from_pretrained` make it. Norms, convolutions, A, D and the state
    are float32; activations are float32 on a CPU, and bfloat16 on a GPU unless all projections are float32. If all
    blocks are Mamba with real A, a step is one compiled call on a CPU with the compiled kernels, and a CUDA graph on an
    NVIDIA GPU; otherwise it runs block by block, around compiled products.

    Args:
        config: of the model.
        matrices: packed weights by the names of the parameters that they stand for.
        others: all other parameters by name, in float32.
        invariant: make a row's logits the same bits alone and in any batch, read whole, in pieces, or token by token.
    Raises ValueError if invariance is asked of a model that does not have it; the message names what prevents it. Also
        for a model that is not causal, as it cannot generate.
    """

    def __init__(
        self,
        config: ModelConfig,
        matrices: Mapping[str, PackedWeight],
        others: Mapping[str, Tensor],
        *,
        invariant: bool = False,
    ) -> None:
        super().__init__(config, device="meta")
        self.require_causal("is not a model for inference")
        pack_modules(self, matrices)
        missing, unexpected = self.load_state_dict(dict(others), strict=False, assign=True)
        assert set(missing) == set(matrices) and not unexpected, (missing, unexpected)
        self.requires_grad_(False)
        self.eval()
        self._activations = activation_dtype(self)
        self.invariant = invariant
        """Whether a row's logits, of `forward` and `step`, are the same bits in any batch and any cut of its text. What
        `hidden` and `loss` compute is the same in any batch and cut, too, but rounded differently."""
        self._native: NativeStep | dict[int, str] | None = None
        self._gpu: GpuStep | CapturedStep | None = None
        self._reasons: dict[int, str] | None = None
        self._device_type: str | None = None
        self._derived: KeptTensors | None = None
        device = next(self.parameters()).device
        why = obstacle(config, device) if invariant else None
        if why is not None:
            raise ValueError(f"invariant=True is not possible for this model: {why}; leave it out")
        if device.type == "cuda":
            require_bfloat16(self, device)

    @classmethod
    def of(
        cls,
        model: LanguageModel,
        weights: Weights | Mapping[str, str] = "float32",
        *,
        device: torch.device | str | None = None,
        invariant: bool = False,
    ) -> InferenceModel:
        """A copy of a model, as `LanguageModel.for_inference` makes it.

        Args:
            weights: may also be the format of each matrix, by the parameter's name.
        """
        if isinstance(model, InferenceModel):
            raise ValueError(
                "the weights of a model for inference are packed already; call for_inference of the LanguageModel that "
                "it was made from, or InferenceModel.from_pretrained(path, weights=...)"
            )
        if not isinstance(weights, str | Mapping):
            raise ValueError(f"weights must be one of {', '.join(WEIGHTS)}, got {weights!r}")
        formats = format_table(model.config, weights) if isinstance(weights, str) else weights
        device = None if device is None else usable_device(device)
        return cls(*packed_copy(model, formats, device), invariant=invariant)

    @classmethod
    def random(
        cls,
        config: ModelConfig,
        weights: Weights = "float32",
        *,
        device: torch.device | str = "cpu",
        invariant: bool = False,
    ) -> InferenceModel:
        """A model with random weights, to measure speed and memory; it is never in memory in float32 as a whole."""
        return cls(*packed_random(config, weights, usable_device(device)), invariant=invariant)

    # --------------------------------------------------------------------------------------------- running

    def forward(
        self,
        input_ids: Int[Tensor, "batch length"],
        state: LanguageModelState | None = None,
        *,
        attention_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        num_last_logits: int | None = None,
    ) -> LanguageModelOutput:
        """`LanguageModel.forward`. With invariance, and for a few tokens, every token is computed as `step` does."""
        options: dict[str, Any] = {
            "attention_mask": attention_mask,
            "cu_seqlens": cu_seqlens,
            "num_last_logits": num_last_logits,
        }
        native = self.native_step if self.invariant or self._is_short(input_ids, attention_mask, cu_seqlens) else None
        found = None if native is None else read_sequences(native, input_ids, state, **options)
        if found is None and self.invariant:
            state = self._own(state)
            found = None if native is None else read_sequences(native, input_ids, state, **options)
        return super().forward(input_ids, state, **options) if found is None else found

    def _is_short(self, input_ids: Tensor, *of_several: Tensor | None) -> bool:
        """Whether the compiled step reads faster, which has no overhead for each operation of each block."""
        return input_ids.numel() <= FEW_TOKENS and not self._is_on_gpu and all(t is None for t in of_several)

    def _own(self, state: LanguageModelState | None) -> LanguageModelState | None:
        """A state as this model's steps return it, so that with invariance all tokens are computed in the same way.

        Raises ValueError where `anymamba.backend` asks for kernels that do not have invariance.
        """
        backend = dispatch.resolve("selective_scan", "cpu", None)
        if backend != "cpu":
            raise ValueError(
                f"invariant=True needs the backend cpu, and {backend} was asked for; leave out one of them"
            )
        if not isinstance(state, LanguageModelState):
            return state
        return map_state(lambda t: t.detach().float() if t.is_floating_point() else t, state)

    def _normed(self, *arguments: Any, **options: Any) -> tuple[Tensor, LanguageModelState]:
        """On a GPU in bfloat16, unless all projections are float32; the residual stream and the result are float32."""
        with self._precision():
            return super()._normed(*arguments, **options)

    def _precision(self) -> AbstractContextManager[object]:
        is_short = self._is_on_gpu and self._activations == torch.bfloat16
        return torch.autocast("cuda", torch.bfloat16) if is_short else nullcontext()

    def step(
        self, token_ids: Int[Tensor, " batch"], state: LanguageModelState, *, reuse_state: bool = False
    ) -> LanguageModelOutput:
        """One token per row: logits (batch, padded_vocab) and the new state, in constant time.

        Args:
            token_ids: (batch,).
            state: one row per sequence.
            reuse_state: the caller does not use the given state again, so its memory may hold the new one.
        """
        compiled = self.gpu_step or self.native_step
        served = compiled is not None and compiled.serves(token_ids, state)
        if self.invariant and not served:
            state = self._own(state)  # type: ignore[assignment]
            served = compiled is not None and compiled.serves(token_ids, state)
        if compiled is None or not served:
            with self._keeping():
                return super().step(token_ids, state)
        return compiled.step(token_ids, state, reuse=reuse_state)

    def _keeping(self) -> AbstractContextManager[object]:
        """Keeps what blocks derive from their weights, such as A. Not on a GPU, where it may be recorded and not
        computed, and not where gradients may need it."""
        if self._is_on_gpu or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return nullcontext()
        if self._derived is None:
            self._derived = KeptTensors(self)
        return self._derived

    def logits(self, x: Float[Tensor, "... d_model"]) -> Float[Tensor, "... padded_vocab"]:
        """Apply the head to the output of `hidden`."""
        embedding: Any = self.embedding  # packed
        return embedding.project(x) if self.head is None else self.head(x)

    def _summed_loss(self, x: Float[Tensor, "tokens d_model"], labels: Int[Tensor, " tokens"]) -> Tensor:
        return sum_over_chunks(self._cross_entropy, x, labels, self.config.padded_vocab_size)

    def report(self) -> list[BlockReport]:
        """How each block runs in `step`, in order."""
        reasons = self._gpu_reasons if self._is_on_gpu else obstacles(self)
        how = "" if self.gpu_step is None else "; the step is recorded as a graph, block by block"
        if isinstance(self.gpu_step, CapturedStep) and self.gpu_step.failure is not None:
            how = f"; {self.gpu_step.failure}"
        default = reasons.get(WHOLE, "another block is not") if reasons else ""
        names = enumerate(self.config.layer_mixers)
        return [
            BlockReport(name, not reasons, reasons.get(index, default) + (how if reasons else ""))
            for index, name in names
        ]

    @property
    def native_step(self) -> NativeStep | None:
        """The compiled call that steps go through; None if they run block by block."""
        if self._native is None:
            self._native = NativeStep.of(self)
        return self._native if isinstance(self._native, NativeStep) else None

    @property
    def gpu_step(self) -> GpuStep | CapturedStep | None:
        """The graphs that steps on an NVIDIA GPU go through; None if they run block by block without."""
        if self._gpu is None and self._is_on_gpu:
            if not self._gpu_reasons:
                self._gpu = GpuStep(self)
            elif not self.grows:
                self._gpu = CapturedStep(self)
        return self._gpu

    @property
    def _gpu_reasons(self) -> dict[int, str]:
        if self._reasons is None:
            self._reasons = gpu_obstacles(self)
        return self._reasons

    @property
    def _is_on_gpu(self) -> bool:
        if self._device_type is None:
            self._device_type = next(self.parameters()).device.type
        return self._device_type == "cuda"

    # --------------------------------------------------------------------------------------------- weights

    @property
    def weight_formats(self) -> dict[str, str]:
        """The format of each packed matrix, by the name of the parameter that it stands for."""
        return {f"{name}.weight": module.format for name, module in self._packed_modules()}

    def packed_weights(self) -> dict[str, PackedWeight]:
        """The packed matrices, by the names of the parameters that they stand for."""
        return {f"{name}.weight": module.packed for name, module in self._packed_modules()}

    def n_parameters(self) -> int:
        """The number of parameters that the packed weights stand for; a tied weight counts once."""
        return super().n_parameters() + sum(m.n_in * m.n_out for _, m in self._packed_modules())

    def _packed_modules(self) -> list[tuple[str, PackedLinear | PackedEmbedding]]:
        return [(n, m) for n, m in self.named_modules() if isinstance(m, PackedLinear | PackedEmbedding)]

    def train(self, mode: bool = True) -> InferenceModel:
        """Raises RuntimeError for mode=True: packed weights have no gradients."""
        if mode:
            raise RuntimeError(
                "a model for inference cannot be trained: its weights are packed and have no gradients; train the "
                "LanguageModel that it was made from (LanguageModel.from_pretrained reads packed files, too), then "
                "call for_inference again"
            )
        return super().train(False)

    def requires_grad_(self, requires_grad: bool = True) -> InferenceModel:
        """Raises RuntimeError for True, as `train` does."""
        if requires_grad:
            self.train()
        return super().requires_grad_(False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        if fn(torch.zeros(0)).dtype != torch.float32:
            raise TypeError(
                "a model for inference computes in float32 and keeps its dtype; choose the format of its weights with "
                f"for_inference(weights=...), got a conversion to {fn(torch.zeros(0)).dtype}"
            )
        self._native = self._gpu = self._reasons = self._device_type = self._derived = (
            None  # all follow from the weights
        )
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_native": None, "_gpu": None, "_reasons": None, "_derived": None}

    # --------------------------------------------------------------------------------------------- files

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        path: str | Path | Checkpoint,
        weights: Weights | None = None,
        device: torch.device | str | None = None,
        revision: str | None = None,
        *,
        verify: bool = True,
        adapter: str | Path | None = None,
        invariant: bool = False,
    ) -> InferenceModel:
        """Load a model for inference. Weights that are stored in the wanted format stay in the mapped file.

        Args:
            path, revision, verify, adapter: as in `LanguageModel.from_pretrained`; or a `Checkpoint`.
            weights: "float32", "bfloat16", "int8" or "int4"; defaults to the formats in the file.
            device: where the weights go; defaults to the CPU.
            invariant: as in `InferenceModel`.
        Raises as `LanguageModel.from_pretrained` does.
        """
        from anymamba.models.checkpoints import Checkpoint, open_checkpoint

        if not isinstance(path, Checkpoint):
            path = open_checkpoint(path, revision, verify=verify, adapter=adapter)
        device = None if device is None else usable_device(device)
        return cls(*packed_checkpoint(path, weights, device), invariant=invariant)

    def save_pretrained(
        self,
        path: str | Path,
        tokenizer: Tokenizer | None = None,
        *,
        format: Literal["hf", "state-spaces", "gguf", "anymamba"] | None = None,
    ) -> None:
        """Write the packed weights as they are, in our own format or as GGUF.

        Args:
            path: a folder; for "gguf" also the path of a .gguf file.
            tokenizer: written beside the model, or inside a GGUF file.
            format: "hf", "anymamba" or "gguf"; defaults as in `LanguageModel.save_pretrained`. Hugging Face's readers
                do not know weights in blocks: a folder with them has our own model type.
        Raises CheckpointError if the format cannot hold the model.
        """
        from anymamba.models.checkpoints import save_weights

        others: dict[str, Tensor] = dict(self.named_parameters())
        weights = PackedModelWeights(PackedParts(self.config, self.packed_weights(), others))
        save_weights(weights, path, tokenizer, format=format, formats=weights.formats)
