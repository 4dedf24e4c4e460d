"""``caesura serve``: an HTTP server until it is told to stop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from caesura.lang.cli.output import NO_ENGINE, CliError


def serve_command(*, model: str, key_file: Path | None, server: dict[str, Any], engine: dict[str, Any]) -> None:
    """Start serving; returns after a drain. Missing packages are an error with the command that installs them."""
    from caesura.runtime.config import EngineConfig

    try:
        from caesura.runtime.server import ServerConfig, serve
    except ModuleNotFoundError as error:
        raise CliError(
            f"the server needs the package {error.name}", "pip install 'caesura[serve]'", NO_ENGINE
        ) from None
    serve(ServerConfig(engine=EngineConfig(model=model, **engine), key_file=key_file, **server))
