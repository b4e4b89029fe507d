"""The prompts that wait and those that are being read, in fair turns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from anymamba.generation.scheduling.jobs import Job
from anymamba.generation.scheduling.reading import LEAST_TOKENS, Piece, PieceRead, PieceReader
from anymamba.generation.scheduling.turns import Turns
from anymamba.generation.stepping import Stepper
from anymamba.models.language_model import LanguageModel

SCORED_TOKENS = 256
"""Tokens of a piece that needs the logits after each of them."""


class PassError(RuntimeError):
    """A pass over prompts has failed.

    Args:
        jobs: whose prompts were in it.
        error: what the model raised.
    """

    def __init__(self, jobs: Sequence[Job], error: Exception) -> None:
        super().__init__(str(error))
        self.jobs, self.error = jobs, error


class PromptReading:
    """Chooses whose prompts are read, and reads them in pieces.

    Args:
        model: a language model.
        stepper: of the model.
    """

    def __init__(self, model: LanguageModel, stepper: Stepper) -> None:
        self._model = model
        self._reader = PieceReader(model, stepper)
        self.turns = Turns()
        self.waiting: list[Job] = []
        """Requests that have no room yet."""
        self.active: list[Job] = []
        """Requests whose prompts are being read."""

    def join(self, job: Job) -> None:
        """Take a new request."""
        self.turns.join(job, [*self.waiting, *self.active])
        self.waiting.append(job)

    def leave(self, job: Job) -> None:
        """Forget a request, wherever it is."""
        self.waiting = [other for other in self.waiting if other is not job]
        self.active = [other for other in self.active if other is not job]

    @property
    def n_rows(self) -> int:
        """Rows of the prompts that are being read."""
        return sum(job.request.n_rows for job in self.active)

    def admit(self, n_free: int) -> Iterator[Job]:
        """Begin with the requests that are next, while their rows fit into so many."""
        for job in self.turns.order(self.waiting):
            n_free -= job.request.n_rows
            if n_free < 0:
                return
            self.waiting.remove(job)
            self.active.append(job)
            yield job

    def read(self, seconds: float) -> list[tuple[Job, Piece, PieceRead]]:
        """One pass over pieces of prompts that takes about so long.

        Raises PassError if the model raises.
        """
        n_tokens = self._reader.clock.tokens_within(seconds)
        jobs, pieces = [], []
        for job in self.turns.order(self.active):
            piece = self._piece(job, n_tokens)
            jobs.append(job)
            pieces.append(piece)
            self.turns.serve(job, len(piece.ids))
            n_tokens -= max(len(piece.ids), LEAST_TOKENS)
            if n_tokens < LEAST_TOKENS:
                break
        try:
            return list(zip(jobs, pieces, self._reader.read(pieces), strict=True))
        except Exception as error:
            raise PassError(jobs, error) from error

    def _piece(self, job: Job, n_tokens: int) -> Piece:
        """The next tokens of a prompt, at most so many, and not across a place where the state is kept."""
        is_scored = job.request.prompt_log_probabilities is not None
        most = min(n_tokens, SCORED_TOKENS) if is_scored else n_tokens
        stop = next((n for n in job.stops if n > job.n_read), len(job.prompt))
        end = min(job.n_read + max(most, LEAST_TOKENS), stop)
        state = self._model.init_state(1) if job.model is None else job.model
        return Piece(job.prompt[job.n_read : end], state, None if is_scored else int(end == stop))
