"""What the server and the engine process say to each other: everything survives the trip, nothing else gets through."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from caesura.runtime import errors
from caesura.runtime.api import PendingCall
from caesura.runtime.executors.base import SampledToken
from caesura.runtime.generation import Finish, TokenChunk, ToolCalling
from caesura.runtime.history import History
from caesura.runtime.ipc import messages as m
from caesura.runtime.sampling import Constraint, ConstraintKind, SamplingParams
from caesura.runtime.snapshot import take_snapshot
from caesura.runtime.text.tool_parser import ParsedCall
from caesura.scheduler.types import Action, ActionCosts, ContextId, PauseDecision

from tests.sim.agents import World

CONTEXT = ContextId(7)
PARAMS = SamplingParams(
    max_new_tokens=9,
    temperature=0.5,
    seed=(1 << 63) - 1,
    stop=("\n", "é"),
    stop_token_ids=(3,),
    logprobs=2,
    logit_bias=((5, -1.5),),
    constraint=Constraint(ConstraintKind.REGEX, "[a-z]+"),
)
TOOLS = ToolCalling(({"name": "add", "parameters": {"type": "object", "properties": {"a": {"type": "number"}}}},))
DECISION = PauseDecision(
    CONTEXT, 1.5, "min_waste", Action.SWAP, "add", "cheapest", ActionCosts(1.0, 2.0, 3.0), 40, 32, 0.1, 2.0, 64, 3
)
FINISH = Finish("tool_calls", "\n", (ParsedCall("add", '{"a": 1}'),), 4, 2, 0)
SNAPSHOT = take_snapshot(World("lru").engine, History())
CHUNK = TokenChunk("hé", (1, 2), (SampledToken(1, -0.5, ((1, -0.5), (2, -1.0))), SampledToken(2, -0.1)), FINISH)

COMMANDS: list[m.Command] = [
    m.Open(1, "space", None),
    m.Append(2, CONTEXT, (1, 2, 3)),
    m.Generate(3, CONTEXT, PARAMS, TOOLS),
    m.Generate(3, CONTEXT, SamplingParams(), None),
    m.Score(4, CONTEXT, 1),
    m.Score(4, CONTEXT, 1, 5),
    m.Prefill(5, CONTEXT),
    m.Fork(6, CONTEXT, 3),
    m.Truncate(7, CONTEXT, 2),
    m.Pause(8, CONTEXT, (PendingCall("add", 1.0, None), PendingCall("sub")), "any"),
    m.Pause(8, CONTEXT, (PendingCall("add", None, 60.0),), "all", 60.0),
    m.Report(CONTEXT, 0.25, 1),
    m.Resume(9, CONTEXT, 60.0),
    m.Tokens(10, CONTEXT),
    m.Decisions(11, CONTEXT),
    m.FlushCache(12),
    m.Hold(12, True),
    m.GoOn(12),
    m.Stats(13),
    m.Look(14, 3),
    m.Ping(),
    m.Stop(3),
    m.Close(CONTEXT),
    m.Shutdown(2.5),
]
EVENTS: list[m.Event] = [
    m.Ready("folder", 99),
    m.Done(1),
    m.Opened(2, CONTEXT),
    m.Length(3, 17),
    m.Scores(4, [-1.0, -2.5]),
    m.ScoredTokens(4, [SampledToken(1, -0.5, ((1, -0.5),))]),
    m.Forked(5, (CONTEXT, ContextId(8)), 4),
    m.TokenIds(6, [1, 2]),
    m.Decided(7, [DECISION]),
    m.Account(8, {"steps": 3, "contexts": {"queued": 0}, "policy": "lru"}),
    m.Seen(8, SNAPSHOT),
    m.Chunk(9, CHUNK, 12),
    m.Failed(10, m.Error("InvalidRequest", "no")),
    m.Closed(CONTEXT, m.Error("DeadlineExceeded", "late")),
    m.Heartbeat(0.5),
    m.Fatal(m.Error("EngineStopped", "gone")),
]
command_decoder = msgspec.msgpack.Decoder(m.Command)
event_decoder = msgspec.msgpack.Decoder(m.Event)


@pytest.mark.parametrize("message", COMMANDS, ids=lambda one: type(one).__name__)
def test_a_command_survives_the_trip(message: m.Command) -> None:
    assert command_decoder.decode(m.encode(message)) == message


@pytest.mark.parametrize("message", EVENTS, ids=lambda one: type(one).__name__)
def test_an_event_survives_the_trip(message: m.Event) -> None:
    assert event_decoder.decode(m.encode(message)) == message


def test_the_lists_above_name_every_message() -> None:
    assert {type(one) for one in COMMANDS} == set(m.Command.__args__)
    assert {type(one) for one in EVENTS} == set(m.Event.__args__)


HOSTILE: list[Any] = [
    [],
    {},
    None,
    "Open",
    ["Exec", 1, "code"],
    ["Open", 1],
    ["Open", 1, "space", None, "one more"],
    ["Open", "1", "space", None],
    ["Open", True, "space", None],
    ["Open", 1.0, "space", None],
    ["Open", 1, b"space", None],
    ["Append", 1, 2, ["3"]],
    ["Append", 1, 2, [1.5]],
    ["Append", 1, 2, 3],
    ["Score", 1, 2, None],
    ["Generate", 1, 2, {"temperature": float("nan")}, None],
    ["Generate", 1, 2, {"max_new_tokens": -1}, None],
    ["Generate", 1, 2, {"seed": (1 << 64) - 1}, None],
    ["Generate", 1, 2, {"stop": ["x"] * 17}, None],
    ["Generate", 1, 2, {"constraint": {"kind": "python", "source": "1"}}, None],
    ["Pause", 1, 2, ["add"], "all"],
    ["Opened", 1, 2],
]


@pytest.mark.parametrize("data", HOSTILE, ids=range(len(HOSTILE)))
def test_anything_else_is_refused(data: Any) -> None:
    with pytest.raises(msgspec.DecodeError):
        command_decoder.decode(msgspec.msgpack.encode(data))


def test_random_and_damaged_bytes_are_refused_or_are_a_plain_message() -> None:
    draw = random.Random(5)
    whole = [m.encode(command) for command in COMMANDS]
    decoded = 0
    for _ in range(30_000):
        data = bytearray(draw.choice(whole) if draw.random() < 0.7 else draw.randbytes(draw.randrange(80)))
        for _ in range(draw.randrange(1, 4)):
            if data:
                data[draw.randrange(len(data))] = draw.randrange(256)
        try:
            command = command_decoder.decode(bytes(data))
        except m.UNREADABLE:
            continue
        assert isinstance(command, m.Message)
        decoded += 1
    assert decoded < 30_000


def test_endless_nesting_is_refused() -> None:
    with pytest.raises(m.UNREADABLE):
        command_decoder.decode(b"\x91" * 100_000)


def nested(depth: int) -> dict[str, Any]:
    value: dict[str, Any] = {}
    for _ in range(depth):
        value = {"x": value}
    return value


TOO_MUCH: dict[str, Callable[[], m.Command]] = {
    "more than the limit": lambda: m.Open(1, "x" * (m.MAX_MESSAGE_BYTES + 1), None),
    "an object": lambda: m.Generate(1, CONTEXT, PARAMS, ToolCalling(({"name": object()},))),
    "an integer beyond 64 bits": lambda: m.Append(1, CONTEXT, (1 << 70,)),
    "half a character": lambda: m.Open(1, "\ud800", None),
    "endless nesting": lambda: m.Generate(1, CONTEXT, PARAMS, ToolCalling((nested(100_000),))),
}


@pytest.mark.parametrize("what", TOO_MUCH)
def test_what_cannot_be_sent_is_the_callers_error(what: str) -> None:
    with pytest.raises(errors.InvalidRequest, match=r"Open|Append|Generate"):
        m.encode(TOO_MUCH[what]())


@pytest.mark.parametrize(
    "kind", [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.CaesuraError)]
)
def test_an_error_keeps_class_and_text(kind: type[errors.CaesuraError]) -> None:
    revived = m.revive(m.describe(kind("what and why")))
    assert type(revived) is kind
    assert str(revived) == "what and why"


def test_errors_from_elsewhere_become_ours() -> None:
    class Special(errors.GrammarError):
        pass

    assert type(m.revive(m.describe(Special("x")))) is errors.GrammarError
    foreign = m.revive(m.describe(ZeroDivisionError("division by zero")))
    assert type(foreign) is errors.CaesuraError
    assert str(foreign) == "ZeroDivisionError: division by zero"
    assert type(m.revive(m.Error("SystemExit", "0"))) is errors.CaesuraError
    assert len(m.describe(ValueError("\ud800" * 1_000_000)).message) < 10_000
