"""Answers of /v1/chat/completions, with calls of tools."""

from __future__ import annotations

import secrets
from typing import Any

from anymamba.generation.requests import TokenScore
from anymamba.generation.stops import StopMatcher
from anymamba.serving.protocol.answers import Answer, Piece, Row
from anymamba.serving.protocol.tools import CALL_BEGINS, Tools, find_calls, parse_call


class ChatAnswer(Answer):
    """An answer of /v1/chat/completions.

    Args:
        tools: those of the request.
    """

    kind, prefix, stream_kind = "chat.completion", "chatcmpl-", "chat.completion.chunk"

    def __init__(self, *answer: Any, tools: Tools | None = None) -> None:
        super().__init__(*answer)
        self._tools = tools
        self._choice_of_tools = "none" if tools is None else tools.choice
        self._before_calls = [StopMatcher((CALL_BEGINS,)) for _ in self.rows]
        self._sent = [0 for _ in self.rows]
        """Characters of each row's text that a stream has sent."""

    def first_pieces(self) -> list[Piece]:
        """`Answer.first_pieces`: who speaks, and the name of the function if the request names one."""
        pieces: list[Piece] = []
        for number in range(len(self.rows)):
            delta: dict[str, Any] = {"role": "assistant", "content": None if self._is_named else ""}
            if self._is_named:
                delta["tool_calls"] = [{"index": 0, **_call(self._name, "")}]
            pieces.append(self._delta(number, delta))
        return pieces

    def piece(self, number: int, text: str, scores: list[TokenScore]) -> list[Piece]:
        """`Answer.piece`."""
        shown = self._shown(number, text)
        if self.n_top is None or not scores:
            return [self.text_event(number, shown)] if shown else []
        return [self._delta(number, self._text_delta(shown), scores)]

    def text_piece(self, number: int, text: str) -> dict[str, Any]:
        """`Answer.text_piece`."""
        return self._delta(number, self._text_delta(text))

    def _shown(self, number: int, text: str) -> str:
        """The text to send now. A call that is not whole is held back, except the arguments of a named function."""
        if self._choice_of_tools == "required":
            return ""
        shown = self._before_calls[number].push(text) if self._choice_of_tools == "auto" else text
        self._sent[number] += len(shown)
        return shown

    def _text_delta(self, text: str) -> dict[str, Any]:
        if self._is_named and text:
            return {"tool_calls": [{"index": 0, "function": {"arguments": text}}]}
        return {"content": text}

    def last_piece(self, number: int) -> list[Piece]:
        """`Answer.last_piece`: what was held back, and the reason of the end."""
        message, reason = self._message(self.rows[number])
        pieces: list[Piece] = []
        if self._choice_of_tools in ("auto", "required"):
            rest = (message["content"] or "")[self._sent[number] :]
            if rest:
                pieces.append(self._delta(number, {"content": rest}))
            for index, call in enumerate(message.get("tool_calls", ())):
                pieces.append(self._delta(number, {"tool_calls": [{"index": index, **call}]}))
        end = self._delta(number, {})
        end["choices"][0]["finish_reason"] = reason
        return [*pieces, end]

    def choice(self, index: int, row: Row) -> dict[str, Any]:
        """`Answer.choice`."""
        message, reason = self._message(row)
        scores = None if self.n_top is None else self.texts.chat(row.scores, self.n_top)
        return {"index": index, "message": message, "logprobs": scores, "finish_reason": reason}

    @property
    def _is_named(self) -> bool:
        return self._choice_of_tools == "named"

    @property
    def _name(self) -> str:
        assert self._tools is not None, "only tools can be named"
        return str(self._tools.functions[0]["name"])

    def _message(self, row: Row) -> tuple[dict[str, Any], str | None]:
        """The message and the reason of its end."""
        text = "".join(row.text)
        content, calls = text, list[tuple[str, str]]()
        if self._is_named:
            content, calls = "", [(self._name, text)]
        elif self._choice_of_tools == "required":
            call = parse_call(text)
            content, calls = ("", [call]) if call is not None else (text, [])
        elif self._choice_of_tools == "auto":
            content, calls = find_calls(text)
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        if not calls:
            return message, row.reason
        message["content"] = content or None
        message["tool_calls"] = [_call(*call) for call in calls]
        is_whole = row.reason == "stop" and not self._is_named  # OpenAI says stop for a function that is named
        return message, "tool_calls" if is_whole else row.reason

    def _delta(self, number: int, delta: dict[str, Any], scores: list[TokenScore] | None = None) -> dict[str, Any]:
        described = self.texts.chat(scores, self.n_top) if scores and self.n_top is not None else None
        return self.chunk([{"index": number, "delta": delta, "logprobs": described, "finish_reason": None}])


def _call(name: str, arguments: str) -> dict[str, Any]:
    return {
        "id": "call_" + secrets.token_hex(12),
        "type": "function",
        "function": {"name": name, "arguments": arguments},
    }
