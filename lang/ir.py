"""Frozen nodes: what a program's expressions are before anything runs.

``+`` joins expressions and strings. `label()` names a node in error messages.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from caesura.lang.backend import Constraint
from caesura.lang.errors import DefinitionError
from caesura.lang.sampling import Sampling
from caesura.lang.symbols import Symbol

if TYPE_CHECKING:
    from caesura.lang.choices import ChoicesSamplingMethod
    from caesura.lang.program import Program
    from caesura.lang.state import ProgramState
    from caesura.lang.tools import Tool
    from caesura.lang.typed import OutputType


@dataclass(frozen=True, slots=True, eq=False)
class Expr:
    """Base of all nodes."""

    def __add__(self, other: object) -> Seq:
        return Seq(_parts(self) + _parts(as_expr(other)))

    def __radd__(self, other: object) -> Seq:
        return Seq(_parts(as_expr(other)) + _parts(self))

    def __format__(self, spec: str) -> str:
        raise DefinitionError(
            f"{self.label()} stands inside an f-string, where its text is not known yet; join it with + instead"
        )

    def label(self) -> str:
        """How error messages name this node."""
        return type(self).__name__.lower()


@dataclass(frozen=True, slots=True)
class Seq(Expr):
    """Expressions one after the other."""

    parts: tuple[Expr, ...]


@dataclass(frozen=True, slots=True)
class Text(Expr):
    """Constant text. ``special`` is reserved for markers of the chat template."""

    text: str

    def label(self) -> str:
        shown = self.text if len(self.text) <= 24 else self.text[:21] + "..."
        return f"text({shown!r})"


@dataclass(frozen=True, slots=True, eq=False)
class Var(Symbol, Expr):
    """The value of a variable, known only when the node before it has run."""

    name: str

    def label(self) -> str:
        return f"variable({self.name!r})"


@dataclass(frozen=True, slots=True, eq=False)
class Argument(Symbol, Expr):
    """An argument of a traced program that was not given."""

    name: str

    def label(self) -> str:
        return f"argument({self.name!r})"


@dataclass(frozen=True, slots=True)
class Gen(Expr):
    """A generation. With ``tools`` the model may call them, and goes on when the results are there."""

    name: str | None
    sampling: Sampling = field(default_factory=Sampling)
    constraint: Constraint | None = None
    output: OutputType | None = None
    tools: tuple[Tool, ...] = ()
    tool_choice: str = "auto"
    max_tool_rounds: int = 8
    parallel_tool_calls: bool = True

    def label(self) -> str:
        return f"gen({self.name!r})"


@dataclass(frozen=True, slots=True)
class Select(Expr):
    """A choice among texts by their logprobs."""

    name: str | None
    choices: tuple[str, ...]
    method: ChoicesSamplingMethod

    def label(self) -> str:
        return f"select({self.name!r})"


@dataclass(frozen=True, slots=True)
class ToolInvocation:
    """One call of a tool with a program's own arguments, and how failures are treated (None: as the tool says)."""

    tool: Tool
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    timeout_s: float | None = None
    retries: int | None = None
    expected_s: float | None = None
    on_error: Literal["observe", "raise"] | None = None


@dataclass(frozen=True, slots=True)
class CallTool(Expr):
    """Call a tool and append its result as text."""

    name: str | None
    call: ToolInvocation

    def label(self) -> str:
        return f"call_tool({self.name!r}, {self.call.tool.name})"


@dataclass(frozen=True, slots=True)
class CallTools(Expr):
    """Call several tools at once and append their results, one a line, in the order of the calls."""

    name: str | None
    calls: tuple[ToolInvocation, ...]
    wait: Literal["all", "any"] = "all"

    def label(self) -> str:
        return f"call_tools({self.name!r}, {', '.join(call.tool.name for call in self.calls)})"


@dataclass(frozen=True, slots=True)
class RoleBegin(Expr):
    """Open a turn."""

    role: str

    def label(self) -> str:
        return f"{self.role}_begin"


@dataclass(frozen=True, slots=True)
class RoleEnd(Expr):
    """Close a turn."""

    role: str

    def label(self) -> str:
        return f"{self.role}_end"


@dataclass(frozen=True, slots=True)
class Reasoning(Expr):
    """Split what the generations inside produce into thinking and answer."""

    body: Expr
    model_type: str

    def thinking(self) -> dict[str, str]:
        """By the variables of the generations inside, those of their thinking."""
        gens = (inner for inner in walk(self.body) if isinstance(inner, Gen))
        return {gen.name: f"{gen.name}_reasoning_content" for gen in gens if gen.name is not None}

    def label(self) -> str:
        return f"separate_reasoning({self.model_type!r})"


@dataclass(frozen=True, slots=True)
class Media(Expr):
    """An image or a video."""

    kind: Literal["image", "video"]
    source: Any
    num_frames: int | None = None

    def label(self) -> str:
        return self.kind


@dataclass(frozen=True, slots=True)
class ProgramCall(Expr):
    """Another program, run in place on the same state."""

    program: Program
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def label(self) -> str:
        return f"program {self.program.name}"

    def __getitem__(self, name: str) -> Any:
        raise DefinitionError(self._is_no_state())

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"no attribute {name!r}: {self._is_no_state()}")

    def _is_no_state(self) -> str:
        name = self.program.name
        return (
            f"inside a program, {name}(...) is an expression: add it to the state (s += {name}(...)), or run it on its "
            f"own with {name}.run(...)"
        )


@dataclass(frozen=True, slots=True)
class ScopeBegin(Expr):
    """Start of a variable scope."""

    name: str


@dataclass(frozen=True, slots=True)
class ScopeEnd(Expr):
    """End of a variable scope: the text since its start becomes the variable."""

    name: str


@dataclass(frozen=True, slots=True)
class SetVar(Expr):
    """Set a variable in order with the expressions around it."""

    name: str
    value: Any


@dataclass(frozen=True, slots=True, eq=False)
class ForkInto(Expr):
    """Give each of the children a session with this context."""

    children: tuple[ProgramState, ...]

    def label(self) -> str:
        return f"fork({len(self.children)})"


@dataclass(frozen=True, slots=True, eq=False)
class JoinFrom(Expr):
    """Take the children's variables, or their text, and close them."""

    children: tuple[ProgramState, ...]
    mode: str

    def label(self) -> str:
        return f"join({self.mode!r})"


@dataclass(frozen=True, slots=True, eq=False)
class TakeSnapshot(Expr):
    """Record the state, to return to it."""

    into: Any  # state.Snapshot; it is filled when the node runs

    def label(self) -> str:
        return "snapshot"


@dataclass(frozen=True, slots=True, eq=False)
class RollbackTo(Expr):
    """Return to a snapshot."""

    snapshot: Any

    def label(self) -> str:
        return "rollback"


@dataclass(frozen=True, slots=True)
class Commit(Expr):
    """Send pending text to the backend and compute it."""


def as_expr(value: object) -> Expr:
    """Turn what stands on the right of ``s +=`` into a node."""
    if isinstance(value, Expr):
        return value
    if isinstance(value, str):
        return Text(value)
    if isinstance(value, (list, tuple)):
        return Seq(tuple(as_expr(item) for item in value))
    if value is None:
        raise DefinitionError("None cannot be added to a state; did a helper forget its return?")
    if callable(value):
        raise DefinitionError(f"{value!r} cannot be added to a state: call it, and add what it gives")
    raise DefinitionError(
        f"{type(value).__name__} cannot be added to a state; give a str (str(x)) or an expression such as gen(...)"
    )


def _parts(node: Expr) -> tuple[Expr, ...]:
    return node.parts if isinstance(node, Seq) else (node,)


def flat(node: Expr) -> list[Expr]:
    """The parts of nested sequences, one after the other."""
    return [inner for part in node.parts for inner in flat(part)] if isinstance(node, Seq) else [node]


def walk(node: Expr) -> list[Expr]:
    """The node and everything inside it, in order of execution."""
    if isinstance(node, Seq):
        return [inner for part in node.parts for inner in walk(part)]
    if isinstance(node, Reasoning):
        return [node, *walk(node.body)]
    return [node]
