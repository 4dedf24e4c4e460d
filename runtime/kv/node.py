"""The parts of the radix tree: nodes, leases on paths, transfers in flight; and what it answers."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple

from caesura.runtime.kv.pages import Handle, row
from caesura.scheduler.types import ContextId, MoveId, MoveKind, PageId


class Hold(StrEnum):
    """How firmly a lease holds its path."""

    RUNNING = "running"  # pinned on the device
    PAUSED = "paused"  # remembered, and revocable from the tail


class Share(NamedTuple):
    """One node's part of the tree's totals, in pages."""

    evictable: int  # on the device, and nobody's
    paused: int  # on the device, and held by paused leases alone
    blocked: int  # the same, but a copy at or below the node must end first
    spare_host: int  # host pages that may go: second copies, and runs that nobody holds
    doubled_host: int  # of these, the second copies
    spare_disk: int  # pages on the disk that may go


NO_SHARE = Share(0, 0, 0, 0, 0, 0)


@dataclass(slots=True, eq=False)
class Transfer:
    """A copy between the tiers in flight. A split adds the new upper half to ``nodes``."""

    id: MoveId
    kind: MoveKind
    nodes: list[Node]
    failed: bool = False  # a copy in that brought nothing: given up as soon as nothing else moves below


@dataclass(slots=True, eq=False)
class Node:
    """A run of whole pages. ``device`` and ``host`` are empty when the run is not on that tier.

    ``host`` is the copy below the device. It lies in memory or, ``on_disk``, in the file, never in both; while it is
    on its way down, ``sinking`` are the pages it will have there.

    ``running``, ``paused`` and ``moving`` count the leases and transfers here *or below*, so a node that nobody
    needs has all three at 0, and with it everything under it. Children are keyed by their first page's tokens.
    """

    id: int
    parent: Node | None
    start: int
    tokens: list[int]
    device: list[Handle] = field(default_factory=list)
    host: list[Handle] = field(default_factory=list)
    on_disk: bool = False
    sinking: list[Handle] = field(default_factory=list)
    children: dict[tuple[int, ...], Node] = field(default_factory=dict)
    leases: dict[ContextId, PrefixLease] = field(default_factory=dict)
    transfer: Transfer | None = None
    spoiled: bool = (
        False  # holds what went wrong: nobody finds it, and it goes when the copies at or below it have ended
    )
    leaving: bool = False  # the device pages go when copied and nothing below is there, unless someone runs on them
    running: int = 0
    paused: int = 0
    moving: int = 0
    device_children: int = 0
    tick: int = 0
    share: Share = NO_SHARE

    @property
    def end(self) -> int:
        """Position after this node's last token."""
        return self.start + len(self.tokens)

    @property
    def device_ready(self) -> bool:
        return bool(self.device) and (self.transfer is None or self.transfer.kind is not MoveKind.IN)

    @property
    def host_ready(self) -> bool:
        return bool(self.host) and (self.transfer is None or self.transfer.kind is not MoveKind.OUT)

    @property
    def held(self) -> bool:
        return self.running + self.paused > 0

    @property
    def pinned(self) -> bool:
        return self.running + self.paused + self.moving > 0

    def frontier(self) -> Node:
        """The deepest node on the path down to here above which (and with which) all is usable on the device."""
        ready = node = self
        while node.parent is not None:
            if not node.device_ready:
                ready = node.parent
            node = node.parent
        return ready

    def path(self) -> list[Node]:
        """Root to this node, the root left out."""
        nodes = []
        node = self
        while node.parent is not None:
            nodes.append(node)
            node = node.parent
        nodes.reverse()
        return nodes

    def subtree(self) -> list[Node]:
        """This node and all below it, parents first."""
        found = [self]
        for node in found:
            found.extend(node.children.values())
        return found

    def shares(self) -> Share:
        """What this node adds to the tree's totals as it is now."""
        pages = len(self.device)
        spare = self.transfer is None and not self.leaving and (pages or not self.pinned)
        below = len(self.host) if spare else 0
        return Share(
            0 if self.pinned else pages,
            pages if self.paused and not self.running else 0,
            pages if self.moving and not self.held else 0,
            0 if self.on_disk else below,
            below if pages and not self.on_disk else 0,
            below if self.on_disk else 0,
        )


@dataclass(slots=True, eq=False)
class PrefixLease:
    """A context's claim: the path from the root to ``node``, and the ``tail`` pages after it.

    The path may lie on the device only down to the node's frontier; a tail exists only when all of it does.
    Released once; a second release raises.
    """

    holder: ContextId
    node: Node
    hold: Hold
    tail: list[Handle] = field(default_factory=list)
    ahead: int = 0  # computed tokens in the tail
    reserved: int = 0  # the step being planned will compute up to here
    awaits: set[MoveId] = field(default_factory=set)  # ids of finished moves may linger
    rows: list[PageId] | None = None  # the page table, kept while RUNNING with everything on the device
    released: bool = False

    @property
    def num_tokens(self) -> int:
        """Tokens of the path, wherever they lie."""
        return self.node.end

    @property
    def computed(self) -> int:
        """Leading tokens whose KV is usable on the device."""
        if self.rows is not None:  # at every step of every running context
            return self.node.start + len(self.node.tokens) + self.ahead
        frontier = self.frontier
        return frontier.end + self.ahead if frontier is self.node else frontier.end

    @property
    def frontier(self) -> Node:
        """The deepest node of the path down to which all is usable. At hand while the page table is."""
        return self.node if self.rows is not None else self.node.frontier()

    def table(self) -> list[PageId]:
        """Rows of the usable pages in order, the tail's included."""
        if self.rows is not None:
            return self.rows
        frontier = self.frontier
        found = [row(handle) for node in frontier.path() for handle in node.device]
        return found + [row(handle) for handle in self.tail]


@dataclass(frozen=True, slots=True)
class Match:
    """How much of a prompt lies where: ready on the device, then continuing on the host."""

    device_tokens: int
    host_tokens: int


@dataclass(frozen=True, slots=True)
class Published:
    """``kept`` are the pages now standing for the published tokens; ``surplus`` are duplicates to free."""

    num_tokens: int
    kept: list[Handle]
    surplus: list[Handle]
