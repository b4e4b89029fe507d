"""Stop strings: text that comes token by token is given out up to the first stop string, and never a part of one."""

from __future__ import annotations

from collections.abc import Sequence

from anymamba.data.tokenizer import StreamDecoder, Tokenizer


class StopMatcher:
    """Gives out text as it comes, ending before the stop string that is complete first (of several, the longest).

    The end of the text that may still become a stop string is held back. What is given out in all does not depend on
    how the text is cut into pieces.

    Args:
        stop: strings that end the text; they are not part of it.
    Raises TypeError or ValueError for a stop that is not a list of strings with characters in them.
    """

    def __init__(self, stop: Sequence[str] = ()) -> None:
        if isinstance(stop, str | bytes):
            raise TypeError(f"stop must be a list of strings, got {stop!r}; write [{stop!r}]")
        for string in stop:
            if not isinstance(string, str):
                raise TypeError(f"a stop string must be a str, got {string!r}")
            if not string:
                raise ValueError("a stop string must not be empty: it would end the text before it begins")
        self._stop = tuple(stop)
        self._held = ""
        self.stopped = False
        """Whether a stop string has come; nothing is given out after it."""

    def push(self, piece: str) -> str:
        """The text that is certain after this piece."""
        if self.stopped:
            return ""
        text = self._held + piece
        found = [(start + len(s), start) for s in self._stop if (start := text.find(s)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)[1]]
        certain = len(text) - self._unfinished(text)
        self._held = text[certain:]
        return text[:certain]

    def flush(self) -> str:
        """What is held back, once no more text comes."""
        held, self._held = self._held, ""
        return held

    def _unfinished(self, text: str) -> int:
        """Length of the longest end of the text with which a stop string begins."""
        longest = min(len(text), max(map(len, self._stop), default=1) - 1)
        return next((n for n in range(longest, 0, -1) if any(s.startswith(text[-n:]) for s in self._stop)), 0)


class StoppingDecoder:
    """Text from tokens as they come, ended by stop strings wherever these lie across tokens."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self._decoder = StreamDecoder(tokenizer)
        self._matcher = StopMatcher(stop)

    @property
    def stopped(self) -> bool:
        """Whether a stop string has come."""
        return self._matcher.stopped

    def push(self, token: int) -> str:
        """The text that this token makes certain."""
        return self._matcher.push(self._decoder.push([token]))

    def flush(self) -> str:
        """The rest of the text, once no more tokens come; it may still complete a stop string."""
        return self._matcher.push(self._decoder.flush()) + self._matcher.flush()
