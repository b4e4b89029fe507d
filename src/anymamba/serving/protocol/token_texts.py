"""Log-probabilities in OpenAI's two forms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from anymamba.data.tokenizer import Tokenizer
from anymamba.generation.requests import TokenScore

LEAST = -9999.0
"""What a log-probability of minus infinity is reported as: JSON has no infinities."""


class TokenTexts:
    """The texts of single tokens, kept after the first use.

    Args:
        tokenizer: the model's.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer, self._texts = tokenizer, dict[int, tuple[str, list[int]]]()

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
        self, scores: Sequence[TokenScore], n_top: int, offset: int, first: int | None = None
    ) -> dict[str, Any]:
        """The `logprobs` of a piece of a completion.

        Args:
            scores: of its tokens.
            n_top: how many of the likeliest tokens to report.
            offset: characters before the piece.
            first: a token before these, which has no log-probability: the first one of a prompt.
        """
        tokens = [] if first is None else [self.text(first)]
        numbers: list[float | None] = [None] * len(tokens)
        top: list[dict[str, float] | None] = [None] * len(tokens)
        for score in scores:
            tokens.append(self.text(score.token))
            numbers.append(_finite(score.log_probability))
            likeliest = {self.text(token): _finite(value) for token, value in score.top[:n_top]}
            top.append({**likeliest, tokens[-1]: _finite(score.log_probability)})
        offsets = []
        for token in tokens:
            offsets.append(offset)
            offset += len(token)
        return {
            "tokens": tokens,
            "token_logprobs": numbers,
            "top_logprobs": top if n_top else None,
            "text_offset": offsets,
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
