"""Settings: one schema, four sources, errors that name field, source and limit, secrets that stay hidden."""

from __future__ import annotations

import dataclasses
import inspect
import json
from pathlib import Path
from typing import Any

import pytest
from caesura.lang.cli.app import app
from caesura.lang.cli.serve_command import serve
from caesura.runtime.config import EngineConfig
from caesura.runtime.errors import InvalidRequest
from caesura.runtime.server.config import ServerConfig
from caesura.runtime.server.settings import Field, as_toml, fields, load
from typer.testing import CliRunner

KEY = "sk-secret-0123456789"


def write(folder: Path, text: str) -> Path:
    file = folder / "caesura.toml"
    file.write_text(text)
    return file


def test_a_flag_wins_over_the_environment_over_the_file_over_the_default(tmp_path: Path) -> None:
    file = write(tmp_path, 'port = 1\nkv_tokens = 1000\npolicy = "lru"\ndrain_s = 5\n')
    environ = {"CAESURA_PORT": "2", "CAESURA_KV_TOKENS": "2000", "PATH": "/bin"}
    found = load({"port": 3, "policy": None}, environ, file)
    assert (found.config.port, found.config.engine.kv_tokens, found.config.engine.policy) == (3, 2000, "lru")
    assert found.config.drain_s == 5.0 and found.config.max_requests == ServerConfig().max_requests
    sources = {one.name: one.source for one in found.settings}
    assert sources["port"] == "flag --port"
    assert sources["kv_tokens"] == "environment CAESURA_KV_TOKENS"
    assert sources["policy"] == f"file {file}"
    assert sources["max_requests"] == "default"
    assert load({}, {"CAESURA_CONFIG": str(file)}).config.port == 1


def test_without_sources_the_configuration_is_its_defaults() -> None:
    assert load({}, {}).config == ServerConfig()


def test_every_field_is_a_setting_and_an_option() -> None:
    owned = {field.name for owner in (ServerConfig, EngineConfig) for field in dataclasses.fields(owner)}
    assert set(fields()) == owned - {"engine", "profile"}
    parameters = inspect.signature(serve).parameters
    assert set(parameters) == set(fields()) | {"config"}
    assert all(parameter.default is None for parameter in parameters.values()), "defaults belong to the configuration"
    help_text = CliRunner().invoke(app, ["serve", "--help"]).output
    assert all(field.flag in help_text for field in fields().values() if field.flag != "MODEL")


OTHER_VALUES: dict[type, Any] = {
    int: 33,
    float: 12.5,
    str: "x",
    bool: True,
    Path: Path("/some/keys"),
    tuple: ("a.b", "c"),
}
SPECIAL = {
    "host": "::1", "api_keys": (KEY,), "admin_keys": (KEY + "1",), "cors_origins": ("https://a.b", "http://c:1"),
    "metrics_compat": "vllm", "log_format": "json", "log_level": "debug", "load_format": "dummy", "dtype": "bfloat16",
    "policy": "lru", "kv_tokens": 999, "share_prefixes": False, "native": False, "quantization": "int8",
    "device": "cuda:1",
}  # fmt: skip


def other_value(field: Field) -> Any:
    return SPECIAL.get(field.name, OTHER_VALUES[field.kind])


@pytest.mark.parametrize("field", fields().values(), ids=lambda field: field.name)
def test_each_setting_means_the_same_from_every_source(field: Field, tmp_path: Path) -> None:
    value = other_value(field)
    text = ",".join(value) if field.kind is tuple else str(value).lower() if field.kind is bool else str(value)
    written = str(value) if field.kind is Path else list(value) if field.kind is tuple else value
    from_flag = load({field.name: value}, {}).config
    from_environment = load({}, {field.variable: text}).config
    from_file = load({}, {}, write(tmp_path, f"{field.name} = {json.dumps(written)}\n")).config
    assert from_flag == from_environment == from_file != ServerConfig()
    assert getattr(from_flag.engine if field.of_engine else from_flag, field.name) == value


def test_what_is_shown_as_toml_can_be_fed_back(tmp_path: Path) -> None:
    flags = {name: other_value(field) for name, field in fields().items() if name not in ("api_keys", "admin_keys")}
    first = load(flags, {})
    again = load({}, {}, write(tmp_path, as_toml(first.settings)))
    assert again.config == first.config
    odd = load({"model": 'a "quoted"\\ \u00e9\U0001f600\n\x7f name'}, {})
    assert load({}, {}, write(tmp_path, as_toml(odd.settings))).config == odd.config


WRONG = [
    ({}, {"CAESURA_PORT": "70000"}, "port is 70000; it must lie between 0 and 65535", "environment CAESURA_PORT"),
    ({}, {"CAESURA_PORT": "many"}, "port is 'many'", "environment CAESURA_PORT"),
    ({}, {"CAESURA_DRAIN_S": "inf"}, "drain_s", "it must be a number"),
    ({}, {"CAESURA_INSECURE": "maybe"}, "insecure is 'maybe'", "true or false"),
    ({}, {"CAESURA_PROT": "1"}, "CAESURA_PROT", "did you mean 'CAESURA_PORT'"),
    ({}, {"CAESURA_APIKEYS": KEY}, "CAESURA_APIKEYS", "did you mean 'CAESURA_API_KEYS'"),
    ({"page_size": 65}, {}, "page_size is 65; it must lie between 1 and 64", "flag --page-size"),
    ({"quantization": "int4"}, {}, "quantization is 'int4'; it must be int8, or left out", "flag --quantization"),
    ({"policy": "none"}, {}, "policy is 'none'; it must be one of", "flag --policy"),
    ({"kv_tokens": 20}, {}, "kv_tokens is 20", "flag --kv-tokens"),
    ({"log_format": "xml"}, {}, "log_format is 'xml'; it must be one of text, json", "flag --log-format"),
    ({"cors_origins": ["*"]}, {}, "cors_origins is '*'", "flag --cors-origin"),
    ({"cors_origins": ["https://a.b/path"]}, {}, "cors_origins has 'https://a.b/path'", "flag --cors-origin"),
    ({"max_connections": 0}, {}, "max_connections is 0; it must lie between 1", "flag --max-connections"),
    ({"port": "80"}, {}, "port is '80'", "a whole number"),
    ({"port": True}, {}, "port is True", "a whole number"),
]


@pytest.mark.parametrize(("flags", "environ", "told", "also"), WRONG)
def test_errors_name_field_source_and_limit(
    flags: dict[str, Any], environ: dict[str, str], told: str, also: str
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        load(flags, environ)
    assert told in str(caught.value) and also in str(caught.value)


@pytest.mark.parametrize(
    ("text", "told"),
    [("prot = 1", "did you mean 'port'"), ("[engine]\nport = 1", "no setting 'engine'"), ("port = ", "not TOML"),
     ("port = 1.5", "a whole number"), ("api_keys = 'x'", "a list of texts"), ("port = 1\nport = 2", "not TOML")],
)  # fmt: skip
def test_errors_of_a_file_name_it(tmp_path: Path, text: str, told: str) -> None:
    file = write(tmp_path, text)
    with pytest.raises(InvalidRequest) as caught:
        load({}, {}, file)
    assert told in str(caught.value) and str(file) in str(caught.value)
    with pytest.raises(InvalidRequest, match="cannot be read"):
        load({}, {}, tmp_path / "missing.toml")


def test_any_origin_is_for_servers_with_keys() -> None:
    assert ServerConfig(cors_origins=("*",), api_keys=(KEY,)).cors_origins == ("*",)


@pytest.mark.parametrize("style", ["table", "json", "toml"])
def test_config_show_tells_sources_and_hides_secrets(style: str) -> None:
    environ = {"CAESURA_API_KEYS": f"{KEY},{KEY}2", "CAESURA_KV_TOKENS": "999"}
    shown = CliRunner().invoke(app, ["config", "show", "--format", style, "--port", "81"], env=environ)
    assert shown.exit_code == 0
    assert KEY not in shown.output and "(hidden)" in shown.output
    assert "environment CAESURA_KV_TOKENS" in shown.output and "flag --port" in shown.output
    if style == "json":
        rows = json.loads(shown.output)
        assert rows["port"] == {"value": 81, "source": "flag --port"}
        assert rows["drain_s"] == {"value": ServerConfig().drain_s, "source": "default"}


def test_a_bad_key_is_not_told() -> None:
    for environ in ({"CAESURA_API_KEYS": "short"}, {"CAESURA_API_KEYS": "has a blank inside"}):
        shown = CliRunner().invoke(app, ["config", "show"], env=environ)
        assert shown.exit_code == 2
        assert "api_keys" in shown.stderr and "CAESURA_API_KEYS" in shown.stderr
        assert environ["CAESURA_API_KEYS"] not in shown.stderr
    assert KEY not in repr(ServerConfig(api_keys=(KEY,), admin_keys=(KEY,)))


def test_what_kubernetes_says_of_a_service_of_our_name_is_no_setting() -> None:
    links = {
        "CAESURA_SERVICE_HOST": "10.0.0.7",
        "CAESURA_SERVICE_PORT": "30000",
        "CAESURA_SERVICE_PORT_HTTP": "30000",
        "CAESURA_PORT": "tcp://10.0.0.7:30000",
        "CAESURA_PORT_30000_TCP": "tcp://10.0.0.7:30000",
        "CAESURA_PORT_30000_TCP_ADDR": "10.0.0.7",
    }
    assert load({}, links).config == load({}, {}).config
    assert load({}, {**links, "CAESURA_PORT": "31000"}).config.port == 31000
    with pytest.raises(InvalidRequest, match="CAESURA_SERVICE"):
        load({}, {"CAESURA_SERVICE": "1"})
