"""Starting one engine process and holding what belongs to it: folder, socket, lifeline, exit status."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import msgspec
import zmq
from caesura.runtime.config import EngineConfig
from caesura.runtime.errors import EngineStopped
from caesura.runtime.ipc import messages as m
from caesura.runtime.ipc.channel import KEY_BYTES, TAG_BYTES, Channel
from caesura.runtime.ipc.process import SOCKET_NAME, TO_CLIENT, TO_ENGINE, Assignment
from caesura.runtime.logs import style

MAX_SOCKET_PATH_BYTES = 100  # what every system's socket addresses hold
EXIT_WAIT_S = 5.0


class EngineChild:
    """A running engine process as its client holds it. Make it on the thread that will talk to it: when that thread
    ends, the process is told to end too.

    ``lifeline`` becomes readable at the moment the process is gone, however it went.
    """

    def __init__(self, config: EngineConfig, heartbeat_s: float) -> None:
        self.folder = _private_folder()
        key = secrets.token_bytes(KEY_BYTES)
        self.channel: Channel[m.Event] = Channel(key, sends=TO_ENGINE, receives=TO_CLIENT, inbound=m.Event)
        self.lifeline, theirs = socket.socketpair()
        folder, pid = str(self.folder), os.getpid()
        assignment = Assignment(folder, key, config, heartbeat_s, pid, theirs.fileno(), style())
        try:
            with theirs:
                # -P: the working folder must not be able to replace a module.
                self._process = subprocess.Popen(
                    [sys.executable, "-P", "-m", "caesura.runtime.ipc.process"],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.DEVNULL,
                    pass_fds=[theirs.fileno()],
                )
        except OSError as error:
            self.lifeline.close()
            shutil.rmtree(self.folder, ignore_errors=True)
            raise EngineStopped(f"the engine process cannot be started: {error}") from error
        self.pid = self._process.pid
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError), self._process.stdin as pipe:
            pipe.write(msgspec.json.encode(assignment))
        self._context = zmq.Context()
        self.socket = self._context.socket(zmq.DEALER)
        self.socket.set_hwm(0)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.setsockopt(zmq.RECONNECT_IVL, 20)
        self.socket.setsockopt(zmq.MAXMSGSIZE, m.MAX_FRAME_BYTES + TAG_BYTES)
        self.socket.setsockopt(zmq.ROUTING_ID, b"client-" + secrets.token_bytes(8))
        self.socket.connect(f"ipc://{self.folder}/{SOCKET_NAME}")

    def describe_exit(self) -> str:
        """How the process ended; waits for it a moment, then kills it."""
        try:
            code = self._process.wait(EXIT_WAIT_S)
        except subprocess.TimeoutExpired:
            return "hung while it ended"
        if code < 0:
            return f"was killed by {_signal_name(-code)}"
        return f"ended with code {code}"

    def close(self) -> None:
        """End the process at once if it still runs; leave nothing behind. Idempotent."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        self.lifeline.close()
        self.socket.close()
        self._context.term()
        shutil.rmtree(self.folder, ignore_errors=True)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # a realtime signal
        return f"signal {number}"


def _private_folder() -> Path:
    """A new folder only this user may enter, with a path short enough for a socket's address."""
    for parent in (tempfile.gettempdir(), "/tmp"):
        if len(os.fsencode(parent)) + len("/caesura-12345678/" + SOCKET_NAME) <= MAX_SOCKET_PATH_BYTES:
            with contextlib.suppress(OSError):
                return Path(tempfile.mkdtemp(prefix="caesura-", dir=parent))
    raise EngineStopped(
        f"no folder for the engine's socket: {tempfile.gettempdir()} is too long or not writable; set TMPDIR to a "
        f"writable folder whose path has at most {MAX_SOCKET_PATH_BYTES - 30} bytes"
    )
