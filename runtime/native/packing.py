"""Weights as the C decoder reads them: packed into blocks of columns, as floats or as 8-bit codes.

Codes are made per output channel, symmetric: weight = scale * code with codes from -127 to 127. See linear_int8.h.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import mmap

import torch
from caesura.runtime.errors import UnsupportedModel
from torch import Tensor

INT8 = "int8"
MAX_CODED_INNER = 65536  # as in linear_int8.h
_LANES = 16
_COLUMNS = 32  # output columns of a packed block
_GROUP, _PAIRED = 4, 8  # as in linear_int8.h
_STEP_BYTES = 2048  # tiles.h reads a last step in full
_TILE_ROWS = 32  # read together by tiles.h
_CHUNK_BYTES = 32 << 20
_LINE_BYTES = 64

_Long, _Pointer = ctypes.c_long, ctypes.c_void_p


class Linear(ctypes.Structure):
    """As in linear.h."""

    _fields_ = [
        ("packed", _Pointer),
        ("bias", _Pointer),
        ("inner", _Long),
        ("outer", _Long),
        ("codes", _Pointer),
        ("scales", _Pointer),
        ("totals", _Pointer),
    ]


class Weights:
    """Packs a model's weights and owns them: C holds their addresses."""

    def __init__(self, library: ctypes.CDLL, quantization: str | None = None) -> None:
        """``quantization`` is None or ``"int8"``."""
        for pack in (library.caesura_pack, library.caesura_pack_gate_up):
            pack.argtypes = [_Pointer, _Long, _Long, _Pointer]
            pack.restype = None
        library.caesura_pack_int8.argtypes = [_Pointer, _Long, _Long, ctypes.c_int, _Pointer, _Pointer, _Pointer]
        library.caesura_pack_int8.restype = None
        self._library = library
        self._quantization = quantization
        self._arena = _Arena()
        self._kept: list[Tensor] = []

    def linear(self, weights: Tensor, bias: Tensor | None, *, gated: bool = False) -> Linear:
        """Packed weights [outer, inner]; ``gated`` ones are gate and up, interleaved, [2 * outer, inner]."""
        outer = weights.shape[0] // 2 if gated else weights.shape[0]
        inner = weights.shape[1]
        packed_bias = None if bias is None else self._floats(bias[:, None], outer, 1, gated)
        if self._quantization == INT8:
            return self._codes(weights, packed_bias, outer, inner, gated)
        return Linear(packed=self._floats(weights, outer, inner, gated), bias=packed_bias, inner=inner, outer=outer)

    def keep(self, tensor: Tensor | None) -> int | None:
        """The address of a tensor that lives as long as this."""
        if tensor is None:
            return None
        self._kept.append(tensor.contiguous())
        return self._kept[-1].data_ptr()

    def _floats(self, weights: Tensor, outer: int, inner: int, gated: bool) -> int:
        packed = self._arena.take(_num_blocks(outer, gated) * inner * _COLUMNS * 4)
        pack = self._library.caesura_pack_gate_up if gated else self._library.caesura_pack
        pack(weights.contiguous().data_ptr(), outer, inner, packed)
        return packed

    def _codes(self, weights: Tensor, bias: int | None, outer: int, inner: int, gated: bool) -> Linear:
        if inner > MAX_CODED_INNER:
            raise UnsupportedModel(
                f"quantization int8 sums at most {MAX_CODED_INNER} products exactly and a layer has {inner} inputs; "
                f"run this model without it"
            )
        columns = _num_blocks(outer, gated) * _COLUMNS
        codes = self._arena.take(columns * -(-inner // _PAIRED) * _PAIRED + _STEP_BYTES)
        scales, totals = torch.empty(columns), torch.empty(columns, dtype=torch.int32)
        source = weights.contiguous()
        self._library.caesura_pack_int8(
            source.data_ptr(), outer, inner, int(gated), codes, scales.data_ptr(), totals.data_ptr()
        )
        return Linear(
            bias=bias, inner=inner, outer=outer, codes=codes, scales=self.keep(scales), totals=self.keep(totals)
        )


class _Arena:
    """Zeroed memory in large pieces and, where the system has them, huge pages: weights are read from end to end in
    every step, and with small pages half of that time is spent looking up addresses."""

    def __init__(self) -> None:
        self._chunks: list[Tensor] = []
        self._used_bytes = 0

    def take(self, size_bytes: int) -> int:
        """The address of ``size_bytes``, aligned to a cache line; some bytes behind it may be read."""
        rounded = -(-size_bytes // _LINE_BYTES) * _LINE_BYTES
        if not self._chunks or self._used_bytes + rounded > self._chunks[-1].numel():
            self._chunks.append(_mapped(max(rounded, _CHUNK_BYTES)))
            self._used_bytes = 0
        address = self._chunks[-1].data_ptr() + self._used_bytes
        self._used_bytes += rounded
        return address


def _mapped(size_bytes: int) -> Tensor:
    if not hasattr(mmap, "MAP_PRIVATE") or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.zeros(size_bytes, dtype=torch.uint8)
    region = mmap.mmap(-1, size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without them
        region.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(region, dtype=torch.uint8)  # holds the region


def _num_blocks(outer: int, gated: bool) -> int:
    return -(-outer // (_LANES if gated else _COLUMNS))


class CodedRows(ctypes.Structure):
    """As in linear_int8.h."""

    _fields_ = [("codes", _Pointer), ("scale", _Pointer), ("zero", _Pointer), ("stride", _Long)]


class RowCodes:
    """Where rows are coded before a product: room for ``width`` inputs each, kept between calls."""

    def __init__(self, width: int) -> None:
        self._stride = -(-width // _LINE_BYTES) * _LINE_BYTES
        self._rows = 0
        self._codes = self._scale = self._zero = torch.empty(0)

    def for_rows(self, rows: int) -> CodedRows:
        """Good until the next call."""
        if rows > self._rows:
            self._rows = -(-(rows + rows // 4) // _TILE_ROWS) * _TILE_ROWS
            self._codes = torch.zeros(self._rows * self._stride, dtype=torch.uint8)
            self._scale, self._zero = torch.empty(self._rows), torch.empty(self._rows, dtype=torch.int32)
        return CodedRows(
            codes=self._codes.data_ptr(),
            scale=self._scale.data_ptr(),
            zero=self._zero.data_ptr(),
            stride=self._stride,
        )


class Operand(ctypes.Structure):
    """As in tiles.h."""

    _fields_ = [("rows", _Pointer), ("parts", _Pointer), ("width", _Long)]


class CutRows:
    """Where rows of ``width`` floats are cut for the tiles of tiles.h, kept between calls."""

    def __init__(self, library: ctypes.CDLL, pool: int, width: int) -> None:
        self._bytes = functools.partial(library.caesura_cut_bytes, pool)
        self._width = width
        self._parts = torch.empty(0)

    def for_rows(self, rows: int) -> int | None:
        """The address; None where products take floats as they are. Good until the next call."""
        size_bytes = self._bytes(rows, self._width)
        if size_bytes > self._parts.numel():
            self._parts = _mapped(size_bytes + size_bytes // 4)
        return self._parts.data_ptr() if size_bytes else None
