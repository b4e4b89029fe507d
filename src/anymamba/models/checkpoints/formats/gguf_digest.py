"""The digest that a GGUF file of ours carries in its metadata, of the whole file with this value blank.

It lies in the file because a GGUF file is complete by itself and is copied alone. The file's size is recorded with it:
a file of another size was rewritten by another program that kept our metadata, as llama-quantize does, and is not
compared. Truncation does not depend on the digest; the offsets of the tensors show it.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from anymamba.base.errors import FORMAT_VERSION, CheckpointError, require_format_version
from anymamba.models.checkpoints.formats.gguf_header import STRING, Header, read_header

KEY = "anymamba.digest"
VERSION = 1
WIDTH = 144
"""Bytes of the value, padded with spaces."""
BLANK = " " * WIDTH
_PIECE = 1 << 18  # read at once; the pieces stay in the processor's cache


def sign(path: Path) -> None:
    """Fill in the digest of a file that was written with BLANK as the value of KEY."""
    header = read_header(path)
    values = {FORMAT_VERSION: VERSION, "bytes": path.stat().st_size, "sha256": _sha256(header)}
    with open(path, "r+b") as file:
        file.seek(_place(header))
        file.write(json.dumps(values).ljust(WIDTH).encode())


def check(header: Header) -> None:
    """Compare a file with its digest, if it has one.

    Raises CheckpointError if it has changed since it was written.
    """
    path, text = header.path, header.value(KEY)
    if text is None:
        return
    way_out = "copy it again; if it was changed on purpose, pass --no-verify (verify=False)"
    try:
        values = json.loads(text)
        require_format_version(values, VERSION, path)
        size, wanted = int(values["bytes"]), str(values["sha256"])
        found = _sha256(header) if size == path.stat().st_size else wanted
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: its metadata key {KEY!r} cannot be read; {way_out}") from error
    if found != wanted:
        raise CheckpointError(f"{path} is damaged or was changed: its SHA-256 is not that in {KEY!r}; {way_out}")


def _place(header: Header) -> int:
    """Where the value begins in the file. Raises ValueError if it is not of the width that is written."""
    value = header.values[KEY]
    start = value.start + 8  # after the length
    if value.kind != STRING or value.entries is not None or value.stop - start != WIDTH:
        raise ValueError(f"{KEY} must be a string of {WIDTH} bytes")
    return start


def _sha256(header: Header) -> str:
    start = _place(header)
    digest, piece = hashlib.sha256(), bytearray(_PIECE)
    with open(header.path, "rb") as file:
        digest.update(file.read(start))
        digest.update(BLANK.encode())
        file.seek(start + WIDTH)
        while size := file.readinto(piece):
            digest.update(memoryview(piece)[:size])
    return digest.hexdigest()
