"""The digest in the metadata of the GGUF files that we write, of the whole file with this value blank.

A GGUF file is complete and is often copied by itself, so its digest is inside. It is there twice, so that damage to the
key or to the recorded size shows. A file of another size than the recorded one was rewritten by a program that kept our
metadata, as llama-quantize does, and is not compared. Truncation shows in the offsets of the tensors.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from anymamba.base.errors import FORMAT_VERSION, CheckpointError, require_format_version
from anymamba.models.checkpoints.formats.gguf_header import STRING, Header, read_header

KEYS = ("anymamba.digest", "anymamba.digest_copy")
VERSION = 1
WIDTH = 144
"""Bytes of the value, padded with spaces."""
BLANK = " " * WIDTH
_PIECE = 1 << 18  # read at once; the pieces stay in the processor's cache


def sign(path: Path) -> None:
    """Fill in the digest of a file that was written with BLANK as the value of both KEYS."""
    header = read_header(path)
    values = {FORMAT_VERSION: VERSION, "bytes": path.stat().st_size, "sha256": _sha256(header)}
    with open(path, "r+b") as file:
        for place in _places(header):
            file.seek(place)
            file.write(json.dumps(values).ljust(WIDTH).encode())


def check(header: Header) -> None:
    """Compare a file with its digest, if it has one.

    Raises CheckpointError if it has changed since it was written.
    """
    path = header.path
    text, other = (header.value(key) for key in KEYS)
    if text is None and other is None:
        return
    way_out = "copy it again; if it was changed on purpose, pass --no-verify (verify=False)"
    try:
        if text != other:
            raise ValueError(f"{KEYS[0]} and {KEYS[1]} differ")
        values = json.loads(text)
        require_format_version(values, VERSION, path)
        size, wanted = int(values["bytes"]), str(values["sha256"])
        found = _sha256(header) if size == path.stat().st_size else wanted
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: its digest cannot be read ({error}); {way_out}") from error
    if found != wanted:
        raise CheckpointError(f"{path} is damaged or was changed: its SHA-256 is not that in its metadata; {way_out}")


def _places(header: Header) -> list[int]:
    """Where the values begin in the file. Raises ValueError if they are not of the width that is written."""
    values = [header.values[key] for key in KEYS]
    starts = [value.start + 8 for value in values]  # after the length
    for value, start in zip(values, starts, strict=True):
        if value.kind != STRING or value.entries is not None or value.stop - start != WIDTH:
            raise ValueError(f"it must be a string of {WIDTH} bytes")
    return sorted(starts)


def _sha256(header: Header) -> str:
    digest, piece = hashlib.sha256(), bytearray(_PIECE)
    with open(header.path, "rb") as file:
        for place in _places(header):
            digest.update(file.read(place - file.tell()))
            digest.update(BLANK.encode())
            file.seek(WIDTH, 1)
        while size := file.readinto(piece):
            digest.update(memoryview(piece)[:size])
    return digest.hexdigest()
