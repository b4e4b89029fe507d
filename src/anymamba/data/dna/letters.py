"""The letters of DNA: bases, ambiguity codes, complements, and four bases in a byte."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

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
COMPLEMENT = bytes.maketrans(LETTERS, _COMPLEMENTS + _COMPLEMENTS.lower())
"""The complement of each letter, in the same case; other bytes are their own. U pairs with A, and A with T."""

PACKED_ORDER = b"TCAG"
"""The bases by their code of two bits, as in UCSC's .2bit files."""
_CODE = bytes(max(0, PACKED_ORDER.find(bytes([i & ~LOWER]))) for i in range(256))
_UNPACKED = np.frombuffer(PACKED_ORDER, np.uint8)[(np.arange(256)[:, None] >> np.array([6, 4, 2, 0])) & 3]
_UNPACKED_AT_ONCE = np.ascontiguousarray(_UNPACKED).view(np.uint32).ravel()  # four letters in one number

ODD = bytes(0 if i & ~LOWER in BASES else i & ~LOWER for i in range(256))
"""0 for the four bases in either case, and the upper-case letter for all others."""


_USUAL = BASES + b"N" + BASES.lower() + b"n"


def other_letters(letters: NDArray[np.uint8]) -> Counter[str]:
    """How many there are of each letter other than A, C, G, T and N, in upper case."""
    return Counter(letters.tobytes().translate(None, _USUAL).decode("ascii").upper())


def odd_letters(letters: NDArray[np.uint8]) -> Counter[str]:
    """The same with N."""
    data = letters.tobytes()
    return other_letters(letters) + Counter({"N": data.count(b"N") + data.count(b"n")})


def odd_in_words(counts: Mapping[str, int]) -> str:
    """Counts of letters other than A, C, G and T, of which there are some, and how they are read."""
    others = {letter: n for letter, n in counts.items() if letter != "N"}
    n_unknown = counts.get("N", 0)
    found = [f"{n_unknown:,} N"] if n_unknown else []
    found += [others_in_words(others)] if others else []
    in_all = n_unknown + sum(n for letter, n in others.items() if letter != "U")
    return "; ".join(found) + (f", which makes {in_all:,}" if 0 < n_unknown < in_all else "")


def others_in_words(counts: Mapping[str, int]) -> str:
    """Counts of letters other than A, C, G, T and N, and how they are read."""
    listed = ", ".join(f"{n:,} {letter}" for letter, n in sorted(counts.items()))
    return f"letters other than A, C, G, T and N: {listed}; U is read as T, the others as N"


def translated(letters: NDArray[np.uint8], table: bytes) -> NDArray[np.uint8]:
    """What a table of 256 bytes has for each letter. `bytes.translate` is 15 times as fast as an index of numpy."""
    return np.frombuffer(bytearray(letters.tobytes().translate(table)), np.uint8).reshape(letters.shape)


def as_dna(text: str) -> str:
    """A sequence with T for U, as all letters are read; upper and lower case stay."""
    return text.replace("U", "T").replace("u", "t")


def reverse_complement(text: str) -> str:
    """The other strand of a sequence, in its own direction; upper and lower case stay.

    Raises ValueError for a letter that is no base or ambiguity code.
    """
    return letters_of(text).tobytes().translate(COMPLEMENT)[::-1].decode("ascii")


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
    codes[: len(letters)] = translated(letters, _CODE)
    four = codes.reshape(-1, 4)
    return (four[:, 0] << 6 | four[:, 1] << 4 | four[:, 2] << 2 | four[:, 3]).tobytes()


def unpack(packed: bytes, first: int, count: int) -> NDArray[np.uint8]:
    """`count` upper-case letters from packed bases, beginning with number `first` of the first byte (0 to 3)."""
    return _UNPACKED_AT_ONCE[np.frombuffer(packed, np.uint8)].view(np.uint8)[first : first + count]
