"""The header of a file in GGUF, the one-file format of llama.cpp, LM Studio and Ollama.

The format is described in https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The header is read without the
package `gguf`, so a file is recognised, or refused with the right reason, even if that package is not installed.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefixtune_cli.errors import ModelError

MAGIC = b"GGUF"
_VERSIONS = (2, 3)
# Types of values: their struct formats; bool is 7. 8 is a string, and 9 an array.
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}  # fmt: skip
_STRING, _ARRAY = 8, 9
_FLOAT32 = 0  # of tensors


@dataclass(frozen=True)
class GgufHeader:
    """What a file says about itself, before its weights.

    Attributes:
        path: the file.
        metadata: numbers and texts by their keys; arrays, such as the vocabulary, are left out.
        tensors: name → (number of elements, type, first byte in the file).
    """

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, tuple[int, int, int]]

    @property
    def architecture(self) -> str:
        return str(self.metadata.get("general.architecture", "unknown"))

    @property
    def parts(self) -> int:
        """The number of files that the model is split into."""
        return int(self.metadata.get("split.count", 1))

    def floats(self, name: str) -> list[float] | None:
        """A float32 tensor; None if there is none with this name and type."""
        count, kind, start = self.tensors.get(name, (0, None, 0))
        if kind != _FLOAT32:
            return None
        with open(self.path, "rb") as file:
            file.seek(start)
            return list(struct.unpack(f"<{count}f", file.read(4 * count)))


def is_gguf(path: str | Path) -> bool:
    """Whether this is a GGUF file, whatever its suffix: Ollama's files have none."""
    try:
        with open(path, "rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


def read_header(path: str | Path) -> GgufHeader:
    """Read the header of a file.

    Raises:
        ModelError: the file is cut off, or of an unknown version.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _read(path, data)
    except (struct.error, ValueError, KeyError) as error:
        raise ModelError(
            f"{path} begins like a GGUF file, but cannot be read: {error}. It is cut off or damaged: compare its size "
            "with the original's, and download it again."
        ) from error


def _read(path: Path, data: mmap.mmap) -> GgufHeader:
    at = len(MAGIC)

    def number(kind: str) -> Any:
        nonlocal at
        (found,) = struct.unpack_from(f"<{kind}", data, at)
        at += struct.calcsize(f"<{kind}")
        return found

    def text() -> str:
        nonlocal at
        start, at = at + 8, at + 8 + number("Q")
        if at > len(data):
            raise ValueError("a text ends after the end of the file")
        return data[start:at].decode(errors="replace")

    def value(kind: int) -> Any:
        nonlocal at
        if kind == _STRING:
            return text()
        if kind != _ARRAY:
            return number(_NUMBERS[kind])
        of, count = number("I"), number("Q")
        if of in _NUMBERS:
            at += count * struct.calcsize(f"<{_NUMBERS[of]}")
        elif of == _STRING:
            for _ in range(count):
                (length,) = struct.unpack_from("<Q", data, at)
                at += 8 + length
        else:
            for _ in range(count):
                value(of)
        return None

    version = number("I")
    if version not in _VERSIONS:
        raise ModelError(
            f"{path} is a GGUF file of version {version}; versions 2 and 3 can be read. Use a newer file of the "
            "model, or its safetensors."
        )
    tensor_count, key_count = number("Q"), number("Q")
    metadata = {}
    for _ in range(key_count):
        key = text()
        if (found := value(number("I"))) is not None:
            metadata[key] = found
    entries = []
    for _ in range(tensor_count):
        name, count = text(), 1
        for _ in range(number("I")):
            count *= number("Q")
        entries.append((name, count, number("I"), number("Q")))
    alignment = int(metadata.get("general.alignment", 32))
    start = -(-at // alignment) * alignment
    tensors = {name: (count, kind, start + offset) for name, count, kind, offset in entries}
    if any(first >= len(data) for _, _, first in tensors.values()):
        raise ValueError("weights begin after the end of the file")
    return GgufHeader(path, metadata, tensors)
