"""A replayed routing record as text and as plain values: what was foreseen, and what slots would have held."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from hybrid.routes import Record
from placement.ledger import human
from placement.recall import Foresight, Recall
from placement.replay import Cell

COLUMNS = 8  # layers side by side


@dataclass(frozen=True, slots=True)
class Replay:
    """Everything that `hybrid replay` found."""

    record: Record
    foresight: Foresight
    cells: Sequence[Cell]
    expert_bytes: int | None  # of one expert; None: no model was named


def to_json(replay: Replay) -> dict[str, object]:
    """The figures of `text`, as plain values; recall by layer, null where a predictor has nothing to say."""
    record, foresight = replay.record, replay.foresight
    return {
        "model": record.model,
        "tokens": len(record.tokens),
        "documents": len(record.starts),
        "decode_steps": int(record.decoded.sum()),
        "layers": record.layers.tolist(),
        "experts": record.n_experts,
        "experts_per_token": record.experts.shape[2],
        "recall": {
            "measured_tokens": foresight.measured,
            "documents": foresight.documents,
            "tokens_learned_before": foresight.learned,
            "note": foresight.note,
            "predictors": [
                {
                    "predictor": found.predictor,
                    "layers_ahead": found.horizon,
                    "at_k": [_value(share) for share in found.at_k.tolist()],
                    "at_2k": [_value(share) for share in found.at_2k.tolist()],
                }
                for found in foresight.recalls
            ],
        },
        "slots": [
            {
                **{key: value for key, value in asdict(cell).items() if key != "outcome"},
                **asdict(cell.outcome),
                "hit_rate": cell.outcome.rate,
                "net": cell.outcome.net,
                "loaded_bytes": _bytes(replay, cell.outcome.loads),
            }
            for cell in replay.cells
        ],
    }


def text(replay: Replay) -> str:
    """The same for people."""
    return "\n".join([*_head(replay.record), "", *_foresight(replay), "", *_slots(replay)])


def _head(record: Record) -> list[str]:
    return [
        f"{len(record.tokens):,} tokens of {len(record.starts):,} documents, {record.decoded.sum():,} of them decode "
        f"steps; {record.experts.shape[2]} of {record.n_experts} experts in {len(record.layers)} layers"
    ]


def _foresight(replay: Replay) -> list[str]:
    found, k = replay.foresight, replay.record.experts.shape[2]
    lines = [
        f"experts foreseen: share of a token's {k} among the best {k} and {2 * k} guesses",
        f"  {found.measured:,} decode steps of {found.documents:,} documents; the tables had learned {found.learned:,} "
        "tokens before and went on learning",
    ]
    if found.note:
        lines.append(f"  note: {found.note}")
    layers = replay.record.layers.tolist()
    for a in range(0, len(layers), COLUMNS):
        some = layers[a : a + COLUMNS]
        lines.append(f"  {'predictor':<23}{'layers':<15}" + "".join(f"{f'layer {layer}':>14}" for layer in some))
        lines += [_row(one, a) for one in found.recalls]
    return lines


def _row(found: Recall, a: int) -> str:
    known = "at step start" if found.horizon is None else f"{found.horizon} before"
    pairs = zip(found.at_k[a : a + COLUMNS].tolist(), found.at_2k[a : a + COLUMNS].tolist(), strict=True)
    cells = ["–" if math.isnan(k) else f"{k:.3f} {k2:.3f}" for k, k2 in pairs]
    return f"  {found.predictor:<23}{known:<15}" + "".join(f"{cell:>14}" for cell in cells)


def _slots(replay: Replay) -> list[str]:
    lines = [
        "experts in VRAM slots: the second half of the documents, after the first",
        "  net: hits less loads, as each load reads the expert from RAM once; the bound lets in only what was used",
        f"  {'at once':>7}{'slots':>13}  {'policy':<19}{'hit rate':>9}{'net':>8}{'loads a step':>14}"
        + (f"{'bytes a step':>14}" if replay.expert_bytes is not None else ""),
    ]
    before = None
    for cell in replay.cells:
        group, outcome = (cell.lanes, cell.slots), cell.outcome
        slots = f"{cell.slots} ({cell.slots / replay.record.n_experts:.0%})"
        head = f"  {cell.lanes:>7}{slots:>13}" if group != before else " " * 22
        loads = outcome.loads / outcome.steps
        moved = _bytes(replay, loads)
        lines.append(
            f"{head}  {cell.policy:<19}{outcome.rate:>9.3f}{outcome.net:>8.3f}{loads:>14.2f}"
            + (f"{human(moved):>14}" if moved is not None else "")
        )
        before = group
    return lines


def _bytes(replay: Replay, loads: float) -> float | None:
    return None if replay.expert_bytes is None else loads * replay.expert_bytes


def _value(share: float) -> float | None:
    return None if math.isnan(share) else share
