"""Children that speak offload.kt_worker's protocol without kt-kernel, well and badly.

`main` answers y = sum_k weights_k * (1 + id_k + 10 * position of the layer) * x, where x and y are bf16.
"""

import ctypes
import json
import mmap
import os
import socket
import sys
import time

import numpy as np

from offload.formats import bf16_to_float32, float32_to_bf16
from offload.kt_worker import DONE, REQUEST, Regions, Setup, _end_with_parent


def main(line: int, memory: int, name: bytes = b"fake") -> None:
    setup = Setup(**json.loads(sys.stdin.buffer.readline()))
    at = Regions.of(setup.rows, setup.hidden, setup.per_token)
    shared = np.frombuffer(mmap.mmap(memory, at.end), np.uint8)
    x, y = (shared[start : start + 2 * setup.rows * setup.hidden].view(np.uint16) for start in (at.x, at.y))
    bell = socket.socket(fileno=line)
    bell.send(name)
    for _ in setup.names:
        bell.send(DONE)
    while request := bell.recv(REQUEST.size):
        layer, rows, k = REQUEST.unpack(request)
        assert 0 < rows <= setup.rows and k <= setup.per_token
        ids = shared[at.ids :][: 8 * rows * k].view(np.int64).reshape(rows, k)
        weights = shared[at.weights :][: 4 * rows * k].view(np.float32).reshape(rows, k)
        factor = (weights * (1 + ids + 10 * layer)).sum(1, keepdims=True, dtype=np.float32)
        values = bf16_to_float32(x[: rows * setup.hidden]).reshape(rows, -1) * factor
        y[: rows * setup.hidden] = float32_to_bf16(values).reshape(-1)
        bell.send(DONE)


def serve_until(line: int, stop: str) -> None:
    """Answer `ready` and the first request, then do what `stop` says."""
    sys.stdin.buffer.readline()
    bell = socket.socket(fileno=line)
    bell.send(b"ready")
    bell.recv(REQUEST.size)
    bell.send(DONE)
    bell.recv(REQUEST.size)
    if stop == "crash":
        print("free(): invalid pointer", file=sys.stderr, flush=True)
        os.abort()
    if stop == "raise":
        raise RuntimeError("group size 48")
    time.sleep(600)


def hold_the_lock(line: int) -> None:
    """As kt-kernel's sync(): stay in native code without letting another Python thread run."""
    sys.stdin.buffer.readline()
    _end_with_parent()
    socket.socket(fileno=line).send(b"ready")
    ctypes.PyDLL(None).sleep(600)
