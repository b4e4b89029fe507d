"""Tokenizers: bytes, or any `tokenizer.json`. Also streaming decoding, and rows of ids in any form as arrays."""

from __future__ import annotations

import codecs
import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

from numpy.typing import ArrayLike

from anymamba.base.files import own_folder, write_json, write_text
from anymamba.data.byte_level import (
    END_OF_DOCUMENT,
    byte_specification,
    is_byte_level,
    is_byte_specification,
    token_to_bytes,
)
from anymamba.data.dna.tokenizer import DnaTokenizer, case_of_specification
from anymamba.data.token_ids import row_of_ids

FILE_NAME = "tokenizer.json"

# names of the end-of-document token in published tokenizers; the first one that a tokenizer has is used
_EOS_NAMES = (END_OF_DOCUMENT, "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[EOS]", "<|im_end|>")


class Tokenizer(Protocol):
    """Maps text to ids and back. Ids are 0 .. vocab_size - 1; eos_id ends a document and is never part of its text."""

    name: str
    vocab_size: int
    eos_id: int | None
    fingerprint: str
    """Identifies the mapping from text to ids: two tokenizers with equal fingerprints give equal ids."""

    def encode(self, text: str | bytes) -> list[int]:
        """The ids of a text; nothing is added before or after it."""
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text, in parallel if that is faster."""
        ...

    def decode_bytes(self, ids: ArrayLike | Iterable[int]) -> bytes:
        """The bytes of a row of ids, including special tokens; they may end inside a character."""
        ...

    def decode(self, ids: ArrayLike | Iterable[int]) -> str:
        """The text of a row of ids; bytes that are not UTF-8 become U+FFFD."""
        ...

    def to_json(self) -> str:
        """The contents of its `tokenizer.json`."""
        ...

    def save(self, folder: Path) -> None:
        """Write `tokenizer.json` (and `tokenizer_config.json`, which `transformers` needs) into a folder."""
        ...


class ByteTokenizer:
    """Ids 0 to 255 are the bytes, 256 ends a document. Input in any encoding, or none, is preserved.

    `<|endoftext|>` inside a text is encoded as its 13 bytes, not as a special token. The saved `tokenizer.json` gives
    the same ids for UTF-8 text, except that it encodes `<|endoftext|>` as the special token, as every such file does.

    Args:
        end_of_document: whether to have the id 256; models with a vocabulary of 256 do not have it.
    """

    name = "bytes"

    def __init__(self, end_of_document: bool = True) -> None:
        self.vocab_size = 257 if end_of_document else 256
        self.eos_id: int | None = 256 if end_of_document else None
        self.fingerprint = f"bytes-{self.vocab_size}"

    def encode(self, text: str | bytes) -> list[int]:
        """The bytes of a text. A str becomes UTF-8, with undecodable bytes of the command line (PEP 383) restored."""
        return list(text if isinstance(text, bytes) else text.encode("utf-8", "surrogateescape"))

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text."""
        return [self.encode(text) for text in texts]

    def decode_bytes(self, ids: ArrayLike | Iterable[int]) -> bytes:
        """The bytes of the ids; 256 becomes `<|endoftext|>`."""
        return b"".join(map(self.token_bytes, row_of_ids(ids).tolist()))

    def decode(self, ids: ArrayLike | Iterable[int]) -> str:
        """The bytes of the ids decoded as UTF-8; invalid bytes become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def token_bytes(self, token: int) -> bytes:
        """The bytes of one id."""
        _check_id(token, self)
        return END_OF_DOCUMENT.encode() if token == self.eos_id else bytes((token,))

    def to_json(self) -> str:
        """A byte-level BPE without merges, which `tokenizers` and `transformers` read."""
        return json.dumps(byte_specification(self.eos_id is not None), ensure_ascii=False, indent=2)

    def save(self, folder: Path) -> None:
        """Write `to_json`, and the configuration that `transformers` needs."""
        _write(folder, self.to_json(), None if self.eos_id is None else END_OF_DOCUMENT)


class JsonTokenizer:
    """Any `tokenizer.json` of the `tokenizers` library; its truncation and padding are switched off.

    Args:
        path: the file, or the one that `text` comes from (a .gguf file).
        text: the contents of a `tokenizer.json`; defaults to those of the file.
    """

    def __init__(self, path: str | Path, text: str | None = None) -> None:
        import tokenizers

        self.path = Path(path)
        self._json = self.path.read_text(encoding="utf-8") if text is None else text
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(self._json)
        except Exception as error:  # the library raises bare Exception
            raise ValueError(
                f"{self.path} is not a tokenizer.json that tokenizers {tokenizers.__version__} reads: {error}"
            ) from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.name = self.path.parent.name if self.path.name == FILE_NAME else self.path.stem
        self.vocab_size = 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values())
        self.fingerprint = hashlib.sha256(self._json.encode()).hexdigest()
        added = {token.content: index for index, token in self._tokenizer.get_added_tokens_decoder().items()}
        self.eos_id: int | None = next((added[name] for name in _EOS_NAMES if name in added), None)
        self._bytes_of: dict[int, bytes] | None = {} if is_byte_level(json.loads(self._json).get("decoder")) else None

    def encode(self, text: str | bytes) -> list[int]:
        """The ids of a text, which must be UTF-8; names of special tokens in it become those tokens."""
        return self.encode_batch([_utf8(text)])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text, on all cores."""
        return [e.ids for e in self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode_bytes(self, ids: ArrayLike | Iterable[int]) -> bytes:
        """The bytes of the ids if the tokenizer is byte-level, else their text in UTF-8."""
        row: list[int] = row_of_ids(ids).tolist()
        if self._bytes_of is None:
            return self.decode(row).encode("utf-8")
        return b"".join(self.token_bytes(token) or b"" for token in row)

    def decode(self, ids: ArrayLike | Iterable[int]) -> str:
        """The text of the ids; bytes that are not UTF-8 become U+FFFD."""
        row: list[int] = row_of_ids(ids).tolist()
        if self._bytes_of is not None:
            return self.decode_bytes(row).decode("utf-8", errors="replace")
        for token in row:
            _check_id(token, self)
        return self._tokenizer.decode(row, skip_special_tokens=False)

    def token_bytes(self, token: int) -> bytes | None:
        """The bytes of one id; None if they depend on its neighbours, as in tokenizers that are not byte-level."""
        if self._bytes_of is None:
            return None
        if token not in self._bytes_of:
            _check_id(token, self)
            self._bytes_of[token] = token_to_bytes(self._tokenizer.id_to_token(token) or "")
        return self._bytes_of[token]

    def to_json(self) -> str:
        """The contents of the file, unchanged."""
        return self._json

    def save(self, folder: Path) -> None:
        """Write the file unchanged."""
        _write(folder, self._json, None if self.eos_id is None else self._tokenizer.id_to_token(self.eos_id))


def load_tokenizer(path: str | Path | None) -> ByteTokenizer | DnaTokenizer | JsonTokenizer:
    """Load the tokenizer of a `tokenizer.json`, or of a folder that holds one; None gives bytes.

    `anymamba.load_tokenizer` also takes .gguf files and names on the hub. A file written by `ByteTokenizer.save` gives
    a ByteTokenizer, one written by `DnaTokenizer.save` a DnaTokenizer.
    """
    if path is None:
        return ByteTokenizer()
    path = Path(path)
    file = path / FILE_NAME if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(f"no tokenizer at {file}; give a tokenizer.json or a folder that holds one")
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not a tokenizer.json: {error}") from None
    return tokenizer_from_json(text, file)


def tokenizer_from_json(text: str, path: Path) -> ByteTokenizer | DnaTokenizer | JsonTokenizer:
    """Make a tokenizer from the contents of a `tokenizer.json`; `path` is their origin, for names and messages."""
    try:
        specification = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path} is not a tokenizer.json: {error}") from None
    for end_of_document in (True, False):
        if is_byte_specification(specification, end_of_document):
            return ByteTokenizer(end_of_document)
    case = case_of_specification(specification)
    return JsonTokenizer(path, text) if case is None else DnaTokenizer(case)


class StreamDecoder:
    """Turns tokens into text one by one, in whole characters. All pushes and the flush together equal `decode`.

    The work per token does not grow with the number of earlier tokens.
    """

    _HELD = 16  # most tokens to hold back for a character; it takes at most 4, but special tokens have no text

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._token_bytes = getattr(tokenizer, "token_bytes", lambda token: None)
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._ids: list[int] = []  # the last tokens; the text of those before _read has been returned
        self._read = 0

    def push(self, ids: ArrayLike | Iterable[int]) -> str:
        """The text that these tokens complete."""
        return "".join(map(self._push, row_of_ids(ids).tolist()))

    def flush(self) -> str:
        """The rest of the text; an unfinished character becomes U+FFFD."""
        text = self._utf8.decode(b"", final=True) + self._rest()
        self._utf8.reset()
        self._ids, self._read = [], 0
        return text

    def _push(self, token: int) -> str:
        data = self._token_bytes(token)
        if data is not None:
            return self._utf8.decode(data)
        # here a token's text depends on the previous ones (spaces, byte fallback): decode again with those
        self._ids.append(token)
        text = self._rest()
        if not text or (text.endswith("\ufffd") and len(self._ids) - self._read < self._HELD):
            return ""
        self._ids, self._read = self._ids[self._read :], len(self._ids) - self._read
        return text

    def _rest(self) -> str:
        given = self._tokenizer.decode(self._ids[: self._read]) if self._read else ""
        return self._tokenizer.decode(self._ids)[len(given) :] if self._ids else ""


def _check_id(token: int, tokenizer: Tokenizer) -> None:
    """Raise ValueError for an id that a tokenizer does not have."""
    if not 0 <= token < tokenizer.vocab_size:
        raise ValueError(
            f"token id {token} is outside the vocabulary of {tokenizer.name}: 0 .. {tokenizer.vocab_size - 1}"
        )


def _write(folder: Path, specification: str, eos: str | None) -> None:
    """Write both files; without the second, transformers would choose a tokenizer class by the model's type."""
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    if eos is not None:
        config["eos_token"] = eos
    folder = Path(folder)
    with own_folder(folder):
        write_text(folder / FILE_NAME, specification)
        write_json(folder / "tokenizer_config.json", config)


def _utf8(text: str | bytes) -> str:
    """A text as str without surrogates; raises ValueError if it is not UTF-8."""
    data = text if isinstance(text, bytes) else text.encode("utf-8", "surrogateescape")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"the text is not valid UTF-8 at byte {error.start} ({error.reason}), which this tokenizer needs; "
            f"the byte tokenizer takes any bytes"
        ) from None
