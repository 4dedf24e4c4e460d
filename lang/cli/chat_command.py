"""``caesura chat``: one context that lives as long as the conversation. Between two questions it is paused."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator
from functools import partial
from typing import Any

from caesura.lang import HTTPBackend, Tool, assistant, gen, get_server_info, system, user
from caesura.lang.backends.engine import EngineBackend
from caesura.lang.cli.output import print_json, stdout
from caesura.lang.cli.run_command import call_arguments, start_backend
from caesura.lang.errors import ProgramError, UnknownVariable
from caesura.lang.printable import printable
from caesura.lang.program import Program
from caesura.lang.runner import runner
from caesura.lang.state import ProgramState
from caesura.runtime.embedded.calculator import CalculatorError, calculate
from caesura.runtime.errors import ContextTooLong
from caesura.runtime.text.tool_events import CallEnded, CallStarted, ContentDelta
from caesura.runtime.text.tool_parser import ToolCallParser, ToolFormat
from rich.console import Console
from rich.text import Text

MAX_TOKENS = 512


class Conversation:
    """A program that takes questions from a queue, and the handle by which they are put in."""

    def __init__(self, backend: Any, *, system_text: str, tools: list[Tool], temperature: float) -> None:
        self._tools = tools
        self._temperature = temperature
        self._inbox: asyncio.Queue[tuple[str, str] | None] = asyncio.Queue()
        self._count = 0
        program = Program(self._body, name="chat", tools=tools)
        self.state: ProgramState = program.run(system_text, backend=backend, stream=True)

    async def _body(self, s: ProgramState, system_text: str) -> None:
        if system_text:
            s += system(system_text)
        while (item := await self._inbox.get()) is not None:
            name, question = item
            before = s.snapshot()
            s += user(question)
            s += assistant(gen(name, tools=self._tools or None, max_tokens=MAX_TOKENS, temperature=self._temperature))
            try:
                await s.get_async(name)
            except UnknownVariable:  # interrupted: as if it had not been asked
                if before.saved is not None:
                    s.rollback(before)

    def ask(self, question: str) -> str:
        """Put a question; returns the name of its answer."""
        self._count += 1
        name = f"answer{self._count}"
        runner().call(self._inbox.put_nowait, (name, question))
        return name

    def pieces(self, name: str) -> Iterator[tuple[str, bool]]:
        """The answer as it comes, raw, with a mark on the last piece of each generation."""
        events = self.state.text_async_iter(name, return_meta_data=True)

        async def following() -> tuple[str, dict[str, Any]] | None:
            return await anext(events, None)

        while (event := runner().wait(following())) is not None:
            yield event[0], event[1].get("finish_reason") is not None

    def interrupt(self) -> None:
        """Stop the answer that is being written."""
        runner().call(self.state.stop)

    def close(self) -> None:
        """End the conversation."""
        runner().call(self._inbox.put_nowait, None)
        self.state.error()


def chat_command(
    *,
    model: str | None,
    url: str | None = None,
    system_text: str,
    with_tools: bool,
    temperature: float | None,
    as_json: bool,
) -> None:
    """Talk until the input ends. With ``as_json`` the messages are printed at the end, and nothing else."""
    terminal = sys.stdin.isatty() and not as_json
    console = Console(quiet=True) if as_json else stdout()
    with start_backend(model, None, url) as backend:
        embedded = get_server_info(backend)["model"] == "embedded"
        results: list[str] = []
        tools = [_calculator(results)] if with_tools and embedded else []
        heat = temperature if temperature is not None else (0.0 if embedded else 0.7)
        begin = partial(Conversation, backend, system_text=system_text, tools=tools, temperature=heat)
        talk = begin()
        messages: list[dict[str, Any]] = []
        if terminal:
            hint = "Ask for a calculation. " if tools else ""
            console.print(Text(f"{backend.name}. {hint}Ctrl-C stops an answer, Ctrl-D ends.", "dim"))
        try:
            for question in questions(console, prompt=terminal):
                for told in ("the window is full: the conversation begins anew", "left out: {}"):
                    printer = Printer(console, backend, tools, results, can_go_on=terminal)
                    too_long = _answer(talk, question, printer)
                    if too_long is None:
                        break
                    messages += _messages(talk)
                    talk.close()
                    talk = begin()
                    printer.note(f"({told.format(too_long)})")
        finally:
            messages += _messages(talk)
            talk.close()
            if as_json:
                print_json({"messages": messages})


def _messages(talk: Conversation) -> list[dict[str, Any]]:
    core = talk.state.core_or_none
    return core.messages() if core is not None else []


def questions(console: Console, *, prompt: bool) -> Iterator[str]:
    """Lines of standard input, without empty ones; with a prompt on a terminal."""
    if not prompt:
        yield from (line.strip() for line in sys.stdin if line.strip())
        return
    import readline  # noqa: F401 - editing and history for input()

    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            console.print()
            return
        except KeyboardInterrupt:
            console.print(Text("\n(Ctrl-D ends)", "dim"))
            continue
        if line:
            yield line


def _answer(talk: Conversation, question: str, printer: Printer) -> ContextTooLong | None:
    """Print the answer. What is returned ended the conversation: the question did not fit its window."""
    name = talk.ask(question)
    try:
        for text, last in talk.pieces(name):
            printer.take(text, last)
    except KeyboardInterrupt:
        talk.interrupt()
        if not printer.can_go_on:
            raise
        printer.note("(stopped)")
    except UnknownVariable:
        pass
    except ProgramError as error:
        if not isinstance(error.root, ContextTooLong):
            raise
        return error.root
    printer.end()
    return None


class Printer:
    """Prints an answer as it comes: calls as one line each, everything else as text. ``can_go_on``: who reads it can
    stop it, and ask something else."""

    def __init__(
        self, console: Console, backend: Any, tools: list[Tool], results: list[str], *, can_go_on: bool
    ) -> None:
        self.can_go_on = can_go_on
        self._console = console
        self._format = _tool_format(backend)
        self._names = [tool.name for tool in tools]
        self._results = results
        self._parser = self._new_parser()
        self._called: dict[int, str] = {}
        self._mid_line = False

    def _new_parser(self) -> ToolCallParser | None:
        return ToolCallParser(self._format, self._names) if self._names else None

    def take(self, text: str, last: bool) -> None:
        """More of the answer."""
        self._print_results()
        if self._parser is None:
            self._write(text)
            return
        events = self._parser.push(text)
        if last:
            events = [*events, *self._parser.finish()]
            self._parser = self._new_parser()
        for event in events:
            if isinstance(event, ContentDelta):
                self._write(event.text)
            elif isinstance(event, CallStarted):
                self._called[event.index] = event.name
            elif isinstance(event, CallEnded):
                self.note(f"{self._called[event.index]}({call_arguments(event.arguments)})")

    def _print_results(self) -> None:
        while self._results:
            self.note(f"  = {self._results.pop(0)}")

    def _write(self, text: str) -> None:
        if text and (self._mid_line or text.strip()):
            self._console.print(Text(printable(text)), end="", soft_wrap=True)
            self._mid_line = True

    def note(self, text: str) -> None:
        """A line about the answer."""
        self.end()
        self._console.print(Text(printable(text), "dim"), soft_wrap=True)

    def end(self) -> None:
        """End the line that is being written."""
        if self._mid_line:
            self._console.print()
            self._mid_line = False


def _tool_format(backend: Any) -> ToolFormat:
    """How calls stand in the text. Only a Caesura server says; elsewhere the language writes them itself."""
    if isinstance(backend, EngineBackend):
        return backend.service.tool_format
    if isinstance(backend, HTTPBackend):
        return ToolFormat(runner().wait(backend.model_info())["tool_call_parser"])
    return ToolFormat.HERMES


def _calculator(results: list[str]) -> Tool:
    def calculator(expression: str) -> str:
        try:
            value = calculate(expression)
        except CalculatorError as error:
            value = f"error: {error}"
        results.append(value)
        return value

    return Tool(calculator, description="Evaluate an arithmetic expression.")
