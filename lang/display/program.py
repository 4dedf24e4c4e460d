"""A program before it runs: its signature, its tools, and its nodes as far as they are known."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING

from caesura.lang import ir
from caesura.lang.display.markup import Markup, folded, join, table, tag, view

if TYPE_CHECKING:
    from caesura.lang.program import Program
    from caesura.lang.trace import Trace

_CLASSES: dict[type[ir.Expr], str] = {
    ir.Gen: "cz-g",
    ir.Select: "cz-x",
    ir.CallTool: "cz-t",
    ir.CallTools: "cz-t",
}


def program_html(program: Program) -> str:
    """Signature, documentation, tools, and the nodes of a symbolic run."""
    arguments = ", ".join(str(parameter) for parameter in program.own_parameters)
    parts = [tag("div", tag("b", program.name), tag("code", f"({arguments})"), cls="cz-head")]
    if doc := inspect.getdoc(program.func):
        parts.append(tag("div", doc))
    if program.tools:
        rows: list[list[str]] = [[tag("code", tool.name), tool.description] for tool in program.tools]
        parts.append(table(rows, cls="cz-tools"))
    parts.append(folded("what it adds to its state", nodes_html(program.trace()), is_open=True))
    return view(*parts)


def trace_html(trace: Trace) -> str:
    """A symbolic trace on its own."""
    return view(tag("div", tag("b", trace.program), cls="cz-head"), nodes_html(trace))


def nodes_html(trace: Trace) -> Markup:
    """The nodes in order, branches as lists in the list, and why it stopped if it did."""
    items = [_node(node) for node in trace.nodes]
    parts = [tag("div", *items, cls="cz-code")]
    for number, branch in enumerate(trace.branches):
        parts.append(folded(f"branch {number}", nodes_html(branch), is_open=True))
    if not trace.complete:
        parts.append(tag("div", f"… the rest depends on what is generated ({trace.stopped_by})", cls="cz-soft"))
    return join(*parts)


def _node(node: ir.Expr) -> Markup:
    if isinstance(node, ir.Text):
        return join(node.text)
    if isinstance(node, ir.RoleBegin):
        return join(Markup("<br>"), tag("span", f"{node.role} ", cls="cz-m"))
    if isinstance(node, ir.RoleEnd):
        return Markup("")
    label = f"{node.name}" if isinstance(node, (ir.Var, ir.Argument)) else node.label()
    known = next((cls for kind, cls in _CLASSES.items() if isinstance(node, kind)), "cz-c")
    return tag("strong" if isinstance(node, ir.Gen) else "em", label, cls=known)
