"""Stop strings: the text does not depend on how it is cut into pieces, and no part of a stop string is passed on."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anymamba.data.tokenizer import ByteTokenizer
from anymamba.generation.stops import StopMatcher, StoppingDecoder


def naive(text: str, stop: list[str]) -> tuple[str, bool]:
    """Character by character: text ends before the first complete stop string (the longest, if several are)."""
    for end in range(1, len(text) + 1):
        ending = [s for s in stop if text[:end].endswith(s)]
        if ending:
            return text[: end - max(map(len, ending))], True
    return text, False


texts = st.text("abc", max_size=30)
stops = st.lists(st.text("abc", min_size=1, max_size=4), max_size=3)


@settings(max_examples=400, deadline=None)
@given(texts, stops, st.lists(st.integers(0, 30), max_size=8))
def test_any_cut_gives_the_naive_text(text, stop, cuts):
    offsets = sorted({0, len(text), *(min(c, len(text)) for c in cuts)})
    matcher, given_out = StopMatcher(stop), ""
    wanted, stopped = naive(text, stop)
    for begin, end in itertools.pairwise(offsets):
        given_out += matcher.push(text[begin:end])
        assert wanted.startswith(given_out)  # nothing that would have to be taken back
        if not matcher.stopped:  # and nothing is held back that could not become a stop string
            held = text[len(given_out) : end]
            assert not held or any(s.startswith(held) for s in stop)
    assert (given_out + matcher.flush(), matcher.stopped) == (wanted, stopped)
    assert matcher.push("abc") == "" or not stopped


def test_stop_strings_across_byte_tokens_and_characters():
    tokenizer = ByteTokenizer()
    decoder = StoppingDecoder(tokenizer, ["→ende"])
    pieces = [decoder.push(token) for token in tokenizer.encode("é→en→ende, more")]
    assert "".join(pieces) == "é→en"
    assert decoder.stopped and decoder.flush() == ""
    assert pieces[:2] == ["", "é"]


def test_an_unfinished_stop_string_is_given_out_at_the_end():
    decoder = StoppingDecoder(ByteTokenizer(), ["User:"])
    assert "".join(decoder.push(token) for token in b"hi Use") == "hi "
    assert decoder.flush() == "Use"
    assert not decoder.stopped


def test_half_a_character_at_the_end_becomes_the_replacement():
    decoder = StoppingDecoder(ByteTokenizer())
    assert decoder.push(0xC3) == ""
    assert decoder.flush() == "\ufffd"


@pytest.mark.parametrize(
    ("stop", "error", "words"),
    [("ab", TypeError, "write \\['ab'\\]"), ([1], TypeError, "must be a str, got 1"), ([""], ValueError, "empty")],
)
def test_bad_stop_strings(stop, error, words):
    with pytest.raises(error, match=words):
        StopMatcher(stop)
