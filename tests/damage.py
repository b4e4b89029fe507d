"""Damaged copies of every file format that the package writes, and what loading one of them may do.

`python -m tests.damage FORMAT COPIES` loads that many copies and prints how they ended.
"""

from __future__ import annotations

import os
import random
import shutil
import struct
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from anymamba import LanguageModel, ModelConfig
from anymamba.base.errors import CheckpointError
from anymamba.base.manifest import NAME as MANIFEST
from anymamba.data.table import build_token_table
from anymamba.data.tokenizer import ByteTokenizer
from anymamba.generation.prompts import read_prompts
from anymamba.generation.state_store import load_state, save_state
from anymamba.models.checkpoints import find_tokenizer, load_pretrained, open_checkpoint, save_pretrained
from anymamba.training.checkpoint import load_checkpoint, save_checkpoint

CONFIG = ModelConfig(d_model=4, n_layers=1, vocab_size=257)
TEXT = "one line of a text\n"


class FileFormat(NamedTuple):
    """How files are made in a folder, and how they are read as a value that can be compared."""

    save: Callable[[Path], object]
    load: Callable[[Path], Any]
    damaged: str = "*"
    """The files that are damaged."""
    silent: bool = False
    """Whether nothing in the files can tell that their contents have changed."""
    rebuilt: bool = False
    """Whether damaged files are never refused but made anew."""


def model() -> LanguageModel:
    """The same model at each call."""
    torch.manual_seed(0)
    return LanguageModel(CONFIG)


def save(format: str) -> Callable[[Path], None]:
    """Saves the model in a format."""
    tokenizer = ByteTokenizer() if format in ("hf", "gguf") else None
    return lambda folder: save_pretrained(model(), folder, tokenizer, format=format)


def save_published(folder: Path) -> None:
    """A folder in the original format, as it is published: without a manifest."""
    save("state-spaces")(folder)
    (folder / MANIFEST).unlink()


def load(verify: bool) -> Callable[[Path], Any]:
    """Loads a model as the verbs do: the bytes of its weights, and its tokenizer."""

    def weights_and_tokenizer(folder: Path) -> Any:
        checkpoint = open_checkpoint(folder, verify=verify)
        tokenizer = find_tokenizer(checkpoint)
        return in_bytes(load_pretrained(checkpoint).state_dict()), tokenizer.to_json()

    return weights_and_tokenizer


def in_bytes(tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Tensors as values that can be compared."""
    return {name: (str(t.dtype), t.shape, bytes(t.flatten().view(torch.uint8).numpy())) for name, t in tensors.items()}


def save_run(folder: Path) -> None:
    tensors = {f"model.{name}": parameter.detach() for name, parameter in model().named_parameters()}
    save_checkpoint(folder, 3, tensors, {"step": 3, "tensors": sorted(tensors)}, keep=1)
    for path in (folder / "checkpoints" / "step-00000003").iterdir():
        path.rename(folder / path.name)
    shutil.rmtree(folder / "checkpoints")


def load_run(folder: Path) -> Any:
    tensors, values = load_checkpoint(folder)
    return in_bytes(tensors), values


def load_saved_state(folder: Path) -> Any:
    state = load_state(folder / "state", model())
    return in_bytes({"logits": state.logits}), repr(state.model)


def load_table(folder: Path) -> Any:
    (folder / "text.txt").write_text(TEXT * 9)
    os.utime(folder / "text.txt", ns=(0, 0))
    table = build_token_table(folder / "text.txt", ByteTokenizer(), cache_dir=folder)
    return [bytes(table.read(i, 0, int(table.lengths[i]))) for i in range(table.n_documents)], list(table.names)


FORMATS = {
    "safetensors": FileFormat(save("hf"), load(True)),
    "safetensors unverified": FileFormat(save("hf"), load(False), silent=True),
    "archive": FileFormat(save_published, load(True), "pytorch_model.bin"),
    "archive unverified": FileFormat(save_published, load(False), silent=True),
    "gguf": FileFormat(save("gguf"), load(True)),
    "gguf unverified": FileFormat(save("gguf"), load(False), silent=True),
    "run checkpoint": FileFormat(save_run, load_run),
    "saved state": FileFormat(
        lambda f: save_state(f / "state", read_prompts(model(), [[1, 2]]), model()), load_saved_state
    ),
    "token cache": FileFormat(load_table, load_table, "*/*", rebuilt=True),
}


# ------------------------------------------------------------------------------------------ damage


def flip_bits(data: bytearray, chance: random.Random) -> None:
    for _ in range(chance.choice([1, 1, 2, 8])):
        data[place(data, chance)] ^= 1 << chance.randrange(8)


def truncate(data: bytearray, chance: random.Random) -> None:
    del data[chance.choice([chance.randrange(len(data)), len(data) - 1, max(0, len(data) - 32), len(data) // 2]) :]


def swap_blocks(data: bytearray, chance: random.Random) -> None:
    size = chance.choice([1, 4, 8, 64, 512])
    a, b = (min(place(data, chance), max(0, len(data) - size)) for _ in range(2))
    first, second = data[a : a + size], data[b : b + size]
    data[a : a + size], data[b : b + size] = second, first


def blank(data: bytearray, chance: random.Random) -> None:
    start = place(data, chance)
    stop = min(len(data), start + chance.choice([1, 8, 64, 4096]))
    data[start:stop] = bytes([chance.choice([0, 0xFF])]) * (stop - start)


def edit_number(data: bytearray, chance: random.Random) -> None:
    """Write a number over eight bytes, or another digit over one."""
    start = place(data, chance)
    digits = [i for i in range(start, min(len(data), start + 200)) if 48 <= data[i] < 58]
    if digits and chance.random() < 0.5:
        data[chance.choice(digits)] = 48 + chance.randrange(10)
    else:
        number = chance.choice([0, 1, 2**31, 2**63, chance.randrange(2**16), chance.getrandbits(64)])
        data[start : start + 8] = struct.pack("<Q", number)[: len(data) - start]


def append(data: bytearray, chance: random.Random) -> None:
    data += chance.randbytes(chance.choice([1, 32, 1000]))


KINDS = (flip_bits, flip_bits, truncate, swap_blocks, blank, edit_number, edit_number, append)


def place(data: bytearray, chance: random.Random) -> int:
    """Anywhere, near the beginning or near the end, where headers and directories are."""
    size = max(1, len(data))
    return chance.choice(
        [chance.randrange(size), chance.randrange(min(size, 1500)), size - 1 - chance.randrange(min(size, 1500))]
    )


def copies(good: dict[Path, bytes], files: list[Path], count: int) -> Iterator[tuple[str, dict[Path, bytes]]]:
    """Copies of the files with one of them damaged, each with words that say what was done."""
    for number in range(count):
        chance = random.Random(number)
        path, kind = chance.choice(files), chance.choice(KINDS)
        data = bytearray(good[path])
        kind(data, chance)
        yield f"copy {number}: {kind.__name__} of {path}", good | {path: bytes(data)}


# ------------------------------------------------------------------------------------------ outcomes


def ends_of(name: str, count: int) -> Counter[str]:
    """Load damaged copies and count those that loaded with the same contents, with others, and that were refused.

    Raises AssertionError, naming the copy, for an end that is not allowed.
    """
    kind, ends = FORMATS[name], Counter[str]()
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root, "files")
        folder.mkdir()
        kind.save(folder)
        found = sorted(p.relative_to(folder) for p in folder.rglob("*") if p.is_file() and not p.name.startswith("."))
        good = {path: (folder / path).read_bytes() for path in found}
        wanted = kind.load(folder)
        damaged = [path for path in found if path.match(kind.damaged) and good[path]]
        for words, files in copies(good, damaged, count):
            shutil.rmtree(folder)
            for path, data in files.items():
                (folder / path).parent.mkdir(parents=True, exist_ok=True)
                (folder / path).write_bytes(data)
            end = end_of(kind, folder, wanted, f"{name}, {words}")
            allowed = (
                {"same"} if kind.rebuilt else {"same", "refused", "changed"} if kind.silent else {"same", "refused"}
            )
            assert end in allowed, f"{name}, {words}: {end}"
            ends[end] += 1
    return ends


def end_of(kind: FileFormat, folder: Path, wanted: Any, words: str) -> str:
    """How loading a folder ended: "same", "changed" or "refused" with one line. Other errors are raised.

    A ValueError is one for a tokenizer that cannot be read or does not fit.
    """
    try:
        return "same" if kind.load(folder) == wanted else "changed"
    except (CheckpointError, FileNotFoundError, ValueError) as error:
        assert not isinstance(error, ValueError) or "tokenizer" in str(error), f"{words}: {error!r}"
        assert str(error) and "\n" not in str(error), f"{words}: {error!r}"
        return "refused"
    except Exception as error:
        raise AssertionError(f"{words}: {type(error).__name__}: {error}") from error


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(dict(ends_of(sys.argv[1], int(sys.argv[2]))))
