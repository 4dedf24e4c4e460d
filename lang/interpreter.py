"""Carries nodes out: each kind of node has one handler; a node without a handler is unsupported."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Awaitable, Callable, Coroutine
from typing import TYPE_CHECKING, Any, TypeVar

from caesura.lang import ir
from caesura.lang.backend import Backend
from caesura.lang.calls import call_tool, call_tools
from caesura.lang.core import Core
from caesura.lang.errors import ProgramError, StateError, TraceStopped, UnsupportedByBackend
from caesura.lang.generate import generate, select
from caesura.lang.reasoning import split_reasoning
from caesura.lang.sampling import Sampling
from caesura.lang.toolloop import generate_with_tools

if TYPE_CHECKING:
    from caesura.lang.state import ProgramState

T = TypeVar("T")
Handler = Callable[["ProgramState", Any, contextvars.Context], Awaitable[None]]


def check(node: ir.Expr, backend: Backend, defaults: Sampling) -> None:
    """Raise UnsupportedByBackend when the backend cannot do what ``node`` needs; called where the node is added.
    ``defaults`` are the run's."""
    able = backend.capabilities
    missing = ""
    if isinstance(node, ir.Gen):
        given = node.sampling.over(defaults)
        if node.tools and not (able.tools and able.chat):
            missing = "gen(tools=...)"
        elif node.constraint is not None and node.constraint.kind not in able.constraints:
            missing = f"the constraint {node.constraint.kind}"
        elif given.return_logprob and not able.logprobs:
            missing = "logprobs"
        elif given.logprob_start_len is not None and given.logprob_start_len >= 0 and not able.prompt_logprobs:
            missing = "logprobs of the prompt (logprob_start_len)"
    elif isinstance(node, ir.Select) and not able.score:
        missing = "select"
    elif isinstance(node, ir.ForkInto) and not able.fork:
        missing = "fork"
    elif isinstance(node, (ir.TakeSnapshot, ir.RollbackTo)) and not able.rollback:
        missing = "snapshot and rollback"
    elif isinstance(node, ir.RoleBegin) and (not able.chat or backend.chat is None):
        missing = "roles (it has no chat template: write plain text)"
    elif isinstance(node, ir.Media) and not able.images:
        missing = f"{node.kind} input"
    if missing:
        raise UnsupportedByBackend(f"backend {backend.name!r} does not support {missing}; used by {node.label()}")


async def execute(state: ProgramState, node: ir.Expr, context: contextvars.Context) -> None:
    """Run one node on a state. ``context`` holds the context variables of the code that added it."""
    if isinstance(node, ir.Seq):
        for part in node.parts:
            await execute(state, part, context)
        return
    state.position = node.label()
    handler = _HANDLERS.get(type(node))
    if handler is None:
        raise UnsupportedByBackend(f"the interpreter does not know the node {type(node).__name__}")
    await handler(state, node, context)


async def _in_context(state: ProgramState, context: contextvars.Context, work: Coroutine[Any, Any, T]) -> T:
    """Await user code with the context variables of the code that asked for it."""
    own = context.copy()
    own.run(state.drain.mark_drained)
    return await asyncio.get_running_loop().create_task(work, context=own)


async def _text(state: ProgramState, node: ir.Text, _: contextvars.Context) -> None:
    state.core.add(node.text)


async def _var(state: ProgramState, node: ir.Var, _: contextvars.Context) -> None:
    texts = state.core.values.texts
    if node.name not in texts:
        raise StateError(f"variable {node.name!r} is used before anything sets it")
    state.core.add(texts[node.name])


async def _argument(state: ProgramState, node: ir.Argument, _: contextvars.Context) -> None:
    raise TraceStopped(f"argument {node.name!r} has no value; it was traced without one")


async def _gen(state: ProgramState, node: ir.Gen, context: contextvars.Context) -> None:
    if node.tools:
        await _in_context(state, context, generate_with_tools(state.core, node))
    else:
        await generate(state.core, node)


async def _select(state: ProgramState, node: ir.Select, _: contextvars.Context) -> None:
    await select(state.core, node)


async def _call_tool(state: ProgramState, node: ir.CallTool, context: contextvars.Context) -> None:
    await _in_context(state, context, call_tool(state.core, node))


async def _call_tools(state: ProgramState, node: ir.CallTools, context: contextvars.Context) -> None:
    await _in_context(state, context, call_tools(state.core, node))


async def _role_begin(state: ProgramState, node: ir.RoleBegin, _: contextvars.Context) -> None:
    await state.core.open_turn(node.role)


async def _role_end(state: ProgramState, node: ir.RoleEnd, _: contextvars.Context) -> None:
    state.core.close_turn(node.role)


async def _reasoning(state: ProgramState, node: ir.Reasoning, context: contextvars.Context) -> None:
    await execute(state, node.body, context)
    core = state.core
    for name, thinking_name in node.thinking().items():
        value = core.values.variables.get(name)
        if isinstance(value, str):
            thinking, answer = split_reasoning(value, node.model_type)
            core.set(thinking_name, thinking)
            core.set(name, answer)


async def _media(state: ProgramState, node: ir.Media, _: contextvars.Context) -> None:
    raise UnsupportedByBackend(f"backend {state.execution.backend.name!r} does not support {node.kind} input")


async def _program(state: ProgramState, node: ir.ProgramCall, context: contextvars.Context) -> None:
    """Run another program's body on this state's context; it has a queue of its own, drained within this node."""
    from caesura.lang.execution import run_body
    from caesura.lang.state import ProgramState as State

    inner = State(state.execution, state.core, has_body=True)
    inner.failure_seen = True  # its failure is this node's failure

    async def run() -> None:
        await state.core.declare_tools(node.program.tools)
        inner.ret = await run_body(inner, lambda s: node.program.body(s, node.args, node.kwargs), node.program.name)
        while not inner.idle and inner.failure is None:
            await inner.change()
        if inner.failure is not None:
            raise inner.failure

    try:
        with state.core.spans.within("program", node.program.name):
            await _in_context(state, context, run())
    except asyncio.CancelledError:
        raise
    except BaseException as error:
        own = inner.failure
        if own is None or (error is not own and getattr(error, "cause", None) is not own.cause):
            own = ProgramError.wrap(error, node.program.name, "its body")
        own.program = node.program.name
        raise own from own.cause
    finally:
        inner.close("its program has ended")
        task = inner.stop()
        if task is not None:
            await asyncio.wait((task,), timeout=5.0)
    state.position = node.label()


async def _scope_begin(state: ProgramState, node: ir.ScopeBegin, _: contextvars.Context) -> None:
    state.core.values.scopes[node.name] = len(state.core.log)


async def _scope_end(state: ProgramState, node: ir.ScopeEnd, _: contextvars.Context) -> None:
    start = state.core.values.scopes.pop(node.name)
    state.core.set(node.name, state.core.text(start))


async def _set_var(state: ProgramState, node: ir.SetVar, _: contextvars.Context) -> None:
    state.core.set(node.name, node.value)


async def _fork(state: ProgramState, node: ir.ForkInto, _: contextvars.Context) -> None:
    """Children share everything computed so far: the text before the fork is always sent first, never by luck."""
    core = state.core
    try:
        session = await core.flush()
        await session.prefill()
        sessions = await state.execution.fork_session(session, len(node.children))
    except BaseException as error:
        state.abandon_forks((node,), ProgramError.wrap(error, state.execution.program, state.position))
        raise
    for number, (child, copy) in enumerate(zip(node.children, sessions, strict=True)):
        forked = core.fork(f"branch {number}")
        forked.session = copy
        child.adopt(forked)


async def _join(state: ProgramState, node: ir.JoinFrom, _: contextvars.Context) -> None:
    core = state.core
    for child in node.children:
        while not child.idle and child.failure is None:
            await child.change()
        if child.failure is not None:
            child.failure_seen = True
            raise child.failure
    if node.mode == "gather_variable":
        found: dict[str, list[Any]] = {}
        for child in node.children:
            for name, value in child.core.values.variables.items():
                if name not in child.core.values.inherited:
                    found.setdefault(name, []).append(value)
        for name, values in found.items():
            core.set(name, values)
    else:
        for child in node.children:
            _append_child(core, child.core)
    await asyncio.gather(*(_give_back(child) for child in node.children))


async def _give_back(child: ProgramState) -> None:
    """Close the context of a joined child."""
    child.core.spans.root.end()
    await child.core.keep_decisions()
    if child.core.session is not None:
        await child.execution.release(child.core.session)
        child.core.session = None


def _append_child(core: Core, child: Core) -> None:
    for segment in child.log[child.forked_at :]:
        core.add_segment(segment)
    core.values.messages.extend(child.values.messages[child.forked_messages :])


async def _snapshot(state: ProgramState, node: ir.TakeSnapshot, _: contextvars.Context) -> None:
    node.into.saved = await state.core.save()


async def _rollback(state: ProgramState, node: ir.RollbackTo, _: contextvars.Context) -> None:
    if node.snapshot.saved is None:
        raise StateError("the snapshot was never taken: an error came before it")
    await state.core.restore(node.snapshot.saved)


async def _commit(state: ProgramState, node: ir.Commit, _: contextvars.Context) -> None:
    session = await state.core.flush()
    await session.prefill()


_HANDLERS: dict[type[ir.Expr], Handler] = {
    ir.Text: _text,
    ir.Var: _var,
    ir.Argument: _argument,
    ir.Gen: _gen,
    ir.Select: _select,
    ir.CallTool: _call_tool,
    ir.CallTools: _call_tools,
    ir.RoleBegin: _role_begin,
    ir.RoleEnd: _role_end,
    ir.Reasoning: _reasoning,
    ir.Media: _media,
    ir.ProgramCall: _program,
    ir.ScopeBegin: _scope_begin,
    ir.ScopeEnd: _scope_end,
    ir.SetVar: _set_var,
    ir.ForkInto: _fork,
    ir.JoinFrom: _join,
    ir.TakeSnapshot: _snapshot,
    ir.RollbackTo: _rollback,
    ir.Commit: _commit,
}
