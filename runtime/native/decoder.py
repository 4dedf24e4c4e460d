"""A drop-in for ``model.transformer.Decoder`` whose forward pass is one call into C.

Float32 on the CPU, or 8-bit weights with rows coded as they come. A row's bits do not depend on the batch around it, on
chunking, on page size or on the number of threads, so this is the deterministic mode too.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Sequence
from typing import Any

import numpy.typing as npt
import torch
from caesura.runtime.model.batch import Batch
from caesura.runtime.model.rotary import RotaryTable
from caesura.runtime.model.weights import LayerWeights, Model
from caesura.runtime.native.library import NoNativeLibrary, native_library
from caesura.runtime.native.packing import INT8, CodedRows, CutRows, Linear, Operand, RowCodes, Weights
from caesura.runtime.native.plan import MAX_QUERIES, plan_attention
from torch import Tensor

LANES = 16
MAX_HEAD_DIM = 256

_Long, _Pointer = ctypes.c_long, ctypes.c_void_p


def _structure(name: str, **fields: Any) -> Any:
    return type(name, (ctypes.Structure,), {"_fields_": list(fields.items())})


_Layer = _structure(
    "Layer",
    **dict.fromkeys(("input_norm", "qk_norm", "mlp_norm"), _Pointer),
    **dict.fromkeys(("qkv", "out", "gate_up", "down"), Linear),
    **dict.fromkeys(("keys", "values"), _Pointer),
    window=_Long,
)
_Decoder = _structure(
    "Decoder",
    **dict.fromkeys(("hidden", "heads", "kv_heads", "head_dim", "inner", "layers", "page_size"), _Long),
    epsilon=ctypes.c_float,
    **dict.fromkeys(("embeddings", "norm", "layer"), _Pointer),
)
_Step = _structure(
    "Step",
    **dict.fromkeys(("rows", "num_pieces", "num_items", "num_decodes"), _Long),
    **dict.fromkeys(("tokens", "positions", "slots", "cos", "sin"), _Pointer),
    **dict.fromkeys(("pieces", "items", "members", "decodes", "offsets"), _Pointer),
    **dict.fromkeys(("hidden_rows", "output", "qkv", "partials"), _Pointer),
    **dict.fromkeys(("normed", "mixed", "inner"), Operand),
    scratch=_Pointer,
    coded=CodedRows,
)


def unsupported(model: Model, page_size: int) -> str | None:
    """Why this model cannot run natively here; None when it can."""
    config = model.config
    if page_size % LANES:
        return f"page_size is {page_size}; the C decoder needs a multiple of {LANES}"
    if model.dtype != torch.float32:
        return f"the model's dtype is {model.dtype}; the C decoder computes in float32"
    if config.hidden_size % LANES or config.head_dim % LANES or config.head_dim > MAX_HEAD_DIM:
        return (
            f"hidden size {config.hidden_size} or head size {config.head_dim} is no multiple of {LANES}, or too large"
        )
    if config.num_heads // config.num_kv_heads > MAX_QUERIES:
        return f"more than {MAX_QUERIES} query heads share a KV head"
    try:
        native_library()
    except NoNativeLibrary as error:
        return str(error)
    return None


class NativeDecoder:
    """Runs one model. Holds no KV: the cache is passed in."""

    def __init__(self, model: Model, *, num_threads: int | None = None, quantization: str | None = None) -> None:
        """Pack the weights, as 8-bit codes with ``quantization`` "int8"; the model's own may be let go of.

        Raises NoNativeLibrary (ask ``unsupported`` first), UnsupportedModel for rows too wide to be coded.
        """
        self.config = model.config
        self._library = _declared(native_library())
        self._num_threads = num_threads or torch.get_num_threads()
        self._pool = self._library.caesura_open(self._num_threads)
        if not self._pool:
            raise NoNativeLibrary("the threads of the C decoder could not be started")
        closes = weakref.finalize(self, self._library.caesura_pool_close, self._pool)
        closes.atexit = False  # an engine's thread may compute on it until the process is gone
        self._rotary = RotaryTable(model.config, torch.float32)
        self._weights = Weights(self._library, quantization)
        self._embeddings, self._norm = self._weights.keep(model.embeddings), self._weights.keep(model.norm)
        self._head = self._weights.linear(model.head, None)
        self._layers = (_Layer * model.config.num_layers)(*(self._layer(layer) for layer in model.layers))
        self._decoder: Any = None
        self._cache: Sequence[Tensor] | None = None  # what _decoder points to
        self._buffers: dict[str, Tensor] = {}
        config = model.config
        widths = {
            "normed": config.hidden_size,
            "mixed": config.num_heads * config.head_dim,
            "inner": config.intermediate_size,
        }
        self._codes = RowCodes(max(widths.values()))
        self._widths = widths
        self._cuts = (
            {name: CutRows(self._library, self._pool, width) for name, width in widths.items()}
            if quantization != INT8
            else {}
        )

    def forward(self, batch: Batch, cache: Sequence[Tensor]) -> Tensor:
        """Hidden states after the last norm: [rows, hidden], good until the next call.

        ``cache`` holds one tensor per layer, [2, num_pages, page_size, kv_heads, head_dim]; within a page it is laid
        out as attention.h says, which is nobody else's business: pages are copied whole.
        """
        if self._cache is not cache:
            self._decoder, self._cache = self._bind(cache), cache
        config, rows = self.config, batch.num_rows
        plan = plan_attention(batch, config.num_heads // config.num_kv_heads)
        cos, sin = self._rotary.tables(batch.max_position)
        q_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        output = self._buffer("output", rows * config.hidden_size)
        step = _Step(
            rows=rows,
            num_pieces=len(plan.pieces),
            num_items=len(plan.items),
            num_decodes=len(plan.decodes),
            tokens=batch.token_ids.data_ptr(),
            positions=batch.positions.data_ptr(),
            slots=batch.slots.data_ptr(),
            cos=cos.data_ptr(),
            sin=sin.data_ptr(),
            pieces=_address(plan.pieces),
            items=_address(plan.items),
            members=_address(plan.members),
            decodes=_address(plan.decodes),
            offsets=_address(plan.offsets),
            hidden_rows=self._buffer("hidden", rows * config.hidden_size).data_ptr(),
            output=output.data_ptr(),
            qkv=self._buffer("qkv", rows * (q_size + 2 * kv_size)).data_ptr(),
            partials=self._buffer(
                "partials", plan.num_partials * config.num_heads * (config.head_dim + LANES)
            ).data_ptr(),
            **{name: self._operand(name, rows) for name in self._widths},
            scratch=self._scratch().data_ptr(),
            coded=self._codes.for_rows(rows),
        )
        self._library.caesura_forward(self._pool, ctypes.byref(self._decoder), ctypes.byref(step))
        return output[: rows * config.hidden_size].view(rows, config.hidden_size)

    def logits(self, hidden: Tensor) -> Tensor:
        """Float32 logits of ``hidden`` [n, hidden]: [n, vocab], good until the next call."""
        rows = hidden.contiguous()
        count, vocab_size = rows.shape[0], self.config.vocab_size
        out = self._buffer("logits", count * vocab_size)[: count * vocab_size].view(count, vocab_size)
        coded, parts = self._codes.for_rows(count), self._cuts["normed"].for_rows(count) if self._cuts else None
        self._library.caesura_linear(
            self._pool, ctypes.byref(self._head), rows.data_ptr(), out.data_ptr(), count, ctypes.byref(coded), parts
        )
        return out

    def erase(self, cache: Sequence[Tensor], slots: Tensor) -> None:
        """Zero the keys and values of these slots [n]."""
        for layer in cache:
            num_pages, page_size, kv_heads, head_dim = layer.shape[1:]
            pages, within = slots // page_size, slots % page_size
            layer[0].view(num_pages, kv_heads, head_dim, page_size)[pages, :, :, within] = 0.0
            layer[1].view(num_pages, kv_heads, page_size, head_dim)[pages, :, within] = 0.0

    # -- preparation ------------------------------------------------------------------------------------------

    def _bind(self, cache: Sequence[Tensor]) -> Any:
        config = self.config
        for layer, tensor, window in zip(self._layers, cache, config.windows, strict=True):
            layer.keys, layer.values = tensor[0].data_ptr(), tensor[1].data_ptr()
            layer.window = window or 0
        return _Decoder(
            hidden=config.hidden_size,
            heads=config.num_heads,
            kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            inner=config.intermediate_size,
            layers=config.num_layers,
            page_size=cache[0].shape[2],
            epsilon=config.rms_norm_eps,
            embeddings=self._embeddings,
            norm=self._norm,
            layer=ctypes.addressof(self._layers),
        )

    def _layer(self, weights: LayerWeights) -> Any:
        keep, linear = self._weights.keep, self._weights.linear
        return _Layer(
            input_norm=keep(weights.input_norm),
            qk_norm=keep(weights.qk_norm),
            mlp_norm=keep(weights.mlp_norm),
            qkv=linear(weights.qkv, weights.qkv_bias),
            out=linear(weights.out, weights.out_bias),
            gate_up=linear(weights.gate_up, weights.gate_up_bias, gated=True),
            down=linear(weights.down, weights.down_bias),
        )

    def _buffer(self, name: str, size: int) -> Tensor:
        """Kept between calls: fresh memory costs more than what is written into it."""
        found = self._buffers.get(name)
        if found is None or found.numel() < size:
            found = self._buffers[name] = torch.empty(size + size // 4 + LANES)
        return found

    def _operand(self, name: str, rows: int) -> Operand:
        width = self._widths[name]
        parts = self._cuts[name].for_rows(rows) if self._cuts else None
        return Operand(None if parts else self._buffer(name, rows * width).data_ptr(), parts, width)

    def _scratch(self) -> Tensor:
        return self._buffer("scratch", self._library.caesura_scratch_bytes() * self._num_threads // 4)


def _address(array: npt.NDArray[Any]) -> int:
    return int(array.ctypes.data)


def _declared(library: ctypes.CDLL) -> ctypes.CDLL:
    """Argument types, without which addresses would be cut to 32 bits."""
    library.caesura_open.restype = _Pointer
    library.caesura_open.argtypes = [ctypes.c_int]
    library.caesura_cut_bytes.restype = _Long
    library.caesura_cut_bytes.argtypes = [_Pointer, _Long, _Long]
    library.caesura_pool_close.argtypes = [_Pointer]
    library.caesura_pool_close.restype = None
    library.caesura_scratch_bytes.restype = _Long
    library.caesura_forward.argtypes = [_Pointer, _Pointer, _Pointer]
    library.caesura_forward.restype = None
    library.caesura_linear.argtypes = [_Pointer, _Pointer, _Pointer, _Pointer, _Long, _Pointer, _Pointer]
    library.caesura_linear.restype = None
    return library
