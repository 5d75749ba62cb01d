"""A layer's experts with many rows, on the device by way of the ring, while the CPU computes the others.

    streamed = streaming.begin(index, rows, settled)   # which experts; the first uploads are on their way
    streaming.expect(index + 1, counts, settled)       # what the next layer will probably ask for
    streaming.finish(x, ids, weights, out)             # products in order, each upload as soon as a place is free

After the layer's own uploads free places take the next layer's likeliest experts, so the link works on while the
device computes attention. What the routers then do not ask for is dropped and counted. Knows no slots in VRAM: experts
that are `settled` elsewhere are not looked at. Called by `offload.split`.
"""

import ctypes
import itertools
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch

from offload.copies import Pinned, copies_to
from offload.device_product import DeviceProduct, host_pieces
from offload.ring import LEAST_PLACES, Loan, Ring
from offload.store import ExpertStore
from offload.stream_split import StreamRates, best_stream

PIECE_ROWS = 2048  # of one expert at a time: 29 MB of bf16 inputs at 7168 hidden
Integers = npt.NDArray[np.integer]
Mask = npt.NDArray[np.bool_]
Notice = Callable[[str], None]


@dataclass(slots=True)
class StreamStats:
    """Counters since the start; they only grow."""

    layers: int = 0  # in which experts were streamed
    experts: int = 0  # streamed and used
    ahead: int = 0  # of them those whose upload began a layer earlier
    dropped: int = 0  # uploaded a layer earlier and not asked for
    bytes: int = 0  # uploaded


class Streaming:
    """The ring and what passes through it. Used by one thread."""

    def __init__(
        self, store: ExpertStore, product: DeviceProduct, rates: StreamRates, ring: Ring, pinned: Pinned | None = None
    ) -> None:
        """The store's experts must all be in memory; `pinned` keeps it so for the copies."""
        assert store.pager is None, "experts on the disk have no address to copy from"
        self._pinned = pinned
        self._store, self._product, self._rates, self._ring = store, product, rates, ring
        self._pieces = host_pieces(store.geometry, store.format, store.n_nodes)
        self._n_experts = store.geometry.n_experts
        self._none = np.zeros(self._n_experts, np.bool_)
        self._loans: dict[tuple[int, int], Loan] = {}  # by (layer's place, expert)
        self._order: list[int] = []  # experts of the running layer
        self._layer = -1  # its place among the layers
        self._queue: deque[tuple[int, int]] = deque()  # uploads that wait for a place: the layer's own
        self._next: deque[tuple[int, int]] = deque()  # and then the next one's
        self._stats = StreamStats()

    def stats(self) -> StreamStats:
        """The counters as they are now."""
        return replace(self._stats)

    def use(self, rates: StreamRates) -> None:
        """Divide by other rates from the next layer on."""
        self._rates = rates

    def may_pay(self, tokens: int) -> bool:
        """False for steps so small that streaming is not worth a thought: those that only decode."""
        return self._rates.may_pay(tokens)

    @property
    def under_way(self) -> bool:
        """Whether the running layer has experts on the link that `finish` will run."""
        return bool(self._order)

    def begin(self, index: int, rows: Integers, settled: Mask) -> Mask:
        """(E,) which experts of a layer (its place among them) will be streamed, of `rows` (E,) tokens each.

        `settled` experts are in VRAM already and keep the device busy.
        """
        for key in [key for key in self._loans if key[0] != index or not rows[key[1]] or settled[key[1]]]:
            self._ring.drop(self._loans.pop(key))
            self._stats.dropped += 1
        ready = np.array([expert for _, expert in self._loans], np.int64)
        mine, others = np.where(settled, 0, rows), np.where(settled, rows, 0)
        self._layer, self._order = index, best_stream(self._rates, mine, ready, others)
        self._queue = deque((index, expert) for expert in self._order if (index, expert) not in self._loans)
        self._next.clear()
        self._stats.layers += bool(self._order)
        self._stats.experts += len(self._order)
        self._stats.ahead += len(ready)
        self._fill()
        streamed = self._none.copy()
        streamed[self._order] = True
        return streamed

    def expect(self, index: int, rows: Integers, settled: Mask) -> None:
        """`rows` (E,) tokens that each expert of the next layer will probably have."""
        nothing = np.zeros(0, np.int64)
        likely = best_stream(self._rates, np.where(settled, 0, rows), nothing, np.where(settled, rows, 0))
        self._next = deque((index, expert) for expert in likely[: self._ring.n_places])
        self._fill()

    def finish(
        self,
        x: torch.Tensor,
        ids: Integers,
        weights: torch.Tensor,
        out: torch.Tensor,
        beside: Iterator[None],
        n_beside: int,
    ) -> None:
        """out += the streamed experts' share. `x` (T, D), `weights` (T, K), `out` (T, D) float32 on the device, `ids`
        (T, K) on the host. `beside` begins other work of the device, one of `n_beside` pieces with each step: between
        the products, while uploads come."""
        tokens = _tokens_of(ids, self._order, x.device) if self._order else []
        shares, k, n = weights.reshape(-1), ids.shape[1], len(tokens)
        for i, (expert, places) in enumerate(zip(self._order, tokens, strict=True)):
            pieces = n_beside * (i + 1) // n - n_beside * i // n
            for _ in itertools.islice(beside, pieces):
                pass
            loan = self._loans.pop((self._layer, expert))
            data = self._ring.read(loan)
            try:
                for some in torch.split(places, PIECE_ROWS):
                    self._product.add(out, x, some // k, shares[some], data)
            finally:
                self._ring.done(loan)
            self._fill()
        self._order = []
        for _ in beside:
            pass

    def check(self) -> None:
        """Raises RingError where a place was used by two."""
        self._ring.check()

    def close(self) -> None:
        """Uploads end, and memory is pinned no more; the store may go then."""
        self._queue.clear()
        self._next.clear()
        for loan in self._loans.values():
            self._ring.drop(loan)
        self._loans.clear()
        self._ring.close()
        if self._pinned is not None:
            self._pinned.close()

    def _fill(self) -> None:
        """Give free places to uploads that wait: the layer's own before the next one's."""
        while self._ring.n_free and (self._queue or self._next):
            key = self._queue.popleft() if self._queue else self._next.popleft()
            self._loans[key] = self._ring.load(key, self.bytes_of(*key))
            self._stats.bytes += self._product.n_bytes

    def bytes_of(self, index: int, expert: int) -> list[torch.Tensor]:
        """An expert's bytes where they lie."""
        places = self._store.addresses[index, expert]
        runs: list[list[int]] = []  # address, bytes
        for node, matrix, _, n_bytes in self._pieces:
            address = int(places[node, matrix])
            if runs and runs[-1][0] + runs[-1][1] == address:
                runs[-1][1] += n_bytes
            else:
                runs.append([address, n_bytes])
        return [host_bytes(address, n_bytes) for address, n_bytes in runs]


def open_streaming(
    store: ExpertStore,
    product: DeviceProduct,
    rates: StreamRates,
    ring_bytes: int,
    device: torch.device,
    notice: Notice,
    checked: bool = False,
) -> Streaming | None:
    """A ring on the device; None, with a notice, where experts lie on the disk. Raises ValueError for a ring that is
    too small. `checked`: with checksums, for tests."""
    n_places = ring_places(ring_bytes, product.n_bytes)
    if store.pager is not None:
        notice("prompts do not stream experts to the device: not all of them are in RAM")
        return None
    pinned = _pin(store, notice) if device.type == "cuda" else None
    staged = device.type == "cuda" and pinned is None
    ring = Ring(copies_to(device), n_places, product.n_bytes, staged=staged, checked=checked)
    return Streaming(store, product, rates, ring, pinned)


def _pin(store: ExpertStore, notice: Notice) -> Pinned | None:
    """The store's memory pinned where it lies; None where that is refused: a mapped file, or too much at once."""
    pinned = Pinned()
    if not store.mapped and all(pinned.add(*arena) for arena in store.arenas):
        return pinned
    pinned.close()
    notice("the experts' memory cannot be pinned: streamed ones are copied once more on the host, which is slower")
    return None


def ring_places(ring_bytes: int, expert_bytes: int) -> int:
    """Places of a ring. Raises ValueError where fewer than two experts fit."""
    n_places = ring_bytes // expert_bytes
    if n_places < LEAST_PLACES:
        raise ValueError(
            f"the ring of {ring_bytes / 1e6:.1f} MB holds {n_places} experts of {expert_bytes / 1e6:.1f} MB, and "
            f"streaming needs {LEAST_PLACES}: give it {LEAST_PLACES * expert_bytes} bytes, or none"
        )
    return n_places


def host_bytes(address: int, n_bytes: int) -> torch.Tensor:
    """Memory at an address that somebody else keeps alive."""
    return torch.from_numpy(np.ctypeslib.as_array((ctypes.c_uint8 * n_bytes).from_address(address)))


def _tokens_of(ids: Integers, experts: list[int], device: torch.device) -> list[torch.Tensor]:
    """For each of the experts where it stands in ids (T, K), flattened: one transfer for all of them."""
    flat = ids.reshape(-1)
    place = np.full(int(max(flat.max(initial=0), max(experts))) + 2, -1, np.int16)  # the last one is for id -1
    place[experts] = np.arange(len(experts))
    which = place[flat]
    found = np.flatnonzero(which >= 0)
    which = which[found]
    ordered = found[np.argsort(which, kind="stable")]
    counts = np.bincount(which, minlength=len(experts)).tolist()
    on_host = torch.from_numpy(ordered)
    if device.type == "cuda":  # from other memory the copy would wait for the work that was begun before
        on_host = on_host.pin_memory()
    return list(torch.split(on_host.to(device, non_blocking=True), counts))
