"""Generation of tokens and text, streamed or at once, for one prompt or a batch, from the beginning or from a state.

A row's tokens and its end do not depend on the other rows of its batch, except for rounding. With a model's compiled
step, on a CPU, they hold to the bit, and are those of the engine, too. Rows that have ended are dropped from the
computation. With recurrent layers a token costs the same for any context length.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypedDict, Unpack

import torch
from jaxtyping import Float, Int
from numpy.typing import ArrayLike
from torch import Tensor

from anymamba.base.sizes import require_at_least
from anymamba.data.tokenizer import Tokenizer
from anymamba.generation.prompts import PREFILL_CHUNK, GenerationState, Prompts, prefill, prompt_rows
from anymamba.generation.running import Chosen, FinishReason, Row, RunningRows, n_ids
from anymamba.generation.sampling import RowDraws, SamplingConfig, Seed, sample
from anymamba.generation.speculation import Speculation, SpeculationReport, Speculator
from anymamba.generation.stepping import Stepper
from anymamba.generation.stops import StoppingDecoder
from anymamba.models.language_model import LanguageModel
from anymamba.parts.state import concatenate_rows, map_state, select_rows


class GenerationOptions(TypedDict, total=False):
    """Keyword arguments of `generate`, `stream` and `stream_text`."""

    max_new_tokens: int
    """Most tokens to generate for each prompt; defaults to 256."""
    sampling: SamplingConfig
    """How to choose tokens; defaults to drawing from the model's own distribution."""
    eos_id: int | None
    """The token that ends a row; defaults to the tokenizer's, if there is a tokenizer."""
    stop: Sequence[str]
    """Strings that end a row; its text is cut before them. They need a tokenizer."""
    seed: Seed
    """The same seed gives the same tokens; defaults to 0. With one number, every row draws different random numbers.
    With one number per prompt, row r draws as it would alone with seed[r]; with a pair (seed, i) as row i of a batch
    with one seed, which lets a large batch run in parts."""
    state: GenerationState | None
    """The state to continue from, one row per prompt; prompts may then be empty. Defaults to the beginning."""
    prefill_chunk: int
    """Tokens of each prompt to read at once; memory grows with it, the result does not change."""
    speculation: Speculation | None
    """Guess tokens and read several at once; the result does not change. Defaults to none."""


class Step(NamedTuple):
    """One step of a stream. The lists have one entry for each row that was still running."""

    rows: list[int]
    """The index of each row's prompt."""
    ids: list[int]
    """The new token of each row; an end-of-sequence token is the row's last."""
    log_probabilities: list[float]
    """Log-probabilities of these tokens under the model, in nats, before penalty, temperature and filters."""
    texts: list[str]
    """The text that is final after this token and was not before; "" without a tokenizer."""
    finish_reasons: list[FinishReason | None]
    """Why a row has ended with this token; None if it continues."""


class TokenStream(Iterator[Step]):
    """Generates a batch step by step; iterating gives a `Step` for each token.

    Args and errors are those of `stream`.
    """

    def __init__(
        self,
        model: LanguageModel,
        prompts: Prompts,
        tokenizer: Tokenizer | None = None,
        *,
        max_new_tokens: int = 256,
        sampling: SamplingConfig | None = None,
        eos_id: int | None = None,
        stop: Sequence[str] = (),
        seed: Seed = 0,
        state: GenerationState | None = None,
        prefill_chunk: int = PREFILL_CHUNK,
        speculation: Speculation | None = None,
    ) -> None:
        require_at_least("max_new_tokens", max_new_tokens, 0)
        if stop and tokenizer is None:
            raise ValueError("stop strings need a tokenizer to turn tokens into text; got tokenizer=None")
        self._model, self._max_new_tokens = model, max_new_tokens
        self._step = Stepper(model)
        self._speculator: Speculator | None = None
        self._sampling = sampling or SamplingConfig()
        self._eos_id = tokenizer.eos_id if eos_id is None and tokenizer is not None else eos_id
        rows = prompt_rows(prompts)
        self._draws = RowDraws(seed, len(rows))
        self._n_steps = 0
        self._ended: list[tuple[list[int], Any]] = []  # what `RunningRows.select` gives, by the rows' numbers
        self.n_prompts = len(rows)
        """Number of prompts."""
        self.n_prompt_tokens = sum(map(len, rows))
        """Number of tokens in all prompts."""
        if speculation is not None:
            if not isinstance(speculation, Speculation):
                raise TypeError(f"speculation must be a Speculation, such as Speculation(8), got {speculation!r}")
            speculation.check(model)
            texts = [row.tolist() for row in rows]
            self._speculator = Speculator(self._step, model, speculation, texts, self._guess, self._numbers)
        self._n_ids = n_ids(model, tokenizer)
        self._running = RunningRows[Row](self._speculator or self._step, model.config.vocab_size, self._n_ids)
        with torch.inference_mode():
            read = prefill(model, rows, self._eos_id, state, prefill_chunk, self._step.native)
            self._read: GenerationState | None = read  # until the first step
            decoders = [None if tokenizer is None else StoppingDecoder(tokenizer, stop) for _ in rows]
            self._running.add([self._row(number, decoder) for number, decoder in enumerate(decoders)], read)

    def _row(self, number: int, decoder: StoppingDecoder | None) -> Row:
        return Row(self._sampling, (self._draws, number), decoder, self._eos_id, self._max_new_tokens)

    @torch.inference_mode()
    def __next__(self) -> Step:
        if not self._running.rows or self._n_steps == self._max_new_tokens:
            raise StopIteration
        self._read = None
        chosen = self._running.advance()
        self._n_steps += 1
        numbers = self._numbers()
        self._drop([i for i, one in enumerate(chosen) if one.reason is not None])
        return self._report(numbers, chosen)

    @property
    def speculation(self) -> SpeculationReport | None:
        """What speculation has done so far; None if there is none."""
        return None if self._speculator is None else self._speculator.report

    @property
    def state(self) -> GenerationState:
        """The state after the prompts and all tokens generated so far, with rows in the order of the prompts.

        The state of a row that has ended is that at its end, including the end-of-sequence token or the stop string.
        """
        with torch.inference_mode():
            result = self._read or self._state_after_last()
        return map_state(Tensor.clone, result)  # a snapshot, made outside inference mode: usable by autograd, too

    def _state_after_last(self) -> GenerationState:
        parts = list(self._ended)
        if self._running.rows:
            parts.append(self._taken(range(len(self._running.rows))))
        order = torch.tensor([number for numbers, _ in parts for number in numbers]).argsort()
        last, held = concatenate_rows([part for _, part in parts])
        last, held = select_rows((last, held), order.to(last.device))
        output = self._step(last, held.model)
        return GenerationState(output.state, output.logits[:, : self._model.config.vocab_size].float(), held.seen)

    def _taken(self, places: Sequence[int]) -> tuple[list[int], Any]:
        """The numbers of rows, their newest tokens and the states before these."""
        if self._speculator is not None:
            self._running.settle(self._speculator.settle)
        return [self._running.rows[place].number for place in places], self._running.select(places)

    def _numbers(self) -> list[int]:
        """The numbers of the running rows, in the order of their states."""
        return [row.number for row in self._running.rows]

    def _guess(self, number: int, logits: Float[Tensor, "one padded_vocab"], ahead: int) -> int:
        """The id that a draft model's logits give for a later token of a row, with the row's own random number."""
        draws = None if self._sampling.is_greedy else self._draws.peek(number, ahead)
        place = self._numbers().index(number)
        seen = self._running.seen[place : place + 1, : self._n_ids].to(logits.device)
        return int(sample(logits[:, : self._n_ids].float(), self._sampling, draws, seen))

    def _report(self, numbers: list[int], chosen: list[Chosen]) -> Step:
        order = sorted(range(len(numbers)), key=numbers.__getitem__)
        numbers, chosen = [numbers[i] for i in order], [chosen[i] for i in order]
        for one in chosen:
            if one.error is not None:
                raise one.error
        ids, log_probabilities, _, texts, reasons, _ = map(list, zip(*chosen, strict=True))
        return Step(numbers, ids, log_probabilities, texts, reasons)

    def _drop(self, places: list[int]) -> None:
        """Remove rows from the computation, by their places among the running ones."""
        if places:
            self._ended.append(self._taken(places))
            self._running.remove(places)


def stream(
    model: LanguageModel,
    prompts: Prompts,
    tokenizer: Tokenizer | None = None,
    **options: Unpack[GenerationOptions],
) -> TokenStream:
    """Generate step by step. Iterating yields the new tokens of all running rows; `.state` is the state so far.

    The prompts are read before this returns.

    Args:
        model: a language model.
        prompts: token ids of each, which may differ in length: lists, ranges, arrays or tensors of integers, on any
            device; or one 2-D array or tensor.
        tokenizer: for text, stop strings and the end-of-sequence id; None: tokens only.
        options: see `GenerationOptions`.
    Raises ValueError or TypeError for prompts that the model cannot read and options out of range, RuntimeError if the
        model's logits are not finite.
    """
    return TokenStream(model, prompts, tokenizer, **options)


@dataclass(frozen=True)
class GenerationOutput:
    """What was generated after each prompt."""

    ids: list[list[int]]
    """The new tokens of each row, including an end-of-sequence token or the tokens of a stop string at the end."""
    log_probabilities: list[list[float]]
    """Log-probability of each token under the model, in nats, before penalty, temperature and filters."""
    finish_reasons: list[FinishReason]
    """Why each row ended: "eos", "stop" (a stop string) or "length" (max_new_tokens)."""
    texts: list[str] | None
    """The text of each row, cut before the end-of-sequence token or the stop string; None without a tokenizer."""
    _stream: TokenStream = field(repr=False)

    @property
    def state(self) -> GenerationState:
        """The state after all tokens, to continue from; see `TokenStream.state`."""
        return self._stream.state

    def padded(self, pad_id: int) -> Int[Tensor, "batch length"]:
        """The new tokens as one tensor; rows that ended early are padded with pad_id."""
        length = max(map(len, self.ids))
        rows = [ids + [pad_id] * (length - len(ids)) for ids in self.ids]
        return torch.tensor(rows, dtype=torch.int64).view(len(rows), length)


def generate(
    model: LanguageModel,
    prompts: Prompts,
    tokenizer: Tokenizer | None = None,
    **options: Unpack[GenerationOptions],
) -> GenerationOutput:
    """Generate until every row has ended. Args and errors as in `stream`."""
    steps = stream(model, prompts, tokenizer, **options)
    ids: list[list[int]] = [[] for _ in range(steps.n_prompts)]
    log_probabilities: list[list[float]] = [[] for _ in range(steps.n_prompts)]
    texts = [""] * steps.n_prompts
    reasons: list[FinishReason] = ["length"] * steps.n_prompts
    for step in steps:
        for row, token, log_probability, text, reason in zip(*step, strict=True):
            ids[row].append(token)
            log_probabilities[row].append(log_probability)
            texts[row] += text
            reasons[row] = reason or reasons[row]
    return GenerationOutput(ids, log_probabilities, reasons, None if tokenizer is None else texts, steps)


class TextStream(Iterator[str]):
    """Iterates over pieces of the text after one prompt, each as soon as it is final; made by `stream_text`."""

    def __init__(self, steps: TokenStream) -> None:
        self._steps = steps
        self.ids: list[int] = []
        """Number of tokens so far."""
        self.log_probabilities: list[float] = []
        """Log-probability of these tokens under the model, in nats."""
        self.finish_reason: FinishReason | None = None
        """Why the text has ended; None until then, and after max_new_tokens=0."""
        self.n_prompt_tokens = steps.n_prompt_tokens
        """Number of tokens in the prompt."""

    def __next__(self) -> str:
        for step in self._steps:
            self.ids.append(step.ids[0])
            self.log_probabilities.append(step.log_probabilities[0])
            self.finish_reason = step.finish_reasons[0]
            if step.texts[0]:
                return step.texts[0]
        raise StopIteration

    @property
    def state(self) -> GenerationState:
        """The state after the prompt and all tokens so far, to continue from."""
        return self._steps.state


def stream_text(
    model: LanguageModel, tokenizer: Tokenizer, prompt: str | bytes | ArrayLike, **options: Unpack[GenerationOptions]
) -> TextStream:
    """Continue a text. Iterating yields pieces of it, never part of a character or of a stop string.

    Args:
        model: a language model.
        tokenizer: its tokenizer.
        prompt: the text to continue, or its token ids. It may be empty if there is a state, or an id that documents
            begin with.
        options: see `GenerationOptions`.
    Raises as `stream` does, and ValueError for a prompt that the tokenizer cannot encode.
    """
    ids = tokenizer.encode(prompt) if isinstance(prompt, str | bytes) else prompt
    return TextStream(stream(model, [ids], tokenizer, **options))
