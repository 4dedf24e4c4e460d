"""A device as the executor uses it: side streams, events and pinned memory on a GPU; on a CPU, where work is done when
a call returns, objects that stand for them and do nothing."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from caesura.runtime.config import DEVICE_NAME
from caesura.runtime.errors import NotEnoughMemory, UnsupportedModel
from caesura.runtime.model.memory import available_memory_bytes, require_memory
from torch import Tensor


class Event(Protocol):
    """A moment in a stream."""

    def query(self) -> bool:
        """It has passed."""

    def synchronize(self) -> None:
        """Wait until it has passed."""


class _Passed:
    def query(self) -> bool:
        return True

    def synchronize(self) -> None: ...


PASSED: Event = _Passed()


class Device:
    """Where tensors live. Raises UnsupportedModel for a device that is not there."""

    def __init__(self, name: str) -> None:
        if not DEVICE_NAME.fullmatch(name):
            raise UnsupportedModel(f"device is {name!r}; it must be cpu, cuda or cuda:N")
        self.torch = torch.device(name)
        self.is_cuda = self.torch.type == "cuda"
        if self.is_cuda and not torch.cuda.is_available():
            raise UnsupportedModel(
                f"device is {name!r}, but torch {torch.__version__} finds no CUDA device: install a CUDA build of "
                "torch and NVIDIA's driver, or use --device cpu"
            )

    @property
    def name(self) -> str:
        """What the hardware calls itself."""
        return torch.cuda.get_device_name(self.torch) if self.is_cuda else "cpu"

    def bind(self) -> None:
        """Make it the calling thread's device: the thread that builds an engine is seldom the one that runs it."""
        if self.is_cuda:
            torch.cuda.set_device(self.torch)

    def side_stream(self) -> torch.cuda.Stream | None:
        """A stream beside the one that computes."""
        return torch.cuda.Stream(self.torch) if self.is_cuda else None  # type: ignore[no-untyped-call]

    def record(self) -> Event:
        """The present end of the current stream."""
        if not self.is_cuda:
            return PASSED
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        return event

    def on(self, stream: torch.cuda.Stream | None, after: Event = PASSED) -> AbstractContextManager[None]:
        """Work given inside goes to ``stream``, behind ``after``."""
        return contextlib.nullcontext() if stream is None else _on(stream, after)

    def wait_for(self, event: Event) -> None:
        """What is given to the current stream from now on begins after ``event``."""
        if isinstance(event, torch.cuda.Event):
            torch.cuda.current_stream().wait_event(event)

    def staging(self, *shape: int, dtype: torch.dtype) -> Tensor:
        """Host memory that the device copies from and to without waiting. Small and short-lived."""
        return torch.empty(*shape, dtype=dtype, pin_memory=self.is_cuda)

    def send(self, host: Tensor) -> Tensor:
        """A copy of ``host`` (from ``staging``) on the device, without waiting."""
        return host.to(self.torch, non_blocking=True) if self.is_cuda else host

    def receive(self, tensor: Tensor) -> Tensor:
        """A copy of ``tensor`` on the host, complete once an event recorded after this call has passed."""
        if not self.is_cuda:
            return tensor
        target = self.staging(*tensor.shape, dtype=tensor.dtype)
        target.copy_(tensor, non_blocking=True)
        return target

    def synchronize(self) -> None:
        """Wait for everything."""
        if self.is_cuda:
            torch.cuda.synchronize(self.torch)

    def release(self) -> None:
        """Give back what torch holds of it and nobody uses."""
        if self.is_cuda:
            gc.collect()  # modules and wrappers refer to each other
            torch.cuda.empty_cache()

    def free_bytes(self) -> int:
        """What may still be allocated on it."""
        self.release()  # blocks that torch keeps count as used
        if self.is_cuda:
            return int(torch.cuda.mem_get_info(self.torch)[0])
        return available_memory_bytes() or 1 << 40

    def require(self, needed_bytes: int, what: str, advice: str) -> None:
        """Raise NotEnoughMemory unless the device has room."""
        if not self.is_cuda:
            require_memory(needed_bytes, what, advice)
            return
        free_bytes = self.free_bytes()
        if needed_bytes > free_bytes:
            gib = 1 << 30
            raise NotEnoughMemory(
                f"{what} needs {needed_bytes / gib:.2f} GiB and {free_bytes / gib:.2f} GiB of the GPU's memory are "
                f"free; {advice}"
            )


@contextlib.contextmanager
def _on(stream: torch.cuda.Stream, after: Event) -> Iterator[None]:
    if isinstance(after, torch.cuda.Event):
        stream.wait_event(after)
    with torch.cuda.stream(stream):
        yield


def _runtime() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]


class PinnedPool:
    """Pages of host memory that the GPU's copy engines reach directly: [pages, *shape].

    Registered after it was allocated: torch's own pinned allocator rounds up to a power of two.
    """

    def __init__(self, device: Device, num_pages: int, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.pages = torch.empty((num_pages, *shape), dtype=dtype)
        self._registered = 0
        if device.is_cuda and num_pages:
            self.pages.zero_()  # every page of memory exists before it is pinned
            status = int(_runtime().cudaHostRegister(self.pages.data_ptr(), self.pages.nbytes, 0))
            if status:
                raise NotEnoughMemory(
                    f"{self.pages.nbytes / (1 << 30):.2f} GiB of host memory could not be pinned (CUDA error "
                    f"{status}); lower host_kv_tokens or raise the limit of locked memory"
                )
            self._registered = self.pages.data_ptr()

    def close(self) -> None:
        """Unpin and free. The device must be idle. Idempotent."""
        if self._registered:
            _runtime().cudaHostUnregister(self._registered)
            self._registered = 0
        self.pages = self.pages.new_empty(0)
