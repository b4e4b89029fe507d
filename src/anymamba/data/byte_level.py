"""Byte-level files: a tokenizer.json whose tokens are bytes, as GPT-2's, and the one that is nothing but bytes."""

from __future__ import annotations

from typing import Any

END_OF_DOCUMENT = "<|endoftext|>"


def _alphabet() -> list[str]:
    """The character for each byte in byte-level BPE files (GPT-2): the byte's own character, or one from U+0100 on."""
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    alphabet, spare = [], 0x100
    for byte in range(256):
        alphabet.append(chr(byte) if byte in printable else chr(spare))
        spare += byte not in printable
    return alphabet


_ALPHABET = _alphabet()
_BYTE_OF_CHARACTER = {character: byte for byte, character in enumerate(_ALPHABET)}
"""The byte of each character of a byte-level file."""


def is_byte_level(decoder: dict[str, Any] | None) -> bool:
    """Whether a file's decoder maps each token to bytes independently of its neighbours."""
    if decoder is None:
        return False
    if decoder["type"] == "Sequence":
        return all(map(is_byte_level, decoder["decoders"]))
    return decoder["type"] == "ByteLevel"


def token_to_bytes(token: str) -> bytes:
    """A byte-level token's bytes; an added token with characters outside the alphabet is its own text in UTF-8."""
    try:
        return bytes(_BYTE_OF_CHARACTER[character] for character in token)
    except KeyError:
        return token.encode("utf-8")


def byte_specification(end_of_document: bool) -> dict[str, Any]:
    """The `tokenizer.json` of the bytes."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": 256, "content": END_OF_DOCUMENT, **special}] if end_of_document else [],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {character: byte for byte, character in enumerate(_ALPHABET)},
            "merges": [],
        },
    }


def is_byte_specification(specification: Any, end_of_document: bool) -> bool:
    """Whether a file maps text to ids as ByteTokenizer does; fields added by other versions are ignored."""
    if not isinstance(specification, dict):
        return False
    model, before = specification.get("model") or {}, specification.get("pre_tokenizer") or {}
    added = [(token["content"], token["id"]) for token in specification.get("added_tokens") or []]
    ends = {END_OF_DOCUMENT: 256} if end_of_document else {}
    return (
        model.get("type") == "BPE"
        and not model.get("merges")
        and {**model.get("vocab", {}), **ends} == {**_BYTE_OF_CHARACTER, **ends}
        and specification.get("normalizer") is None
        and before.get("type") == "ByteLevel"
        and not before.get("add_prefix_space")
        and added == list(ends.items())
    )
