"""Record nano's routing on held-out conversations.

    python -m hybrid.nano.record MODEL_DIR OUT.npz [--tokens N] [--scored N]

Every conversation goes through the real engine (INT4 experts, 8-bit activations) in one step, its answers given as if
the model had written them. The file is `hybrid.routes.Record`; `hybrid.nano.load` sums it up.
"""

import argparse
import hashlib
import random
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from hybrid.batch import Batch, Row
from hybrid.config import EngineConfig
from hybrid.engine import Engine
from hybrid.moe import Moe
from hybrid.nano.conversation import Encoded, encode
from hybrid.nano.data import Make, copy_list, known_tool, unseen_tool
from hybrid.nano.load import report
from hybrid.nano.mixture import named, numbered
from hybrid.nano.sums import arithmetic
from hybrid.nano.swarm_data import sub_agent
from hybrid.nano.vocabulary import N_RANKS, Vocabulary, read_vocabulary
from hybrid.routes import Record, write_record
from offload.config import PoolConfig

SEED = 40_000
TOKENS = 25_000
SCORED_TOKENS = 1_000  # most of the file: scores hardly compress, and each comes with two looks ahead
LOOKS = 2  # layers before that a layer is looked ahead from
PAGE = 16
# Conversations of each family in a round of about 25,000 tokens. As many sub-agents as a large batch, so that those of
# one swarm can be looked at together. No talk: most of its questions are the training's own.
FAMILIES: dict[str, tuple[Make, int]] = {
    "sub-agent": (sub_agent, 40), "tool": (known_tool, 20), "tool unseen": (unseen_tool, 10),
    "arithmetic": (arithmetic, 24), "copy": (copy_list, 8),
    "fan-out 2 to 5": (named(2, 5), 4), "fan-out 4 to 12": (named(4, 12), 3),
    "fan-out numbered 3 to 12": (numbered(3, 12), 2), "fan-out numbered 13 to 40": (numbered(13, 40), 1),
    "fan-out numbered 41 to 100": (numbered(41, 100), 1),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Document:
    """One conversation to run, and the name of its family."""

    family: str
    encoded: Encoded

    @property
    def n_tokens(self) -> int:
        return len(self.encoded.ids)


def documents(vocabulary: Vocabulary, n_tokens: int, scored: int) -> tuple[list[Document], int]:
    """Held-out conversations of `n_tokens` tokens or a little more, always the same, and how many of the first ones
    are to be scored: in turns one of each family where they fit, `scored` tokens at most."""
    first: list[Document] = []
    rest: list[Document] = []
    stream = _drawn(vocabulary)
    while n_tokens > 0:
        rest.append(next(stream))
        n_tokens -= rest[-1].n_tokens
    complete = True  # every family has had its turn: none is scored more often than another that has more
    while complete and rest:
        families = {document.family for document in rest}
        others: list[Document] = []
        for document in rest:
            if document.family in families and document.n_tokens <= scored:
                families.remove(document.family)
                scored -= document.n_tokens
                first.append(document)
            else:
                others.append(document)
        rest, complete = others, not families
    return [*first, *rest], len(first)


def _drawn(vocabulary: Vocabulary) -> Iterator[Document]:
    """Rounds of `FAMILIES`, each in an order of its own."""
    rng = random.Random(SEED)
    while True:
        order = [family for family, (_, n) in FAMILIES.items() for _ in range(n)]
        rng.shuffle(order)
        for family in order:
            yield Document(family, encode(FAMILIES[family][0](rng, True), vocabulary))


class Recorder:
    """Keeps what the routers do: a `hybrid.moe.Watch`. All scores and looks ahead too while `scoring`."""

    def __init__(self) -> None:
        self.scoring = False
        self._inputs: dict[int, torch.Tensor] = {}  # of this step's layers so far
        self._bias: dict[int, torch.Tensor] = {}
        self._experts: defaultdict[int, list[torch.Tensor]] = defaultdict(list)
        self._scores: defaultdict[int, list[torch.Tensor]] = defaultdict(list)
        self._ahead: defaultdict[int, list[torch.Tensor]] = defaultdict(list)

    def __call__(self, moe: Moe, x: torch.Tensor, ids: torch.Tensor) -> None:
        router = moe.router
        self._bias[moe.layer] = torch.zeros(len(router.weight)) if router.bias is None else router.bias
        self._experts[moe.layer].append(ids.sort(-1).values.cpu())
        scored = x if self.scoring else x[:0]
        scores = router.scores(scored)
        if any(layer >= moe.layer for layer in self._inputs):  # another step
            self._inputs.clear()
        before = [router.scores(x) for x in [*self._inputs.values()][: -LOOKS - 1 : -1]]
        before += [torch.zeros_like(scores)] * (LOOKS - len(before))
        self._scores[moe.layer].append(scores.half().cpu())
        self._ahead[moe.layer].append(torch.stack(before, 1).half().cpu())
        self._inputs[moe.layer] = scored.clone()

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """`layers`, `bias`, `experts`, `scores` and `ahead` of a `hybrid.routes.Record`."""
        bias = torch.stack(list(self._bias.values()))
        experts = torch.stack([torch.cat(steps) for steps in self._experts.values()], 1)
        scores = torch.stack([torch.cat(steps) for steps in self._scores.values()], 1)
        ahead = torch.stack([torch.cat(steps) for steps in self._ahead.values()], 1)
        return {
            "layers": np.array(list(self._bias), np.int32),
            "bias": bias.cpu().numpy(),
            "experts": experts.numpy().astype(np.min_scalar_type(bias.shape[1] - 1)),
            "scores": scores.numpy(),
            "ahead": ahead.numpy(),
        }


def record(directory: Path, chosen: Sequence[Document], n_scored: int, pool: PoolConfig) -> Record:
    """Run the documents, each in one step, through the model of `directory`; the first `n_scored` with their scores.

    Raises what `Engine` raises, and OSError.
    """
    n_pages = -(-max(document.n_tokens for document in chosen) // PAGE)
    recorder = Recorder()
    engine = Engine(EngineConfig(directory, "cpu", "float32", "native", pool, n_pages, PAGE), watch=recorder)
    try:
        for i, document in enumerate(chosen):
            recorder.scoring = i < n_scored
            engine.step(Batch((Row(i, tuple(document.encoded.ids), 0, tuple(range(n_pages))),)))
    finally:
        engine.close()
    starts = np.cumsum([0, *(document.n_tokens for document in chosen)])[:-1]
    turns = [
        (at + start, at + stop, kind)
        for at, document in zip(starts.tolist(), chosen, strict=True)
        for start, stop, kind in document.encoded.turns
    ]
    ids = [token for document in chosen for token in document.encoded.ids]
    return Record(
        model=model_hash(directory),
        tokens=np.array(ids, np.min_scalar_type(engine.model.vocab_size - 1)),
        starts=starts.astype(np.int32),
        families=np.array([document.family for document in chosen]),
        turns=np.array([(start, stop) for start, stop, _ in turns], np.int32),
        kinds=np.array([kind for _, _, kind in turns]),
        **recorder.arrays(),
    )


def model_hash(directory: Path) -> str:
    """SHA-256, in hexadecimal, of config.json and the weights' files in the order of their names. Raises OSError."""
    total = hashlib.sha256((directory / "config.json").read_bytes())
    for path in sorted(directory.glob("*.safetensors")):
        total.update(path.read_bytes())
    return total.hexdigest()


def _vocabulary(directory: Path) -> Vocabulary:
    """Raises OSError, and ValueError where the model is not nano."""
    try:
        found = read_vocabulary(directory)
    except ValueError:
        found = Vocabulary({})
    if found.tokens.keys() != set(range(N_RANKS)) or not {bytes([byte]) for byte in range(256)} <= found.ranks.keys():
        raise ValueError(f"{directory}/tiktoken.model: expected nano's {N_RANKS} ranks; name a checkpoint of nano")
    return found


def main(arguments: list[str]) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m hybrid.nano.record", description=__doc__)
    parser.add_argument("model", type=Path, help="checkpoint directory of nano")
    parser.add_argument("out", type=Path, help=".npz file to write")
    parser.add_argument("--tokens", type=int, default=TOKENS, help="at least, in whole conversations (%(default)s)")
    parser.add_argument("--scored", type=int, default=SCORED_TOKENS, help="tokens with scores, at most (%(default)s)")
    options = parser.parse_args(arguments)
    if options.tokens < 1:
        parser.error("--tokens: expected at least 1")
    if options.scored < 0:
        parser.error("--scored: expected at least 0")
    if options.out.is_dir() or not options.out.parent.is_dir():  # the run takes minutes
        parser.error(f"{options.out}: expected a file in a directory that is there")
    try:
        chosen, n_scored = documents(_vocabulary(options.model), options.tokens, options.scored)
        made = record(options.model, chosen, n_scored, PoolConfig())
        write_record(options.out, made)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    print(report(made))


if __name__ == "__main__":
    main(sys.argv[1:])
