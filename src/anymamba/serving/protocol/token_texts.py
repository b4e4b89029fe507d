"""Log-probabilities in OpenAI's two forms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from anymamba.data.tokenizer import StreamDecoder, Tokenizer
from anymamba.generation.requests import TokenScore

LEAST = -9999.0
"""What a log-probability of minus infinity is reported as: JSON has no infinities."""


class TokenOffsets:
    """Where each token of a text begins, in characters: at the first character that it completes.

    A token that completes none has the offset of the character that it is a part of.

    Args:
        tokenizer: the model's.
        start: characters before the first token.
    """

    def __init__(self, tokenizer: Tokenizer, start: int = 0) -> None:
        self._decoder, self._n_ids, self._end = StreamDecoder(tokenizer), tokenizer.vocab_size, start

    def next(self, token: int) -> int:
        """The offset of the next token."""
        offset = self._end
        if token < self._n_ids:
            self._end += len(self._decoder.push([token]))
        return offset


class TokenTexts:
    """The texts of single tokens, kept after the first use.

    Args:
        tokenizer: the model's.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer, self._texts = tokenizer, dict[int, tuple[str, list[int]]]()

    def offsets(self, start: int = 0) -> TokenOffsets:
        """Offsets of the tokens of a text after so many characters."""
        return TokenOffsets(self._tokenizer, start)

    def text(self, token: int) -> str:
        """The token's text, or `bytes:\\xff...` for one that is not a whole number of characters."""
        return self._entry(token)[0]

    def _entry(self, token: int) -> tuple[str, list[int]]:
        if token not in self._texts:
            known = 0 <= token < self._tokenizer.vocab_size
            data = self._tokenizer.decode_bytes([token]) if known else f"<|{token}|>".encode()
            try:
                text = data.decode()
            except UnicodeDecodeError:
                text = "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
            self._texts[token] = text, list(data)
        return self._texts[token]

    def completion(
        self, scores: Sequence[TokenScore], n_top: int, offsets: TokenOffsets, first: int | None = None
    ) -> dict[str, Any]:
        """The `logprobs` of a piece of a completion.

        Args:
            scores: of its tokens.
            n_top: how many of the likeliest tokens to report.
            offsets: gives those of the tokens, and goes on with the next piece.
            first: a token before these, which has no log-probability: the first one of a prompt.
        """
        ids = [*(() if first is None else (first,)), *(score.token for score in scores)]
        numbers: list[float | None] = [None] * (len(ids) - len(scores))
        top: list[dict[str, float] | None] = [None] * len(numbers)
        for score in scores:
            numbers.append(_finite(score.log_probability))
            likeliest = {self.text(token): _finite(value) for token, value in score.top[:n_top]}
            top.append({**likeliest, self.text(score.token): _finite(score.log_probability)})
        return {
            "tokens": [self.text(token) for token in ids],
            "token_logprobs": numbers,
            "top_logprobs": top if n_top else None,
            "text_offset": [offsets.next(token) for token in ids],
        }

    def chat(self, scores: Sequence[TokenScore], n_top: int) -> dict[str, Any]:
        """The `logprobs` of a piece of a chat's answer."""
        content = [
            {
                **self._described(score.token, score.log_probability),
                "top_logprobs": [self._described(*pair) for pair in score.top[:n_top]],
            }
            for score in scores
        ]
        return {"content": content, "refusal": None}

    def _described(self, token: int, log_probability: float) -> dict[str, Any]:
        text, data = self._entry(token)
        return {"token": text, "logprob": _finite(log_probability), "bytes": data}


def _finite(log_probability: float) -> float:
    return max(log_probability, LEAST)
