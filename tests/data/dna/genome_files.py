"""Writes the same sequences as files of every kind that is read."""

from __future__ import annotations

import gzip
import struct
import zlib
from pathlib import Path

Records = dict[str, str]
BGZIP_END = bytes.fromhex("1f8b08040000000000ff0600424302001b0003000000000000000000")
ORDER = "TCAG"


def fasta_text(records: Records, width: int = 60, end: str = "\n", last: bool = True) -> bytes:
    """FASTA with lines of a width; `last` tells whether the last line ends."""
    lines = []
    for name, letters in records.items():
        lines.append(f">{name} some words")
        lines += [letters[i : i + width] for i in range(0, len(letters), width)]
    return (end.join(lines) + (end if last else "")).encode()


def write_index(path: Path, text: bytes) -> None:
    """The .fai of FASTA whose lines are of one width, as samtools faidx writes it."""
    rows, offset, current = [], 0, None
    for line in text.splitlines(keepends=True):
        letters = len(line.rstrip(b"\r\n"))
        if line.startswith(b">"):
            current = [line[1:].split()[0].decode(), 0, offset + len(line), 0, 0]
            rows.append(current)
        else:
            current[1] += letters
            if not current[3]:
                current[3:] = letters, len(line)
        offset += len(line)
    path.write_text("".join("\t".join(map(str, row)) + "\n" for row in rows))


def write_bgzip(path: Path, text: bytes, block: int = 100) -> None:
    """A file of bgzip with its .gzi."""
    places, packed = [], b""
    for start in range(0, len(text), block):
        places.append((len(packed), start))
        packed += _bgzip_block(text[start : start + block])
    path.write_bytes(packed + BGZIP_END)
    rest = places[1:]
    path.with_name(path.name + ".gzi").write_bytes(
        struct.pack("<Q", len(rest)) + b"".join(struct.pack("<QQ", *place) for place in rest)
    )


def _bgzip_block(data: bytes) -> bytes:
    body = zlib.compressobj(6, zlib.DEFLATED, -15)
    deflated = body.compress(data) + body.flush()
    head = struct.pack("<4BI2BH2BHH", 31, 139, 8, 4, 0, 0, 255, 6, 66, 67, 2, len(deflated) + 25)
    return head + deflated + struct.pack("<II", zlib.crc32(data), len(data))


def two_bit_bytes(records: Records, order: str = "<", version: int = 0) -> bytes:
    """A .2bit file; the letters are A, C, G, T and N in either case."""
    offset_code = "Q" if version else "I"
    header = struct.pack(f"{order}4I", 0x1A412743, version, len(records), 0)
    width = struct.calcsize(offset_code)
    at = len(header) + sum(1 + len(name.encode()) + width for name in records)
    index, bodies = b"", b""
    for name, letters in records.items():
        index += bytes([len(name.encode())]) + name.encode() + struct.pack(order + offset_code, at + len(bodies))
        bodies += _two_bit_record(letters, order)
    return header + index + bodies


def _two_bit_record(letters: str, order: str) -> bytes:
    parts = [len(letters)]
    for marked in ([c in "Nn" for c in letters], [c.islower() for c in letters]):
        runs = _runs(marked)
        parts += [len(runs), *(start for start, _ in runs), *(end - start for start, end in runs)]
    codes = [max(0, ORDER.find(c.upper())) for c in letters] + [0] * (-len(letters) % 4)
    packed = bytes(
        codes[i] << 6 | codes[i + 1] << 4 | codes[i + 2] << 2 | codes[i + 3] for i in range(0, len(codes), 4)
    )
    return struct.pack(f"{order}{len(parts) + 1}I", *parts, 0) + packed


def _runs(marked: list[bool]) -> list[tuple[int, int]]:
    found, start = [], None
    for i, mark in enumerate([*marked, False]):
        if mark and start is None:
            start = i
        elif not mark and start is not None:
            found.append((start, i))
            start = None
    return found


def write_all(folder: Path, records: Records, width: int = 60) -> dict[str, Path]:
    """The records in every format that can hold them."""
    folder.mkdir(exist_ok=True)
    text = fasta_text(records, width)
    made = {name: folder / name for name in ("plain.fa", "dos.fa", "zip.fa.gz", "in_place.fa", "blocks.fa.gz")}
    made["plain.fa"].write_bytes(text)
    made["dos.fa"].write_bytes(fasta_text(records, width, "\r\n", last=False))
    made["zip.fa.gz"].write_bytes(gzip.compress(text))
    made["in_place.fa"].write_bytes(text)
    write_bgzip(made["blocks.fa.gz"], text)
    for name in ("in_place.fa", "blocks.fa.gz"):
        write_index(folder / f"{name}.fai", text)
    if set("".join(records.values())) <= set("ACGTNacgtn"):
        for name, order, version in (("little.2bit", "<", 0), ("big.2bit", ">", 0), ("long.2bit", "<", 1)):
            made[name] = folder / name
            made[name].write_bytes(two_bit_bytes(records, order, version))
    return made
