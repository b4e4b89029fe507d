"""Structured output: grammars of llguidance that say which tokens may come next."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool

from anymamba.data.tokenizer import Tokenizer
from anymamba.serving.protocol.errors import ApiError

try:
    from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper
except ImportError as error:
    raise ImportError(f'llguidance is needed here ({error}); pip install "anymamba[serve]"') from error

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

LONGEST_REASON = 300
_SPACED: JsonCompileOptions = {"whitespace_pattern": r"[\x20\x0A\x0D\x09]{1,16}"}  # a weak model would not end them
_COMPACT: JsonCompileOptions = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


class GrammarMask:
    """A `TokenMask` of one answer.

    Args:
        matcher: the state of the grammar.
        vocab_size: the model's.
        param: the field of the request that holds the grammar, for messages.
    """

    def __init__(self, matcher: LLMatcher, vocab_size: int, param: str) -> None:
        self._matcher, self._vocab_size, self._param = matcher, vocab_size, param

    def allowed(self) -> Bool[np.ndarray, " ids"]:
        """True for each id that may come next. All are false at the end, and if the grammar is too complex to go on."""
        if self._matcher.is_error():
            return np.zeros(self._vocab_size, bool)
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        return np.unpackbits(bits, bitorder="little")[: self._vocab_size].astype(bool)

    def accept(self, token: int) -> None:
        """Go on after a token. Raises ApiError if the grammar turns out to be too complex."""
        if not self._matcher.consume_token(token):
            raise _bad_grammar(self._matcher.get_error(), self._param)

    def fork(self) -> GrammarMask:
        """A copy that goes on by itself."""
        return GrammarMask(self._matcher.deep_copy(), self._vocab_size, self._param)


class _Tokens:
    """A tokenizer as llguidance takes it where it does not read the file: the text of each token.

    Args:
        tokenizer: tokens have the same text wherever they are.
        n_ids: ids in all; those that the tokenizer does not have are empty.
        eos_id: the id that ends an answer.
    """

    def __init__(self, tokenizer: Tokenizer, n_ids: int, eos_id: int) -> None:
        self.eos_token_id, self.bos_token_id = eos_id, None
        self.tokens = [tokenizer.decode_bytes([i]) if i < tokenizer.vocab_size else b"" for i in range(n_ids)]
        self.special_token_ids = [token["id"] for token in json.loads(tokenizer.to_json()).get("added_tokens", ())]
        self._encode = tokenizer.encode

    def __call__(self, text: str | bytes) -> list[int]:
        return self._encode(text)


def _read_tokenizer(tokenizer: Tokenizer, n_ids: int, eos_id: int) -> LLTokenizer | None:
    """The tokenizer for llguidance; None if the text of a token depends on those around it."""
    text = tokenizer.to_json()
    if json.loads(text).get("decoder") == {"type": "Fuse"}:  # as that of DNA has it
        return LLTokenizer(TokenizerWrapper(_Tokens(tokenizer, n_ids, eos_id)), n_vocab=n_ids, eos_token=eos_id)
    try:
        return LLTokenizer(text, n_vocab=n_ids, eos_token=eos_id)
    except ValueError:  # of a decoder that it does not know
        return None


class Grammars:
    """Compiles grammars for one tokenizer.

    Args:
        tokenizer: the model's.
        vocab_size: the model's; ids that the tokenizer does not have are never allowed.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        eos_id = vocab_size if tokenizer.eos_id is None else tokenizer.eos_id  # one more id, which is never generated
        n_ids = max(vocab_size, eos_id + 1)
        self._tokenizer = _read_tokenizer(tokenizer, n_ids, eos_id)
        self._limits = LLParserLimits(initial_lexer_fuel=500_000, max_grammar_size=200_000, verbose_errors=False)

    def json_schema(self, schema: Mapping[str, Any] | bool, param: str, *, compact: bool = False) -> GrammarMask:
        """A JSON value that fits a schema.

        Args:
            schema: the JSON schema.
            param: the field of the request that holds it, for messages.
            compact: allow no white space but one space after a comma or a colon.
        Raises ApiError with the reason if it cannot be compiled.
        """
        form = _COMPACT if compact else _SPACED
        try:
            text = LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=form)
        except ValueError as error:
            raise _bad_grammar(str(error), param) from None
        return self._compiled(text, param)

    def regex(self, pattern: str, param: str) -> GrammarMask:
        """A text that matches a regular expression as a whole. Raises ApiError if it cannot be compiled."""
        return self._compiled(LLMatcher.grammar_from_regex(pattern), param)

    def choice(self, texts: Sequence[str], param: str) -> GrammarMask:
        """One of some texts. Raises ApiError if it cannot be compiled."""
        lark = "start: " + " | ".join(json.dumps(text) for text in texts)
        return self._compiled(LLMatcher.grammar_from_lark(lark), param)

    def _compiled(self, grammar: str, param: str) -> GrammarMask:
        if self._tokenizer is None:
            raise _bad_grammar("llguidance cannot read the tokenizer of this model; leave it out", param)
        matcher = LLMatcher(self._tokenizer, grammar, log_level=0, limits=self._limits)
        if not matcher.is_error():
            matcher.compute_bitmask()  # some grammars turn out to be too complex only at the first token
        if matcher.is_error():
            raise _bad_grammar(matcher.get_error(), param)
        return GrammarMask(matcher, self._vocab_size, param)


def _bad_grammar(reason: str, param: str) -> ApiError:
    reason = " ".join(reason.split())[:LONGEST_REASON]
    return ApiError(400, f"{param} cannot be used: {reason}", param=param, code="invalid_grammar")
