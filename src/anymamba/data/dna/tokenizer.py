"""The tokenizer of DNA: one token a base, with the ids that HyenaDNA and Caduceus use."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from anymamba.base.files import own_folder, write_json, write_text

from ..token_ids import row_of_ids
from .letters import AMBIGUOUS, translated

Case = Literal["fold", "keep"]
SPECIAL = ("[CLS]", "[SEP]", "[BOS]", "[MASK]", "[PAD]", "[RESERVED]", "[UNK]")
MASK_ID, PAD_ID, UNKNOWN_ID = 3, 4, 6
N_ID = 11
PADDED_VOCAB = 16
"""Rows of the embedding: 12 ids, or 16 where lower case is kept, padded to a multiple of 8."""
COMPLEMENT_IDS = np.array([0, 1, 2, 3, 4, 5, 6, 10, 9, 8, 7, 11, 15, 14, 13, 12], np.uint8)
"""The id of each id's complement: A and T, C and G; N and the special tokens are their own."""
COMPLEMENT_IDS.setflags(write=False)


class DnaTokenizer:
    """[CLS] 0, [SEP] 1, [BOS] 2, [MASK] 3, [PAD] 4, [RESERVED] 5, [UNK] 6, A 7, C 8, G 9, T 10, N 11.

    U is T, and the IUPAC codes for several bases are N. Any other character is [UNK], also those of a special token's
    name. Nothing is added before or after a sequence, and no id ends it.

    Args:
        case: "fold" reads lower case, which marks repeats, as upper case. "keep" gives the lower-case bases ids of
            their own: a 12, c 13, g 14, t 15; a lower-case n is N.
    """

    def __init__(self, case: Case = "fold") -> None:
        if case not in ("fold", "keep"):
            raise ValueError(f"case must be 'fold' or 'keep', got {case!r}")
        self.case: Case = case
        self.name = "dna" if case == "fold" else "dna-case"
        self.fingerprint = self.name
        self._tokens = tuple(vocabulary(case))
        self.vocab_size = len(self._tokens)
        self.eos_id: int | None = None
        self._ids = _id_table(case)

    def encode(self, text: str | bytes) -> list[int]:
        """The ids of a sequence, one a character."""
        return self.encode_array(text).tolist()

    def encode_array(self, text: str | bytes) -> NDArray[np.uint8]:
        """`encode` as (length,) numbers of 8 bits."""
        data = text if isinstance(text, bytes) else text.encode("ascii", "replace")  # others become ?, which is [UNK]
        return np.frombuffer(bytearray(data.translate(self._ids)), np.uint8)

    def encode_letters(self, letters: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """The ids of ASCII codes, as from `Genome.letters`, in any shape."""
        return translated(letters, self._ids)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each sequence."""
        return [self.encode(text) for text in texts]

    def decode_bytes(self, ids: ArrayLike | Iterable[int]) -> bytes:
        """The letters of the ids; special tokens become their names."""
        return b"".join(map(self.token_bytes, row_of_ids(ids).tolist()))

    def decode(self, ids: ArrayLike | Iterable[int]) -> str:
        """The letters of the ids; special tokens become their names."""
        return self.decode_bytes(ids).decode("ascii")

    def token_bytes(self, token: int) -> bytes:
        """The letter of one id, or the name of a special token."""
        if not 0 <= token < self.vocab_size:
            raise ValueError(f"token id {token} is outside the vocabulary of {self.name}: 0 .. {self.vocab_size - 1}")
        return self._tokens[token].encode("ascii")

    def to_json(self) -> str:
        """A `tokenizer.json` that gives the same ids, which `tokenizers` and `transformers` read."""
        return json.dumps(dna_specification(self.case), indent=2)

    def save(self, folder: Path) -> None:
        """Write `to_json`, and the configuration that `transformers` needs: its fast tokenizer with these tokens."""
        config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        names = ("cls_token", "sep_token", "bos_token", "mask_token", "pad_token")
        config |= dict(zip(names, SPECIAL, strict=False)) | {"unk_token": SPECIAL[UNKNOWN_ID]}
        folder = Path(folder)
        with own_folder(folder):
            write_text(folder / "tokenizer.json", self.to_json())
            write_json(folder / "tokenizer_config.json", config)


def vocabulary(case: Case) -> dict[str, int]:
    """The id of each token."""
    bases = "ACGTN" if case == "fold" else "ACGTNacgt"
    return {token: i for i, token in enumerate((*SPECIAL, *bases))}


def dna_specification(case: Case) -> dict[str, Any]:
    """The `tokenizer.json`: characters as words, after letters are folded as `DnaTokenizer` does."""
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": token, **special} for i, token in enumerate(SPECIAL)],
        "normalizer": {"type": "Sequence", "normalizers": [_replacement(*pair) for pair in _folded(case)]},
        "pre_tokenizer": {"type": "Split", "pattern": {"Regex": r"[\s\S]"}, "behavior": "Isolated", "invert": False},
        "post_processor": None,
        "decoder": {"type": "Fuse"},
        "model": {"type": "WordLevel", "vocab": vocabulary(case), "unk_token": SPECIAL[UNKNOWN_ID]},
    }


def case_of_specification(specification: Any) -> Case | None:
    """The case of a `tokenizer.json` that maps sequences to ids as `DnaTokenizer` does; None for any other file."""
    if not isinstance(specification, dict):
        return None
    deciding = ("normalizer", "pre_tokenizer", "post_processor", "model")
    for case in ("fold", "keep"):
        own = dna_specification(case)
        if all(specification.get(part) == own[part] for part in deciding):
            return case
    return None


def reverse_complement_ids(ids: ArrayLike) -> NDArray[Any]:
    """The ids of the other strand, in its own direction.

    Args:
        ids: (..., length) ids of `DnaTokenizer`, 0 to 15.
    Returns an array of the same shape and integer type.
    """
    array = np.asarray(ids)
    if array.size and (array.dtype.kind not in "iu" or array.min() < 0 or array.max() >= PADDED_VOCAB):
        raise ValueError(f"ids must be whole numbers from 0 to {PADDED_VOCAB - 1}, got {array.dtype}")
    return COMPLEMENT_IDS.astype(array.dtype)[array[..., ::-1]] if array.size else array


def _folded(case: Case) -> list[tuple[str, str]]:
    """Patterns of letters, and the letter that each is read as."""
    codes = AMBIGUOUS.decode()
    ambiguous = (f"[{codes}{codes.lower()}n]", "N")
    if case == "keep":
        return [ambiguous, ("U", "T"), ("u", "t")]
    return [ambiguous, ("[Uut]", "T"), ("a", "A"), ("c", "C"), ("g", "G")]


def _replacement(pattern: str, content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"Regex": pattern}, "content": content}


def _id_table(case: Case) -> bytes:
    """The id of each byte."""
    table = np.full(256, UNKNOWN_ID, np.uint8)
    bases = {letter: i for letter, i in vocabulary(case).items() if len(letter) == 1}
    table[[ord(letter) for letter in bases]] = list(bases.values())
    table[list(AMBIGUOUS + AMBIGUOUS.lower() + b"n")] = N_ID
    if case == "fold":
        table[list(b"acgt")] = table[list(b"ACGT")]
    table[list(b"Uu")] = table[list(b"Tt")]
    return table.tobytes()
