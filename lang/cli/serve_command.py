"""``caesura serve``: an HTTP server until it is told to stop. Its options are the server's settings, one each.

An option that is not given is None here: the defaults are the configuration's own, below environment and file.
"""

from __future__ import annotations

import errno
import os
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from caesura.lang.cli.output import NO_ENGINE, POLICY_HELP, CliError, stderr

if TYPE_CHECKING:
    from caesura.runtime.server.settings import Settings

CANNOT_LISTEN = (errno.EADDRINUSE, errno.EACCES)


def _option(help: str, *names: str) -> Any:
    return typer.Option(*names, help=help, show_default=False)


def _many(flag: str, help: str) -> Any:
    return typer.Option(flag, help=f"{help}; repeatable.", show_default=False)


def serve(
    model: Annotated[
        str | None, typer.Argument(help="Checkpoint folder or hub id; embedded by default.", show_default=False)
    ] = None,
    config: Annotated[Path | None, _option("TOML file with settings.")] = None,
    host: Annotated[str | None, _option("Address to listen on; other than loopback needs keys.")] = None,
    port: Annotated[int | None, _option("Port to listen on.")] = None,
    model_name: Annotated[str | None, _option("Name that clients see.")] = None,
    api_keys: Annotated[list[str] | None, _many("--api-key", "A key; better in a file or the environment")] = None,
    admin_keys: Annotated[list[str] | None, _many("--admin-key", "A key for metrics and the cache as well")] = None,
    key_file: Annotated[Path | None, _option("Keys, one name:key[:admin] a line; read anew when changed.")] = None,
    insecure: Annotated[bool | None, _option("Listen anywhere without keys.")] = None,
    in_process: Annotated[bool | None, _option("Keep the engine in the server's process.")] = None,
    allowed_hosts: Annotated[list[str] | None, _many("--allowed-host", "Host header accepted on loopback")] = None,
    allowed_origins: Annotated[list[str] | None, _many("--allowed-origin", "Origin whose requests are taken")] = None,
    cors_origins: Annotated[list[str] | None, _many("--cors-origin", "Origin whose scripts may read answers")] = None,
    max_requests: Annotated[int | None, _option("Requests at work at once; more get 429.")] = None,
    max_connections: Annotated[int | None, _option("Connections open at once; more get 503.")] = None,
    max_kept_contexts: Annotated[int | None, _option("Contexts kept for clients to come back to.")] = None,
    max_contexts_per_key: Annotated[int | None, _option("Of these, for one key.")] = None,
    default_max_tokens: Annotated[int | None, _option("Tokens of a chat answer that sets no limit.")] = None,
    tool_wait_s: Annotated[float | None, _option("How long a context waits for its tool results.")] = None,
    context_ttl_s: Annotated[float | None, _option("How long an unused context of /v1/contexts lives.")] = None,
    request_deadline_s: Annotated[float | None, _option("How long a request may take.")] = None,
    send_deadline_s: Annotated[float | None, _option("How long a client may read nothing of its answer.")] = None,
    header_deadline_s: Annotated[float | None, _option("How long a request's headers may take to arrive.")] = None,
    body_deadline_s: Annotated[float | None, _option("How long its body may take.")] = None,
    drain_s: Annotated[float | None, _option("How long SIGTERM leaves to requests.")] = None,
    metrics_compat: Annotated[str | None, _option("Also show metrics under these names: none, vllm.")] = None,
    log_format: Annotated[str | None, _option("How the log is written: text, json.")] = None,
    log_level: Annotated[str | None, _option("debug, info, warning or error.")] = None,
    revision: Annotated[str | None, _option("Revision of a hub id.")] = None,
    load_format: Annotated[str | None, _option("auto, or dummy for weights of chance.")] = None,
    dtype: Annotated[str | None, _option("float32 or bfloat16.")] = None,
    device: Annotated[str | None, _option("cpu, cuda or cuda:N: where the model computes.")] = None,
    tensor_parallel: Annotated[int | None, _option("GPUs (or processes on a CPU) that share the model.")] = None,
    quantization: Annotated[str | None, _option("int8: 8-bit weights, made at load.")] = None,
    policy: Annotated[str | None, _option(POLICY_HELP)] = None,
    page_size: Annotated[int | None, _option("Tokens of a KV page.")] = None,
    kv_tokens: Annotated[int | None, _option("Tokens the device pool holds; else what fits.")] = None,
    host_kv_tokens: Annotated[int | None, _option("Tokens the host pool holds; else what the policy needs.")] = None,
    kv_disk: Annotated[str | None, _option("Folder of a file for KV that memory has no room for.")] = None,
    kv_disk_tokens: Annotated[int | None, _option("Tokens that file holds; else eight device pools.")] = None,
    max_step_tokens: Annotated[int | None, _option("Tokens computed in one step.")] = None,
    max_running: Annotated[int | None, _option("Contexts computed at once.")] = None,
    native: Annotated[bool | None, _option("The decoder in C, where it can be had.")] = None,
    deterministic: Annotated[bool | None, _option("Results that no batch or chunk changes, in torch too.")] = None,
    share_prefixes: Annotated[bool | None, _option("Let contexts share common beginnings.")] = None,
    seed: Annotated[int | None, _option("Seed of dummy weights.")] = None,
    num_threads: Annotated[int | None, _option("Threads that compute.")] = None,
) -> None:
    """Serve a model over HTTP: OpenAI's and SGLang's routes, and contexts that survive their tool calls.

    Every option is also a variable (CAESURA_KV_TOKENS) and a key of the TOML file (kv_tokens); an option wins over the
    variable, the variable over the file. "caesura config show" tells where each value comes from.
    """
    flags = dict(locals())
    settings = resolve(flags, flags.pop("config"))
    if "CAESURA_API_KEY" in os.environ and not settings.config.has_keys:
        stderr().print(
            "CAESURA_API_KEY is read by clients; this server asks for no key (CAESURA_API_KEYS gives it some)"
        )
    from caesura.runtime.server import serve as run

    _check_free(settings.config.host, settings.config.port)
    run(settings.config)


def _check_free(host: str, port: int) -> None:
    """Raises CliError where the server could not listen: said before the engine is loaded, which takes its time."""
    try:
        for family, *_, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
            socket.create_server(address, family=family).close()
    except OSError as error:
        if error.errno in CANNOT_LISTEN:
            why = os.strerror(error.errno)
            raise CliError(f"cannot listen on {host}:{port}: {why}", "caesura serve --port PORT") from None


def resolve(flags: dict[str, Any], file: Path | None) -> Settings:
    """The settings from all sources. Missing packages are an error with the command that installs them."""
    try:
        from caesura.runtime.server.settings import load
    except ModuleNotFoundError as error:
        raise CliError(
            f"the server needs the package {error.name}", "pip install 'caesura[serve]'", NO_ENGINE
        ) from None
    given = {name: value for name, value in flags.items() if value is not None and value not in ((), [])}
    return load(given, os.environ, file)
