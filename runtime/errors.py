"""Every error the runtime raises, on one screen. Normal outcomes (out of pages, a failed tool) are values."""

from __future__ import annotations


class CaesuraError(Exception):
    """Base of all errors raised by this project."""


class InvalidRequest(CaesuraError, ValueError):
    """The caller's input is wrong; the message names the field, the limit and what to do."""


class ModelError(CaesuraError):
    """A checkpoint cannot be used."""


class UnsupportedModel(ModelError):
    """An architecture or option outside what the decoder implements."""


class BrokenCheckpoint(ModelError):
    """A file is missing, truncated, hostile, or does not fit the config."""


class NotEnoughMemory(ModelError):
    """The weights or the KV pool do not fit into the machine."""


class GrammarError(InvalidRequest):
    """A regex, schema or grammar that cannot be compiled or satisfied."""


class TemplateError(InvalidRequest):
    """A chat template that fails, breaks out of the sandbox or outlasts its deadline."""


class ContextTooLong(InvalidRequest):
    """The context cannot fit the model's window or the KV pool, whatever is evicted."""


class Overloaded(CaesuraError):
    """There is no room for this work now; the same request may succeed later."""


class ContextClosed(CaesuraError):
    """The context was closed, aborted or expired while it was being used."""


class DeadlineExceeded(CaesuraError):
    """A wait outlasted its deadline."""


class EngineStopped(CaesuraError):
    """The engine has stopped; the message carries the reason."""


class BrokenInvariant(CaesuraError, AssertionError):
    """A bug of ours: accounting that does not add up. The message carries the numbers."""
