"""The tokenizer in a GGUF file: the complete tokenizer.json, and the parts that llama.cpp reads.

llama.cpp reads the vocabulary, the merges, a rule that splits words, and whether a text begins and ends with a token.
It supports neither the normaliser of a byte-level tokenizer nor flags of added tokens; `write` returns the differences.
Source: the GGUF specification, "Tokenizer" (`tokenizer.huggingface.json` is the entirety of a tokenizer.json).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anymamba.base.errors import CheckpointError

if TYPE_CHECKING:
    from gguf import GGUFWriter

Field = Callable[..., Any]
"""Returns a metadata value, from its key and a default."""

WHOLE = "tokenizer.huggingface.json"
NO_MERGE = "<unused> <unused>"  # never applies: llama.cpp requires a list of merges, and gguf writes no empty list
GPT2_SPLITS = {"gpt-2": None, "mpt": {"type": "NFC"}, "olmo": {"type": "NFC"}}
"""llama.cpp's names for tokenizers that split words as GPT-2's does, with the normaliser of the published ones.

MPT and OLMo use GPT-NeoX's tokenizer, like the published Mamba models; llama.cpp's converter writes these names.
"""

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
"""Types of tokens, from the specification."""
TOKEN_IDS = {
    "eos_token_id": "tokenizer.ggml.eos_token_id",
    "bos_token_id": "tokenizer.ggml.bos_token_id",
    "pad_token_id": "tokenizer.ggml.padding_token_id",
}


# ------------------------------------------------------------------------------------------ reading


def read_whole(field: Field, path: Path) -> str | None:
    """The tokenizer.json that a file holds; None if it holds none, or if its tokens are no longer those of the file.

    Raises CheckpointError if it is not a tokenizer.json.
    """
    text, tokens = field(WHOLE), field("tokenizer.ggml.tokens")
    if not isinstance(text, str):
        return None
    try:
        words = dict(_words(json.loads(text)))
        # another program may have changed the tokens
        changed = tokens is not None and any(i >= len(tokens) or tokens[i] != word for i, word in words.items())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: {WHOLE} is not a tokenizer.json ({error}); give one with --tokenizer"
        ) from error
    return None if changed else text


def read_parts(field: Field, path: Path) -> str | None:
    """A tokenizer.json made from what llama.cpp reads; None if that is not a tokenizer like GPT-2's.

    Raises CheckpointError if the tokens, their types and the merges are not lists that belong together.
    """
    words, split = field("tokenizer.ggml.tokens"), field("tokenizer.ggml.pre")
    if field("tokenizer.ggml.model") != "gpt2" or not isinstance(split, str) or split not in GPT2_SPLITS or not words:
        return None
    merges, kinds = field("tokenizer.ggml.merges", []), field("tokenizer.ggml.token_type")
    if not _are_strings(words) or not _are_strings(merges):
        raise CheckpointError(f"{path}: its tokens and merges must be lists of strings; give --tokenizer")
    kinds = [NORMAL] * len(words) if kinds is None else kinds
    if not isinstance(kinds, list) or len(kinds) != len(words):
        raise CheckpointError(f"{path}: its types of tokens must be {len(words):,}, one for each; give --tokenizer")
    rows = list(enumerate(zip(words, kinds, strict=True)))
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = [
        {"id": i, "content": word, **flags, "special": kind == CONTROL}
        for i, (word, kind) in rows
        if kind in (CONTROL, USER_DEFINED)
    ]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    # with the added tokens, whose ids would change otherwise
    vocab = {word: i for i, (word, kind) in rows if kind in (NORMAL, CONTROL, USER_DEFINED)}
    specification = {
        "version": "1.0",
        "added_tokens": added,
        "normalizer": GPT2_SPLITS[split],
        "pre_tokenizer": byte_level,
        "post_processor": _template(field, words),
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": vocab, "merges": [merge for merge in merges if merge != NO_MERGE]},
    }
    return json.dumps(specification, ensure_ascii=False)


def _are_strings(values: Any) -> bool:
    return isinstance(values, list) and all(isinstance(value, str) for value in values)


def _template(field: Field, words: list[str]) -> dict[str, Any] | None:
    """The rule that puts special tokens before and after a text; None if the file has none."""
    added = [end for end in ("bos", "eos") if field(f"tokenizer.ggml.add_{end}_token")]
    ids = {end: field(f"tokenizer.ggml.{end}_token_id") for end in added}
    ends = {end: i for end, i in ids.items() if isinstance(i, int) and 0 <= i < len(words)}
    if not ends:
        return None

    def piece(end: str) -> list[dict[str, Any]]:
        return [{"SpecialToken": {"id": words[ends[end]], "type_id": 0}}] if end in ends else []

    text = [{"Sequence": {"id": name, "type_id": 0}} for name in ("A", "B")]
    return {
        "type": "TemplateProcessing",
        "single": [*piece("bos"), text[0], *piece("eos")],
        "pair": [*piece("bos"), text[0], *piece("eos"), *piece("bos"), text[1], *piece("eos")],
        "special_tokens": {words[i]: {"id": words[i], "ids": [i], "tokens": [words[i]]} for i in ends.values()},
    }


def _parsed(text: str, what: str) -> tuple[dict[str, Any], dict[int, str]]:
    """The contents of a tokenizer.json, and a dict of its tokens by id."""
    try:
        specification = json.loads(text)
        return specification, dict(_words(specification))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{what} is not a tokenizer.json ({error!r}); give one with --tokenizer") from error


def _words(specification: dict[str, Any]) -> Iterator[tuple[int, str]]:
    """The ids and tokens of a tokenizer.json, added tokens last."""
    vocab = specification["model"]["vocab"]
    if isinstance(vocab, dict):
        yield from ((i, word) for word, i in vocab.items())
    else:  # Unigram: words and their scores
        yield from ((i, word) for i, (word, _) in enumerate(vocab))
    yield from ((token["id"], token["content"]) for token in specification.get("added_tokens") or [])


# ------------------------------------------------------------------------------------------ writing


def write(writer: GGUFWriter, text: str | None, n_rows: int, token_ids: Mapping[str, Any]) -> list[str]:
    """Write a tokenizer and the ids of special tokens. Returns phrases that say where llama.cpp differs from it.

    Args:
        text: the contents of a tokenizer.json, None to leave it out.
        n_rows: rows of the model's embedding.
        token_ids: the known ids of special tokens (eos_token_id, ...).
    Raises CheckpointError if the tokenizer cannot be read or has ids that the model does not have.
    """
    ids = dict(token_ids)
    if text is None:
        writer.add_tokenizer_model("no_vocab")
    differences = [] if text is None else _write_tokenizer(writer, text, n_rows, ids)
    for name, key in TOKEN_IDS.items():
        value = ids.get(name)
        if isinstance(value, int) and 0 <= value < n_rows:
            writer.add_uint32(key, value)
    return differences


def _write_tokenizer(writer: GGUFWriter, text: str, n_rows: int, ids: dict[str, Any]) -> list[str]:
    """Write a tokenizer and add its begin and end tokens to `ids`; return the differences."""
    specification, words = _parsed(text, "the model's tokenizer")
    if max(words, default=0) >= n_rows:
        why = f"it has the id {max(words)}, the model has {n_rows} rows"
        raise CheckpointError(f"the tokenizer cannot be written to GGUF: {why}; give --tokenizer none")
    writer.add_string(WHOLE, text)
    why_not = unlike_gpt2(specification)
    if why_not is not None:
        writer.add_tokenizer_model("no_vocab")
        return [f"it does not support this kind ({why_not}) and reads the file as one without a tokenizer"]
    _write_parts(writer, specification, words, n_rows)
    before, after = _ends(text) if specification.get("post_processor") else ([], [])
    begins = len(before) == 1
    ends = len(after) == 1 and ids.get("eos_token_id") in (None, after[0])  # llama.cpp also stops generation at it
    writer.add_add_bos_token(begins)
    writer.add_add_eos_token(ends)
    ids |= ({"bos_token_id": before[0]} if begins else {}) | ({"eos_token_id": after[0]} if ends else {})
    differences = list(_differences(specification))
    if before and not begins:
        differences.append(f"it does not put the ids {before} before a text")
    if after and not ends:
        differences.append(f"it does not put the ids {after} after a text")
    return differences


def _write_parts(writer: GGUFWriter, specification: dict[str, Any], words: dict[int, str], n_rows: int) -> None:
    """Write the parts of a byte-level BPE that llama.cpp reads."""
    kinds = dict.fromkeys(words, NORMAL)
    for added in specification.get("added_tokens") or []:
        kinds[added["id"]] = CONTROL if added["special"] else USER_DEFINED
    rows = range(n_rows)
    merges = [m if isinstance(m, str) else " ".join(m) for m in specification["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([words.get(i, f"[PAD{i}]") for i in rows])
    writer.add_token_types([kinds.get(i, UNUSED) for i in rows])
    writer.add_token_merges(merges or [NO_MERGE])


def unlike_gpt2(specification: dict[str, Any]) -> str | None:
    """Why llama.cpp's GPT-2 tokenizer cannot replace a tokenizer.json at all; None if it can."""
    model, before = specification.get("model") or {}, specification.get("pre_tokenizer") or {}
    if model.get("type") != "BPE" or before.get("type") != "ByteLevel":
        return f"model {model.get('type')!r} after pre_tokenizer {before.get('type')!r} is not a byte-level BPE"
    if before.get("add_prefix_space"):
        return "it adds a space before the text"
    if not before.get("use_regex", True) and model.get("merges"):
        return "it has merges across words"
    return None


def _differences(specification: dict[str, Any]) -> Iterator[str]:
    """Where llama.cpp differs from a tokenizer.json like GPT-2's, except at the ends of texts."""
    normalizers = list(_types(specification.get("normalizer")))
    if normalizers:
        yield f"it does not normalise text ({', '.join(normalizers)}), so text not yet normalised gets other ids"
    flags = ("lstrip", "rstrip", "single_word")
    flagged = [t["content"] for t in specification.get("added_tokens") or [] if any(t.get(flag) for flag in flags)]
    if flagged:
        more = f" and {len(flagged) - 3} more" if len(flagged) > 3 else ""
        yield f"it ignores lstrip, rstrip and single_word of the tokens {', '.join(map(repr, flagged[:3]))}{more}"
    options = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "ignore_merges")
    unknown = [name for name in options if specification["model"].get(name)]
    if unknown:
        yield f"it does not support {', '.join(unknown)}"


def _types(part: dict[str, Any] | None) -> Iterator[str]:
    """The types of a normaliser, or of its parts if it is a sequence."""
    if part is None:
        return
    if part.get("type") != "Sequence":
        yield str(part.get("type"))
    for inner in part.get("normalizers", []):
        yield from _types(inner)


def _ends(text: str) -> tuple[list[int], list[int]]:
    """The ids that a tokenizer.json puts before and after every text."""
    import tokenizers

    try:
        tokenizer = tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the library raises bare Exception
        raise CheckpointError(
            f"the tokenizer cannot be written to GGUF: tokenizers {tokenizers.__version__} does not read it ({error})"
        ) from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    inner, whole = (tokenizer.encode("a", add_special_tokens=special).ids for special in (False, True))
    starts = [i for i in range(len(whole)) if whole[i : i + len(inner)] == inner]
    return (whole[: starts[0]], whole[starts[0] + len(inner) :]) if starts and inner else ([], [])
