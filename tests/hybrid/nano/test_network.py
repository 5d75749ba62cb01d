"""The network that trains against the engine that serves, and against plain autograd."""

import itertools
import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn.functional import linear, silu

from hybrid.batch import Batch as EngineBatch
from hybrid.batch import Row
from hybrid.config import EngineConfig, ModelConfig
from hybrid.engine import Engine
from hybrid.nano import export, mixture, network
from hybrid.nano.batches import packed, windowed
from hybrid.nano.conversation import encode
from hybrid.nano.network import Network, int4
from hybrid.nano.optimiser import orthogonalised
from hybrid.nano.train import CONFIG, PHASES
from hybrid.nano.vision import Tower
from hybrid.nano.vocabulary import SPECIAL, read_vocabulary
from offload.config import PoolConfig
from offload.formats import dequantise, pack_int4

CPU = torch.device("cpu")
MODEL = CONFIG.with_name("model")


@pytest.fixture
def untrained() -> Network:
    torch.manual_seed(3)
    config = json.loads(CONFIG.read_text())
    made = Network(ModelConfig.from_json(config), Tower(config["vision_config"], CPU), CPU)
    with torch.no_grad():  # as large as trained ones, so that an error shows
        for name, weight in made.named():
            if name == "lm_head.weight":
                weight.normal_(std=0.1)
            elif weight.ndim == 1:
                weight.uniform_(0.5, 1.5)
        for bias in made.biases.values():
            bias.uniform_(-0.1, 0.1)
    return made.eval()


def test_the_engine_serves_what_was_trained(untrained: Network, tmp_path: Path) -> None:
    vocabulary = read_vocabulary(MODEL)
    document = encode(mixture.named(2, 2)(random.Random(5), True), vocabulary)
    untrained.quantise(True)
    progress = {"phase": len(PHASES)}
    biases = {str(layer): bias for layer, bias in untrained.biases.items()}
    state = {"progress": progress, "weights": untrained.state_dict(), "biases": biases}
    torch.save(state, tmp_path / "state.pt")
    vocabulary.write(tmp_path)
    export.export(tmp_path, tmp_path / "out")

    n = len(document.ids)
    batch, _ = packed([document], CPU)
    targets = torch.tensor(document.ids[1:])
    with torch.no_grad():
        logits = untrained(replace(batch, asked=torch.arange(n - 1), targets=targets))
    expected = logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]
    pages = tuple(range(1, n // 16 + 2))
    config = EngineConfig(tmp_path / "out", "cpu", "float32", "native", PoolConfig(1, "a16"), n_pages=len(pages) + 1)
    engine = Engine(config)
    try:
        row = Row(0, tuple(document.ids), 0, pages, targets=tuple(document.ids[1:]))
        (answer,) = engine.step(EngineBatch((row,))).rows
    finally:
        engine.close()
    served = torch.tensor([scored.logprob for scored in answer.scored])
    assert expected.std() > 1
    torch.testing.assert_close(served, expected, atol=2e-3, rtol=0)


def test_experts_match_a_loop_in_values_and_gradients(untrained: Network) -> None:
    config = untrained.config
    torch.manual_seed(1)
    x = torch.randn(40, config.hidden_size, dtype=torch.float64, requires_grad=True)
    untrained.double()
    untrained.biases = {layer: bias.double() for layer, bias in untrained.biases.items()}
    layer = config.moe_layers[0]
    out = untrained._experts(layer, x, torch.ones(40, dtype=torch.bool))
    probe = torch.randn_like(out)
    names = [f"model.layers.{layer}.mlp.{part}" for part in ("gate.weight", "experts.gate", "experts.down")]
    weights = dict(untrained.named())
    ours = torch.autograd.grad((out * probe).sum(), [x, *(weights[name] for name in names)])

    scores = linear(x, weights[names[0]]).sigmoid()
    rows = []
    for token in range(40):
        order = (scores[token].detach() + untrained.biases[layer]).argsort(descending=True)
        best = order[: config.num_experts_per_tok]
        shares = scores[token, best] / scores[token, best].sum() * config.routed_scaling_factor
        row = torch.zeros(config.hidden_size, dtype=torch.float64)
        for share, expert in zip(shares, best, strict=True):
            gate, up, down = (weights[f"model.layers.{layer}.mlp.experts.{p}"][expert] for p in ("gate", "up", "down"))
            row = row + share * linear(silu(linear(x[token], gate)) * linear(x[token], up), down)
        rows.append(row)
    plain = torch.stack(rows)
    theirs = torch.autograd.grad((plain * probe).sum(), [x, *(weights[name] for name in names)])
    torch.testing.assert_close(out, plain)
    torch.testing.assert_close(ours, theirs)


def test_padding_and_neighbours_change_nothing(untrained: Network) -> None:
    vocabulary = read_vocabulary(MODEL)
    documents = [encode(make(random.Random(2), False), vocabulary) for make in mixture.BASICS.shares]
    with torch.no_grad():
        together, spans = packed(documents, CPU)
        all_logits = untrained(together)
        for document in documents:
            alone, (first, *_) = packed([document], CPU)
            logits = untrained(alone)
            at = next(s for s in spans if together.targets[s.start : s.stop].equal(alone.targets[: first.stop]))
            torch.testing.assert_close(all_logits[at.start : at.stop], logits[: first.stop], atol=1e-4, rtol=1e-4)


def test_int4_is_what_is_packed(untrained: Network) -> None:
    weight = dict(untrained.named())["model.layers.1.mlp.experts.down"][3].detach()
    codes, scales = int4(weight)
    words = pack_int4(codes.flatten(-2).to(torch.int8).numpy())
    bits = scales.bfloat16().view(torch.int16).numpy()
    unpacked = torch.from_numpy(dequantise("int4", words, bits))
    assert torch.equal(unpacked, network.int4_rounded(weight))
    error = (unpacked - weight).abs().unflatten(-1, (-1, 32)) / scales[..., None]
    assert 0.3 < error.max() < 0.6  # half a step, and what rounding the scale to bf16 adds


def test_balance_moves_biases_against_the_load(untrained: Network) -> None:
    layer = untrained.config.moe_layers[0]
    untrained.biases[layer].zero_()
    for counts in untrained.routed.values():
        counts.fill_(10.0)
    untrained.routed[layer][4] = 40.0
    untrained.balance(0.01)
    assert untrained.biases[layer][4] == pytest.approx(-0.01)
    assert untrained.biases[layer][5] == pytest.approx(0.01)
    assert not untrained.routed[layer].any()


def test_orthogonalised_has_singular_values_near_one() -> None:
    torch.manual_seed(2)
    for shape in ((48, 96), (96, 48)):
        values = torch.linalg.svdvals(orthogonalised(torch.randn(shape)))
        assert values.min() > 0.5
        assert values.max() < 1.3


def test_a_window_teaches_nothing_that_is_out_of_sight() -> None:
    vocabulary = read_vocabulary(MODEL)
    whole = encode(mixture.numbered(60, 60)(random.Random(3), False), vocabulary)
    rng = random.Random(1)
    seen_ends, seen_starts, lengths = 0, 0, set()
    for _ in range(50):
        cut = windowed(rng, whole)
        assert len(cut.ids) < len(whole.ids) / 2
        kept = dict(zip(cut.positions, cut.ids, strict=True))
        assert all(whole.ids[position] == token for position, token in kept.items())
        gaps = [i for i, (a, b) in enumerate(itertools.pairwise(cut.positions)) if b > a + 1]
        assert all(cut.weights[gap + 1] == 0 for gap in gaps)  # nobody can know which call comes after it
        assert sum(weight > 0 for weight in cut.weights[sum(gaps) :]) > 20
        seen_starts += not gaps
        lengths.add(cut.ids.count(SPECIAL["<|tool_call_begin|>"]))
        seen_ends += cut.positions[-1] == len(whole.ids) - 1
    assert 0 < seen_starts < 25
    assert 0 < seen_ends < 35
    assert len(lengths) > 8  # or the length would tell where the list ends


def test_a_list_whose_results_are_merged_stays_whole() -> None:
    vocabulary = read_vocabulary(MODEL)
    whole = encode(mixture.numbered(30, 30)(random.Random(3), True), vocabulary)
    assert any(score.startswith("merge") for _, _, score in whole.turns)
    assert windowed(random.Random(1), whole) is whole
