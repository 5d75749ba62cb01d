"""What of the overlapped step only a CUDA device can show, for `python -m tests.gpu`: parity and times.

Parity: greedy decoding with hand-off, halves and graphs on against all of them off, and every captured shape replayed.
Times: decode steps with each of them, in turns. With the CPU in the device's place the same code runs without graphs.
"""

import statistics
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hybrid.batch import Batch, Row, Sampling
from hybrid.config import EngineConfig
from hybrid.engine import Engine
from hybrid.trial_steps import TrialSteps, pages_needed
from offload.config import PoolConfig
from tests.bench.stepping import PAGE_SIZE

ROWS, PROMPT, ANSWER, PAGES_EACH = 5, 40, 24, 8
LIMIT = 2e-3  # of a logprob, as between the devices
WAYS: dict[str, dict[str, Any]] = {
    "direct": {"handoff": False},
    "flag": {"handoff": True},
    "flag, graphs": {"handoff": True, "graphs": True},
    "flag, halves": {"handoff": True, "ping_pong": "on"},
    "flag, graphs, halves": {"handoff": True, "graphs": True, "ping_pong": "on"},
}
BATCHES = (1, 2, 4, 8, 16)


def parity(model: Path, device: str) -> dict[str, Any]:
    """Tokens and logprobs of every way against the first one's, in float32."""
    answers = {way: _decode(model, device, settings) for way, settings in WAYS.items()}
    expected, _ = answers["direct"]
    rows: dict[str, Any] = {}
    for way, (found, graphs) in answers.items():
        tokens = found[0] == expected[0]
        difference = float(np.abs(found[1] - expected[1]).max()) if tokens else float("nan")
        captured = "graphs" not in WAYS[way] or device == "cpu" or set(graphs) == {"replayed", "a prompt in the step"}
        rows[way] = {
            "tokens_equal": tokens, "max_abs_difference": difference, "graphs": graphs,
            "passed": tokens and difference < LIMIT and captured,
        }  # fmt: skip
        print(
            f"{'passed' if rows[way]['passed'] else 'FAILED'}: {way}: differs by {difference:.2e}, {graphs}", flush=True
        )
    return rows


def times(model: Path, device: str, dtype: str, steps: int = 20) -> dict[str, dict[int, float]]:
    """Median seconds of decode steps by way and batch size, and of a layer's hand-off beside the device's own part."""
    found: dict[str, dict[int, float]] = {}
    for way, settings in WAYS.items():
        n_pages = pages_needed(PAGE_SIZE, 512, 512, max(BATCHES), max(BATCHES))
        engine = Engine(EngineConfig(model, device, dtype, "native", PoolConfig(), n_pages, PAGE_SIZE, **settings))  # type: ignore[arg-type]
        try:
            found[way] = {}
            for batch in BATCHES:
                trial = TrialSteps(engine)
                trial.fill(512, batch, None)
                seconds = [trial.decode(batch).seconds for _ in range(steps + 3)][3:]
                found[way][batch] = statistics.median(seconds)
        finally:
            engine.close()
        print(f"{way:<22}" + "".join(f"{found[way][n] * 1e3:>9.2f} ms" for n in BATCHES), flush=True)
    return found


def _decode(
    model: Path, device: str, settings: dict[str, Any]
) -> tuple[tuple[list[list[int]], np.ndarray], dict[str, int]]:
    """Greedy tokens of some requests that decode together, with their logprobs; how the device's parts ran."""
    config = EngineConfig(
        model,
        device,
        "float32",
        "native",
        PoolConfig(precision="a16"),
        ROWS * PAGES_EACH,
        PAGE_SIZE,
        **settings,  # type: ignore[arg-type]
    )
    engine, rng = Engine(config), np.random.default_rng(9)
    known = [tuple(rng.integers(0, 256, PROMPT - 3 * i).tolist()) for i in range(ROWS)]
    tokens: list[list[int]] = [[] for _ in known]
    logprobs: list[float] = []
    written = [0] * ROWS
    try:
        for _ in range(ANSWER):
            rows = [
                Row(i, ids[written[i] :], written[i], tuple(range(i * PAGES_EACH, (i + 1) * PAGES_EACH)),
                    Sampling(temperature=0.0, logprobs=0))
                for i, ids in enumerate(known)
            ]  # fmt: skip
            for i, output in enumerate(engine.step(Batch(tuple(rows))).rows):
                assert output.token is not None and output.logprob is not None
                written[i] = len(known[i])
                known[i] = (*known[i], output.token)
                tokens[i].append(output.token)
                logprobs.append(output.logprob.logprob)
        return (tokens, np.array(logprobs)), engine.graphs
    finally:
        engine.close()
        if device == "cuda":
            torch.cuda.empty_cache()
