"""The parts of the radix tree: nodes, leases on paths, transfers in flight."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from caesura.runtime.kv.pages import Handle
from caesura.scheduler.types import MoveId, MoveKind


class Hold(StrEnum):
    """How firmly a lease holds its path."""

    RUNNING = "running"  # pinned on the device
    PAUSED = "paused"  # remembered, and revocable from the tail


@dataclass(slots=True, eq=False)
class Transfer:
    """A copy between the tiers in flight. A split adds the new upper half to ``nodes``."""

    id: MoveId
    kind: MoveKind
    nodes: list[Node]
    drop_device: bool = False  # free the device pages when the copy-out is acknowledged


@dataclass(slots=True, eq=False)
class Node:
    """A run of whole pages. ``device`` and ``host`` are empty when the run is not on that tier.

    ``running`` and ``paused`` count the leases anchored here or below, so a node nobody needs has both at 0.
    """

    id: int
    parent: Node | None
    start: int
    tokens: list[int]
    device: list[Handle] = field(default_factory=list)
    host: list[Handle] = field(default_factory=list)
    children: dict[tuple[int, ...], Node] = field(default_factory=dict)
    leases: set[PrefixLease] = field(default_factory=set)
    transfer: Transfer | None = None
    running: int = 0
    paused: int = 0
    device_children: int = 0
    tick: int = 0

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


@dataclass(slots=True, eq=False)
class PrefixLease:
    """A context's claim on the path from the root to ``node``. Released once; a second release raises."""

    holder: int
    node: Node
    hold: Hold
    released: bool = False

    @property
    def num_tokens(self) -> int:
        return self.node.end
