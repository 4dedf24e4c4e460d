"""A model of what the pages *contain*, run beside the ledger.

Computing token p of a context writes a digest of everything up to p into its page; copies carry digests at any moment
between their begin and their acknowledgement; free pages and targets of unfinished copies hold garbage. A page that
is given away, written or read at the wrong moment shows up as a wrong digest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from caesura.runtime.kv.check import check, dump
from caesura.runtime.kv.ledger import KVLedger
from caesura.runtime.kv.node import Node
from caesura.runtime.kv.pages import row
from caesura.scheduler.ledger import Segment
from caesura.scheduler.types import Action, ContextId, Move, MoveId, MoveKind, PageId

GARBAGE = -1
Arena = list[list[int]]


def disk_pays(start: int, num_tokens: int) -> bool:
    """All runs but those that are short and shallow."""
    return start + num_tokens > 2


def digests(namespace: int, tokens: Sequence[int]) -> list[int]:
    """What position p of a context must hold, for every p."""
    found, last = [], hash((namespace,))
    for token in tokens:
        last = hash((last, token))
        found.append(last)
    return found


@dataclass
class Flight:
    """A tier copy between begin and acknowledgement."""

    move: Move
    contents: list[list[int]]  # of the source, when the copy began
    begun: bool = False  # the ledger's move has been taken by the executor
    arrived: bool = False


@dataclass
class Subject:
    """A context as its owner sees it."""

    namespace: int
    tokens: list[int] = field(default_factory=list)
    contents: list[int] = field(default_factory=list)


class KVModel:
    """The ledger, two arenas of digests, and everything a scheduler and an executor would do with them."""

    def __init__(self, page_size: int, device_pages: int, host_pages: int, disk_pages: int = 0) -> None:
        self.size = page_size
        self.ledger = KVLedger(page_size, device_pages, host_pages, disk_pages, disk_pays)
        if disk_pages % 8:  # sinks whatever it can, whenever it may
            self.ledger.below.kept_free_pages = host_pages
        self.device: Arena = [[GARBAGE] * page_size for _ in range(device_pages)]
        self.host: Arena = [[GARBAGE] * page_size for _ in range(host_pages + disk_pages)]  # memory, then the disk
        self.subjects: dict[ContextId, Subject] = {}
        self.planned: dict[ContextId, tuple[int, int, tuple[PageId, ...]]] = {}  # start, end, page table
        self.flights: dict[MoveId, Flight] = {}
        self.next_id = 0
        self.tick = 0
        self.seen: dict[str, int] = {}  # how often each interesting thing happened

    # -- contexts ---------------------------------------------------------------------------------------------

    @property
    def room_tokens(self) -> int:
        return len(self.device) * self.size

    def open(self, namespace: int, tokens: Sequence[int] = ()) -> ContextId:
        context = ContextId(self.next_id)
        self.next_id += 1
        self.ledger.open(context, f"ns{namespace}")
        self.subjects[context] = Subject(namespace)
        self.append(context, tokens)
        return context

    def append(self, context: ContextId, tokens: Sequence[int]) -> None:
        subject = self.subjects[context]
        subject.tokens.extend(tokens[: max(0, self.room_tokens - len(subject.tokens))])
        subject.contents = digests(subject.namespace, subject.tokens)

    def fork(self, parent: ContextId) -> ContextId:
        child = ContextId(self.next_id)
        self.next_id += 1
        source = self.subjects[parent]
        self.ledger.open(child, "")
        self.ledger.fork(parent, child)
        self.subjects[child] = Subject(source.namespace, list(source.tokens), list(source.contents))
        if self.ledger.device.num_pages and self._lease_tail(child):
            self._note("shared unfinished page")
        return child

    def _lease_tail(self, context: ContextId) -> int:
        lease = self.ledger.leases.get(context)
        return len(lease.tail) if lease is not None else 0

    def truncate(self, context: ContextId, num_tokens: int) -> None:
        subject = self.subjects[context]
        del subject.tokens[num_tokens:]
        del subject.contents[num_tokens:]
        self.planned.pop(context, None)
        self.ledger.pause(context)
        self.ledger.truncate(context, num_tokens)
        assert self.ledger.computed(context) <= num_tokens

    def pause(self, context: ContextId) -> None:
        self.planned.pop(context, None)
        self.ledger.pause(context)

    def release(self, context: ContextId) -> None:
        self.planned.pop(context, None)
        self.ledger.release(context)
        assert self.ledger.computed(context) == 0 == self.ledger.held_tokens(context)

    def discard(self, context: ContextId) -> None:
        self.planned.pop(context, None)
        before = self.ledger.free_pages
        assert self.ledger.discard(context) == self.ledger.free_pages - before

    def close(self, context: ContextId, *, keep_cached: bool = True) -> None:
        if self.ledger.is_loading(context):
            self._note("closed while loading")
        self.planned.pop(context, None)
        self.ledger.close(context, keep_cached=keep_cached)
        del self.subjects[context]

    # -- the step ---------------------------------------------------------------------------------------------

    def plan(self, context: ContextId, num_tokens: int, *, load: bool) -> None:
        """What a scheduler does to run ``num_tokens`` of a context in the coming step."""
        ledger, tokens = self.ledger, self.subjects[context].tokens
        if context in self.planned or ledger.is_loading(context) or not tokens:
            return
        limit = len(tokens) - 1
        probed = ledger.tree.probe(f"ns{self.subjects[context].namespace}", tokens, limit)
        computed = ledger.acquire(context, tokens, limit)
        assert computed >= probed.device_tokens
        if load:
            promised = ledger.host_tokens(context, tokens, limit)
            coming = ledger.load(context, tokens, limit)
            assert coming <= promised, f"{coming} tokens coming, {promised} promised"
            if coming:
                moving = {node.transfer.kind for node in self._coming(context) if node.transfer is not None}
                self._note("wait for a sinking run" if MoveKind.DOWN in moving else "load")
                assert ledger.is_loading(context)
                return
        computed = ledger.computed(context)
        end = min(len(tokens), computed + num_tokens)
        if end == computed:
            return
        lacking = ledger.lacking_now(context, end)
        before = (dump(ledger), ledger.free_pages, ledger.evictable_pages, ledger.table(context))
        done = ledger.extend(context, end)
        assert done == (lacking == 0), f"extend said {done}, {lacking} pages were lacking"
        if done:
            self.planned[context] = computed, end, ledger.table(context)
        else:
            self._note("extend refused")
            assert before == (dump(ledger), ledger.free_pages, ledger.evictable_pages, ledger.table(context))

    def _coming(self, context: ContextId) -> list[Node]:
        awaits = self.ledger.leases[context].awaits
        return [node for move in awaits for node in self.ledger.transfers[move].nodes]

    def execute(self, failing: frozenset[int] = frozenset()) -> None:
        """Carry the step out; slices whose number is in ``failing`` are lost between execution and commit."""
        self._begin_flights()
        copies = self.ledger.take_copies()
        carried = [[list(self.device[page]) for page in copy.source] for copy in copies]
        for copy, contents in zip(copies, carried, strict=True):
            assert copy.kind is MoveKind.COPY
            self._note("copy-on-write")
            for page, content in zip(copy.target, contents, strict=True):
                self.device[page] = content
        written: set[tuple[int, int]] = set()
        for context, (start, end, table) in self.planned.items():
            contents = self.subjects[context].contents
            self._read(context, table, start)
            for position in range(start, end):
                slot = table[position // self.size], position % self.size
                assert slot not in written, f"page {slot[0]} slot {slot[1]} is written twice in one step"
                written.add(slot)
                self.device[slot[0]][slot[1]] = contents[position]
        planned, self.planned = self.planned, {}
        for number, (context, (_, end, _)) in enumerate(planned.items()):
            if number in failing:
                self.close(context)
                self._note("lost before commit")
            else:
                self.ledger.commit(context, self.subjects[context].tokens, end)
                assert self.ledger.computed(context) == end

    def _read(self, context: ContextId, table: Sequence[PageId], num_tokens: int) -> None:
        contents = self.subjects[context].contents
        for position in range(num_tokens):
            found = self.device[table[position // self.size]][position % self.size]
            assert found == contents[position], f"context {context} position {position} holds somebody else's KV"

    def spoil(self, context: ContextId, index: int) -> None:
        """A step committed under way has failed: what it wrote at some place of a context's path is wrong."""
        self._note_flights()
        lease = self.ledger.leases.get(context)
        path = lease.node.path() if lease is not None else []
        pages = [row(page) for node in path if node.device_ready for page in node.device]
        if not pages:
            return
        first = index % len(pages)
        wrong = frozenset(pages[first:])
        holders = self.ledger.spoil(wrong)
        assert context in holders
        for holder in holders:  # their own step is built on it
            self.pause(holder)
            assert self.ledger.computed(holder) <= first * self.size
        subject = self.subjects[context]
        found = self.ledger.tree.probe(f"ns{subject.namespace}", subject.tokens)
        assert found.device_tokens + found.host_tokens <= first * self.size, "what went wrong can be found"
        copied = {
            page for flight in self.flights.values() for page in flight.move.source if flight.move.kind is MoveKind.OUT
        }
        for page in wrong - copied:
            self.device[page] = [GARBAGE] * self.size
        self._note("spoiled under a copy" if copied & wrong else "spoiled")

    # -- copies between the tiers -----------------------------------------------------------------------------

    def _ends(self, move: Move) -> tuple[Arena, Arena]:
        source = self.device if move.kind is MoveKind.OUT else self.host
        return source, self.device if move.kind is MoveKind.IN else self.host

    def _note_flights(self) -> None:
        for move in self.ledger.tiers.begun:
            if move.id not in self.flights:
                source, target = self._ends(move)
                self.flights[move.id] = Flight(move, [list(source[page]) for page in move.source])
                for page in move.target:
                    target[page] = [GARBAGE] * self.size
                self._note(f"copy {move.kind.value}")

    def _begin_flights(self) -> None:
        self._note_flights()
        for move in self.ledger.take_moves():
            self.flights[move.id].begun = True

    def arrive(self, index: int) -> None:
        """The bytes of one copy cross the link; the ledger hears of it later."""
        flight = self._flight(index)
        if flight is not None and not flight.arrived:
            source, target = self._ends(flight.move)
            assert [source[page] for page in flight.move.source] == flight.contents, "the source changed under a copy"
            for page, content in zip(flight.move.target, flight.contents, strict=True):
                assert target[page] == [GARBAGE] * self.size, "the target was written under a copy"
                target[page] = list(content)
            flight.arrived = True

    def acknowledge(self, index: int) -> None:
        self.arrive(index)
        flight = self._flight(index)
        if flight is None:
            return
        source, target = self._ends(flight.move)
        assert [source[page] for page in flight.move.source] == flight.contents, "the source changed under a copy"
        assert [target[page] for page in flight.move.target] == flight.contents, "the target changed under a copy"
        del self.flights[flight.move.id]
        self.ledger.acknowledge(flight.move.id)

    def fail(self, index: int) -> None:
        """One copy from or to the disk ends without having brought anything."""
        flying = [flight.move for flight in self.flights.values() if flight.begun and not flight.arrived]
        moves = [move for move in flying if self._uses_disk(move)]
        if index % 2:  # mostly of those that come back: after one of the others the disk is not written
            moves = [move for move in moves if move.kind is MoveKind.IN]
        if not moves:
            return
        move = moves[index % len(moves)]
        source, _ = self._ends(move)
        assert [source[page] for page in move.source] == self.flights[move.id].contents, (
            "the source changed under a copy"
        )
        del self.flights[move.id]
        self.ledger.acknowledge(move.id, failed=True)
        self._note(f"failed {move.kind.value}")
        if move.kind is MoveKind.IN:
            if move.id in self.ledger.transfers:
                self._note("failed while something moves below")
        else:
            assert not self.ledger.disk_writable

    def _uses_disk(self, move: Move) -> bool:
        below = move.source if move.kind is MoveKind.IN else move.target
        return any(page >= self.ledger.num_host_pages for page in below)

    def sink(self) -> None:
        """What a scheduler does every step, whether memory is short or not."""
        free = self.ledger.free_host_pages
        if self.ledger.sink():
            assert self.ledger.disk_writable and free < self.ledger.num_host_pages
            self._note("sink")

    def _flight(self, index: int) -> Flight | None:
        begun = [flight for flight in self.flights.values() if flight.begun]
        return begun[index % len(begun)] if begun else None

    def settle_flights(self) -> None:
        self._begin_flights()
        while self.flights:
            self.acknowledge(0)

    # -- taking memory back -----------------------------------------------------------------------------------

    def reclaim(self, index: int, num_pages: int, action: Action) -> None:
        segments = self.ledger.segments()
        if not segments:
            return
        segment = segments[index % len(segments)]
        before = self.ledger.free_pages + self.ledger.evictable_pages
        done = self.ledger.reclaim(segment.id, min(num_pages, segment.num_pages), action)
        assert self.ledger.free_pages + self.ledger.evictable_pages == before + done.freed
        if done.freed or done.pending:
            self._note(f"reclaim {action.value} as {done.action.value}")
        assert not (done.pending and done.action is Action.DISCARD)

    def squeeze(self, action: Action) -> None:
        """Take everything that paused contexts hold, leaf first: pausing can never keep memory from others."""
        self.settle_flights()
        while leaves := _leaves(self.ledger.segments()):
            for segment in leaves:
                done = self.ledger.reclaim(segment.id, segment.num_pages, action)
                got = done.freed + done.pending  # a tail may free the source of its called-off copy besides
                right = got >= segment.num_pages if segment.id < 0 else got == segment.num_pages
                assert right, f"{segment} gave {done}\n{dump(self.ledger)}"
            self.settle_flights()
        assert self.ledger.paused_pages == 0

    def copy_out(self, index: int) -> None:
        segments = self.ledger.segments()
        if segments:
            self.ledger.copy_out(segments[index % len(segments)].id)

    # -- what must hold ---------------------------------------------------------------------------------------

    def after(self, context: ContextId | None = None, *, full: bool = False) -> None:
        """Call after every operation: poison what is free, then read what was touched (or everything)."""
        self.tick += 1
        self.ledger.advance(self.tick)
        self._note_flights()
        below = self.ledger.below
        for pool, arena in ((self.ledger.device, self.device), (below.host, self.host), (below.disk, self.host)):
            for page in pool.free_rows():
                arena[page] = [GARBAGE] * self.size
        for planned, (_, _, table) in self.planned.items():
            assert self.ledger.table(planned) == table, f"pages of running context {planned} were taken"
        contexts = list(self.subjects) if full else [context] if context in self.subjects else []
        for each in contexts:
            self._check_context(each)
        if full:
            check(self.ledger)
            for name, root in self.ledger.tree.roots().items():
                self._check_tree(root, int(name[2:]))

    def _check_context(self, context: ContextId) -> None:
        computed = self.ledger.computed(context)
        assert computed <= len(self.subjects[context].tokens)
        pending = {page for move, _ in self.ledger.tiers.copies.values() for page in move.target}
        table = self.ledger.table(context)
        if not pending.intersection(table):  # else its last page is written when the step begins
            self._read(context, table, computed)

    def _check_tree(self, root: Node, namespace: int) -> None:
        """Every run that is ready on a tier holds what its path says, needed by someone or not."""
        stack: list[tuple[Node, tuple[int, ...]]] = [(root, ())]
        while stack:
            node, above = stack.pop()
            if node.spoiled:
                continue
            prefix = (*above, *node.tokens)
            contents = digests(namespace, prefix)[node.start :]
            for ready, arena, pages in (
                (node.device_ready, self.device, node.device),
                (node.host_ready, self.host, node.host),
            ):
                found = [value for page in pages for value in arena[row(page)]]
                assert not ready or found == contents, f"node {node.id} holds the wrong KV\n{dump(self.ledger)}"
            stack.extend((child, prefix) for child in node.children.values())

    def finish(self) -> None:
        """Everybody leaves: not one page or lease may stay behind."""
        ledger = self.ledger
        for context in list(self.subjects):
            self.close(context)
        self.settle_flights()
        self.after(full=True)
        assert ledger.free_pages + ledger.evictable_pages == ledger.num_device_pages
        assert not ledger.leases and not ledger.holdings and not ledger.transfers
        assert not any(node.pinned or node.leases for node in ledger.tree.nodes.values())
        ledger.flush()
        check(ledger)
        assert ledger.free_pages == ledger.num_device_pages
        assert ledger.free_host_pages == ledger.num_host_pages
        assert ledger.free_disk_pages == ledger.num_disk_pages
        assert not ledger.tree.nodes

    def _note(self, event: str) -> None:
        self.seen[event] = self.seen.get(event, 0) + 1


def _leaves(segments: list[Segment]) -> list[Segment]:
    parents = {segment.parent for segment in segments}
    return [segment for segment in segments if segment.id not in parents]
