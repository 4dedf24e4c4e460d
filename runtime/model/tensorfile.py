"""Safetensors headers, checked before a byte of data is trusted.

Format (public specification): 8 bytes little-endian header length, a JSON header {name: {dtype, shape,
data_offsets}}, then the data. A hostile or truncated file must end in one clear error and no allocation, so the
declared sizes are compared with the file's real length first.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from caesura.runtime.errors import BrokenCheckpoint, UnsupportedModel
from caesura.runtime.model.config import read_json_object

MAX_HEADER_BYTES = 100_000_000  # the format's own limit
_ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
_OTHER_ITEM_BYTES = {"I64": 8, "U64": 8, "I32": 4, "U32": 4, "I16": 2, "U16": 2, "I8": 1, "U8": 1, "BOOL": 1}
_INDEX = "model.safetensors.index.json"


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of a file."""

    file: Path
    dtype: str
    shape: tuple[int, ...]

    @property
    def is_float(self) -> bool:
        return self.dtype in _ITEM_BYTES


def read_entries(folder: Path) -> dict[str, TensorEntry]:
    """All tensors of a checkpoint folder, from one file or from the shards its index names.

    Raises BrokenCheckpoint (missing, truncated, inconsistent) or UnsupportedModel (pickled weights only).
    """
    if (folder / _INDEX).is_file():
        return _read_shards(folder)
    single = folder / "model.safetensors"
    if not single.is_file():
        found = sorted(folder.glob("*.safetensors"))
        if len(found) == 1:
            single = found[0]
        elif found:
            raise BrokenCheckpoint(f"{folder} holds {len(found)} safetensors files but no {_INDEX}")
        else:
            raise _no_weights(folder)
    return read_header(single)


def _no_weights(folder: Path) -> Exception:
    pickled = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in folder.glob(pattern))
    if pickled:
        return UnsupportedModel(
            f"{folder} has pickled weights only ({pickled[0]}); a pickle can run code, so only safetensors are read. "
            "Convert the checkpoint with save_pretrained(safe_serialization=True)"
        )
    return BrokenCheckpoint(f"model.safetensors is missing in {folder}")


def _read_shards(folder: Path) -> dict[str, TensorEntry]:
    mapping = read_json_object(folder / _INDEX).get("weight_map")
    if not isinstance(mapping, dict) or not mapping:
        raise BrokenCheckpoint(f"{_INDEX} has no weight_map")
    headers: dict[str, dict[str, TensorEntry]] = {}
    entries: dict[str, TensorEntry] = {}
    for name, shard in mapping.items():
        if not isinstance(shard, str) or Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise BrokenCheckpoint(f"{_INDEX} names the shard {shard!r}; a safetensors file name was expected")
        if shard not in headers:
            if not (folder / shard).is_file():
                raise BrokenCheckpoint(f"{shard} is missing in {folder}, but {_INDEX} names it")
            headers[shard] = read_header(folder / shard)
        if name not in headers[shard]:
            raise BrokenCheckpoint(f"{_INDEX} places {name} in {shard}, which does not hold it")
        entries[name] = headers[shard][name]
    return entries


def read_header(file: Path) -> dict[str, TensorEntry]:
    """Parse and check one file's header against the file's length. Raises BrokenCheckpoint."""
    file_bytes = file.stat().st_size
    with file.open("rb") as stream:
        prefix = stream.read(8)
        if len(prefix) < 8:
            raise BrokenCheckpoint(f"{file.name} has {file_bytes} bytes: too short for a safetensors header")
        header_bytes = int.from_bytes(prefix, "little")
        if header_bytes > min(MAX_HEADER_BYTES, file_bytes - 8):
            raise BrokenCheckpoint(
                f"{file.name} declares a header of {header_bytes} bytes, but the file has {file_bytes}; "
                "it is truncated or not a safetensors file"
            )
        text = stream.read(header_bytes)
    try:
        header = json.loads(text.decode(), object_pairs_hook=_unique, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise BrokenCheckpoint(f"{file.name} has a header that is not valid JSON: {error}") from error
    if not isinstance(header, dict):
        raise BrokenCheckpoint(f"{file.name} has a header that is not an object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise BrokenCheckpoint(f"{file.name} has a __metadata__ that is not an object of strings")
    return _check_entries(file, header, file_bytes - 8 - header_bytes)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name occurs twice")
    return result


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no number")


def _check_entries(file: Path, header: Mapping[str, Any], data_bytes: int) -> dict[str, TensorEntry]:
    spans: list[tuple[int, int, str]] = []
    entries: dict[str, TensorEntry] = {}
    for name, raw in header.items():
        entry, begin, end = _entry(file, name, raw)
        spans.append((begin, end, name))
        entries[name] = entry
        if end > data_bytes:
            raise BrokenCheckpoint(
                f"{file.name} is truncated: {name} ends at byte {end} of the data, which has {data_bytes} bytes"
            )
    position = 0
    for begin, end, name in sorted(spans):
        if begin != position:
            raise BrokenCheckpoint(f"{file.name}: {name} begins at byte {begin}, expected {position} (overlap or hole)")
        position = end
    if position != data_bytes:
        raise BrokenCheckpoint(f"{file.name} has {data_bytes - position} bytes that belong to no tensor")
    return entries


def _entry(file: Path, name: str, raw: object) -> tuple[TensorEntry, int, int]:
    if not isinstance(raw, dict):
        raise BrokenCheckpoint(f"{file.name}: the entry of {name} is not an object")
    dtype, shape, offsets = raw.get("dtype"), raw.get("shape"), raw.get("data_offsets")
    item_bytes = {**_ITEM_BYTES, **_OTHER_ITEM_BYTES}.get(dtype) if isinstance(dtype, str) else None
    if item_bytes is None:
        raise UnsupportedModel(f"{file.name}: {name} has dtype {dtype!r}; supported: {', '.join(_ITEM_BYTES)}")
    if not _naturals(shape) or not _naturals(offsets) or len(offsets) != 2:
        raise BrokenCheckpoint(f"{file.name}: {name} has a shape or data_offsets that are not natural numbers")
    begin, end = offsets
    if end - begin != math.prod(shape) * item_bytes:
        raise BrokenCheckpoint(
            f"{file.name}: {name} spans {end - begin} bytes, but its shape {shape} of {dtype} "
            f"needs {math.prod(shape) * item_bytes}"
        )
    return TensorEntry(file, str(dtype), tuple(shape)), begin, end


def _naturals(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(
        isinstance(item, int) and not isinstance(item, bool) and 0 <= item < 1 << 62 for item in value
    )
