"""The letters of DNA: bases, ambiguity codes, complements, and four bases in a byte."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

BASES = b"ACGT"
AMBIGUOUS = b"RYSWKMBDHV"
"""The IUPAC codes for two or three possible bases; N is any base."""
U = ord("U")
LOWER = 0x20  # the bit that makes an upper-case letter lower case
_UPPER = b"ACGTURYSWKMBDHVN"
LETTERS = _UPPER + _UPPER.lower()
"""All letters that a sequence may have; U is the T of RNA."""
_COMPLEMENTS = b"TGCAAYRSWMKVHDBN"
COMPLEMENT = np.arange(256, dtype=np.uint8)
"""The complement of each letter, in the same case; other bytes are their own. U pairs with A, and A with T."""
COMPLEMENT[list(_UPPER)] = list(_COMPLEMENTS)
COMPLEMENT[list(_UPPER.lower())] = list(_COMPLEMENTS.lower())

PACKED_ORDER = b"TCAG"
"""The bases by their code of two bits, as in UCSC's .2bit files."""
_CODE = np.zeros(256, np.uint8)
_CODE[list(PACKED_ORDER)] = range(4)
_CODE[list(PACKED_ORDER.lower())] = range(4)
_UNPACKED = np.frombuffer(PACKED_ORDER, np.uint8)[(np.arange(256)[:, None] >> np.array([6, 4, 2, 0])) & 3]

ODD = np.where(np.isin(np.arange(256), list(BASES + BASES.lower())), 0, np.arange(256) & ~LOWER).astype(np.uint8)
"""0 for the four bases in either case, and the upper-case letter for all others."""


def reverse_complement(text: str) -> str:
    """The other strand of a sequence, in its own direction; upper and lower case stay.

    Raises ValueError for a letter that is no base or ambiguity code.
    """
    letters = letters_of(text)
    return COMPLEMENT[letters][::-1].tobytes().decode("ascii")


def letters_of(text: str | bytes) -> NDArray[np.uint8]:
    """A sequence as an array of ASCII codes. Raises ValueError for a letter that DNA does not have."""
    data = text if isinstance(text, bytes) else text.encode("utf-8", "surrogateescape")
    wrong = data.translate(None, LETTERS)
    if wrong:
        at = data.index(wrong[:1])
        raise ValueError(
            f"a sequence may have the letters {_UPPER.decode()} in either case, got {chr(wrong[0])!r} at position {at}"
        )
    return np.frombuffer(data, np.uint8)


def pack(letters: NDArray[np.uint8]) -> bytes:
    """Four bases in a byte, the first in the highest bits; what is no base, and the rest of the last byte, is 0.

    Args:
        letters: (n,) ASCII codes.
    """
    codes = np.zeros(-(-len(letters) // 4) * 4, np.uint8)
    codes[: len(letters)] = _CODE[letters]
    four = codes.reshape(-1, 4)
    return (four[:, 0] << 6 | four[:, 1] << 4 | four[:, 2] << 2 | four[:, 3]).tobytes()


def unpack(packed: bytes, first: int, count: int) -> NDArray[np.uint8]:
    """`count` upper-case letters from packed bases, beginning with number `first` of the first byte (0 to 3)."""
    return _UNPACKED[np.frombuffer(packed, np.uint8)].reshape(-1)[first : first + count]
