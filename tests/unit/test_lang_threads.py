"""Other threads: who adds, reads and ends while the language's own thread works; what is left in the end."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import subprocess
import sys
import threading
import time
import weakref

import pytest
from caesura.lang import ScriptedBackend, StateError, function, gen, ir
from caesura.lang.drain import Drain


class SlowToClose(ScriptedBackend):
    """Its sessions close when ``go_on`` is set."""

    def __init__(self, replies):
        super().__init__(replies)
        self.closing, self.go_on = threading.Event(), threading.Event()

    def _session(self, token_ids):
        session = super()._session(token_ids)
        close = session.close

        async def slowly():
            self.closing.set()
            while not self.go_on.is_set():
                await asyncio.sleep(0.005)
            await close()

        session.close = slowly
        return session


@pytest.mark.parametrize("add", [lambda s: s.submit(gen("late")), lambda s: s.fork(2)], ids=["gen", "fork"])
def test_nothing_is_added_to_a_program_that_ends(add):
    """It would run on a session that is given back, or open one that nobody does."""

    @function
    def program(s):
        s += gen("x")

    backend = SlowToClose("fine")
    state = program.run(backend=backend)
    assert backend.closing.wait(5)
    with pytest.raises(StateError, match="its program has ended"):
        add(state)
    backend.go_on.set()
    assert state.error() is None
    assert state.text() == "fine"
    assert (len(backend.requests), backend.open_sessions) == (1, 0)


def test_a_queue_is_read_while_other_threads_add_to_it():
    async def never(node, context):
        """The queue has nothing to work on."""

    drain = Drain(never, lambda error: None, lambda: None)

    def add():
        for _ in range(20_000):
            drain.add(ir.Text("x"))

    adding = threading.Thread(target=add)
    adding.start()
    read = 0
    while adding.is_alive():
        read = max(read, len(drain.waiting))
        time.sleep(0.001)  # who reads without a break keeps the lock from the other for as long as the system likes
    adding.join()
    assert read <= 20_000 == len(drain.clear())


def test_programs_that_have_ended_are_not_kept_by_the_one_that_runs_them():
    @function
    def inner(s):
        s += gen("x")
        return s["x"]

    @function
    def outer(s):
        seen = []
        for _ in range(5):
            state = inner.run()
            assert state.ret_value == "fine"
            seen.append(weakref.ref(state))
        until = time.monotonic() + 10
        while any(ref() for ref in seen[:-1]) and time.monotonic() < until:  # its thread may be about to let go
            gc.collect()
            time.sleep(0.01)
        return [ref() for ref in seen[:-1]]

    assert outer.run(backend=ScriptedBackend("fine")).ret_value == [None] * 4


INTERRUPTED = """
import signal, threading, time
from caesura.lang import ScriptedBackend, ScriptedReply, function, gen

signal.signal(signal.SIGINT, signal.default_int_handler)  # in a job in the background it is ignored

backend = ScriptedBackend(lambda prompt, request: ScriptedReply("x", latency_s=60.0))

@function
def program(s, i):
    s += gen("x")

try:
    print("begun", flush=True)
    program.run_batch([(i,) for i in range(50)], backend=backend, num_threads=8)
except KeyboardInterrupt:
    until = time.monotonic() + 10
    while backend.open_sessions and time.monotonic() < until:
        time.sleep(0.01)
    time.sleep(0.1)
    print(len(backend.requests), backend.open_sessions, threading.active_count(), flush=True)
"""


def test_ctrl_c_ends_a_batch_and_all_that_runs():
    with subprocess.Popen([sys.executable, "-c", INTERRUPTED], stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "begun\n"
        threading.Event().wait(0.5)
        os.kill(child.pid, signal.SIGINT)
        requests, left, threads = map(int, child.stdout.readline().split())
        assert child.wait(20) == 0
    assert requests <= 8
    assert left == 0
    assert threads == 2  # the main one, and the language's loop


AT_THE_END = """
import atexit

@atexit.register  # before the language is imported: it is called when that has ended
def last():
    try:
        state.text()
    except StateError as error:
        print(error)

from caesura.lang import ScriptedBackend, StateError, function, gen

@atexit.register
def before():
    print(state.text())

@function
def program(s):
    s += gen("x")

state = program.run(backend=ScriptedBackend("fine"))
state.sync()
"""


def test_who_reads_while_the_process_ends_is_told():
    done = subprocess.run([sys.executable, "-c", AT_THE_END], capture_output=True, text=True, timeout=30, check=True)
    read, told = done.stdout.splitlines()
    assert read == "fine"
    assert "the process ends, and its programs have ended" in told


FINALIZED = """
import time, weakref
from caesura.lang import ScriptedBackend, ScriptedReply, function, gen

class Threads:
    pass

backend = ScriptedBackend(ScriptedReply("x", latency_s=60.0))
threads = Threads()
weakref.finalize(threads, lambda: print(backend.open_sessions))

@function
def program(s):
    s += gen("x")

program.run(backend=backend)
while not backend.requests:
    time.sleep(0.01)
"""


def test_programs_end_before_the_finalizers_of_what_they_use():
    done = subprocess.run([sys.executable, "-c", FINALIZED], capture_output=True, text=True, timeout=30, check=True)
    assert done.stdout == "0\n"
