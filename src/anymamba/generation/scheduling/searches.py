"""Beam searches among the requests of an engine."""

from __future__ import annotations

from collections.abc import Iterator

from anymamba.data.tokenizer import Tokenizer
from anymamba.generation.beam import BeamRows, Hypothesis, Rules, Search, end_test
from anymamba.generation.prompts import GenerationState
from anymamba.generation.requests import Event, Finished, NewToken, TokenScore
from anymamba.generation.scheduling.jobs import Job
from anymamba.generation.stepping import Stepper
from anymamba.generation.stops import StoppingDecoder


class RunningSearch:
    """The search of one request. Its beams are rows of a batch of their own, beside the running rows.

    Args:
        job: the request, which has beams.
        step: steps the model.
        read: the state after its prompt, one row.
        n_ids: ids that may be generated.
        tokenizer: for text; None: no text.
    """

    def __init__(self, job: Job, step: Stepper, read: GenerationState, n_ids: int, tokenizer: Tokenizer | None) -> None:
        request, beams = job.request, job.request.beams
        assert beams is not None
        self.job, self._tokenizer = job, tokenizer
        ends = end_test(request.eos_id, tokenizer, request.stop)
        rules = Rules(beams.num_beams, request.max_new_tokens, beams.length_penalty, beams.early_stopping, ends)
        self._search = Search(rules)
        self._rows = BeamRows(step, read, [self._search], n_ids)

    def advance(self) -> bool:
        """One more token of every beam. Returns whether the search is done."""
        self._rows.advance()
        return not self._rows.active

    def events(self) -> Iterator[Event]:
        """The tokens and the ends of the n best answers, best first. If there are fewer, the rest are empty."""
        best = self._search.best(self.job.request.n)
        for index, answer in enumerate(best):
            texts = self._texts(answer)
            for token, log_probability, text in zip(answer.ids, answer.log_probabilities, texts, strict=True):
                yield NewToken(index, TokenScore(token, log_probability, ()), text)
            yield Finished(index, answer.finish_reason, self.job.usage(len(answer.ids)), None)
        for index in range(len(best), self.job.request.n):
            yield Finished(index, "length", self.job.usage(0), None)

    def _texts(self, answer: Hypothesis) -> list[str]:
        """The text that becomes final with each token."""
        if self._tokenizer is None:
            return [""] * len(answer.ids)
        decoder = StoppingDecoder(self._tokenizer, self.job.request.stop)
        is_eos = answer.finish_reason == "eos"
        texts = [decoder.push(token) for token in (answer.ids[:-1] if is_eos else answer.ids)]
        return [*texts, decoder.flush()] if is_eos else [*texts[:-1], texts[-1] + decoder.flush()]
