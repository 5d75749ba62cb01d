"""A layer's experts divided between the CPU and the device, behind the interface of `offload.experts.Experts`.

The CPU gets the tokens without the experts that lie in VRAM and starts at once; the device runs those meanwhile, and
`wait` adds the two sums. The ids come to the host once, for both. A miss never waits for anything: it is the CPU's.
Of a step with many tokens some experts go over the link as well (`offload.streaming`), the decoding rows' share of
them too: their uploads begin before the CPU does, their products after the device's other work of the layer.
Knows no models. Called by `hybrid.moe` and `hybrid.engine`.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from offload.config import PoolConfig
from offload.copies import copies_to
from offload.device_product import DeviceProduct
from offload.experts import Choices, Experts, ExpertStats, Pending
from offload.kernels.grouping import MASKED
from offload.paging import PagingStats
from offload.slots import MISS
from offload.stopwatch import Stopwatch, stopwatch_of
from offload.store import ExpertStore
from offload.streaming import Streaming, StreamStats
from offload.topology import Topology
from offload.uploads import Uploads
from offload.vram import Notice, VramSlots, VramStats
from offload.warming import WarmStats

Integers = npt.NDArray[np.integer]
FEW_TOKENS = 32  # up to here reading an expert's weights takes the device longer than multiplying all tokens by them


def with_vram(
    host: Experts,
    store: ExpertStore,
    slots: Sequence[int],
    product: DeviceProduct,
    device: torch.device,
    notice: Notice,
    streaming: Streaming | None = None,
) -> "SplitExperts":
    """`host` and `slots` of each MoE layer on the device. Raises ValueError for slots that do not fit the store."""
    copies = copies_to(device)
    uploads = Uploads(copies, store.geometry.expert_bytes(store.format), staged=device.type == "cuda")
    vram = VramSlots(store, slots, copies, uploads, notice)
    return SplitExperts(host, vram, product, stopwatch_of(device), streaming)


class SplitPending:
    """A layer that both work on."""

    def __init__(self, split: "SplitExperts", host: Pending, like: torch.Tensor, n_experts: int) -> None:
        self._split, self._host, self._like = split, host, like
        self._n_experts = n_experts  # that the CPU runs
        self._started = time.perf_counter()
        self.total: torch.Tensor | None = None  # float32 (T, D), the device's share
        self.later: Callable[[], torch.Tensor | None] | None = None  # the device's share, where the link has a part
        self.lap: Any = None  # of the device's work

    def wait(self) -> torch.Tensor:
        """Block until the CPU's sum is there: both together (T, D), in x's dtype, on x's device. Raises PoolError when
        a worker failed."""
        if self.later is not None:
            try:
                self.total = self.later()
            except BaseException:  # the device's memory is full, say: the CPU's part ends, so that a step can follow
                self._host.wait()
                raise
        if self.total is None:
            result = self._host.wait()
        else:
            self._host.add_to(self.total)
            result = self.total.to(self._like.dtype)
        self._split._ran(self._n_experts, time.perf_counter() - self._started, self.lap)
        return result


class SplitExperts:
    """All layers' experts, run by `host` and by the device. Used by one thread."""

    def __init__(
        self,
        host: Experts,
        vram: VramSlots,
        product: DeviceProduct,
        stopwatch: Stopwatch,
        streaming: Streaming | None = None,
    ) -> None:
        self._host, self._vram, self._product, self._stopwatch = host, vram, product, stopwatch
        self._streaming = streaming
        self._k = 0  # experts of a token, as last submitted, in a step that may stream; else 0
        choices = host.choices()
        self._index = {layer: i for i, layer in enumerate(choices.layers)}
        self._chosen = np.zeros_like(choices.counts)  # tokens of experts that the device ran
        self._laps: deque[tuple[Any, float]] = deque()  # of the device's work, with the CPU's seconds for its layer

    @property
    def wants_hints(self) -> bool:
        """True where a hint can do something."""
        return self._host.wants_hints or self._k > 0

    def begin(self) -> None:
        """A step begins: which experts the device runs is settled until it ends."""
        self._vram.begin()

    def end(self, teaches: bool) -> None:
        """The step has ended; it `teaches` which experts are wanted if it only decoded."""
        while self._laps and (seconds := self._stopwatch.seconds(self._laps[0][0])) is not None:
            _, host = self._laps.popleft()
            beside = host if self._stopwatch.overlaps else 0.0
            self._vram.spend(0, 0.0, max(0.0, seconds - beside))
        self._vram.end(teaches)

    def submit(self, layer: int, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> Pending | SplitPending:
        """As `Experts.submit`, within a step."""
        tokens = self._host.fetch(x, ids, weights)
        chosen = tokens.ids.numpy()  # (T, K)
        index, n_experts = self._index.get(layer), self._chosen.shape[1]
        if index is None or not ((chosen >= MASKED) & (chosen < n_experts)).all():
            return self._host.start(layer, x, tokens)  # which refuses it
        self._vram.observe(index, chosen)
        rows = np.append(self._vram.rows(index), MISS)  # (E + 1,), the last one for id -1
        hits = rows[chosen] != MISS  # (T, K)
        away = hits  # from the CPU
        streams = self._streaming is not None and self._streaming.may_pay(len(x))
        self._k = chosen.shape[1] if streams else 0
        if self._streaming is not None and streams:
            uses = np.bincount(chosen[chosen >= 0], minlength=n_experts)
            away = hits | self._streaming.begin(index, uses, rows[:-1] != MISS)[chosen] & (chosen != MASKED)
        if away.any():
            tokens = tokens._replace(ids=torch.from_numpy(np.where(away, MASKED, chosen)))
            self._chosen[index] += np.bincount(chosen[away], minlength=n_experts)
        pending = SplitPending(self, self._host.start(layer, x, tokens), x, len(np.unique(chosen[~away])))
        if streams:  # after the hint, which waits for the device
            pending.later = partial(self._stream, x, weights, chosen, hits, rows)
        elif hits.any():
            started = self._stopwatch.start()
            pending.total = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
            for _ in self._add(pending.total, x, weights, chosen, hits, rows):
                pass
            pending.lap = self._stopwatch.stop(started)
        return pending

    def hint(self, layer: int, scores: torch.Tensor) -> None:
        """As `Experts.hint`: what lies in VRAM need not come to RAM. Of a step that streams, the choices that the
        scores (T, E) would make of each expert say which ones the next layer will probably stream."""
        index = self._index.get(layer)
        self._host.hint(layer, scores, None if index is None else self._vram.elsewhere(index))
        if self._streaming is not None and self._k and index is not None:
            likely = scores.topk(self._k, -1, sorted=False).indices.flatten()
            uses = torch.bincount(likely, minlength=scores.shape[1]).cpu().numpy()
            self._streaming.expect(index, uses, self._vram.elsewhere(index))

    def stats(self) -> ExpertStats:
        """What the CPU did."""
        return self._host.stats()

    def vram(self) -> VramStats:
        """What the slots did."""
        return self._vram.stats()

    def warming(self) -> WarmStats | None:
        """As `Experts.warming`."""
        return self._host.warming()

    def streamed(self) -> StreamStats | None:
        """What went through the ring; None without one."""
        return None if self._streaming is None else self._streaming.stats()

    def paging(self) -> PagingStats | None:
        """As `Experts.paging`."""
        return self._host.paging()

    def choices(self) -> Choices:
        """How often each expert was chosen since the start, whoever ran it."""
        host = self._host.choices()
        return host._replace(counts=host.counts + self._chosen)

    def with_pool(self, config: PoolConfig, topology: Topology) -> "SplitExperts":
        """These experts with other workers, as `Experts.with_pool`."""
        self._host = self._host.with_pool(config, topology)
        return self

    def check(self) -> None:
        """Tables agree."""
        self._vram.check()
        if self._streaming is not None:
            self._streaming.check()

    def close(self) -> None:
        """Uploads end, then the host's workers and the store."""
        if self._streaming is not None:
            self._streaming.close()
        self._vram.close()
        self._host.close()

    def _add(
        self,
        out: torch.Tensor,
        x: torch.Tensor,
        weights: torch.Tensor,
        chosen: Integers,
        hits: Integers,
        rows: Integers,
    ) -> Iterator[None]:
        """out += what the experts in slots make of their tokens, with each step one of many tokens or all of few.
        `hits` (T, K): where these stand in `chosen`."""
        at = np.flatnonzero(hits)
        at = at[np.argsort(chosen.ravel()[at], kind="stable")]  # by expert, ascending
        names, which = np.unique(chosen.ravel()[at], return_inverse=True)
        n, k = len(names), chosen.shape[1]
        on_device = torch.from_numpy(np.stack((at, which))).to(x.device, non_blocking=True)
        places, expert = on_device.unbind()  # one transfer for both
        data = [self._vram.memory[row] for row in rows[names].tolist()]
        tokens, shares = places // k, weights.reshape(-1)[places].float()
        if len(x) <= FEW_TOKENS:
            each = torch.zeros((n, len(x)), device=x.device)
            each.index_put_((expert, tokens), shares, accumulate=True)
            self._product.add_few(out, x, each, data)
            yield
            return
        ends = np.cumsum(np.bincount(which, minlength=n)).tolist()
        for lying, first, stop in zip(data, [0, *ends], ends, strict=False):
            self._product.add(out, x, tokens[first:stop], shares[first:stop], lying)
            yield

    def _stream(
        self, x: torch.Tensor, weights: torch.Tensor, chosen: Integers, hits: Integers, rows: Integers
    ) -> torch.Tensor | None:
        """What the experts in slots and those on the link make of their tokens; None for nothing at all."""
        assert self._streaming is not None, "a layer that streams"
        n_hits = len(np.unique(chosen[hits]))
        if not n_hits and not self._streaming.under_way:
            return None
        out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        in_slots = self._add(out, x, weights, chosen, hits, rows) if n_hits else iter(())
        self._streaming.finish(x, chosen, weights.float(), out, in_slots, n_hits)
        return out

    def _ran(self, n_experts: int, seconds: float, lap: Any) -> None:
        """A layer is over: `n_experts` by the CPU in so long."""
        if lap is None:  # else starting the device's work is in these seconds
            self._vram.spend(n_experts, seconds, 0.0)
        else:
            self._laps.append((lap, seconds))
