"""Archives of torch.save, mapped into memory and checked. They are read with weights_only, which runs no code."""

from __future__ import annotations

import re
import struct
import warnings
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from anymamba.base.errors import CheckpointError
from anymamba.models.checkpoints.formats.tensors import MAPPED_BYTES, StoredTensor, Unchanged
from anymamba.ops.packed_linear import PackedWeight

READ_BYTES = 1 << 20


class TorchFile:
    """One file that torch.save wrote: a dict of tensors by name. No code in the file is run.

    Args:
        verify: compare the members with the archive's CRC-32s before the first one is used.
    """

    def __init__(self, path: Path, verify: bool = True) -> None:
        self.path, self._unverified, self._unchanged = path, verify, Unchanged(path)
        self.formats: dict[str, str] = {}

    def stored(self) -> dict[str, StoredTensor]:
        return {name: StoredTensor(tuple(t.shape), t.dtype) for name, t in self._load().items()}

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        rest = list(names)[::-1]
        while rest:
            budget, tensors = MAPPED_BYTES, self._load()
            while rest and budget > 0:
                name = rest.pop()
                budget -= tensors[name].numel() * tensors[name].element_size()
                yield name, tensors[name]

    def blocks(self, name: str) -> PackedWeight | None:
        """None: the archive is opened again and again, and its tensors need not be aligned."""
        return None

    def _load(self) -> dict[str, Tensor]:
        self._require_plain_archive()
        if self._unverified:
            self._require_checksums()
            self._unverified = False
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about pickles that torch.save does not write; they are refused
                values = torch.load(self.path, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:  # torch.load can raise many kinds of errors
            called = re.search(r"GLOBAL ([\w.]+)", str(error))
            if called:
                why = f"reading it would call {called[1]}, which is not needed for tensors"
                raise CheckpointError(f"{self.path} is refused: {why}") from None
            why = " ".join(str(error).split())[:120]
            raise CheckpointError(f"{self.path} is truncated or corrupt ({why}); copy it again") from None
        self._unchanged.require()
        if not isinstance(values, dict):
            raise CheckpointError(f"{self.path} must be a dict of tensors by name, got {type(values).__name__}")
        for name, tensor in values.items():
            self._require_whole(name, tensor)
        return values

    def _require_plain_archive(self) -> None:
        """Require an archive as torch.save writes it: its members are uncompressed and lie within the file."""
        try:
            with zipfile.ZipFile(self.path) as archive:
                members = archive.infolist()
        except (zipfile.BadZipFile, NotImplementedError, ValueError) as error:
            raise CheckpointError(
                f"{self.path} is truncated or not an archive of torch.save ({error}); a bare pickle is not opened, "
                "because reading it can run code"
            ) from None
        size = self.path.stat().st_size
        for member in members:
            within = 0 <= member.header_offset <= size - member.file_size
            if member.compress_type != zipfile.ZIP_STORED or not within:
                raise CheckpointError(f"{self.path}: its member {member.filename!r} is not as torch.save writes it")

    def _require_checksums(self) -> None:
        """Compare all members with their CRC-32s; torch.load does not. Zeros are those of set_crc32_options(False)."""
        try:
            with zipfile.ZipFile(self.path) as archive:
                if not any(member.CRC for member in archive.infolist()):
                    return
                for member in archive.infolist():
                    with archive.open(member) as file:
                        while file.read(READ_BYTES):
                            pass
        except (zipfile.BadZipFile, RuntimeError, ValueError, EOFError, struct.error) as error:
            why = " ".join(str(error).split()) or type(error).__name__
            raise CheckpointError(f"{self.path} is damaged ({why}); copy it again") from None

    def _require_whole(self, name: Any, tensor: Any) -> None:
        if not isinstance(name, str) or not isinstance(tensor, Tensor) or tensor.layout != torch.strided:
            raise CheckpointError(f"{self.path}: {name!r} must be a tensor, got {type(tensor).__name__}")
        if not tensor.is_floating_point():
            raise CheckpointError(f"{self.path}: {name} must be floating point, got {tensor.dtype}")
        stored, wanted = tensor.untyped_storage().nbytes(), tensor.numel() * tensor.element_size()
        if tensor.device.type != "cpu" or stored < wanted:
            raise CheckpointError(
                f"{self.path}: {name} claims {wanted:,} bytes for its shape {tuple(tensor.shape)}, "
                f"but {stored:,} are stored"
            )
