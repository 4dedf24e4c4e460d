"""The radix tree on its own: probing, splitting, sharing, order of eviction."""

from __future__ import annotations

import pytest
from caesura.runtime.errors import BrokenInvariant
from caesura.runtime.kv.node import Hold, Node
from caesura.runtime.kv.pages import PagePool
from caesura.runtime.kv.radix import Match, RadixTree
from caesura.scheduler.types import ContextId


class Grove:
    """A tree of page size 2 and a pool to fill it from."""

    def __init__(self) -> None:
        self.tree = RadixTree(2)
        self.pool = PagePool(100, "device")
        self.holders = 0

    def grow(self, tokens: list[int], tick: int = 1, namespace: str = "", release: bool = True) -> Node:
        """Publish ``tokens`` as one context would; returns the node its lease ends at."""
        tree = self.tree
        self.holders += 1
        lease = tree.lease(ContextId(self.holders), Hold.RUNNING, tree.root(namespace))
        pages = self.pool.allocate(len(tokens) // 2)
        assert pages is not None
        self.pool.free(tree.publish(lease, tokens, pages, tick).surplus)
        node = lease.node
        if release:
            tree.release(lease, tick)
        return node

    def evict(self) -> list[int] | None:
        """Take the next victim whole; returns its tokens."""
        node = self.tree.next_device_victim()
        if node is None:
            return None
        tokens = list(node.tokens)
        self.pool.free(self.tree.set_device(node, []))
        self.tree.remove(node)
        return tokens


def test_probe_counts_whole_pages_and_changes_nothing() -> None:
    grove = Grove()
    grove.grow([1, 2, 3, 4, 5, 6])
    before = [(node.id, list(node.tokens), node.tick, node.share) for node in grove.tree.nodes.values()]
    assert grove.tree.probe("", [1, 2, 3, 4, 5, 6, 7]) == Match(6, 0)
    assert grove.tree.probe("", [1, 2, 3, 9]) == Match(2, 0)
    assert grove.tree.probe("", [1, 2, 3, 4, 5, 6], limit=5) == Match(4, 0)
    assert grove.tree.probe("", [1]) == grove.tree.probe("", [9, 9]) == grove.tree.probe("", []) == Match(0, 0)
    assert grove.tree.probe("", (1, 2, 3, 4)) == Match(4, 0)
    assert before == [(node.id, list(node.tokens), node.tick, node.share) for node in grove.tree.nodes.values()]


def test_namespaces_do_not_share() -> None:
    grove = Grove()
    grove.grow([1, 2, 3, 4], namespace="alice")
    assert grove.tree.probe("alice", [1, 2, 3, 4]) == Match(4, 0)
    assert grove.tree.probe("bob", [1, 2, 3, 4]) == Match(0, 0)
    assert "bob" not in grove.tree.roots()


def test_split_keeps_identity_with_the_deeper_half() -> None:
    grove = Grove()
    node = grove.grow([1, 2, 3, 4, 5, 6], release=False)
    pages = list(node.device)
    upper = grove.tree.split(node, 2)
    assert (upper.tokens, upper.device, upper.start) == ([1, 2], pages[:1], 0)
    assert (node.tokens, node.device, node.start) == ([3, 4, 5, 6], pages[1:], 2)
    assert node.parent is upper
    assert list(node.leases) == [1] and not upper.leases
    assert upper.running == node.running == 1


def test_split_refuses_a_cut_through_a_page() -> None:
    grove = Grove()
    node = grove.grow([1, 2, 3, 4])
    for length in (0, 1, 4, 6):
        with pytest.raises(BrokenInvariant, match="split"):
            grove.tree.split(node, length)


def test_merge_undoes_a_split() -> None:
    grove = Grove()
    node = grove.grow([1, 2, 3, 4, 5, 6])
    pages = list(node.device)
    grove.tree.split(node, 4)
    grove.tree.split(node.parent or node, 2)
    grove.tree.merge(node)
    assert (node.tokens, node.device, node.start) == ([1, 2, 3, 4, 5, 6], pages, 0)
    assert len(grove.tree.nodes) == 2
    assert grove.tree.evictable_pages == 3
    assert grove.tree.probe("", [1, 2, 3, 4, 5, 6]) == Match(6, 0)


def test_publishing_what_is_there_returns_the_duplicates() -> None:
    grove = Grove()
    first = grove.grow([1, 2, 3, 4])
    grove.grow([1, 2, 3, 4, 5, 6])
    assert grove.pool.num_free == 100 - 3
    assert first.tokens == [1, 2, 3, 4]


def test_a_node_grows_only_under_its_sole_owner() -> None:
    grove = Grove()
    first = grove.grow([1, 2], release=False)
    second = grove.grow([1, 2, 3, 4], release=False)
    assert first is not second
    assert first.end == 2, "the first context's lease must not grow with the second's tokens"


def test_a_second_release_raises() -> None:
    grove = Grove()
    lease = grove.tree.lease(ContextId(1), Hold.RUNNING, grove.tree.root(""))
    grove.tree.release(lease, 1)
    with pytest.raises(BrokenInvariant, match="released twice"):
        grove.tree.release(lease, 2)
    assert not grove.tree.nodes, "an empty namespace leaves no root behind"


def test_eviction_is_least_recently_used_and_leaf_first() -> None:
    grove = Grove()
    grove.grow([1, 1], tick=1)
    grove.grow([2, 2, 3, 3], tick=2)
    grove.grow([2, 2, 4, 4], tick=3)
    grove.grow([5, 5], tick=4)
    grove.grow([1, 1], tick=5)  # used again
    assert [grove.evict() for _ in range(6)] == [[3, 3], [4, 4], [2, 2], [5, 5], [1, 1], None]
    assert grove.pool.num_free == 100
    assert grove.tree.evictable_pages == 0


def test_what_is_held_is_not_evicted() -> None:
    grove = Grove()
    held = grove.grow([1, 1], release=False)
    grove.grow([1, 1, 2, 2])
    assert grove.tree.evictable_pages == 1
    assert grove.evict() == [2, 2]
    assert grove.evict() is None
    with pytest.raises(BrokenInvariant, match="removed with 1 device pages"):
        grove.tree.remove(held)


def test_counters_never_go_below_zero() -> None:
    grove = Grove()
    node = grove.grow([1, 1])
    with pytest.raises(BrokenInvariant, match="-1 running"):
        grove.tree._count(node, Hold.RUNNING, -1)


def test_the_order_forgets_outdated_entries() -> None:
    grove = Grove()
    for tick in range(1, 1_000):
        grove.grow([1, 1], tick=tick)
    assert len(grove.tree._device_order._heap) < 100
