"""Security by number (docs/security.md lists every number and its test): what the guard's unit tests cannot show,
because it takes a server process, an engine process, or the whole source tree."""

from __future__ import annotations

import ast
import asyncio
import re
import socket
import sys
import tomllib
import tracemalloc
from pathlib import Path
from typing import Any

import httpx
import pytest
from caesura.runtime.server.chat_protocol import ChatRequest
from caesura.runtime.server.conversation import conversation_of, prompt_of
from caesura.runtime.server.limits import decode
from fastapi import FastAPI

from tests.integration.server_client import QUESTION, TOOLS, embedded_service, run
from tests.integration.server_hostile import check_answer, remote_service, with_remote
from tests.integration.test_server_disconnect import children, server

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted(path for name in ("lang", "runtime", "scheduler") for path in (ROOT / name).rglob("*.py"))
CODE_MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "marshal", "shelve", "joblib", "jsonpickle"}
CODE_CALLS = {"recv_pyobj", "send_pyobj", "eval", "exec", "compile", "literal_eval", "__import__", "load_module"}
RUNS_CODE = "the process that runs the user's own programs, given on the command line"
ALLOWED_CALLS = {"lang/cli/program_file.py": RUNS_CODE}


def test_sec_01_sec_07_the_source_has_no_way_from_data_to_code() -> None:
    """No module that unpickles, no eval or exec, no shell, no torch.load, no loader of YAML objects."""
    assert len(SOURCES) > 100
    found: list[str] = []
    for path in SOURCES:
        where = str(path.relative_to(ROOT))
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names = {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                names = {(node.module or "").split(".")[0]}
            elif isinstance(node, ast.Call):
                found += _bad_call(node, where)
                continue
            else:
                continue
            found += [f"{where}:{node.lineno} imports {name}" for name in names & CODE_MODULES]
    assert not found, found


def _bad_call(node: ast.Call, where: str) -> list[str]:
    called = ast.unparse(node.func)
    last = called.rsplit(".", 1)[-1]
    is_builtin = isinstance(node.func, ast.Name)
    bad = last in CODE_CALLS and (is_builtin or last in {"recv_pyobj", "send_pyobj", "literal_eval", "load_module"})
    bad = bad or called in {"torch.load", "yaml.load", "yaml.unsafe_load", "os.system", "os.popen"}
    bad = bad or any(word.arg == "shell" and ast.unparse(word.value) != "False" for word in node.keywords)
    return [f"{where}:{node.lineno} calls {called}"] if bad and where not in ALLOWED_CALLS else []


def test_sec_10_no_dependency_pulls_in_what_only_a_client_needs() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    needed = [*project["dependencies"], *(line for name in ("serve", "test") for line in extras[name])]
    names = {re.split(r"[^A-Za-z0-9_.-]", line, maxsplit=1)[0].lower() for line in needed}
    assert not names & {"litellm", "langchain", "smolagents", "pydantic-ai", "sglang"}
    for file in (ROOT / "tests" / "clients").glob("*/requirements.txt"):
        pins = [line for line in file.read_text().splitlines() if line and not line.startswith(("#", " ", "-"))]
        assert pins and all("==" in line for line in pins), f"{file.name} must pin every version"


# -- a server process --------------------------------------------------------------------------------------------


def sockets_of(pid: int) -> set[str]:
    """Inodes of a process's sockets."""
    found = set()
    for link in Path(f"/proc/{pid}/fd").iterdir():
        try:
            target = str(link.readlink())
        except OSError:
            continue
        if target.startswith("socket:["):
            found.add(target[8:-1])
    return found


def internet_sockets(pid: int) -> list[tuple[str, str, str]]:
    """(protocol, local address in hexadecimal, state) of a process's sockets that the network can reach."""
    mine, found = sockets_of(pid), []
    for protocol in ("tcp", "tcp6", "udp", "udp6", "raw"):
        table = Path(f"/proc/{pid}/net/{protocol}")
        for line in table.read_text().splitlines()[1:] if table.exists() else []:
            parts = line.split()
            if parts[9] in mine:
                found.append((protocol, parts[1], parts[3]))
    return found


@pytest.mark.skipif(not Path("/proc/self/net/tcp").exists(), reason="looks at /proc")
def test_sec_02_sec_20_one_port_on_one_address_that_bears_rude_clients() -> None:
    """Only the HTTP port is open, only on the asked address, in both processes. Huge headers, half requests and a
    client that never reads leave it serving."""
    with server("own") as (process, url):
        port = int(url.rsplit(":", 1)[1])
        (engine,) = children(process.pid)
        listening = [one for one in internet_sockets(process.pid) if one[2] == "0A" or one[0].startswith("udp")]
        assert listening == [("tcp", f"0100007F:{port:04X}", "0A")]
        assert internet_sockets(engine) == []

        rude = [socket.create_connection(("127.0.0.1", port), timeout=10) for _ in range(40)]
        try:
            for number, one in enumerate(rude[:38]):
                one.sendall(b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\nX-Slow: " + b"a" * number)
            rude[38].sendall(b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n")
            assert is_refused(rude[38], b"X: " + b"a" * (1 << 20) + b"\r\n\r\n")
            body = b'{"text": ["a", "b", "c", "d"], "stream": true, "sampling_params": {"max_new_tokens": 1500}}'
            head = f"POST /generate HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(body)}\r\n\r\n".encode()
            rude[39].sendall(head + body)  # and never reads
            with httpx.Client(base_url=url, trust_env=False, timeout=30) as polite:
                assert polite.get("/health").status_code == 200
                answer = polite.post("/generate", json={"text": "a", "sampling_params": {"max_new_tokens": 2}})
                assert answer.status_code == 200
        finally:
            for one in rude:
                one.close()


def is_refused(connection: socket.socket, data: bytes) -> bool:
    """Whether a connection answers data with an error, or is closed."""
    try:
        connection.sendall(data)
        answer = connection.recv(4096)
    except OSError:
        return True
    return answer == b"" or answer.startswith((b"HTTP/1.1 400", b"HTTP/1.1 431"))


# -- requests ----------------------------------------------------------------------------------------------------

FORBIDDEN_FIELDS = {
    "custom_logit_processor", "logits_processor", "lora_path", "model_path", "weights", "chat_template", "template",
    "prompt_embeds", "file", "path", "output_dir", "command", "code", "url", "callback",
}  # fmt: skip


def payload(canary: Path) -> str:
    """What would create the file if anything unpickled it, as such payloads are sent: in hexadecimal."""
    return b"".join([b"cposix\nsystem\n(S'touch ", str(canary).encode(), b"'\ntR."]).hex()


def test_sec_04_no_field_takes_code_weights_or_objects(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    hostile = payload(canary)

    async def test(app: FastAPI, client: httpx.AsyncClient) -> None:
        document = app.openapi()
        for name, schema in document["components"]["schemas"].items():
            taken = {field.lower() for field in schema.get("properties", {})}
            assert not taken & FORBIDDEN_FIELDS, f"{name} takes {taken & FORBIDDEN_FIELDS}"
        for path, base in (("/generate", {"text": "a"}), ("/v1/chat/completions", {"messages": [QUESTION]})):
            for field in sorted(FORBIDDEN_FIELDS):
                for where in ({field: hostile}, {"sampling_params": {field: hostile}}, {"metadata": {field: hostile}}):
                    body = {**base, "max_tokens": 1, **where}
                    check_answer(await client.post(path, json=body), (path, where))
            answer = await client.post(path, content=bytes.fromhex(hostile))
            assert answer.status_code == 400
        assert not canary.exists()

    with_remote(test)


def test_sec_09_no_request_brings_a_tool_server(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    servers = [
        {"type": "mcp", "server_label": "x", "command": ["touch", str(canary)]},
        {"type": "mcp", "server_label": "x", "server_url": "http://127.0.0.1:9/mcp"},
        {"type": "shell"},
        {"type": "code_interpreter", "container": {"type": "auto"}},
    ]

    async def test(app: FastAPI, client: httpx.AsyncClient) -> None:
        for tool in servers:
            answer = await client.post("/v1/chat/completions", json={"messages": [QUESTION], "tools": [tool]})
            assert answer.status_code == 400, tool
            answer = await client.post("/v1/responses", json={"input": "a", "tools": [tool]})
            assert answer.status_code == 400, tool
        assert not canary.exists()

    with_remote(test)


TRAVERSALS = ["../../etc/passwd", "..%2f..%2fetc%2fpasswd", "%2e%2e/%2e%2e/etc/passwd", "....//etc/passwd",
              "/etc/passwd", "..\\..\\etc\\passwd", "%00/etc/passwd", "~root/.ssh/id_rsa"]  # fmt: skip


def test_sec_17_no_route_reads_or_writes_a_path_of_the_request() -> None:
    async def test(app: FastAPI, client: httpx.AsyncClient) -> None:
        for path in ("/dashboard/", "/v1/models/", "/v1/contexts/", "/v1/responses/", "/static/", "/metrics/"):
            for traversal in TRAVERSALS:
                answer = await client.get(path + traversal)
                assert answer.status_code in (400, 404), (path, traversal)
                assert "root:" not in answer.text

    with_remote(test)


def test_sec_19_refused_requests_leave_nothing_on_the_heap() -> None:
    """What one refusal allocates is bounded by the body; what stays after hundreds of them is nothing."""
    small = [b'{"messages":[{"role":"user"}],"n":9}', b'{"prompt":"x","stop":["1","2","3","4","5"]}', b"[" * 70, b"{"]
    tools = b",".join([b'{"type":"function","function":{"name":"f"}}'] * 3000)
    stops = b",".join([b'"x"'] * 500_000)
    large = [b'{"messages":[{"role":"user"}],"tools":[%s]}' % tools, b'{"prompt":"x","stop":[%s]}' % stops]

    async def test(client: httpx.AsyncClient, app: FastAPI) -> None:
        async def refused(body: bytes) -> None:
            for path in ("/v1/chat/completions", "/v1/completions", "/generate"):
                assert (await client.post(path, content=body)).status_code == 400

        for body in (*small, *large):
            await refused(body)
        tracemalloc.start()
        try:
            for body in large:
                before = tracemalloc.get_traced_memory()[0]
                tracemalloc.reset_peak()
                await refused(body)
                peak = tracemalloc.get_traced_memory()[1] - before
                assert peak < 5 * 2**20 + MOST_HEAP_OF_BODY * len(
                    body
                )  # one body is read at a time, and 4 MiB is the limit
            before = tracemalloc.get_traced_memory()[0]
            for _ in range(25):
                for body in small:
                    await refused(body)
            assert tracemalloc.get_traced_memory()[0] - before < 2**20
        finally:
            tracemalloc.stop()

    run(test)


MOST_HEAP_OF_BODY = 20
GRAMMARS: list[dict[str, Any]] = [
    *({"regex": regex} for regex in (
        "(" * 5000 + ")" * 5000, "(a*)*" * 300, "(a|a)*b" * 500, "a{1,100000}", "((a{1,300}){1,300}){1,300}",
        "[" * 9000,
        "(?P<x>a)(?P=x)", r"(?<=a)b", r"\p{Greek}{1,5000}", "(?:" * 2000 + "a" + ")?" * 2000, "\\", "\x00",
        "(?i)" * 999,
    )),
    *({"ebnf": ebnf} for ebnf in (
        "root ::= root", "root ::= (" * 3000, 'start: start "a"', "start: " + "(" * 9000, 'root ::= "a"{1,100000000}',
        "%import common.WORD", "start: %json {", 'start: /(a+)+$/ "b"', "root ::= missing", 'start: "a"~1..999999999',
    )),
    *({"json_schema": schema} for schema in (
        '{"$ref":"#"}', '{"$ref":"file:///etc/passwd"}', '{"allOf":[{"$ref":"#"}]}', '{"type":"array","minItems":1e9}',
        '{"type":"string","pattern":"' + "(a+)+" * 2000 + '"}', '{"enum":[' + ",".join(map(str, range(12000))) + "]}",
        '{"type":"string","minLength":1000000000}', '{"multipleOf":1e-300}',
        '{"properties":{"a":{"$ref":"#/nowhere"}}}',
        '{"oneOf":[' + ",".join(['{"type":"object"}'] * 1500) + "]}", '{"type":[]}', "{", "null",
        '{"const":' + "[" * 60,
    )),
]  # fmt: skip


def test_sec_22_hostile_grammars_fail_alone() -> None:
    """Each ends in an answer or a refusal while another client's stream goes on, in the same engine process."""

    async def test(app: FastAPI, client: httpx.AsyncClient) -> None:
        stop = asyncio.Event()
        num_neighbours = 0
        body = {"text": "a", "sampling_params": {"max_new_tokens": 40, "temperature": 0, "ignore_eos": True}}
        expected = (await client.post("/generate", json=body)).json()["output_ids"]

        async def neighbour() -> None:
            nonlocal num_neighbours
            while not stop.is_set():
                assert (await client.post("/generate", json=body)).json()["output_ids"] == expected
                num_neighbours += 1

        beside = asyncio.ensure_future(neighbour())
        try:
            for grammar in GRAMMARS:
                params = {**grammar, "max_new_tokens": 4}
                answer = await client.post("/generate", json={"text": "a", "sampling_params": params})
                check_answer(answer, str(grammar)[:80])
        finally:
            stop.set()
            await beside
        assert num_neighbours > 0

    with_remote(test)


def test_a_grammar_that_fails_at_work_is_a_wrong_request() -> None:
    """It compiles, and outgrows the parser some tokens later."""

    async def test(app: FastAPI, client: httpx.AsyncClient) -> None:
        params = {"regex": "(a*)*" * 300, "min_new_tokens": 8, "max_new_tokens": 9}
        answer = await client.post("/generate", json={"text": "a", "sampling_params": params})
        assert answer.status_code == 400, answer.text
        assert answer.json()["error"]["code"] == "invalid_grammar"

    with_remote(test)


def _calls_made(num_messages: int) -> int:
    """Python calls that reading and rendering a conversation takes: work, counted instead of timed."""
    pair = '{"role":"user","content":"hi"},{"role":"assistant","content":"ho"}'
    raw = f'{{"messages":[{",".join([pair] * (num_messages // 2))}]}}'.encode()
    service, count = embedded_service(), 0

    def profile(frame: Any, event: str, arg: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(profile)
    try:
        body = decode(raw, ChatRequest)
        body.check()
        conversation = conversation_of(body)
        conversation.fingerprint(num_messages)
        prompt_of(conversation, service.template, service.tokenizer)
    finally:
        sys.setprofile(None)
    return count


def test_sec_24_a_history_ten_times_as_long_is_ten_times_the_work() -> None:
    _calls_made(20)  # what is compiled once
    assert _calls_made(2000) <= 12 * _calls_made(200)


def test_sec_25_no_request_makes_the_server_ask_anybody(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def refuse(*arguments: Any, **_: Any) -> Any:
        asked.append(arguments)
        raise OSError("no network here")

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    for name in ("getaddrinfo", "create_connection", "gethostbyname"):
        monkeypatch.setattr(socket, name, refuse)
    url = "http://attacker.example/x.png"
    image = {"type": "image_url", "image_url": {"url": url}}
    schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"$ref": url}}}
    refused: list[tuple[str, dict[str, Any]]] = [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": [image]}]}),
        ("/v1/chat/completions", {"messages": [QUESTION], "response_format": schema}),
        ("/v1/responses", {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": url}]}]}),
        ("/generate", {"text": "x", "image_data": url}),
    ]

    async def test(client: httpx.AsyncClient, app: FastAPI) -> None:
        for path, body in refused:
            assert (await client.post(path, json=body)).status_code == 400, body
        text = {"messages": [{"role": "user", "content": f"![x]({url}) file:///etc/passwd"}], "max_tokens": 2}
        assert (await client.post("/v1/chat/completions", json=text)).status_code == 200
        asking = {"messages": [QUESTION], "tools": TOOLS, "max_tokens": 60}
        assert (await client.post("/v1/chat/completions", json=asking)).status_code == 200
        assert (await client.get("/metrics")).status_code == 200
        assert (await client.get("/v1/models")).status_code == 200

    run(test)
    assert asked == []


def test_sec_03_the_engine_survived_all_of_this() -> None:
    """Last in the file: the engine process that the tests above have used."""
    counts = remote_service().stats()["ipc"]
    assert counts["restarts"] == 0
    assert counts["engine"]["malformed"] == counts["engine"]["unauthentic"] == counts["engine"]["foreign"] == 0
