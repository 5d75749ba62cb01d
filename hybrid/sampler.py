"""Logits to tokens and logprobs, for all rows of a step at once. Called by the engine; knows no model and no request.

Order of operations: logit_bias; repetition penalty (ids of prompt and output), then frequency and presence penalties
(output); temperature; top_k; top_p of what top_k left; min_p. A lower id goes before a higher one of equal
probability everywhere. Temperature 0 takes the first of this order and ignores the filters.

A draw is the inverse of the cumulative distribution, in order of id (of rank where a filter is on), at a uniform
number hashed from (seed, n_sampled). Probabilities are summed as integers in fixed point. Such sums are exact, so
neither their order nor the rest of the batch can move a draw, and the device only through an exponential's last bit.

Logprobs are those of the raw logits. B and N are rows, V is the vocabulary.
"""

from collections.abc import Iterator, Sequence
from hashlib import blake2b
from math import inf, isfinite, log

import numpy as np
import torch
from torch import Tensor

from hybrid.batch import Row, Sampling, TokenLogprob

# Weights are relative to the most probable id. With 44 bits the sum over 2^18 ids stays below 2^63, and only ids
# 6e-14 times as probable as the best one are lost.
FIXED_POINT = 2.0**44
BLOCK = 2**21  # logits handled at a time where 64-bit copies are made: bounds each at 16 MiB


class LogitsError(ArithmeticError):
    """Logits that are no numbers: the model, its weights or a kernel is broken. One line."""


def sample_rows(logits: Tensor, rows: Sequence[Row]) -> tuple[tuple[int, TokenLogprob | None], ...]:
    """One token for each row of `logits` (B, V) float32; `rows` are those B rows, all with `sampling` set.

    The logprob is None where `sampling.logprobs` is None. Results leave the device in one transfer.
    Raises LogitsError for NaN, +inf or nothing but -inf, ValueError for a logit_bias id outside the vocabulary.
    """
    if not rows:
        return ()
    settings = [_sampling(row) for row in rows]
    adjusted = _adjust(logits, rows, settings)
    best, tokens = adjusted.max(-1)  # (B,), (B,); NaN wins, so best tells whether the row is sane
    drawn = [i for i, s in enumerate(settings) if s.temperature != 0]
    for part in _blocks(drawn, logits.shape[-1]):
        gaps = _pick(best, part)[:, None] - _pick(adjusted, part)  # (D, V)
        numbers = [uniform(settings[i].seed, rows[i].n_sampled) for i in part]
        tokens[_upload(part, logits.device)] = _draw(gaps, [settings[i] for i in part], numbers)
    asked = [i for i, s in enumerate(settings) if s.logprobs is not None]
    n_top = max((s.logprobs or 0 for s in settings), default=0)
    parts = [tokens, best]
    if asked:
        parts.append(_report(_pick(logits, asked), _pick(tokens, asked), n_top).flatten())
    values = torch.cat([part.double() for part in parts]).tolist()  # the step's one wait for the device
    for row, top in zip(rows, values[len(rows) : 2 * len(rows)], strict=True):
        _require_finite(top, f"request {row.request_id}")
    drawn_ids = [int(token) for token in values[: len(rows)]]
    reports = dict(zip(asked, _rows_of(values[2 * len(rows) :], len(asked)), strict=True))
    return tuple(
        (token, _token_logprob(token, reports[i], s.logprobs or 0) if i in reports else None)
        for i, (token, s) in enumerate(zip(drawn_ids, settings, strict=True))
    )


def score(logits: Tensor, targets: Sequence[int], n_alternatives: int) -> tuple[TokenLogprob, ...]:
    """Logprobs of known ids: `targets[i]` under `logits[i]`, (N, V) float32, with the most probable alternatives.

    Raises LogitsError as `sample_rows` does, ValueError for a target outside the vocabulary.
    """
    n_rows, n_vocab = logits.shape
    if len(targets) != n_rows:
        raise ValueError(f"{len(targets)} targets for {n_rows} rows of logits")
    if not targets:
        return ()
    _require_ids("targets", targets, n_vocab)
    ids = _upload(targets, logits.device)
    blocks = [slice(part[0], part[-1] + 1) for part in _blocks(range(n_rows), n_vocab)]
    values = torch.cat([_report(logits[at], ids[at], n_alternatives) for at in blocks]).flatten().tolist()
    reports = _rows_of(values, n_rows)
    for i, report in enumerate(reports):
        _require_finite(report[0], f"scored row {i}")
    return tuple(_token_logprob(t, report, n_alternatives) for t, report in zip(targets, reports, strict=True))


def uniform(seed: int, n_sampled: int) -> float:
    """The random number in [0, 1) behind token `n_sampled` of a request: a hash, so that nothing has a state."""
    digest = blake2b(f"{seed} {n_sampled}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) * 2.0**-53


def _sampling(row: Row) -> Sampling:
    if row.sampling is None:
        raise ValueError(f"request {row.request_id} asks for no token, so it has no row to sample")
    return row.sampling


def _adjust(logits: Tensor, rows: Sequence[Row], settings: Sequence[Sampling]) -> Tensor:
    """Logits after bias and penalties: a copy, or `logits` itself where no row has any."""
    biases = [(i, *pair) for i, s in enumerate(settings) for pair in s.logit_bias]
    penalised = [i for i, s in enumerate(settings) if s.penalised]
    if not biases and not penalised:
        return logits
    logits = logits.clone()
    if biases:
        _require_ids("logit_bias", [token for _, token, _ in biases], logits.shape[-1])
        at_row, at_id = _upload([pair[:2] for pair in biases], logits.device).unbind(-1)
        change = _upload([pair[2] for pair in biases], logits.device).float()
        logits.index_put_((at_row, at_id), change, accumulate=True)
    if penalised:
        table = np.concatenate([_penalties(i, rows[i], settings[i]) for i in penalised])
        at_row, at_id, factor, shift = _upload(table, logits.device).unbind(-1)
        at, factor = (at_row.long(), at_id.long()), factor.float()
        x = logits[at]
        logits[at] = torch.where(x > 0, x / factor, x * factor) - shift.float()
    return logits


def _penalties(i: int, row: Row, s: Sampling) -> np.ndarray:
    """(M, 4) for the M ids so far: row `i`, id, divisor of its logit (factor of a negative one), what to take off."""
    ids, where = np.unique(np.array(row.prompt + row.output, dtype=np.int64), return_inverse=True)
    counts = np.bincount(where[len(row.prompt) :], minlength=len(ids))  # in the output
    shift = s.frequency_penalty * counts + s.presence_penalty * (counts > 0)
    return np.stack([np.full(len(ids), i), ids, np.full(len(ids), s.repetition_penalty), shift], axis=-1)


def _draw(gaps: Tensor, settings: Sequence[Sampling], numbers: Sequence[float]) -> Tensor:
    """(D,) ids drawn with probabilities proportional to exp(-gaps / temperature); gaps (D, V) >= 0 are overwritten."""
    # A temperature near zero would overflow; below the floor it is greedy anyway.
    warmth = _upload([max(s.temperature, 1e-30) for s in settings], gaps.device).float()
    gaps /= warmth[:, None]
    points = _upload(numbers, gaps.device)[:, None]  # (D, 1)
    filtered = [i for i, s in enumerate(settings) if (s.top_k, s.top_p, s.min_p) != (None, None, None)]
    free = [i for i in range(len(settings)) if i not in filtered]
    tokens = torch.empty(len(settings), dtype=torch.int64, device=gaps.device)
    if filtered:
        chosen = [settings[i] for i in filtered]
        tokens[_upload(filtered, gaps.device)] = _draw_ranked(_pick(gaps, filtered), chosen, _pick(points, filtered))
    if free:
        cumulative = _cumulative(_pick(gaps, free))
        tokens[_upload(free, gaps.device)] = _invert(cumulative, cumulative[:, -1:], _pick(points, free)).squeeze(-1)
    return tokens.clamp_(max=gaps.shape[-1] - 1)  # beyond the end only where logits are no numbers


def _draw_ranked(gaps: Tensor, settings: Sequence[Sampling], points: Tensor) -> Tensor:
    """(F,) ids drawn from what the filters leave of (F, V): each filter keeps the n most probable ids."""
    ranked = _ascending(gaps)
    cumulative = _cumulative(ranked)
    top_k, top_p, floor = _limits(settings, gaps.shape[-1], gaps.device)
    wanted = (cumulative.gather(-1, top_k - 1) * top_p).ceil().long()  # mass that top_p asks for of what top_k left
    n_p = torch.searchsorted(cumulative, wanted) + 1
    n_min = torch.searchsorted(ranked, floor, right=True)
    n_kept = torch.minimum(torch.minimum(top_k, n_p), n_min).clamp_(min=1)
    rank = _invert(cumulative, cumulative.gather(-1, n_kept - 1), points)
    # The id of that rank: among ids with the same gap, the lower goes first.
    gap = ranked.gather(-1, rank.clamp(max=gaps.shape[-1] - 1))
    nth = rank - torch.searchsorted(ranked, gap) + 1
    return torch.searchsorted((gaps == gap).cumsum(-1), nth).squeeze(-1)


def _limits(settings: Sequence[Sampling], n_vocab: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """top_k in 1 .. V, top_p, and the widest gap that min_p allows, (F, 1) each; filters that are off let all pass."""
    limits = [
        (
            n_vocab if s.top_k is None else min(max(s.top_k, 1), n_vocab),
            1.0 if s.top_p is None else s.top_p,
            -log(s.min_p) if s.min_p else inf,
        )
        for s in settings
    ]
    top_k, top_p, floor = _upload(limits, device)[:, :, None].unbind(1)
    return top_k.long(), top_p, floor.float()


def _cumulative(gaps: Tensor) -> Tensor:
    """Running sums of exp(-gaps) along the last dimension, int64 in fixed point."""
    return gaps.neg().exp_().mul_(FIXED_POINT).long().cumsum(-1)


def _invert(cumulative: Tensor, total: Tensor, points: Tensor) -> Tensor:
    """(n, 1) index of the entry in which `points` in [0, 1) of `total` falls."""
    mass = torch.minimum((points * total).long(), total - 1)
    return torch.searchsorted(cumulative, mass, right=True)


def _ascending(gaps: Tensor) -> Tensor:
    if gaps.device.type == "cpu":
        # torch's CPU sort carries indices along: 18 ms for 163,840 values, against 1.3 ms (AVX2, one thread).
        return torch.from_numpy(np.sort(gaps.numpy(), axis=-1))
    return gaps.sort(dim=-1).values


def _report(logits: Tensor, ids: Tensor, n_top: int) -> Tensor:
    """(N, 2 + 2 n_top) float64: log of the normaliser, logprob of `ids` (N,), the best ids, their logprobs."""
    norm = logits.logsumexp(-1, keepdim=True)
    parts = [norm, logits.gather(-1, ids[:, None]) - norm]
    if n_top > 0:
        best = _best_ids(logits, min(n_top, logits.shape[-1]))
        parts += [best, logits.gather(-1, best) - norm]
    return torch.cat([part.double() for part in parts], dim=-1)


def _best_ids(logits: Tensor, k: int) -> Tensor:
    """(N, k) ids of the largest logits, best first, the lower id first among equals.

    topk promises no order among equals, so it gets distinct 64-bit keys: the float's bits, turned into an integer of
    the same order, above the id counted down.
    """
    bits = (logits + 0.0).view(torch.int32)  # -0.0 + 0.0 is 0.0, so that both zeros are equal
    bits ^= (bits >> 31) & 0x7FFFFFFF
    keys = bits.long().bitwise_left_shift_(32)
    keys -= torch.arange(logits.shape[-1], device=logits.device)
    return -keys.topk(k, dim=-1).values & 0xFFFFFFFF


def _token_logprob(token: int, report: Sequence[float], n_top: int) -> TokenLogprob:
    """One row of `_report` as a value, with the first `n_top` of its alternatives."""
    half = (len(report) - 2) // 2
    pairs = zip(report[2 : 2 + half], report[2 + half :], strict=True)
    return TokenLogprob(token, report[1], tuple((int(i), logprob) for i, logprob in pairs)[:n_top])


def _blocks(index: Sequence[int], n_vocab: int) -> Iterator[Sequence[int]]:
    size = max(BLOCK // n_vocab, 1)
    return (index[start : start + size] for start in range(0, len(index), size))


def _rows_of(values: list[float], n_rows: int) -> list[list[float]]:
    width = len(values) // n_rows if n_rows else 0
    return [values[i * width : (i + 1) * width] for i in range(n_rows)]


def _pick(x: Tensor, index: Sequence[int]) -> Tensor:
    """The rows `index` of `x`, which rise; `x` itself where they are all of them."""
    return x if len(index) == len(x) else x[_upload(index, x.device)]


def _upload(values: object, device: torch.device) -> Tensor:
    """Host numbers as int64 or float64 on the device, without waiting for it."""
    return torch.from_numpy(np.asarray(values)).to(device, non_blocking=True)


def _require_ids(name: str, ids: Sequence[int], n_vocab: int) -> None:
    # Checked here because an index outside its tensor kills the whole CUDA context.
    for token in ids:
        if not 0 <= token < n_vocab:
            raise ValueError(f"{name}: token id {token} is outside the vocabulary of {n_vocab}")


def _require_finite(value: float, who: str) -> None:
    if not isfinite(value):
        raise LogitsError(f"{who}: the logits hold NaN or infinity; the checkpoint or a kernel is broken")
