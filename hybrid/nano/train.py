"""Train nano: `python -m hybrid.nano.train DIR`. Run again with the same DIR to go on where it stopped.

Phases end when their scores are reached, or after so many steps: copying first and alone, in small steps, because
nothing else is learned without it; then everything, with longer swarms. The experts see INT4 rounding from the third
phase on, so that what ships is what was trained. DIR gets `state.pt` (every few minutes) and `log.jsonl`; the eyes
begin with the `tower.pt` of `hybrid.nano.first_look` if it is there.
"""

import argparse
import json
import random
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.multiprocessing.spawn import spawn
from torch.nn.functional import cross_entropy

from hybrid.config import ModelConfig
from hybrid.nano import mixture
from hybrid.nano.batches import packed, windowed
from hybrid.nano.conversation import Encoded, encode
from hybrid.nano.data import Make, copy_list, known_tool, unseen_tool
from hybrid.nano.mixture import BASICS, COPYING, FULL, LONG_LISTS, Mixture, named, numbered
from hybrid.nano.network import Network
from hybrid.nano.optimiser import Optimiser
from hybrid.nano.pictures import picture
from hybrid.nano.probe import exact, probes
from hybrid.nano.sums import arithmetic
from hybrid.nano.swarm_data import sub_agent
from hybrid.nano.talk import talk
from hybrid.nano.vision import Tower
from hybrid.nano.vocabulary import Vocabulary, read_vocabulary
from hybrid.nano.workers import ALONE, Workers, join

CONFIG = Path(__file__).with_name("config.json")
SEED = 1
MUON_RATE = 5e-3
ADAM_RATE = 3e-3
BALANCE_RATE = 0.01
WARM_UP = 30  # steps
_WINDOWED = 0.85  # of the long fan-outs; the others are taught whole
_SAVE_SECONDS = 120
_LOG_STEPS = 25

COPY_PROBES: dict[Make, int] = {copy_list: 60}
PROBES: dict[Make, int] = {
    copy_list: 30, known_tool: 60, unseen_tool: 40, sub_agent: 40, arithmetic: 100, talk: 40, picture: 70,
    named(2, 2): 10, named(4, 4): 20, named(10, 10): 15, numbered(12, 12): 10, numbered(30, 30): 6,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Phase:
    """One stretch of the training. It ends after `steps`, or once every score of `until` is reached."""

    name: str
    mixture: Mixture
    tokens: int  # per step, at least
    steps: int
    until: Mapping[str, float] = field(default_factory=dict)
    probes: Mapping[Make, int] = field(default_factory=lambda: PROBES)
    probed_every: int = 400  # steps
    quantised: bool = True
    decays: bool = False  # learning rates fall to nothing over the phase
    rate: float = 1.0  # of both learning rates


PHASES = (
    Phase("copying", COPYING, 1000, 3000, {"copy": 0.2}, COPY_PROBES, 200, quantised=False),
    Phase("basics", BASICS, 1700, 6000, {"tool": 0.8, "fan-out 4": 0.5, "sum think": 0.5}, quantised=False, rate=0.4),
    Phase("full", FULL, 2200, 6000, {"tool": 0.97, "fan-out 4": 0.97, "fan-out 10": 0.8, "sum think": 0.97}, rate=0.4),
    Phase("decay", FULL, 2400, 9500, probed_every=1000, decays=True, rate=0.4),
    Phase("long lists", LONG_LISTS, 2400, 5500, probed_every=1000, decays=True, rate=0.3),
)


@dataclass(slots=True)
class Progress:
    """How far the training is."""

    phase: int = 0
    step: int = 0  # of the phase
    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0


class Trainer:
    """One training in one directory."""

    def __init__(
        self,
        directory: Path,
        device: torch.device,
        tell: Callable[[str], None] = lambda line: None,
        workers: Workers = ALONE,
    ) -> None:
        self.directory = directory
        self._tell = tell
        self._workers = workers
        self.device = device
        directory.mkdir(parents=True, exist_ok=True)
        self.vocabulary = _vocabulary(directory)
        torch.manual_seed(SEED)
        config = json.loads(CONFIG.read_text())
        tower = Tower(config["vision_config"], device)
        self.network = Network(ModelConfig.from_json(config), tower, device)
        self.optimiser = Optimiser(self.network.named(), tower.parameters())
        self.progress = Progress()
        if (directory / "state.pt").is_file():
            self._load(torch.load(directory / "state.pt", map_location=device, weights_only=True))
        elif (directory / "tower.pt").is_file():
            tower.load(torch.load(directory / "tower.pt", map_location=device, weights_only=True))
        else:
            tell("no tower.pt: the eyes begin untaught; python -m hybrid.nano.first_look teaches them first")

    def run(self, phases: tuple[Phase, ...] = PHASES) -> None:
        """Every phase from where the directory's state stands."""
        while self.progress.phase < len(phases):
            self._phase(phases[self.progress.phase])
            self.progress.phase, self.progress.step = self.progress.phase + 1, 0
        self.save()

    def _phase(self, phase: Phase) -> None:
        documents = probes(phase.probes, self.vocabulary)
        self.network.quantise(phase.quantised)
        done = self.progress
        saved = time.monotonic()
        losses: list[float] = []
        while done.step < phase.steps:
            began = time.monotonic()
            loss, busiest, n_tokens = self._step(phase)
            losses.append(loss)
            done.step, done.steps, done.tokens = done.step + 1, done.steps + 1, done.tokens + n_tokens
            done.seconds += time.monotonic() - began
            if done.steps % _LOG_STEPS == 0:
                self._log(phase, loss=sum(losses) / len(losses), busiest=busiest)
                losses = []
            if done.step % phase.probed_every == 0 or done.step == phase.steps:
                scores = self._scores(documents)
                short = {name: least for name, least in phase.until.items() if scores[name] < least}
                self._log(phase, scores={name: round(share, 3) for name, share in scores.items()}, short_of=short)
                if phase.until and not short:
                    break
            if time.monotonic() - saved > _SAVE_SECONDS:
                self.save()
                saved = time.monotonic()

    def _scores(self, documents: Sequence[Encoded]) -> dict[str, float]:
        """Share of right turns by score name; the workers split the documents."""
        mine = exact(self.network, documents[self._workers.rank :: self._workers.count], self.device)
        counts: defaultdict[str, list[int]] = defaultdict(lambda: [0, 0])
        for part in self._workers.gathered(mine):
            for name, (right, total) in part.items():
                counts[name][0] += right
                counts[name][1] += total
        return {name: right / total for name, (right, total) in sorted(counts.items())}

    def _step(self, phase: Phase) -> tuple[float, float, int]:
        """Loss, the busiest expert's load and the tokens of one update over all workers' documents."""
        batch, _ = packed(self._documents(phase), self.device)
        losses = cross_entropy(self.network(batch), batch.targets, reduction="none")
        loss = (losses * batch.weights).sum()
        loss.backward()  # type: ignore[no-untyped-call]
        seen = torch.stack((loss.detach(), batch.weights.sum(), batch.real.sum().float()))
        weights = list(self.network.parameters())
        for weight in weights:
            weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
        gradients = [weight.grad for weight in weights if weight.grad is not None]
        self._workers.add_up([seen, *self.network.routed.values(), *gradients])
        total, weighed, n_tokens = seen.tolist()
        torch._foreach_div_(gradients, weighed)
        rate = phase.rate * min(1.0, (self.progress.steps + 1) / WARM_UP)
        if phase.decays:
            rate *= 1 - self.progress.step / phase.steps
        busiest = self.network.balance(BALANCE_RATE * rate)
        self.optimiser.step(MUON_RATE * rate, ADAM_RATE * rate)
        return total / weighed, busiest, int(n_tokens)

    def _documents(self, phase: Phase) -> list[Encoded]:
        rng = random.Random(f"{SEED} {self.progress.steps} {self._workers.rank}")  # a resumed training reads on
        documents: list[Encoded] = []
        while sum(len(document.ids) for document in documents) < phase.tokens / self._workers.count:
            encoded = encode(phase.mixture.draw(rng), self.vocabulary)
            documents.append(windowed(rng, encoded) if rng.random() < _WINDOWED else encoded)
        return documents

    def _log(self, phase: Phase, **values: Any) -> None:
        if self._workers.rank:
            return
        line = json.dumps({**asdict(self.progress), "phase": phase.name, **values})
        with (self.directory / "log.jsonl").open("a") as file:
            file.write(f"{line}\n")
        self._tell(line)

    def save(self) -> None:
        """Write `state.pt` in one move; the first worker does it for all, as all have the same."""
        if self._workers.rank:
            return
        biases = {str(layer): bias for layer, bias in self.network.biases.items()}
        state = {
            "weights": self.network.state_dict(),
            "biases": biases,
            "optimiser": self.optimiser.state(),
            "progress": asdict(self.progress),
        }
        torch.save(state, self.directory / "state.part")
        (self.directory / "state.part").replace(self.directory / "state.pt")

    def _load(self, state: dict[str, Any]) -> None:
        self.network.load_state_dict(state["weights"])
        for layer, bias in self.network.biases.items():
            bias.copy_(state["biases"][str(layer)])
        self.optimiser.load(state["optimiser"])
        self.progress = Progress(**state["progress"])


def _vocabulary(directory: Path) -> Vocabulary:
    """The directory's, else the shipped model's; a new one is counted only where there is neither.

    Raises ValueError where a training has lost the vocabulary that it began with.
    """
    if not (directory / "tiktoken.model").is_file():
        if (directory / "state.pt").is_file():
            raise ValueError(f"{directory}: holds state.pt without its tiktoken.model; restore it, or begin elsewhere")
        shipped = CONFIG.with_name("model")
        known = (shipped / "tiktoken.model").is_file()
        (read_vocabulary(shipped) if known else mixture.vocabulary()).write(directory)
    return read_vocabulary(directory)


def _work(rank: int, options: argparse.Namespace, meeting: Path) -> None:
    workers = join(rank, options.workers, meeting)
    Trainer(options.directory, torch.device(options.device), print, workers).run()


def main(arguments: list[str]) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m hybrid.nano.train", description=__doc__)
    parser.add_argument("directory", type=Path, help="what to resume, or where to begin")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--workers", type=int, default=1, help="processes; on a CPU one for each core is fastest")
    options = parser.parse_args(arguments)
    if options.device not in ("cpu", "cuda") or (options.device == "cuda" and not torch.cuda.is_available()):
        parser.error(f"--device {options.device}: cpu, or cuda where torch finds a CUDA device")
    if options.workers < 1 or (options.workers > 1 and options.device != "cpu"):
        parser.error(f"--workers {options.workers}: at least 1, and more only with --device cpu")
    options.directory.mkdir(parents=True, exist_ok=True)
    try:
        _vocabulary(options.directory)  # once, before the workers
    except ValueError as error:
        parser.error(str(error))
    with tempfile.TemporaryDirectory() as scratch:
        meeting = Path(scratch) / "meeting"
        if options.workers == 1:
            _work(0, options, meeting)
        else:
            spawn(_work, (options, meeting), options.workers)  # type: ignore[no-untyped-call]


if __name__ == "__main__":
    main(sys.argv[1:])
