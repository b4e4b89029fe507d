"""Beam searches among the requests of an engine."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from anymamba.data.tokenizer import Tokenizer
from anymamba.generation.beam import BeamRows, Hypothesis, Rules, Search, end_test
from anymamba.generation.prompts import GenerationState
from anymamba.generation.requests import Event, Finished, KeptState, NewToken, TokenScore
from anymamba.generation.scheduling.jobs import Job
from anymamba.generation.stepping import Stepper
from anymamba.generation.stops import StoppingDecoder
from anymamba.models.language_model import LanguageModelState


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
        options = (beams.num_beams, request.max_new_tokens, beams.length_penalty, beams.early_stopping)
        self._search = Search(Rules(*options, ends, request.n_top), self._before if request.keep_state else None)
        self._rows, self._vocab_size = BeamRows(step, read, [self._search], n_ids), read.logits.shape[1]

    def _before(self, beam: int) -> tuple[LanguageModelState, Tensor]:
        model, logits = self._rows.before(beam)
        return model, logits[:, : self._vocab_size].float()

    def advance(self) -> bool:
        """One more token of every beam. Returns whether the search is done."""
        self._rows.advance()
        return not self._rows.active

    def events(self) -> Iterator[Event]:
        """The tokens and the ends of the n best answers, best first. If there are fewer, the rest are empty."""
        best = self._search.best(self.job.request.n)
        for index, answer in enumerate(best):
            tops = answer.tops or [()] * len(answer.ids)
            scores = map(TokenScore, answer.ids, answer.log_probabilities, tops)
            for score, text in zip(scores, self._texts(answer), strict=True):
                yield NewToken(index, score, text)
            kept = None if index else self._kept(answer)
            yield Finished(index, answer.finish_reason, self.job.usage(len(answer.ids)), kept)
        for index in range(len(best), self.job.request.n):
            yield Finished(index, "length", self.job.usage(0), None)

    def _kept(self, best: Hypothesis) -> KeptState | None:
        """The state before the newest token of the best answer, if the request keeps its state."""
        if self._search.kept is None:
            return None
        return self.job.to_keep(KeptState((*self.job.prompt, *best.ids[:-1]), *self._search.kept))

    def _texts(self, answer: Hypothesis) -> list[str]:
        """The text that becomes final with each token."""
        if self._tokenizer is None:
            return [""] * len(answer.ids)
        decoder = StoppingDecoder(self._tokenizer, self.job.request.stop)
        is_eos = answer.finish_reason == "eos"
        texts = [decoder.push(token) for token in (answer.ids[:-1] if is_eos else answer.ids)]
        return [*texts, decoder.flush()] if is_eos else [*texts[:-1], texts[-1] + decoder.flush()]
