"""Stop strings: text that arrives in pieces is passed on up to the first stop string, and no part of one is."""

from __future__ import annotations

from collections.abc import Sequence

from anymamba.data.tokenizer import StreamDecoder, Tokenizer


class StopMatcher:
    """Passes on text piece by piece until the first stop string is complete (the longest, if several are).

    An end of the text that may still become a stop string is held back. The text passed on in all does not depend on
    how it is cut into pieces.

    Args:
        stop: strings that end the text; they are not part of it.
    Raises TypeError or ValueError if stop is not a list of strings that are not empty.
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
        """Whether a stop string has occurred; no text is passed on after it."""

    def push(self, piece: str) -> str:
        """The text that becomes final with this piece."""
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
        """The text still held back; call it at the end of the text."""
        held, self._held = self._held, ""
        return held

    def _unfinished(self, text: str) -> int:
        """Length of the longest suffix of the text that is a proper prefix of a stop string."""
        longest = min(len(text), max(map(len, self._stop), default=1) - 1)
        return next((n for n in range(longest, 0, -1) if any(s.startswith(text[-n:]) for s in self._stop)), 0)


class StoppingDecoder:
    """Turns tokens into text one by one and ends it at stop strings, which may span several tokens."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self._decoder = StreamDecoder(tokenizer)
        self._matcher = StopMatcher(stop)

    @property
    def stopped(self) -> bool:
        """Whether a stop string has occurred."""
        return self._matcher.stopped

    def push(self, token: int) -> str:
        """The text that becomes final with this token."""
        return self._matcher.push(self._decoder.push([token]))

    def flush(self) -> str:
        """The rest of the text; call it after the last token. The rest may still complete a stop string."""
        return self._matcher.push(self._decoder.flush()) + self._matcher.flush()
