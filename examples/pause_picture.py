"""The scene of pause_timeline.py as a picture: who waits for a tool, and where its KV lies meanwhile.

An observer of the engine notes the contexts after every step, the rest draws them: the picture in the README.

    python examples/pause_picture.py --policies discard,min_waste --out pause.svg
"""

from __future__ import annotations

from html import escape
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import typer
from caesura.runtime.engine import Engine
from caesura.runtime.trace import state_of
from caesura.scheduler.types import Action, StepPlan, StepResult
from pause_timeline import AGENTS, Agent, Timeline

WIDTH, LEFT, RIGHT, LANE, GAP, HEAD, FOOT = 1000, 96, 28, 56, 24, 70, 66
END_S, MOST_TOKENS = 3.25, 400
COLOURS = {"running": "#1f9d6b", "kept": "#a6dcc3", "host": "#7d9bf0", "gone": "#f7d9d3"}
LEGEND = {"running": "computing", "kept": "waiting, KV on the device", "host": "KV on the host", "gone": "KV dropped"}
ABOUT = {
    "discard": "a tool call is the end of a request: what nobody else uses is dropped and computed again",
    "min_waste": "nothing until memory is wanted, then the least missed part, by the cheaper way",
}


class Moment(NamedTuple):
    """One context after a step."""

    at_s: float
    state: str
    tokens: int
    on_device: int


class Recorder(Timeline):
    """Runs the scene under a policy and keeps what a picture needs."""

    def __init__(self, policy: str) -> None:
        super().__init__(policy)
        self.moments: dict[str, list[Moment]] = {name: [] for name in AGENTS}
        self.notes: list[tuple[str, float, str]] = []  # agent, moment, what was decided
        for name, (start_s, *_) in AGENTS.items():
            self.sim.after(start_s, Agent(self, name).start)
        self.sim.run()

    def on_step(self, engine: Engine, plan: StepPlan, result: StepResult) -> None:
        for one in plan.decisions:
            what, costs = f"{one.action.value} {one.affected_tokens} tokens", one.costs
            if one.action is Action.SWAP:
                what += (
                    f" for {costs.swap_token_s:.1f} token-seconds; to drop them would cost "
                    f"{costs.discard_token_s:.1f}, to keep them {costs.preserve_token_s:.0f}"
                )
            self.notes.append((self.names[one.context_id], one.now, what))
        for context in engine.scheduler.contexts.values():
            held = engine.ledger.computed(context.id)
            self.moments[self.names[context.id]].append(
                Moment(self.clock.now(), state_of(context), context.num_tokens, held)
            )


def x(at_s: float) -> float:
    return round(LEFT + (WIDTH - LEFT - RIGHT) * at_s / END_S, 1)


def text(at: float, y: float, words: str, style: str = "", anchor: str = "start") -> str:
    return f'<text x="{at}" y="{y}" text-anchor="{anchor}" class="{style}">{escape(words)}</text>'


def box(start_s: float, end_s: float, bottom: float, tokens: int, kind: str, below: int = 0) -> str:
    """Tokens over a span of time, on top of ``below`` others."""
    height, base = (round(LANE * count / MOST_TOKENS, 1) for count in (tokens, below))
    width = round(max(x(end_s) - x(start_s), 0.8), 1)
    y = round(bottom - base - height, 1)
    return f'<rect x="{x(start_s)}" y="{y}" width="{width}" height="{height}" fill="{COLOURS[kind]}"/>'


def lane(recorder: Recorder, name: str, bottom: float) -> list[str]:
    """One agent: its tokens over time, by where they lie, and what it waits for."""
    start_s, _, tool, tool_s, _ = AGENTS[name]
    moments = recorder.moments[name]
    drawn = [f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{bottom}" y2="{bottom}" class="rule"/>']
    drawn.append(text(LEFT - 16, bottom - 8, f"agent {name}", "name", "end"))
    first = Moment(start_s, "running", moments[0].tokens, moments[0].on_device)
    kept: list[Moment] = []
    for moment in (first, *moments):  # neighbours that look alike are one box
        if not kept or (moment.state, moment.on_device) != (kept[-1].state, kept[-1].on_device):
            kept.append(moment)
    for now, then in pairwise([*kept, moments[-1]]):
        waits = now.state not in ("running", "queued", "idle")
        drawn.append(box(now.at_s, then.at_s, bottom, now.on_device, "kept" if waits else "running"))
        if waits and now.tokens - now.on_device > 1:
            lost = "host" if now.state == "swapped" else "gone"
            drawn.append(box(now.at_s, then.at_s, bottom, now.tokens - now.on_device, lost, now.on_device))
    paused_s = next(moment.at_s for moment in moments if moment.state not in ("running", "queued", "idle"))
    drawn.append(text(x(paused_s + tool_s / 2), bottom - 9, f"{tool}, {tool_s:g} s", "tool", "middle"))
    for agent, at_s, what in recorder.notes:
        if agent == name:
            high = round(bottom - LANE * moments[-1].tokens / MOST_TOKENS - 4, 1)
            drawn.append(f'<path d="M {x(at_s)} {high} l -4 -7 h 8 z" class="mark"/>')
            drawn.append(text(x(at_s) + 8, high - 1, what, "note"))
    return drawn


def picture(policies: list[str]) -> str:
    """The scene under each policy, one below the other, as SVG."""
    panel = HEAD + len(AGENTS) * (LANE + GAP)
    height = len(policies) * panel + FOOT
    drawn = []
    for place, policy in enumerate(policies):
        recorder, top = Recorder(policy), place * panel
        account = recorder.engine.scheduler.meter
        title = (
            f'<tspan class="title">{policy}</tspan><tspan dx="14" class="about">{escape(ABOUT.get(policy, ""))}</tspan>'
        )
        drawn.append(f'<text x="{LEFT}" y="{top + 34}">{title}</text>')
        tally = f"{account.tokens_computed:,} tokens computed, {account.tokens_recomputed:,} of them again"
        drawn.append(text(LEFT, top + 55, tally, "bad" if account.tokens_recomputed > 100 else "good"))
        for row, name in enumerate(AGENTS):
            drawn += lane(recorder, name, top + HEAD + (row + 1) * LANE + row * GAP)
    foot = height - FOOT + 14
    drawn += [text(x(second), foot, f"{second} s", "axis", "middle") for second in range(4)]
    at = float(LEFT)
    for kind, words in LEGEND.items():
        drawn.append(f'<rect x="{at}" y="{foot + 17}" width="14" height="14" rx="2" fill="{COLOURS[kind]}"/>')
        drawn.append(text(at + 20, foot + 29, words, "axis"))
        at += 50 + 7.2 * len(words)
    style = (
        "text{font:14px ui-sans-serif,system-ui,'Segoe UI',Helvetica,Arial,sans-serif;fill:#2b2f36}"
        "rect{shape-rendering:crispEdges}.title{font-size:19px;font-weight:700}.about,.axis{fill:#6b7280}"
        ".good{font-weight:600;fill:#1f7a55}.bad{font-weight:600;fill:#9a3412}.axis{font-size:13px}"
        ".name{font-weight:600}.tool{font-style:italic;font-size:13px}.note{font-size:12.5px;fill:#9a3412}"
        ".mark{fill:#9a3412}.rule{stroke:#d8d5cc}"
    )
    label = f"Three agents that pause at tool calls, under {escape(' and '.join(policies))}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{label}">'
        f"<style>{style}</style>"
        f'<rect width="{WIDTH}" height="{height}" rx="10" fill="#fdfcf9"/>\n' + "\n".join(drawn) + "\n</svg>\n"
    )


def main(policies: str = "discard,min_waste", out: Path = Path("out/pause.svg")):
    """Draw the scene under some policies (`caesura run --help` lists them)."""
    try:
        drawn = picture([name.strip() for name in policies.split(",")])
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(drawn)
    print(f"drawn: {out}")


if __name__ == "__main__":
    typer.run(main)
