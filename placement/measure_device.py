"""Rates of the device that runs everything but the routed experts: products, attention, and what a step costs besides.

The products and the attention are those that the engine calls, on tensors of K2.5's sizes; the overheads come from
real steps of tiny models. On a machine without a GPU the CPU is the device and every line here runs the same. Knows no
plans. Called by `placement.measure`.
"""

import itertools
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

from hybrid.batch import Batch, Row, Sampling
from hybrid.config import KEY_BLOCK, EngineConfig, ModelConfig
from hybrid.engine import DTYPES, Engine
from hybrid.inputs import Group, upload
from hybrid.kv import LatentCache, allocate
from hybrid.mla import Attention, Queries
from hybrid.narrow import Matrix, Narrow, linear, quantised
from hybrid.random_checkpoint import write_checkpoint
from hybrid.sampler import sample_rows
from offload.config import PoolConfig
from placement.document import Measured
from placement.hardware import Hardware
from placement.measure_kernels import CACHES, cache_bytes, small_config
from placement.measure_timing import Effort, Sizes, medians, take_turns, timed
from placement.plan import WeightDtype, engine_types
from placement.profile import Device, Gemm, median_of

PAGE_SIZE = 16
GATHERED_ROWS = 4
LAUNCHES = 20  # products between two looks at a GPU's clock
SMALL_VOCABULARY = 512


def measure_device(hardware: Hardware, device: torch.device, sizes: Sizes, scratch: Path) -> Device:
    """Everything that `serve` needs of the device, with products in the type that it uses there."""
    kv_read, decode, prefill = measure_attention(device, sizes)
    per_step, per_layer, per_row = measure_overheads(device, sizes, scratch)
    return Device(
        kind="cuda" if device.type == "cuda" else "cpu",
        name=torch.cuda.get_device_name(device) if device.type == "cuda" else hardware.cpu,
        gemms=(measure_gemm(hardware, device, own_dtype(device), sizes),),
        kv_read=kv_read,
        attention_decode=decode,
        attention_prefill=prefill,
        per_step=per_step,
        per_layer=per_layer,
        per_row=per_row,
        per_logit=measure_sampling(device, sizes),
    )


def own_dtype(device: torch.device) -> WeightDtype:
    """The type of weights that the engine takes there unless told otherwise."""
    return "bfloat16" if device.type == "cuda" else "float32"


def measure_gemm(hardware: Hardware, device: torch.device, dtype: WeightDtype, sizes: Sizes) -> Gemm:
    """Products by rows as the engine calls them, over more weights than the caches hold."""
    item = {"float32": 4, "bfloat16": 2}.get(dtype, 1)
    n_weights = max(3, -(-CACHES * _cache(hardware, device) // (item * sizes.gemm**2)))
    weights = itertools.cycle([_weight(sizes.gemm, dtype, device) for _ in range(n_weights)])
    computed = DTYPES[own_dtype(device)] if engine_types(dtype)[1] else DTYPES[dtype]
    n_launches = LAUNCHES if device.type == "cuda" else 1

    def call_with(rows: int) -> Callable[[], float]:
        x = torch.randn((rows, sizes.gemm), device=device).to(computed)

        def run() -> None:
            for _ in range(n_launches):
                linear(x, next(weights))

        return lambda: timed(device, run) / n_launches

    with torch.inference_mode():
        found = take_turns({rows: call_with(rows) for rows in sizes.gemm_rows}, sizes.effort, leaves_out=True)
    return Gemm(dtype, sizes.gemm, medians(found))


def measure_attention(device: torch.device, sizes: Sizes) -> tuple[Measured, Measured, Measured]:
    """Bytes per second of gathering latents, FLOP/s of decoding and of a prompt's chunk.

    FLOP of the absorbed path for each new id: 2 H C (N + V) and for each key 2 H ((C + R) + C); of the naive path for
    each key 2 H C (N + V) and for each new id and key 2 H (N + R + V).
    """
    model = _attention_model(sizes)
    n_tokens = max(rows * context for rows, context in (*sizes.decodes, (1, sizes.prompt[1])))
    dtype = DTYPES[own_dtype(device)]
    cache = allocate(model, -(-n_tokens // PAGE_SIZE), PAGE_SIZE, dtype, device)
    cache.entries.normal_()
    attend = _Attend(model, cache, device, dtype)
    new, keys = sizes.prompt
    rows, context = sizes.decodes[-1]
    n_bytes = rows * context * model.latent_size * cache.entries.element_size()
    calls = {
        "read": attend.gathering(rows, context),
        "prompt": attend.call("naive", 1, new, keys),
        **{f"decode {rows}": attend.call("absorbed", rows, 1, context) for rows, context in sizes.decodes},
    }
    with torch.inference_mode():
        found = take_turns(calls, sizes.effort)
    n_rounds = min(len(seconds) for seconds in found.values())
    decode = np.array([_thinned(found[f"decode {rows}"], n_rounds) for rows, _ in sizes.decodes])  # (shapes, rounds)
    flops = sum(rows * _absorbed_flops(model, context) for rows, context in sizes.decodes)
    prompt = _naive_flops(model, new, keys)
    return (
        median_of([n_bytes / seconds for seconds in found["read"]]),
        median_of((flops / decode.sum(axis=0)).tolist()),
        median_of([prompt / seconds for seconds in found["prompt"]]),
    )


def measure_overheads(device: torch.device, sizes: Sizes, scratch: Path) -> tuple[Measured, Measured, Measured]:
    """Seconds of a step, of one layer and of one row, by least squares over real steps of models of two depths.

    Of the medians, so that a disturbed step does not count; the spread is that of the fits of a turn each.
    """
    kinds = list(itertools.product(sizes.layers, sizes.batches))
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory(dir=scratch)))
        calls: dict[tuple[int, int], Callable[[], float]] = {}
        for layers in sizes.layers:
            engine = stack.enter_context(closing(_tiny_engine(folder / str(layers), layers, device, sizes)))
            calls |= {(layers, batch): _step_call(engine, batch) for batch in sizes.batches}
        found = take_turns(calls, sizes.effort)
    factors = np.array([(1, layers, batch) for layers, batch in kinds], np.float64)
    n_fits = min(len(seconds) for seconds in found.values())
    times = np.array([[median_of(found[kind]).value, *_thinned(found[kind], n_fits)] for kind in kinds])
    fits = np.maximum(np.linalg.lstsq(factors, times, rcond=None)[0], 0)  # (3, 1 + fits)
    per_step, per_layer, per_row = (_around(float(fit[0]), fit[1:].tolist()) for fit in fits)
    return per_step, per_layer, per_row


def measure_sampling(device: torch.device, sizes: Sizes) -> Measured:
    """Seconds of drawing one token, for each word of the vocabulary; the rest of drawing is in the rows' overhead."""
    n_rows = 4
    rows = [Row(i, (0,), 0, (0,), Sampling(temperature=1.0, seed=i)) for i in range(n_rows)]

    def call_with(n_vocab: int) -> Callable[[], float]:
        logits = torch.randn((n_rows, n_vocab), device=device)
        return lambda: timed(device, lambda: sample_rows(logits, rows))

    with torch.inference_mode():
        found = take_turns({n: call_with(n) for n in (SMALL_VOCABULARY, sizes.vocabulary)}, _short(sizes.effort))
    small = median_of(found[SMALL_VOCABULARY]).value
    words = n_rows * (sizes.vocabulary - SMALL_VOCABULARY)
    return median_of([max(0.0, (seconds - small) / words) for seconds in found[sizes.vocabulary]])


class _Attend:
    """Calls of one layer's attention on a cache that is full of latents."""

    def __init__(self, model: ModelConfig, cache: LatentCache, device: torch.device, dtype: torch.dtype) -> None:
        self._model, self._cache, self._device, self._dtype = model, cache, device, dtype

    def call(self, path: str, rows: int, new: int, context: int) -> Callable[[], float]:
        """Seconds of one call for `rows` requests with so many new ids at the end of so long a context."""
        model, group = self._model, self._group(rows, new, context)
        heads, nope, latent = model.num_attention_heads, model.qk_nope_head_dim, model.kv_lora_rank
        empty = torch.empty(0, dtype=self._dtype, device=self._device)
        kv_b = self._normal(heads, nope + model.v_head_dim, latent) / latent**0.5
        attention = Attention(
            config=model, layer=0, path="naive" if path == "naive" else "absorbed", q_a=None, q_a_norm=None, q_b=empty,
            kv_a=empty, kv_a_norm=empty, kv_b=kv_b.flatten(0, 1), out=empty,
        )  # fmt: skip
        queries = Queries(self._normal(rows, new, heads, nope), self._normal(rows, new, heads, model.qk_rope_head_dim))
        return lambda: timed(self._device, lambda: attention._attend(queries, group, self._cache))

    def gathering(self, rows: int, context: int) -> Callable[[], float]:
        """Seconds of gathering all latents in the blocks of keys that attention takes, on the CPU of few rows each:
        larger ones come from the system page by page, which the products' rate contains already."""
        pages = self._group(rows, 1, context).pages
        step = KEY_BLOCK // PAGE_SIZE
        at_once = rows if self._device.type == "cuda" else GATHERED_ROWS

        def run() -> None:
            for row, first in itertools.product(range(0, rows, at_once), range(0, pages.shape[1], step)):
                self._cache.read(0, pages[row : row + at_once, first : first + step])

        return lambda: timed(self._device, run)

    def _group(self, rows: int, new: int, context: int) -> Group:
        each = -(-context // PAGE_SIZE)
        batch = [Row(i, tuple([0] * new), context - new, tuple(range(i * each, (i + 1) * each))) for i in range(rows)]
        (group,) = upload(Batch(tuple(batch)), PAGE_SIZE, self._device).groups
        return group

    def _normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, device=self._device).to(self._dtype)


def _attention_model(sizes: Sizes) -> ModelConfig:
    """K2.5's attention with so many heads, in a model of one layer."""
    return ModelConfig.from_json(
        small_config(
            num_hidden_layers=1, hidden_size=sizes.hidden, num_attention_heads=sizes.heads, kv_lora_rank=512,
            qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128,
        )
    )  # fmt: skip


def _absorbed_flops(model: ModelConfig, context: int) -> float:
    latent, in_and_out = model.kv_lora_rank, model.qk_nope_head_dim + model.v_head_dim
    return 2.0 * model.num_attention_heads * (latent * in_and_out + context * (model.latent_size + latent))


def _naive_flops(model: ModelConfig, new: int, context: int) -> float:
    latent, in_and_out = model.kv_lora_rank, model.qk_nope_head_dim + model.v_head_dim
    return (
        2.0 * model.num_attention_heads * context * (latent * in_and_out + new * (in_and_out + model.qk_rope_head_dim))
    )


def _tiny_engine(out: Path, layers: int, device: torch.device, sizes: Sizes) -> Engine:
    write_checkpoint(small_config(num_hidden_layers=layers), out, 0)
    kind = "cuda" if device.type == "cuda" else "cpu"
    dtype = "bfloat16" if kind == "cuda" else "float32"
    n_pages = 2 * max(sizes.batches)
    return Engine(EngineConfig(out, kind, dtype, "native", PoolConfig(), n_pages, PAGE_SIZE))  # type: ignore[arg-type]


def _step_call(engine: Engine, batch: int) -> Callable[[], float]:
    """Seconds of one decode step of so many rows, each with a few ids in the cache."""
    counter = itertools.count()

    def call() -> float:
        n = next(counter)
        rows = tuple(
            Row(i, ((n + i) % 256,), PAGE_SIZE, (2 * i, 2 * i + 1), Sampling(temperature=1.0, seed=i), n_sampled=n)
            for i in range(batch)
        )
        began = time.perf_counter()
        engine.step(Batch(rows))
        return time.perf_counter() - began

    return call


def _around(value: float, others: list[float]) -> Measured:
    """A figure with the spread of less certain ones."""
    spread = median_of([*others, value])
    assert spread.low is not None and spread.high is not None
    return Measured(value, min(value, spread.low), max(value, spread.high))


def _thinned(seconds: list[float], n: int) -> list[float]:
    """Medians of `n` stretches of the samples, in the order they were taken."""
    return [median_of(part.tolist()).value for part in np.array_split(np.array(seconds), n)]


def _weight(size: int, dtype: WeightDtype, device: torch.device) -> Matrix:
    """Normal numbers, (size, size)."""
    values = torch.randn((size, size), device=device)
    computed, narrow = engine_types(dtype)
    return Narrow(*quantised(values, narrow)) if narrow else values.to(DTYPES[computed])


def _cache(hardware: Hardware, device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    return cache_bytes(hardware)


def _short(effort: Effort) -> Effort:
    return replace(effort, seconds=effort.seconds / 3)
