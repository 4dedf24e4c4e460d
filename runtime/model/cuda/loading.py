"""A process's part of a model, straight to its device: what others hold is never read."""

from __future__ import annotations

from pathlib import Path

from caesura.runtime.errors import UnsupportedModel
from caesura.runtime.model.config import ModelConfig, read_config
from caesura.runtime.model.cuda.device import Device
from caesura.runtime.model.cuda.parallel import Shard
from caesura.runtime.model.weights import (
    DTYPES,
    Model,
    Read,
    assemble,
    dummy_tensors,
    open_tensors,
    resolve_source,
    tensor_shapes,
)
from torch import Tensor


def load_part(
    source: str | Path,
    device: Device,
    *,
    dtype: str,
    load_format: str = "auto",
    seed: int = 0,
    revision: str | None = None,
    rank: int = 0,
    size: int = 1,
) -> tuple[Model, Shard]:
    """Load process ``rank``'s part of ``size``. Raises as ``load_model`` does, before anything is allocated."""
    if dtype not in DTYPES:
        raise UnsupportedModel(f"dtype is {dtype!r}; supported: {', '.join(DTYPES)}")
    path = resolve_source(source, revision)
    config = read_config(path)
    shard = Shard(config, rank, size)
    if load_format == "dummy":
        return _part(config, shard, device, dtype, dummy_tensors(config, seed, device.torch)), shard
    with open_tensors(config, path) as read:
        return _part(config, shard, device, dtype, read), shard


def part_of(config: ModelConfig, device: Device, dtype: str, read: Read, rank: int = 0, size: int = 1) -> Model:
    """Process ``rank``'s part of a model whose tensors ``read`` gives."""
    return _part(config, Shard(config, rank, size), device, dtype, read)


def _part(config: ModelConfig, shard: Shard, device: Device, dtype: str, read: Read) -> Model:
    shapes = tensor_shapes(config)
    ranges = {name: shard.ranges(name, shape) for name, shape in shapes.items()}
    count = sum(_size(found, shapes[name]) for name, found in ranges.items() if found is not None)
    device.require(count * DTYPES[dtype].itemsize, f"loading {count / 1e6:.0f}M weights as {dtype}", "use another GPU")
    whole = shard.size == 1

    def own(name: str) -> Tensor:
        found = ranges[name]
        if found is None:  # somebody else adds this bias
            return read(name).mul(0)
        return read(name) if whole else read(name, found)

    return assemble(shard.local, DTYPES[dtype], own, device.torch)


def _size(ranges: tuple[slice, ...], shape: tuple[int, ...]) -> int:
    size = 1
    for part, extent in zip(ranges, shape, strict=True):
        size *= len(range(*part.indices(extent)))
    return size
