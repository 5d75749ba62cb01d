"""One run of `disk.py` in a process of its own: decode with experts that come from the disk in one of four ways.

    mapped          the file mapped, and nothing asked for: pages come when a kernel touches them
    mapped, hinted  likewise, with MADV_WILLNEED for the experts that the look-ahead names
    slots           slots of our own, experts read when a layer needs them
    slots, ahead    likewise, and ahead of use: what `hybrid serve` does

The last line of stdout is one JSON document.
"""

import ctypes
import dataclasses
import hashlib
import json
import mmap
import statistics
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch

import hybrid.engine
import hybrid.nano
from hybrid.batch import Batch, Row, Sampling, StepOutput
from hybrid.config import EngineConfig
from hybrid.routes import Record, read_record
from offload import packed, store
from offload.checkpoint import Checkpoint
from offload.config import MATRICES, PoolConfig
from offload.experts import Experts
from offload.numa import address_of
from offload.prefetch import ranked
from offload.sources import packed_path
from tests.bench.widened import NANO

PAGE = 16
GREEDY = Sampling(temperature=0.0, logprobs=0)
WAYS = ("mapped", "mapped, hinted", "slots", "slots, ahead")

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


class MappedExperts(Experts):
    """Experts of a mapped file, asked from the system ahead of use where `asks`."""

    asks = False

    @property
    def wants_hints(self) -> bool:
        return self.asks

    def hint(self, layer: int, scores: torch.Tensor) -> None:
        """One page stands for an expert: where it is not in memory, all of the expert is asked for."""
        for expert in ranked(scores, self._k).tolist():
            first = int(self._job.addresses[self._find(layer), expert, 0, 0])
            middle = (first + self._expert_bytes // 2) // mmap.PAGESIZE * mmap.PAGESIZE
            answer = ctypes.create_string_buffer(1)
            if _libc.mincore(middle, mmap.PAGESIZE, answer) or not answer.raw[0] & 1:
                start = first // mmap.PAGESIZE * mmap.PAGESIZE
                _libc.madvise(start, first + self._expert_bytes - start, mmap.MADV_WILLNEED)


def engine_of(way: str, wide: Path, inner: int, budget: int, pages: int) -> hybrid.engine.Engine:
    """Nano with the wide experts in place of its own."""

    def open_wide(
        checkpoint: Checkpoint, prefix: Any, geometry: Any, layers: Any, target: Any, *rest: Any, **names: Any
    ):
        geometry, other = dataclasses.replace(geometry, inner=inner), Checkpoint(wide)
        if not way.startswith("mapped"):
            return store.open_store(other, prefix, geometry, layers, target, *rest, **names)
        contents = store._contents(other, prefix, geometry, layers, target)
        assert packed.usable(wide, contents, [])
        with packed_path(wide, contents.format).open("rb") as file:
            mapped = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))[packed.DATA_AT :]
        places = store._places(contents, 1, [address_of(mapped)], shared=True)
        addresses = places.reshape(len(layers), geometry.n_experts, 1, len(MATRICES))
        return store.ExpertStore(geometry, contents.format, layers, addresses, [mapped], [])

    hybrid.engine.open_store = open_wide  # type: ignore[assignment]
    if way.startswith("mapped"):
        MappedExperts.asks = way.endswith("hinted")
        hybrid.engine.Experts = MappedExperts  # type: ignore[misc]
    config = EngineConfig(NANO, "cpu", "float32", "native", PoolConfig(), pages, PAGE, expert_ram=budget)
    engine = hybrid.engine.Engine(config)
    pager = engine._experts._pager  # type: ignore[union-attr]
    assert (pager is None) == way.startswith("mapped")
    if way == "slots":
        pager._forced = False  # type: ignore[union-attr]
    return engine


def prompts(record: Record, count: int, tokens: int) -> list[tuple[int, ...]]:
    """Conversations up to one of the model's turns that is long enough to decode."""
    found = []
    for start, stop in record.turns.tolist():
        if stop - start > tokens:
            begin = int(record.starts[record.starts <= start].max())
            if start - begin <= 400:
                found.append(tuple(record.tokens[begin:start].tolist()))
    step = max(1, len(found) // count)
    return found[::step][:count]


def bytes_from_disk() -> int:
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("read_bytes")).split()[1])


class Decoding:
    """Runs the conversations, and counts over the decoded tokens alone: a prompt needs nearly every expert."""

    def __init__(self, engine: hybrid.engine.Engine) -> None:
        self._engine = engine
        self.said: list[tuple[int, float]] = []  # tokens with their logprobs
        self.prompt_seconds = 0.0
        self.counts: Counter[str] = Counter()

    def conversation(self, number: int, ids: tuple[int, ...], tokens: int) -> None:
        """The prompt in one step, then so many tokens one by one."""
        pages = tuple(range(-(-(len(ids) + tokens + 1) // PAGE)))
        self.prompt_seconds += self._step(Row(number, ids, 0, pages, GREEDY)).seconds
        before = self._now()
        for i in range(tokens):
            step = self._step(Row(number, (self.said[-1][0],), len(ids) + i, pages, GREEDY))
            self.counts.update({"tokens": 1, "seconds": step.seconds, "bytes_wanted": step.expert_bytes})  # type: ignore[dict-item]
        self.counts.update(self._now())
        self.counts.subtract(before)

    def _step(self, row: Row) -> StepOutput:
        output = self._engine.step(Batch((row,)))
        answer = output.rows[0]
        assert answer.token is not None and answer.logprob is not None
        self.said.append((answer.token, answer.logprob.logprob))
        return output

    def _now(self) -> Counter[str]:
        lines = Path("/proc/self/io").read_text().splitlines()
        read = int(next(line for line in lines if line.startswith("read_bytes")).split()[1])
        found: Counter[str] = Counter({"bytes_read": read, "cpu_seconds": time.process_time()})  # type: ignore[dict-item]
        paging = self._engine._experts.paging()  # type: ignore[union-attr]
        if paging is not None:
            names = ("wanted", "hits", "ahead", "ahead_used", "bytes_on_demand", "bytes_ahead", "waited")
            found.update({name: getattr(paging, name) for name in names})
        return found


def main() -> int:
    """Run one way; arguments: way, directory of the wide experts, their inner rows, budget, prompts, tokens."""
    way, wide, inner, budget, count, tokens = sys.argv[1], Path(sys.argv[2]), *map(int, sys.argv[3:7])
    torch.set_num_threads(1)
    asked = prompts(read_record(Path(hybrid.nano.__file__).parent / "routing.npz"), count, tokens)
    pages = -(-(max(map(len, asked)) + tokens + 1) // PAGE)
    engine = engine_of(way, wide, inner, budget, pages)
    run = Decoding(engine)
    for number, ids in enumerate(asked):
        run.conversation(number, ids, tokens)
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    found: dict[str, Any] = {
        **run.counts,
        "tokens_per_second": run.counts["tokens"] / run.counts["seconds"],
        "prompt_seconds": run.prompt_seconds,
        "said": hashlib.sha256(repr(run.said).encode()).hexdigest()[:16],
        "anonymous_bytes": int(status["RssAnon"].split()[0]) << 10,
    }
    paging = engine._experts.paging()  # type: ignore[union-attr]
    if paging is not None:
        recall = [recall.share for recall in paging.recall]  # prompts included
        found |= {"slots": paging.n_slots, "recall": recall, "reads_ahead": paging.read_ahead}
        found["hit_rate"] = run.counts["hits"] / run.counts["wanted"]
        found["useful"] = run.counts["ahead_used"] / run.counts["ahead"] if run.counts["ahead"] else None
        found["mean_recall"] = statistics.fmean(share for share in recall[1:] if share is not None)
    engine.close()
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
