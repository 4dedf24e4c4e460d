"""The HTTP server: OpenAI's and SGLang's wire protocols, and Caesura's own contexts, over one engine service."""

from __future__ import annotations

from caesura.runtime.server.app import create_app
from caesura.runtime.server.config import ServerConfig
from caesura.runtime.server.run import serve

__all__ = ["ServerConfig", "create_app", "serve"]
