"""safetensors files with a canonical header: equal content gives equal bytes.

The library's own writer orders its metadata at random. The format is an 8-byte length, a JSON header and the tensors'
bytes (https://huggingface.co/docs/safetensors); here names and metadata are sorted and the payload follows that order.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import safe_open

from lora_trainer.storage import atomic_files

Tensors = dict[str, torch.Tensor]
_DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def encode(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None) -> Iterator[bytes]:
    """The file's bytes in chunks: header first, then one chunk per tensor in the order of their names."""
    header: dict[str, object] = {}
    if metadata:
        header["__metadata__"] = dict(sorted(metadata.items()))
    end = 0
    for name, tensor in sorted(tensors.items()):
        start, end = end, end + tensor.nbytes
        dtype, shape = _DTYPE_NAMES[tensor.dtype], list(tensor.shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for name in sorted(tensors):
        yield tensor_bytes(tensors[name])


def tensor_bytes(tensor: torch.Tensor) -> bytes:
    """A tensor's values as little-endian bytes."""
    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def payload_sha256(tensors: Mapping[str, torch.Tensor]) -> str:
    """sha256 of all tensors' bytes in the order of their names: the file's content without its metadata."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(tensor_bytes(tensors[name]))
    return digest.hexdigest()


def save(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write the file atomically and durably."""
    atomic_files.write_file(path, encode(tensors, metadata))


def load(path: Path) -> tuple[Tensors, dict[str, str]]:
    """All tensors, on the CPU, and the metadata.

    Raises:
        SafetensorError: the file is not a whole safetensors file.
        OSError: it cannot be read.
    """
    with safe_open(path, framework="pt", device="cpu") as file:
        return {name: file.get_tensor(name).clone() for name in file.keys()}, dict(file.metadata() or {})
