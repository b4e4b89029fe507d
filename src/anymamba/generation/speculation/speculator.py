"""Speculation: the next tokens are guessed, and the model reads several guesses in one pass.

Tokens are chosen one by one from the model's own logits, with the same random numbers as without speculation. A guess
only decides whether the logits of the next token have been computed already. So the text is the same as without it: bit
for bit where a pass computes the bits of single steps, as the compiled step of whole models does, and up to rounding
elsewhere.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor

from anymamba.base.sizes import require_at_least
from anymamba.generation.speculation.drafts import Drafter, LookupDrafter, ModelDrafter
from anymamba.generation.speculation.pacing import Pacing
from anymamba.generation.speculation.passes import GraphVerification, dtype_of_activations, near_ties
from anymamba.generation.stepping import Stepper
from anymamba.models.inference import InferenceModel
from anymamba.models.inference.native_reading import Verifier
from anymamba.models.language_model import LanguageModel, LanguageModelOutput, LanguageModelState

MOST_TOKENS = 64
"""Of a pass. What they are worth is worked out before each, which takes time for each of them."""


@dataclass(frozen=True)
class Speculation:
    """How to guess tokens. Guessing stops by itself while it does not pay."""

    n_tokens: int = 8
    """Most tokens to guess at once. More than 64 are 64."""
    draft: LanguageModel | None = None
    """A smaller model with the same vocabulary that guesses; defaults to looking up what followed the same tokens
    earlier in the text."""
    earlier: Sequence[int] = ()
    """Ids before the prompts that the state has read, where generation continues from a state."""

    def __post_init__(self) -> None:
        require_at_least("n_tokens", self.n_tokens, 1)
        if isinstance(self.draft, str | Path):
            raise TypeError(
                f"draft must be a model, got {str(self.draft)!r}; load it with LanguageModel.from_pretrained"
            )

    def check(self, model: LanguageModel) -> None:
        """Raise ValueError if the draft model has another vocabulary than the model."""
        if self.draft is None:
            return
        ours, theirs = model.config.vocab_size, self.draft.config.vocab_size
        if ours != theirs:
            raise ValueError(
                f"the draft model must have the model's vocabulary of {ours} ids, got {theirs}; take a model with the "
                "same tokenizer, or leave out draft"
            )


class SpeculationReport(NamedTuple):
    """What speculation did."""

    n_passes: int
    """Passes that read guesses."""
    n_guessed: int
    """Tokens guessed in them."""
    n_right: int
    """How many of those saved a step: those that were right in all rows."""
    n_near_ties: int
    """Tokens from passes that round differently from single steps, and whose two likeliest ids were closer than that:
    only there a greedy text may differ from one without speculation. A sampled one may also differ where its random
    number falls between two ids. 0 where a pass gives the bits of single steps."""


class Verification(Protocol):
    """Reads several tokens of each row in one pass, and gives the state after some of them."""

    def read(
        self, token_ids: Int[Tensor, "batch length"], state: LanguageModelState
    ) -> Float[Tensor, "batch length padded_vocab"]:
        """Logits after each token."""

    def accept(self, n_tokens: int) -> LanguageModelState:
        """The state after the first n_tokens of each row."""


class ForwardVerification:
    """Verification by the model's forward pass, for models without a compiled step."""

    def __init__(self, model: LanguageModel) -> None:
        self._model, self._device = model, next(model.parameters()).device

    def read(
        self, token_ids: Int[Tensor, "batch length"], state: LanguageModelState
    ) -> Float[Tensor, "batch length padded_vocab"]:
        """Logits after each token."""
        self._ids, self._before = token_ids.to(self._device), state
        logits, self._after = self._model(self._ids, state)
        return logits

    def accept(self, n_tokens: int) -> LanguageModelState:
        """The state after the first n_tokens, which are read again unless all are accepted."""
        if n_tokens == self._ids.shape[1]:
            return self._after
        return self._model(self._ids[:, :n_tokens], self._before, num_last_logits=0).state


class Speculator:
    """Steps rows as `Stepper` does, and reads guesses ahead. A step whose tokens were all guessed costs nothing.

    All rows are read in one pass, each with guesses of its own. They go on together, so a pass serves as many tokens as
    were right in every row. While guesses are ahead, the state that a call returns is that before them; `settle` gives
    the one after the tokens that were stepped over.

    Args:
        stepper: of the model.
        model: a language model.
        speculation: the options, which fit the model.
        texts: the ids of each row so far.
        choose: how a draft model chooses tokens of a row, given its number.
        numbers: gives the numbers of the rows that are still stepped, in the order of their tokens.
    """

    def __init__(
        self,
        stepper: Stepper,
        model: LanguageModel,
        speculation: Speculation,
        texts: Sequence[Sequence[int]],
        choose: Callable[[int, Tensor, int], int],
        numbers: Callable[[], Sequence[int]],
    ) -> None:
        self._step, self._most, self._numbers = stepper, min(speculation.n_tokens, MOST_TOKENS), numbers
        self._drafters: list[Drafter] = []
        for number, text in enumerate(texts):
            ids = [*speculation.earlier, *text]
            if speculation.draft is None:
                self._drafters.append(LookupDrafter(ids))
            else:
                self._drafters.append(ModelDrafter(speculation.draft, ids, partial(choose, number)))
        self._drafting: list[Drafter] = []  # of the rows of the last call
        self.pacing = Pacing(self._most)
        self._forward = ForwardVerification(model)
        self._dtype, self._n_ids = dtype_of_activations(model), model.config.vocab_size
        self._native: Verifier | None = None
        self._reading: Verification | None = None  # with guesses ahead
        self._ahead: deque[tuple[list[int], Tensor]] = deque()  # a guess for each row, and the logits after them
        self._n_read = self._n_guessed = 0  # of this pass: steps that it served, the first included; and guesses
        self._right: list[bool] = []  # whether the next guess of each row is right
        self._seconds = 0.0
        self._counts = [0, 0, 0]
        self._device = next(model.parameters()).device
        self._on_gpu = self._device.type == "cuda"
        in_graphs = self._on_gpu and isinstance(model, InferenceModel) and not model.grows
        self._graph = GraphVerification(model) if in_graphs else None  # type: ignore[arg-type]
        self._is_warm = not self._on_gpu  # the first step on a GPU may record a graph
        self._ties: Tensor | None = None  # of this pass, where it may round differently
        self._n_ties: int | Tensor = 0

    @property
    def report(self) -> SpeculationReport:
        """What was done so far."""
        n_passes, n_guessed, n_right = self._counts
        return SpeculationReport(n_passes, n_guessed, n_right, int(self._n_ties))

    def runs_ahead(self, n_rows: int) -> bool:
        """False: guesses are read ahead, not steps."""
        return False

    def __call__(
        self, token_ids: Int[Tensor, " batch"], state: LanguageModelState, *, reuse_state: bool = False
    ) -> LanguageModelOutput:
        """`Stepper.__call__`, whose state is used again: reuse_state is true."""
        assert reuse_state
        tokens = token_ids.tolist()
        self._drafting = [self._drafters[number] for number in self._numbers()]
        for drafter, token in zip(self._drafting, tokens, strict=True):
            drafter.push(token)
        if self._ahead:
            self._right = [guess == token for guess, token in zip(self._ahead[0][0], tokens, strict=True)]
            if all(self._right):
                self._n_read += 1
                self._counts[2] += len(tokens)
                return LanguageModelOutput(self._ahead.popleft()[1], state)
        state = self.settle(state)
        start = self._now()
        n_guesses = self.pacing.best(self._chances())
        if n_guesses:
            logits = self._read_ahead(token_ids, [drafter.draft(n_guesses) for drafter in self._drafting], state)
            self._seconds = self._now() - start
            return LanguageModelOutput(logits, state)
        output = self._step(token_ids, state, reuse_state=True)
        if self._is_warm:
            self.pacing.add_step(self._now() - start)
        self._is_warm = True
        return output

    def settle(self, state: LanguageModelState) -> LanguageModelState:
        """The state after the tokens stepped over, in place of the one returned last. Drops guesses that are left."""
        if self._reading is None:
            return state
        start = self._now()
        state = self._reading.accept(self._n_read)
        if self._ties is not None:
            self._n_ties, self._ties = self._n_ties + self._ties[:, : self._n_read].sum(), None
        self._seconds += self._now() - start
        if self._graph is not None and self._graph.has_recorded:
            self._graph.has_recorded = False  # this pass took longer than the next ones
        else:
            self.pacing.add_pass(self._n_guessed, self._seconds)
        n_right = self._n_read - 1
        for drafter, right in zip(self._drafting, self._right or [True] * len(self._drafting), strict=True):
            drafter.judge(n_right if right else self._n_guessed, n_right)
        self._reading, self._right = None, []
        self._ahead.clear()
        return state

    def _chances(self) -> list[float]:
        """That at least the first 1, 2, ... guesses of every row are right; empty if a row has none."""
        if self._on_gpu and len(self._drafting) > 1:  # its passes read one row
            return []
        chances = [drafter.chances(self._most) for drafter in self._drafting]
        return [math.prod(each) for each in zip(*chances, strict=False)]

    def _now(self) -> float:
        """The time, when a GPU is done with what was queued."""
        if self._on_gpu:
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    def _read_ahead(
        self, token_ids: Int[Tensor, " batch"], guesses: list[list[int]], state: LanguageModelState
    ) -> Float[Tensor, "batch padded_vocab"]:
        self._reading = self._verification(token_ids, state)
        logits = self._reading.read(torch.cat([token_ids.cpu()[:, None], torch.tensor(guesses)], 1), state)
        if self._reading is not self._native:
            self._ties = near_ties(logits[..., : self._n_ids], self._dtype)
        self._ahead.extend((list(each), logits[:, i]) for i, each in enumerate(zip(*guesses, strict=True), 1))
        self._n_read, self._n_guessed = 1, len(guesses[0])
        self._counts[0] += 1
        self._counts[1] += len(guesses) * len(guesses[0])
        return logits[:, 0]

    def _verification(self, token_ids: Int[Tensor, " batch"], state: LanguageModelState) -> Verification:
        native = self._step.native
        if native is None or not native.serves(token_ids, state):
            return self._forward if self._graph is None else self._graph
        if self._native is None:
            self._native = Verifier(native)
        return self._native
