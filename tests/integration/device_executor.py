"""Device executors on the CPU: the class that runs on a GPU, without streams and graphs."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from caesura.runtime.executors.torch_cuda import CudaExecutor
from caesura.runtime.kv.device_arena import DeviceArena
from caesura.runtime.model.cuda.device import Device
from caesura.runtime.model.cuda.parallel import whole
from caesura.runtime.model.cuda.runner import Options, Runner
from caesura.runtime.model.weights import LayerWeights, Model


def make_arena(model: Model, page_size: int, pages: int, host_pages: int = 0, **options: Any) -> DeviceArena:
    config = model.config
    return DeviceArena(
        Device(options.pop("device", "cpu")),
        num_layers=config.num_layers,
        kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        page_size=page_size,
        num_device_pages=pages,
        num_host_pages=host_pages,
        dtype=model.dtype,
        **options,
    )


def moved(model: Model, device: str) -> Model:
    """The same model on another device."""
    if device == "cpu":
        return model

    def there(value: Any) -> Any:
        return value.to(device) if isinstance(value, torch.Tensor) else value

    def layer(one: LayerWeights) -> LayerWeights:
        return LayerWeights(**{field.name: there(getattr(one, field.name)) for field in dataclasses.fields(one)})

    return dataclasses.replace(
        model,
        embeddings=there(model.embeddings),
        layers=tuple(map(layer, model.layers)),
        norm=there(model.norm),
        head=there(model.head),
    )


def make_device_executor(
    model: Model,
    page_size: int,
    num_tokens: int = 2048,
    *,
    num_host_pages: int = 4,
    device: str = "cpu",
    **options: Any,
) -> CudaExecutor:
    """An executor whose pool holds ``num_tokens``, as ``model_checkpoints.make_executor`` makes them."""
    eos_ids = options.pop("eos_ids", {2})
    pages = options.pop("num_device_pages", None) or -(-num_tokens // page_size) + 64
    arena = make_arena(model, page_size, pages, num_host_pages, device=device)
    runner = Runner(moved(model, device), whole(model.config), arena, Device(device), None, Options(**options))
    return CudaExecutor(runner, eos_ids=eos_ids)
