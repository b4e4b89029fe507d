"""The engine: many requests at once on one model, each admitted and ended between any two tokens of the others.

A step reads pieces of prompts and generates one token of every running row. It is model code only: a server calls
`step` in a thread of its own, and gives requests and takes events from other threads.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch import Tensor

from anymamba.base.sizes import require_sizes
from anymamba.data.tokenizer import Tokenizer
from anymamba.generation.prefix_tree import PrefixTree
from anymamba.generation.prompts import GenerationState
from anymamba.generation.requests import (
    EndReason,
    Event,
    Failed,
    Finished,
    KeptState,
    NewToken,
    PromptRead,
    Request,
    TokenScore,
)
from anymamba.generation.running import RunningRows, n_ids
from anymamba.generation.scheduling import (
    AnswerRow,
    Inbox,
    Job,
    PassError,
    Piece,
    PieceRead,
    PromptReading,
    RunningSearch,
    check_request,
)
from anymamba.generation.stepping import Stepper
from anymamba.models.language_model import LanguageModel
from anymamba.parts.state import map_state, select_rows, state_bytes

ALONE = 0.25
"""Seconds of one pass over prompts while no row is running: how late a new request may be noticed."""


class EngineStatistics(NamedTuple):
    """What an engine is doing and has done."""

    n_rows: int
    """Answers that are being generated."""
    n_reading: int
    """Requests whose prompts are being read."""
    n_queued: int
    """Requests that wait for room."""
    prompt_tokens: int
    """Tokens of all prompts that were read or found."""
    cached_tokens: int
    """How many of those were found in the prefix tree or a session's state."""
    new_tokens: int
    """Tokens generated."""
    seconds_per_step: float
    """A running mean over steps of the running rows, without the reading of prompts."""


class Engine:
    """Runs requests on one model. `submit` and `cancel` may be called from any thread, `step` from one at a time.

    Args:
        model: a language model, on any device.
        tokenizer: for text and stop strings; None: tokens only.
        max_rows: answers that are generated at once; more wait. Defaults to what fits into `memory`, else to 64.
        memory: bytes for the states of running rows.
        longest_wait: seconds that a running row may wait for its next token while prompts are read.
        slowdown: how many times as long as without prompts it may wait at most, if that is shorter; with more prompts
            than running rows, as many times that. It always may wait 1.5 times as long.
        prefix_tree: keeps states after the beginnings of prompts; None: every prompt is read.
    """

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: Tokenizer | None = None,
        *,
        max_rows: int | None = None,
        memory: int | None = None,
        longest_wait: float = 0.05,
        slowdown: float = 2.5,
        prefix_tree: PrefixTree | None = None,
    ) -> None:
        if max_rows is None:
            max_rows = 64 if memory is None else rows_within(model, memory)
        require_sizes(max_rows=max_rows)
        self._model, self._tokenizer, self._tree = model, tokenizer, prefix_tree
        self.max_rows, self.longest_wait, self.slowdown = max_rows, longest_wait, slowdown
        self._device = next(model.parameters()).device
        self._n_ids = n_ids(model, tokenizer)
        self._stepper = Stepper(model)
        self._inbox, self._ids = Inbox(), itertools.count()
        self._prompts = PromptReading(model, self._stepper)
        self._running = self._no_rows()
        self._searches: list[RunningSearch] = []
        self._workers = ThreadPoolExecutor(1, "anymamba-masks")
        self._seconds = 0.0
        self._counts: tuple[int, int, int] = (0, 0, 0)

    def _no_rows(self) -> RunningRows[AnswerRow]:
        return RunningRows(self._stepper, self._model.config.vocab_size, self._n_ids)

    # ------------------------------------------------------------------------------------ from any thread

    def submit(self, request: Request, sink: Callable[[Event], None]) -> int:
        """Take a request. Returns its id.

        Args:
            sink: called with each event in the thread that calls `step`; it must return at once.
        Raises ValueError or TypeError for a request that cannot be served.
        """
        native = self._stepper.native is not None
        prompt = check_request(request, self._model.config.vocab_size, self.max_rows, self._tokenizer, native)
        job = Job(next(self._ids), request, prompt, sink)
        self._inbox.submit(job)
        return job.id

    def cancel(self, request_id: int) -> None:
        """End a request before the next step; its answers finish as "cancelled". One that has ended stays as it is."""
        self._inbox.cancel(request_id)

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until there is something to do, at most so many seconds. Returns whether there is."""
        return self._inbox.wait(timeout)

    @property
    def statistics(self) -> EngineStatistics:
        """What the engine is doing and has done."""
        n_queued = len(self._prompts.waiting) + len(self._inbox)
        return EngineStatistics(self._n_rows, len(self._prompts.active), n_queued, *self._counts, self._seconds)

    @property
    def _n_rows(self) -> int:
        return len(self._running.rows) + sum(search.job.request.n_rows for search in self._searches)

    # ------------------------------------------------------------------------------------ one step

    @torch.inference_mode()
    def step(self) -> bool:
        """Read pieces of prompts and generate one token of every running row. Returns false if there was no work."""
        self._take_commands()
        for job in self._prompts.admit(self.max_rows - self._n_rows - self._prompts.n_rows):
            self._start(job)
        if self._prompts.active:
            self._read()
        if self._running.rows:
            self._generate()
        for search in list(self._searches):
            self._search(search)
        busy = bool(self._running.rows or self._searches or self._prompts.active or self._prompts.waiting)
        if not busy:
            self._inbox.rest()
        return busy

    def _take_commands(self) -> None:
        new, cancelled = self._inbox.take()
        for job in new:
            self._prompts.join(job)
        if cancelled:
            jobs = (*self._prompts.waiting, *self._prompts.active, *(search.job for search in self._searches))
            self._end_jobs([job for job in jobs if job.id in cancelled])
            rows = self._running.rows
            self._end_rows({i: "cancelled" for i, row in enumerate(rows) if row.job.id in cancelled})

    def _start(self, job: Job) -> None:
        """Make the rows, whose masks are then worked on, and find the state to read from."""
        try:
            job.make_rows(self._tokenizer, self._workers)
        except Exception as error:  # of a mask
            self._end_jobs([job], error)
            return
        n_top = job.request.prompt_log_probabilities
        kept = job.own_state() if n_top is None else None
        if self._tree is not None:
            found, job.stops = self._tree.find(job.request.owner, job.prompt, n_top)
            if found is not None and (kept is None or len(found.tokens) > len(kept.tokens)):
                kept = found
        if kept is not None:
            job.start_from(kept, self._device)
            if job.n_read == len(job.prompt):
                self._generate_after(job, kept.logits.to(self._device))

    # ------------------------------------------------------------------------------------ prompts

    def _read(self) -> None:
        """One pass over pieces of prompts, as many tokens as the running rows may wait for."""
        try:
            found = self._prompts.read(self._pass_seconds())
        except PassError as failure:
            self._end_jobs(failure.jobs, failure.error)
            return
        for job, piece, result in found:
            self._take_piece(job, piece, result)

    def _pass_seconds(self) -> float:
        """How long reading may take before the next tokens of the running rows: the longer, the more prompts wait."""
        n_rows, step = self._n_rows, self._seconds
        if not n_rows:
            return ALONE
        slowdown = self.slowdown * max(1, len(self._prompts.active) / n_rows)
        return max(1.5 * step, min(self.longest_wait, slowdown * step)) - step

    def _take_piece(self, job: Job, piece: Piece, read: PieceRead) -> None:
        job.n_read += len(piece.ids)
        job.model = read.state
        vocab_size = self._model.config.vocab_size
        if piece.n_logits is None:
            job.score(read.logits.float(), vocab_size)
        logits = read.logits[:, :vocab_size].float()
        if self._tree is not None and (job.n_read in job.stops or job.n_read == len(job.prompt)):
            self._tree.keep(job.request.owner, job.prompt[: job.n_read], read.state, logits[-1:], job.known_scores)
        if job.n_read == len(job.prompt):
            self._generate_after(job, logits[-1:])

    def _generate_after(self, job: Job, logits: Tensor) -> None:
        """Begin to generate after a prompt: its state is forked for each answer."""
        self._prompts.leave(job)
        self._count(len(job.prompt), job.n_cached, 0)
        self._emit(job, PromptRead(job.n_cached, job.token_scores()))
        request, model = job.request, job.model
        assert model is not None
        job.model = None  # the rows have copies
        if request.keep_state:
            job.after_prompt = KeptState(job.prompt, *map_state(Tensor.clone, (model, logits)))
        if not request.max_new_tokens:
            for index in range(request.n):
                self._emit(job, Finished(index, "length", job.usage(0), job.after_prompt))
            return
        seen = torch.zeros(1, self._model.config.vocab_size, dtype=torch.bool, device=logits.device)
        if request.sampling.repetition_penalty != 1:
            seen[0, list(set(job.prompt))] = True
        state = GenerationState(model, logits, seen)
        if request.beams is not None:
            self._searches.append(RunningSearch(job, self._stepper, state, self._n_ids, self._tokenizer))
        else:
            forks = torch.zeros(request.n, dtype=torch.int64, device=logits.device)
            self._running.add(job.rows, select_rows(state, forks))
            job.rows = []  # they hold the job: without a cycle there is no garbage to collect

    # ------------------------------------------------------------------------------------ answers

    def _generate(self) -> None:
        """One more token of every running row."""
        start, has_step = time.perf_counter(), any(row.ids for row in self._running.rows)
        try:
            chosen = self._running.advance()
        except Exception as error:
            rows, self._running = self._running.rows, self._no_rows()  # their states may be half written
            for row in rows:
                self._emit(row.job, Failed(row.number, error))
            return
        if has_step:
            self._seconds += (time.perf_counter() - start - self._seconds) * (0.1 if self._seconds else 1)
        ended: dict[int, EndReason | Exception] = {}
        for place, (row, one) in enumerate(zip(self._running.rows, chosen, strict=True)):
            end = one.error or one.reason
            if end is not None:
                ended[place] = end
            row.n_read = len(row.ids)
            if one.token is not None:
                row.ids.append(one.token)
                self._count(0, 0, 1)
                self._prompts.turns.count(row.job, 1)
                self._emit(row.job, NewToken(row.number, TokenScore(one.token, *one[1:3]), one.text))
        if self._tree is not None:
            for place, row in enumerate(self._running.rows):
                if place not in ended and (len(row.job.prompt) + row.n_read) % self._tree.every == 0:
                    self._kept(place)
        self._end_rows(ended)

    def _search(self, search: RunningSearch) -> None:
        """One more token of every beam of a search."""
        try:
            if not search.advance():
                return
        except Exception as error:
            self._end_jobs([search.job], error)
            return
        self._searches.remove(search)
        for event in search.events():
            self._count(0, 0, isinstance(event, NewToken))
            self._emit(search.job, event)

    def _end_rows(self, ended: Mapping[int, EndReason | Exception]) -> None:
        """Send the last events of rows and remove them, by their places among the running ones."""
        if not ended:
            return
        for place, end in ended.items():
            row = self._running.rows[place]
            if isinstance(end, Exception):
                self._emit(row.job, Failed(row.number, end))
                continue
            kept = self._kept(place) if row.job.request.keep_state or self._tree is not None else None
            self._emit(row.job, Finished(row.number, end, row.job.usage(len(row.ids)), row.job.to_keep(kept)))
        self._running.remove(list(ended))

    def _kept(self, place: int) -> KeptState:
        """A copy of a row's state, which is that before its newest token. The prefix tree keeps it, too."""
        row = self._running.rows[place]
        model, logits, _ = self._running.before_last([place])
        tokens = (*row.job.prompt, *row.ids[: row.n_read])
        if self._tree is not None:
            self._tree.keep(row.job.request.owner, tokens, model, logits)
        return KeptState(tokens, model, logits)

    # ------------------------------------------------------------------------------------ ends

    def _end_jobs(self, jobs: Iterable[Job], error: Exception | None = None) -> None:
        """End requests that have no rows yet: by an error, or cancelled."""
        for job in jobs:
            self._prompts.leave(job)
            self._searches = [search for search in self._searches if search.job is not job]
            for index in range(job.request.n):
                end = Finished(index, "cancelled", job.usage(0), None) if error is None else Failed(index, error)
                self._emit(job, end)

    def _count(self, prompt_tokens: int, cached_tokens: int, new_tokens: int) -> None:
        a, b, c = self._counts
        self._counts = (a + prompt_tokens, b + cached_tokens, c + new_tokens)

    def _emit(self, job: Job, event: Event) -> None:
        """Give an event to its sink. A sink that raises gets no more, and its request is cancelled."""
        if job.broken:
            return
        try:
            job.sink(event)
        except Exception:
            job.broken = True
            self.cancel(job.id)


def rows_within(model: LanguageModel, memory: int) -> int:
    """How many rows fit into so many bytes; at least 1. The states of attention layers grow, and count as empty."""
    vocab_size = model.config.padded_vocab_size
    return max(1, memory // (state_bytes(model.init_state(1)) + 9 * vocab_size))  # two rows of logits, one of `seen`
