"""The decoder in C: one source, compiled at first use, for CPUs whose compiler can be found."""

from caesura.runtime.native.decoder import NativeDecoder, unsupported

__all__ = ["NativeDecoder", "unsupported"]
