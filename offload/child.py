"""A process with shared memory that answers requests one at a time.

For native code that must not take this process down with it, nor hold its interpreter lock: whatever becomes of the
child, the caller gets one PoolError and never waits for ever. Knows nothing about what is asked. `offload.kt` uses it.
"""

import contextlib
import json
import mmap
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from typing import NoReturn

from offload.pool import PoolError

LONGEST_ANSWER = 256
ENDING_SECONDS = 5
LAST_WORDS = 2000  # bytes of the child's standard error that are searched for its last line


class Child:
    """The process. It ends when this object is closed and when this process dies, however it dies."""

    def __init__(self, name: str, entry: str, setup: Mapping[str, object], n_bytes: int) -> None:
        """`entry` is Python that defines main(socket, memory), which gets two file descriptors.

        `setup` arrives on its standard input, as one line of JSON. `memory` is `n_bytes` long. Answers are packets.
        """
        memory = os.memfd_create(name)
        os.ftruncate(memory, n_bytes)
        self.memory = mmap.mmap(memory, n_bytes)
        self._name = name
        self._failure = ""
        self._errors = os.memfd_create(f"{name} errors")
        self._line, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._answered = select.poll()
        self._answered.register(self._line, select.POLLIN)
        code = f"import sys\nsys.path[:] = {sys.path!r}\n{entry}\nmain({theirs.fileno()}, {memory})"
        self._process = subprocess.Popen(
            [sys.executable, "-c", code],
            pass_fds=[theirs.fileno(), memory],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=self._errors,
            start_new_session=True,  # ctrl-C is this process's business
        )
        theirs.close()  # the child holds the only other end, so its death ends the connection
        os.close(memory)
        assert self._process.stdin is not None
        self._alive = self._process.stdin
        try:
            self._alive.write(json.dumps(setup).encode() + b"\n")
            self._alive.flush()  # and not closed: the child ends when it is
        except BrokenPipeError:
            self._fail()

    @property
    def pid(self) -> int:
        return self._process.pid

    def ask(self, request: bytes) -> None:
        """Send a request. Raises PoolError when the child is gone."""
        if self._failure:
            raise PoolError(self._failure)
        try:
            self._line.send(request)
        except OSError:
            self._fail()

    def answer(self, seconds: float) -> bytes:
        """Wait for an answer. Raises PoolError when the child ends, or is late and is therefore ended."""
        if self._failure:
            raise PoolError(self._failure)
        if not self._answered.poll(seconds * 1000):
            self._fail(f"did not answer for {seconds:.0f} s and was ended")
        answer = b""
        with contextlib.suppress(ConnectionResetError):  # it ended before it read the request
            answer = self._line.recv(LONGEST_ANSWER)
        if not answer:
            self._fail()
        return answer

    def close(self) -> None:
        """End the child at once, there is nothing to save. A second call does nothing."""
        self._failure = self._failure or f"the {self._name} process is closed"
        self._line.close()
        with contextlib.suppress(BrokenPipeError):
            self._alive.close()
        self._process.kill()
        self._process.wait()
        if self._errors >= 0:
            os.close(self._errors)
            self._errors = -1

    def _fail(self, late: str = "") -> NoReturn:
        if late:
            self._process.kill()
        try:
            status = self._process.wait(ENDING_SECONDS)
        except subprocess.TimeoutExpired:  # it closed its end and went on
            self._process.kill()
            status = self._process.wait()
        how = f"ended with {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
        said = os.pread(self._errors, LAST_WORDS, max(0, os.fstat(self._errors).st_size - LAST_WORDS))
        lines = [line.strip() for line in said.decode(errors="replace").split("\n") if line.strip()]
        self._failure = f"the {self._name} process {late or how}" + (f": {lines[-1]}" if lines else "")
        self.close()
        raise PoolError(self._failure)
