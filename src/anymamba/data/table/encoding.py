"""Turns documents into tokens, in pieces that fit in memory."""

from __future__ import annotations

import codecs
import os
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..documents import Document, OnBadRow, refuse
from ..tokenizer import ByteTokenizer, Tokenizer

# In characters. The tokenizers library needs about 500 bytes per token, so 2 MiB of text need 250 MB.
WHOLE = 2 << 20  # a document up to this size is encoded in one piece
SEGMENT = 1 << 20  # a piece of a longer one
_GROUP_TEXTS = 4096  # most texts in one call of the tokenizer, which encodes them in parallel, ...
_GROUP_CHARACTERS = SEGMENT * max(2, min(16, os.cpu_count() or 1))  # ... and most characters: a segment for each core


class DocumentEnd(NamedTuple):
    """The end of a document: which document, and its number of bytes."""

    file: Path
    row: int | None
    n_bytes: int


class Piece(NamedTuple):
    """The next tokens; `end` is set if they are the last of their document."""

    ids: NDArray
    end: DocumentEnd | None


def token_dtype(tokenizer: Tokenizer) -> np.dtype:
    """The narrowest type for a tokenizer's ids. The byte tokenizer's 257th id ends documents and is never stored."""
    top = 255 if isinstance(tokenizer, ByteTokenizer) else tokenizer.vocab_size - 1
    return np.min_scalar_type(top)


def encode_documents(
    documents: Iterable[Document], tokenizer: Tokenizer, on_bad_row: OnBadRow = refuse
) -> Iterator[Piece]:
    """The tokens of documents in order; `on_bad_row` is called for rows that are not UTF-8, as in `iter_documents`.

    For the byte tokenizer, bytes are passed through. For others a document must be UTF-8. Up to 2 Mi characters are
    encoded in one piece; a longer document is cut into segments of about 1 Mi, before whitespace that follows other
    characters (if possible, before a space that follows a letter or digit). For tokenizers that split at whitespace
    first, such as the byte-level BPE of GPT-2, GPT-NeoX and Llama 3, the ids are those of the uncut text. They may
    differ at the cuts for tokenizers that join words over spaces, that put something before every text, that have added
    tokens with inner spaces, or whose normalisation looks across spaces; and in text without whitespace for 2 Mi
    characters, which is cut anywhere.
    """
    if isinstance(tokenizer, ByteTokenizer):
        return _bytes_as_tokens(documents)
    return _encode_texts(_utf8_rows(documents, on_bad_row), tokenizer)


def _bytes_as_tokens(documents: Iterable[Document]) -> Iterator[Piece]:
    for document in documents:
        n_bytes = 0
        for piece in document.pieces:
            n_bytes += len(piece)
            yield Piece(np.frombuffer(piece, np.uint8), None)
        yield Piece(np.zeros(0, np.uint8), DocumentEnd(document.file, document.row, n_bytes))


def _utf8_rows(documents: Iterable[Document], on_bad_row: OnBadRow) -> Iterator[Document]:
    """The documents but for rows that are not UTF-8; files are checked while they are read."""
    for document in documents:
        if document.row is not None:
            data = b"".join(document.pieces)
            try:
                data.decode("utf-8")
            except UnicodeDecodeError as error:
                on_bad_row(_not_utf8(document, error.start, error.reason))
                continue
            document = replace(document, pieces=iter((data,)))
        yield document


def _encode_texts(documents: Iterable[Document], tokenizer: Tokenizer) -> Iterator[Piece]:
    """Encode texts in groups, so that many short documents need one call."""
    dtype = token_dtype(tokenizer)
    texts: list[str] = []
    ends: list[DocumentEnd | None] = []
    size = 0

    def encoded() -> Iterator[Piece]:
        for ids, end in zip(tokenizer.encode_batch(texts), ends, strict=True):
            yield Piece(np.array(ids, dtype), end)
        texts.clear()
        ends.clear()

    for document in documents:
        for text, end in _segments(document):
            if size + len(text) > _GROUP_CHARACTERS or len(texts) == _GROUP_TEXTS:
                yield from encoded()
                size = 0
            texts.append(text)
            ends.append(end)
            size += len(text)
    yield from encoded()


def _segments(document: Document) -> Iterator[tuple[str, DocumentEnd | None]]:
    """A document's text, in one piece or in segments; the last one comes with the document's end."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    text, n_bytes, limit = "", 0, WHOLE
    for piece in document.pieces:
        text += _decode(decoder, piece, n_bytes, document)
        n_bytes += len(piece)
        while len(text) > limit:
            limit = SEGMENT  # the document is a long one
            cut = last_cut(text, SEGMENT) or last_cut(text, WHOLE)
            if cut is None and len(text) <= WHOLE:
                break
            cut = WHOLE if cut is None else cut
            yield text[:cut], None
            text = text[cut:]
    text += _decode(decoder, b"", n_bytes, document, final=True)
    yield text, DocumentEnd(document.file, document.row, n_bytes)


def last_cut(text: str, stop: int) -> int | None:
    """The last position in (0, stop] where a text may be cut: before whitespace that follows other characters."""
    stop = min(stop, len(text) - 1)
    place = text.rfind(" ", 1, stop + 1)
    for _ in range(1000):  # a space after a letter or digit is the safest place
        if place < 1:
            break
        if text[place - 1].isalnum():
            return place
        place = text.rfind(" ", 1, place)
    for place in range(stop, 0, -1):
        if text[place].isspace() and not text[place - 1].isspace():
            return place
    return None


def _decode(
    decoder: codecs.IncrementalDecoder, piece: bytes, before: int, document: Document, final: bool = False
) -> str:
    """The next text of a document; an error gives the position in bytes."""
    waiting = len(decoder.getstate()[0])  # bytes of an unfinished character
    try:
        return decoder.decode(piece, final)
    except UnicodeDecodeError as error:
        raise _not_utf8(document, before - waiting + error.start, error.reason) from None


def _not_utf8(document: Document, position: int, reason: str) -> ValueError:
    return ValueError(
        f"{document.name}: not valid UTF-8 at byte {position} ({reason}); use byte mode (no tokenizer), which takes "
        f"any bytes, or convert the file to UTF-8"
    )
