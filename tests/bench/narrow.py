"""What narrow weights and narrow KV cost in accuracy: `python -m tests.bench.narrow`.

Against the same model in float32 (experts as published, 16-bit activations): the relative error of the matrices, and
what becomes of the logprobs: the Kullback-Leibler divergence, the next token's logprob, and how often the first choice
stays the same. On nano, which was trained, over the taught tokens of held-out conversations; and on a random checkpoint
with Kimi-K2.5's sizes of latent, key and heads over random ids. The peer is the model computed in bfloat16, as on GPUs:
the last line of stdout is one JSON document with every variant's divergence as a multiple of its. Formats that were
tried and not taken are there too. Errors do not depend on what else the machine does.
"""

import argparse
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from hybrid.batch import Batch, Row
from hybrid.config import EngineConfig, KvDtype, NarrowFormat, is_router
from hybrid.engine import Engine
from hybrid.inputs import upload
from hybrid.kv import LatentCache, allocate
from hybrid.model import build_model
from hybrid.nano.record import documents
from hybrid.nano.vocabulary import read_vocabulary
from hybrid.narrow import Matrix, Narrow, quantised, widened
from hybrid.random_checkpoint import write_checkpoint
from hybrid.weights import load_weights
from hybrid.widths import HEAD, format_of
from offload.checkpoint import Checkpoint
from offload.config import PoolConfig
from tests.bench import machine
from tests.families import Raw, kimi_k25

NANO = Path(__file__).resolve().parents[2] / "hybrid" / "nano" / "model"
PAGE = 16
LONGEST = 2000  # tokens of a conversation
GROUP = 128
CPU = torch.device("cpu")
FORMATS: tuple[NarrowFormat, ...] = ("fp8", "int8")
Tensors = Mapping[str, Matrix]
Change = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True, slots=True)
class Text:
    """Ids, and the places whose next id is judged."""

    ids: tuple[int, ...]
    places: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Figures:
    """One variant beside float32. Logprobs are natural."""

    variant: str
    error: float | None  # ||w - w'|| / ||w|| of a matrix, mean over those that changed
    error_max: float | None
    kl: float  # mean over the places
    kl_max: float
    logprob: float  # mean of the next id's change, without its sign
    logprob_max: float
    agreement: float  # share of places with the same first choice


class Subject:
    """One loaded model, run with other tensors or another cache."""

    def __init__(self, engine: Engine, texts: Sequence[Text]) -> None:
        self.engine, self._texts = engine, texts
        self.tensors = {name: one for name, one in engine._tensors.items() if isinstance(one, torch.Tensor)}
        self._exact = self._logprobs(self.tensors, self.cache())

    def cache(self, kind: KvDtype = "model", dtype: torch.dtype = torch.float32) -> LatentCache:
        n_pages = -(-max(len(text.ids) for text in self._texts) // PAGE)
        return allocate(self.engine.model, n_pages, PAGE, dtype, CPU, kind)

    def beside_float32(self, variant: str, tensors: Tensors, cache: Any) -> Figures:
        kl, moved, same = [], [], []
        for text, exact, found in zip(self._texts, self._exact, self._logprobs(tensors, cache), strict=True):
            following = torch.tensor([text.ids[place + 1] for place in text.places])[:, None]
            kl.append((exact.exp() * (exact - found)).sum(-1))
            moved.append((found - exact).gather(1, following).abs())
            same.append(exact.argmax(-1) == found.argmax(-1))
        errors = [self._error(name, one) for name, one in tensors.items() if one is not self.tensors[name]]
        matrices = [error for error in errors if error]
        mean, most = (sum(matrices) / len(matrices), max(matrices)) if matrices else (None, None)
        all_kl, all_moved = torch.cat(kl), torch.cat(moved)
        figures = (all_kl.mean(), all_kl.max(), all_moved.mean(), all_moved.max(), torch.cat(same).float().mean())
        return Figures(variant, mean, most, *(float(value) for value in figures))

    def _logprobs(self, tensors: Tensors, cache: Any) -> list[torch.Tensor]:
        """(places, vocabulary) of every text."""
        model = build_model(self.engine.model, tensors, self.engine._experts, "auto")
        found = []
        with torch.inference_mode():
            for text in self._texts:
                pages = tuple(range(-(-len(text.ids) // PAGE)))
                inputs = upload(Batch((Row(0, text.ids, 0, pages),)), PAGE, CPU)
                found.append(
                    model.logits(model.hidden([model.lane([inputs], cache)])[list(text.places)]).log_softmax(-1)
                )
        return found

    def _error(self, name: str, found: Matrix) -> float:
        exact = self.tensors[name]
        return float((widened(found, torch.float32).float() - exact).norm() / exact.norm())


class TriedCache:
    """A wide cache whose entries go through a format that was not taken."""

    def __init__(self, cache: LatentCache, change: Change) -> None:
        self.page_size, self.read, self._cache, self._change = cache.page_size, cache.read, cache, change

    def write(self, layer: int, slots: torch.Tensor, latent: torch.Tensor) -> None:
        self._cache.write(layer, slots, self._change(latent))


def weight_variants(subject: Subject) -> Iterator[tuple[str, Tensors]]:
    """The formats of the engine, as it loads them, the head alone in each, and those tried."""
    plain = subject.tensors
    for fmt in FORMATS:
        yield f"{fmt} weights", {**plain, **loaded(subject.engine, fmt)}
        yield f"{fmt} in the head alone", {**plain, HEAD: Narrow(*quantised(plain[HEAD], fmt))}
    chosen = [name for name, one in plain.items() if format_of(name, tuple(one.shape), "fp8")]
    yield "fp8 weights by block of 128 x 128 (tried)", {**plain, **{name: by_block(plain[name]) for name in chosen}}
    yield "int8 weights by 128 inputs (tried)", {**plain, **{name: by_group(plain[name]) for name in chosen}}


def cache_variants(subject: Subject) -> Iterator[tuple[str, Any]]:
    """The formats of the engine and those tried."""
    n_latent = subject.engine.model.kv_lora_rank
    for fmt in FORMATS:
        yield f"{fmt} KV", subject.cache(fmt)
        yield f"{fmt} KV, one factor (tried)", TriedCache(subject.cache(), lambda x, fmt=fmt: by_row(x, fmt))

    def key_in_bf16(x: torch.Tensor) -> torch.Tensor:
        return torch.cat((by_row(x[:, :n_latent], "fp8"), x[:, n_latent:].bfloat16().float()), 1)

    yield "fp8 KV, key in bf16 (tried)", TriedCache(subject.cache(), key_in_bf16)


def loaded(engine: Engine, fmt: NarrowFormat) -> dict[str, Narrow]:
    """The checkpoint's matrices as an engine with such weights holds them."""
    with closing(Checkpoint(engine.config.model)) as checkpoint:
        found = load_weights(checkpoint, engine.model, CPU, torch.float32, lambda *_: None, lambda _: None, narrow=fmt)
    return {name: one for name, one in found.items() if isinstance(one, Narrow)}


def by_row(rows: torch.Tensor, fmt: NarrowFormat) -> torch.Tensor:
    return Narrow(*quantised(rows, fmt)).wide(torch.float32)


def by_group(matrix: torch.Tensor) -> torch.Tensor:
    """int8 with a factor for every GROUP inputs of a row."""
    return torch.cat([by_row(part, "int8") for part in matrix.split(GROUP, 1)], 1)


def by_block(matrix: torch.Tensor) -> torch.Tensor:
    """e4m3 with a factor for every block, as fp8 checkpoints are published."""
    strips = [
        torch.cat([by_row(block.reshape(1, -1), "fp8").view(block.shape) for block in strip.split(GROUP, 1)], 1)
        for strip in matrix.split(GROUP, 0)
    ]
    return torch.cat(strips, 0)


def nano(n_tokens: int) -> tuple[Path, list[Text]]:
    """Held-out conversations with their answers' tokens as places."""
    chosen, _ = documents(read_vocabulary(NANO), n_tokens, 0)
    texts = []
    for document in chosen:
        places = [place - 1 for start, stop, _ in document.encoded.turns for place in range(start, stop)]
        if document.n_tokens <= LONGEST:
            texts.append(Text(tuple(document.encoded.ids), tuple(places)))
    return NANO, texts


def random_k25(folder: Path, n_tokens: int) -> tuple[Path, list[Text]]:
    """A random checkpoint with K2.5's latent, key and head sizes, and random ids."""
    raw: Raw = kimi_k25()
    raw["text_config"] |= {
        "hidden_size": 1024, "intermediate_size": 2048, "moe_intermediate_size": 256, "num_hidden_layers": 4,
        "num_attention_heads": 8, "num_key_value_heads": 8, "q_lora_rank": 384, "kv_lora_rank": 512,
        "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "n_routed_experts": 16,
        "num_experts_per_tok": 4,
    }  # fmt: skip
    write_checkpoint(raw, folder / "k25", seed=7, tokenizer=None)
    rng = torch.Generator().manual_seed(7)
    ids = torch.randint(0, raw["text_config"]["vocab_size"], (n_tokens,), generator=rng).tolist()
    return folder / "k25", [Text(tuple(ids), tuple(range(n_tokens - 1)))]


def measured(directory: Path, texts: Sequence[Text]) -> list[Figures]:
    """All variants of one model."""
    n_pages = -(-max(len(text.ids) for text in texts) // PAGE)
    config = EngineConfig(directory, "cpu", "float32", "native", PoolConfig(1, "a16"), n_pages, PAGE)
    with closing(Engine(config)) as engine:
        subject = Subject(engine, texts)
        halved = {name: one if is_router(name) else one.bfloat16() for name, one in subject.tensors.items()}
        found = [subject.beside_float32("all in bfloat16", halved, subject.cache(dtype=torch.bfloat16))]
        found += [subject.beside_float32(name, tensors, subject.cache()) for name, tensors in weight_variants(subject)]
        found += [subject.beside_float32(name, subject.tensors, cache) for name, cache in cache_variants(subject)]
        both = {**subject.tensors, **loaded(engine, "int8")}
        return [*found, subject.beside_float32("int8 weights and KV", both, subject.cache("int8"))]


def table(figures: Sequence[Figures]) -> str:
    """As Markdown."""
    lines = [
        "| | matrix error, mean and most | KL, mean | most | logprob moves by | at most | same first choice |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for one in figures:
        error = "" if one.error is None else f"{one.error:.2%}, {one.error_max:.2%}"
        lines.append(
            f"| {one.variant} | {error} | {one.kl:.1e} | {one.kl_max:.1e} | {one.logprob:.1e} | {one.logprob_max:.1e} "
            f"| {one.agreement:.2%} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Print both tables and the document."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.narrow", description=__doc__)
    parser.add_argument("--tokens", type=int, default=6000, help="of nano's conversations, about (%(default)s)")
    parser.add_argument("--random-tokens", type=int, default=128, help="of the random checkpoint (%(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, list[Figures]] = {}
    with tempfile.TemporaryDirectory() as folder:
        subjects = {
            "nano": nano(options.tokens),
            "random, K2.5's shape": random_k25(Path(folder), options.random_tokens),
        }
        for name, (directory, texts) in subjects.items():
            n_places = sum(len(text.places) for text in texts)
            found[name] = measured(directory, texts)
            print(
                f"{name}: {n_places} places in {len(texts)} texts, beside float32\n{table(found[name])}\n", flush=True
            )
    ratios = {name: {one.variant: one.kl / figures[0].kl for one in figures} for name, figures in found.items()}
    document = {
        "bench": "narrow", **machine.describe(), "torch": torch.__version__, "kl_by_bfloat16": ratios,
        "figures": {name: [asdict(one) for one in figures] for name, figures in found.items()},
    }  # fmt: skip
    print(json.dumps(document))


if __name__ == "__main__":
    main()
