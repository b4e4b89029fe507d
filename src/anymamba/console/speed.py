"""How fast tokens are generated: measured over all batches, and profiled for the first tokens if that is wanted."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from anymamba.console.profiling import StepProfile, phase

if TYPE_CHECKING:
    from anymamba.generation.generate import Step, TokenStream

PROFILED_TOKENS = 32
"""Tokens of each row that are in a profile, after the prompts."""


class Speed:
    """Counts tokens and the time that they take.

    Args:
        profile: records the prompts of the first batch and its first tokens.
    """

    def __init__(self, profile: StepProfile | None = None) -> None:
        self.profile = profile
        self.tokens = 0
        """Tokens generated so far."""
        self.seconds = 0.0
        """Time spent on prompts and tokens."""
        self._first: float | None = None  # seconds to the first token of the first batch
        self._later, self._later_seconds = 0, 0.0  # tokens after the first one of each row
        self._recorded = 0
        self._guessed, self._right = 0, 0  # tokens of speculation

    def steps(self, open_stream: Callable[[], TokenStream]) -> Iterator[Step]:
        """The steps of a stream. The time to open it, in which the prompts are read, counts too."""
        started = now = time.perf_counter()
        self._start_profile()
        first = stream = None

        def opened() -> TokenStream:
            nonlocal stream
            stream = open_stream()
            return stream

        for step in self._traced(opened) if self._is_recording else opened():
            now = time.perf_counter()
            self.tokens += len(step.ids)
            if first is None:
                first = now
                self._first = self._first or now - started
            else:
                self._later += len(step.ids)
            yield step
        self.seconds += now - started
        self._later_seconds += now - (first or now)
        if stream is not None and stream.speculation is not None:
            self._guessed += stream.speculation.n_guessed
            self._right += stream.speculation.n_right

    @contextmanager
    def search(self) -> Iterator[None]:
        """Measures the body, which generates all tokens at once; the caller counts them."""
        started = time.perf_counter()
        self._start_profile()
        with phase("search"):
            yield
        self.finish()
        self.seconds += time.perf_counter() - started

    def finish(self) -> None:
        """Write the profile, if it has not been written yet."""
        if self.profile is not None and self.profile.is_recording:
            self.profile.stop("prompts" + (f" and {self._recorded} tokens" if self._recorded else ""))
        self.profile = None

    def summary(self) -> str:
        """The speed in one line."""
        rate = self._later / self._later_seconds if self._later_seconds else self.tokens / max(self.seconds, 1e-9)
        first = "" if self._first is None else f", the first after {self._first:.2f} s"
        tokens = f"{self.tokens:,} token{'' if self.tokens == 1 else 's'}"
        guesses = f"; {self._right:,} of {self._guessed:,} guesses were right" if self._guessed else ""
        return f"generated {tokens} in {self.seconds:.2f} s{first}: {rate:,.1f} tokens/s{guesses}"

    @property
    def _is_recording(self) -> bool:
        return self.profile is not None and self.profile.is_recording

    def _start_profile(self) -> None:
        if self.profile is not None:
            self.profile.start()

    def _traced(self, open_stream: Callable[[], TokenStream]) -> Iterator[Step]:
        """The steps, with names in the trace; the profile is written after the first ones."""
        with phase("prompt"):
            steps = open_stream()
        while True:
            with phase("token"):
                step = next(steps, None)
            if step is None:
                return
            self._recorded += 1
            if self._recorded == PROFILED_TOKENS:
                self.finish()
            yield step
