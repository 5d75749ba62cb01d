"""One model, loaded, and one step of it: `Engine(config).step(batch)`.

Joins checkpoint, experts, weights, cache and model; asks for logits only where a row needs them. Knows no requests
beyond the rows of a batch, and decides nothing: pages, order and sampling settings come with the batch. Torch runs
with its own number of threads (`torch.set_num_threads` is the caller's to set); the expert workers are separate.
Called by the engine process, by benches and by tests.
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch

from hybrid.batch import Batch, Row, RowOutput, StepOutput, TokenLogprob
from hybrid.config import LOGIT_ROWS, ConfigError, EngineConfig, ModelConfig
from hybrid.inputs import check_rows, in_pieces, row_starts, upload
from hybrid.kv import allocate
from hybrid.kv_ram import RamTier
from hybrid.lanes import Lane
from hybrid.model import build_model
from hybrid.moe import Watch
from hybrid.ping_pong import Mode, PingPong
from hybrid.sampler import sample_rows, score
from hybrid.segments import CaptureError, Segments
from hybrid.weights import load_weights
from hybrid.widths import kv_bytes_per_token
from offload.backends import Backend, BackendError, choose
from offload.checkpoint import Checkpoint
from offload.config import PoolConfig, Progress
from offload.device_product import DeviceProduct
from offload.experts import Choices, Experts, ExpertStats
from offload.isa import choose as choose_isa
from offload.kt import INSTALL, KtExperts, Published
from offload.pool import PoolError
from offload.ram import ram
from offload.split import SplitExperts, with_vram
from offload.store import open_store
from offload.streaming import StreamStats, open_streaming
from offload.topology import Topology, find_topology
from offload.vram import VramStats
from offload.warming import WarmStats

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

HOST_RESERVE = 512 * 2**20  # for what a step allocates, where nobody has reckoned it

Notice = Callable[[str], None]
Sampled = tuple[int, TokenLogprob | None]


def _silent_progress(stage: str, done: int, total: int) -> None:
    """Nobody watches."""


def _silent_notice(text: str) -> None:
    """Nobody reads."""


class Engine:
    """A loaded model. `step` is not re-entrant: one caller at a time."""

    def __init__(
        self,
        config: EngineConfig,
        progress: Progress = _silent_progress,
        notice: Notice = _silent_notice,
        watch: Watch | None = None,
    ) -> None:
        """Load everything; `progress(stage, bytes done, bytes in all)` and `notice(line)` report meanwhile. `watch`
        sees every choice of the routers (`hybrid.moe`).

        Raises ConfigError, CheckpointError, BackendError or a plain ValueError, one line for the user each.
        """
        self._config, self._watch = config, watch
        self._device = _device(config.device)
        dtype = DTYPES[config.dtype]
        self.model = ModelConfig.from_directory(config.model)
        self._checkpoint = Checkpoint(config.model)
        choose_isa(config.pool.isa)  # a tier that cannot run is refused before anything is read
        topology = find_topology(config.pool.threads)
        on_device = any(config.vram_slots) or config.ring_bytes  # which kt-kernel cannot feed
        wanted = "numba" if config.experts == "auto" and on_device else config.experts
        backend, line = choose(wanted, self._published(), config.expert_format, config.pool, topology)
        self._config = replace(config, experts=backend)
        if line:
            notice(line)
        # Weights first: they are the smaller part, and tell soonest that checkpoint and config.json do not fit.
        self._tensors = load_weights(
            self._checkpoint, self.model, self._device, dtype, progress, notice, config.narrow, config.embedding_in_ram
        )
        self._experts = self._open_experts(backend, topology, progress, notice)
        self._transformer = build_model(self.model, self._tensors, self._experts, config.mla, watch)
        self._cache = allocate(self.model, config.n_pages, config.page_size, dtype, self._device, config.kv_dtype)
        self._ram_tier = RamTier(self._cache.storage(), config.n_ram_pages, notice)
        # A record of the routing wants a layer's tokens all at once.
        self._ping_pong = PingPong("off" if watch else config.ping_pong, notice)
        self._notice = notice
        self._segments = self._new_segments()

    def step(self, batch: Batch) -> StepOutput:
        """Move pages between the tiers, compute the new ids of every row, fill their cache pages, and answer each row
        in the batch's order."""
        began = time.perf_counter()
        check_rows(batch.rows, self._config.n_pages, self._config.page_size, self.model.vocab_size)
        before = self._experts.stats()
        with self._experts_within(batch), torch.inference_mode():
            self._ram_tier.move(batch.moves)
            parts = self._ping_pong.parts(batch)
            hidden = self._hidden(parts)  # (T, D)
            rows = self._answer(batch.rows, hidden)
        after = self._experts.stats()
        seconds = time.perf_counter() - began
        self._ping_pong.took(batch, len(parts), seconds)
        return StepOutput(
            rows=rows,
            seconds=seconds,
            expert_bytes=after.bytes_read - before.bytes_read,
            distinct_experts=after.distinct_experts - before.distinct_experts,
        )

    @property
    def config(self) -> EngineConfig:
        """As given, with the pool and the backend of the experts that are in use."""
        return self._config

    def vram(self) -> VramStats | None:
        """What the expert slots on the device did; None without any."""
        return self._experts.vram() if isinstance(self._experts, SplitExperts) else None

    def streamed(self) -> StreamStats | None:
        """What went through the ring; None without one."""
        return self._experts.streamed() if isinstance(self._experts, SplitExperts) else None

    def choices(self) -> Choices:
        """How many tokens chose each routed expert since the start."""
        return self._experts.choices()

    def expert_stats(self) -> ExpertStats:
        """What the routed experts did since the start."""
        return self._experts.stats()

    def warming(self) -> WarmStats | None:
        """What idle expert workers read into their caches; None where they do not."""
        return None if isinstance(self._experts, KtExperts) else self._experts.warming()

    def use_pool(self, pool: PoolConfig) -> None:
        """Run the loaded experts with other threads, instructions or precision from now on. Nothing is read again.

        Raises BackendError where kt-kernel runs them, ValueError for a tier that cannot run or other memory nodes, and
        PoolError where workers cannot start. The engine is as it was then.
        """
        if isinstance(self._experts, KtExperts):
            raise BackendError("kt-kernel's threads are settled when it loads: start again with --experts numba")
        self._experts = self._experts.with_pool(pool, find_topology(pool.threads))
        self._transformer = build_model(self.model, self._tensors, self._experts, self._config.mla, self._watch)
        self._segments = self._new_segments()
        self._config = replace(self._config, pool=pool)

    def use_ping_pong(self, mode: Mode) -> None:
        """Split steps from now on never, always, or where it pays."""
        self._ping_pong = PingPong(mode, self._notice)
        self._config = replace(self._config, ping_pong=mode)

    @property
    def halved(self) -> dict[int, bool]:
        """Batch sizes whose steps were tried whole and in halves, and whether they run in halves now."""
        return self._ping_pong.choices

    @property
    def graphs(self) -> dict[str, int]:
        """Halves of steps and whole ones by how their device part ran: "replayed" from graphs, else why not."""
        return {} if self._segments is None else {"replayed": self._segments.replayed, **self._segments.eager}

    def close(self) -> None:
        """Stop the expert workers and let go of their memory."""
        self._experts.close()
        self._ram_tier.close()
        self._checkpoint.close()

    @contextlib.contextmanager
    def _experts_within(self, batch: Batch) -> Iterator[None]:
        """One step: which experts lie in VRAM is settled meanwhile. Prompts do not teach which ones should."""
        if not isinstance(self._experts, SplitExperts):
            yield
            return
        teaches = False
        self._experts.begin()
        try:
            yield
            teaches = all(len(row.ids) == 1 for row in batch.rows)
        finally:
            self._experts.end(teaches)

    def _new_segments(self) -> Segments | None:
        """What replays decode steps from CUDA graphs, where asked for and possible."""
        if not self._config.graphs or self._device.type != "cuda":
            return None
        if self._watch is not None:
            self._notice("CUDA graphs are off: a record of the routing sees every layer's tokens as they run")
            return None
        return Segments(self._transformer, self._cache, self._notice)

    def _hidden(self, parts: Sequence[Batch]) -> torch.Tensor:
        """The residual stream of all new ids, (T, D), in the batch's order."""
        while True:
            try:
                return self._transformer.hidden([self._lane(i, part) for i, part in enumerate(parts)])
            except CaptureError as error:  # a step may be taken again: it writes the same to the same places
                assert self._segments is not None, "it has captured"
                self._segments.refuse(error)

    def _lane(self, half: int, part: Batch) -> Lane:
        captured = self._segments.lane(half, part.rows) if self._segments is not None else None
        if captured is not None:
            return captured
        pieces = [upload(piece, self._config.page_size, self._device) for piece in in_pieces(part)]
        return self._transformer.lane(pieces, self._cache)

    def _published(self) -> Published:
        model = self.model
        return Published(
            self._checkpoint, model.expert_name, model.expert_geometry, model.moe_layers, model.num_experts_per_tok
        )

    def _open_experts(
        self, backend: Backend, topology: Topology, progress: Progress, notice: Notice
    ) -> Experts | SplitExperts | KtExperts:
        """The routed experts, run by our kernels, and some by the device, or by kt-kernel."""
        config, model = self._config, self.model
        if backend == "kt":
            if any(config.vram_slots):
                raise ConfigError("vram_slots: kt-kernel runs all experts by itself; use --experts numba, or no slots")
            if config.ring_bytes:
                notice("prompts do not stream experts to the device: kt-kernel runs all of them")
            try:
                return KtExperts(self._published(), topology, progress)
            except PoolError as error:
                raise BackendError(f"--experts kt: {error}; use --experts numba, or reinstall: {INSTALL}") from error
        store = open_store(
            self._checkpoint,
            model.expert_name,
            model.expert_geometry,
            model.moe_layers,
            config.expert_format,
            progress,
            nodes=topology.nodes,
            budget=self._expert_ram(),
        )
        for line in store.notices:
            notice(line)
        progress("compiling expert kernels, or loading them from the cache", 0, 0)
        experts = Experts(store, config.pool, topology, self._device if config.handoff else None, config.warm)
        if not any(config.vram_slots) and not config.ring_bytes:
            return experts
        slots = config.vram_slots or (0,) * len(model.moe_layers)
        product = DeviceProduct(model.expert_geometry, store.format, DTYPES[config.dtype], self._device)
        streaming = None
        if config.ring_bytes:
            if config.stream_rates is None:
                raise ConfigError("ring_bytes: which experts to stream needs stream_rates, those of this machine")
            streaming = open_streaming(store, product, config.stream_rates, config.ring_bytes, self._device, notice)
        return with_vram(experts, store, slots, product, self._device, notice, streaming)

    def _expert_ram(self) -> int:
        """Bytes of RAM for the experts of a packed file."""
        config = self._config
        if config.expert_ram is not None:
            return config.expert_ram
        token = kv_bytes_per_token(self.model, DTYPES[config.dtype].itemsize, config.kv_dtype)
        n_pages = config.n_ram_pages + (config.n_pages if config.device == "cpu" else 0)
        return ram()[1] - HOST_RESERVE - n_pages * config.page_size * token

    def _answer(self, rows: Sequence[Row], hidden: torch.Tensor) -> tuple[RowOutput, ...]:
        starts = row_starts(rows)
        drawing = [i for i, row in enumerate(rows) if row.sampling is not None]
        drawn = self._sample([rows[i] for i in drawing], hidden, [starts[i] for i in drawing])
        sampled: dict[int, Sampled] = dict(zip(drawing, drawn, strict=True))
        outputs = []
        for i, row in enumerate(rows):
            token, logprob = sampled.get(i, (None, None))
            outputs.append(RowOutput(row.request_id, token, logprob, self._score(row, hidden, starts[i])))
        return tuple(outputs)

    def _sample(self, rows: Sequence[Row], hidden: torch.Tensor, starts: Sequence[int]) -> list[Sampled]:
        """The next token after the last new id of each row."""
        last = [start + len(row.ids) - 1 for row, start in zip(rows, starts, strict=True)]
        sampled: list[Sampled] = []
        for a in range(0, len(rows), LOGIT_ROWS):
            index = torch.tensor(last[a : a + LOGIT_ROWS], device=hidden.device)
            logits = self._transformer.logits(hidden[index])  # (B, vocabulary)
            sampled += sample_rows(logits, rows[a : a + LOGIT_ROWS])
        return sampled

    def _score(self, row: Row, hidden: torch.Tensor, start: int) -> tuple[TokenLogprob, ...]:
        """Logprobs of the row's known next ids."""
        targets = row.targets or ()
        scored: list[TokenLogprob] = []
        for a in range(0, len(targets), LOGIT_ROWS):
            some = targets[a : a + LOGIT_ROWS]
            logits = self._transformer.logits(hidden[start + a : start + a + len(some)])  # (N, vocabulary)
            scored += score(logits, some, row.n_alternatives)
        return tuple(scored)


def _device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: torch finds no CUDA device here; use --device cpu, or install torch for CUDA")
    return torch.device(name)
