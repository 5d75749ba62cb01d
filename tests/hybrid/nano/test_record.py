"""hybrid.nano.record: what the routers of the shipped model did, against NumPy and against the kernels' own count."""

import base64
import hashlib
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from hybrid.batch import Batch, Row
from hybrid.config import EngineConfig
from hybrid.engine import Engine
from hybrid.moe import Moe
from hybrid.nano import record as module
from hybrid.nano import words
from hybrid.nano.conversation import Conversation
from hybrid.nano.data import Make
from hybrid.nano.record import FAMILIES, Document, documents, main, model_hash, record
from hybrid.nano.vocabulary import SPECIAL, Vocabulary, read_vocabulary
from hybrid.routes import Record, read_record
from offload.config import PoolConfig
from offload.experts import Choices

MODEL = Path(module.__file__).with_name("model")
ONE_THREAD = PoolConfig(threads=1)
SHORT, SCORED = 1100, 450  # tokens

Seen = list[tuple[int, torch.Tensor, torch.Tensor]]  # layer, its input, the experts chosen


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    return read_vocabulary(MODEL)


@pytest.fixture(scope="module")
def chosen(vocabulary: Vocabulary) -> tuple[list[Document], int]:
    return documents(vocabulary, SHORT, SCORED)


@pytest.fixture(scope="module")
def made(chosen: tuple[list[Document], int]) -> Record:
    return record(MODEL, *chosen, ONE_THREAD)


@pytest.fixture(scope="module")
def seen(chosen: tuple[list[Document], int]) -> tuple[Seen, Choices]:
    """The same steps on an engine of our own: inputs and choices of every layer, and the kernels' count."""
    found: Seen = []

    def watch(moe: Moe, x: torch.Tensor, ids: torch.Tensor) -> None:
        found.append((moe.layer, x.clone(), ids.clone()))

    engine = Engine(EngineConfig(MODEL, "cpu", "float32", "native", ONE_THREAD, n_pages=64), watch=watch)
    for document in chosen[0]:
        engine.step(Batch((Row(0, tuple(document.encoded.ids), 0, tuple(range(64))),)))
    choices = engine.choices()
    engine.close()
    return found, choices


def test_the_kernels_counted_the_same_choices(made: Record, seen: tuple[Seen, Choices]) -> None:
    _, choices = seen
    assert made.layers.tolist() == list(choices.layers) == [1, 2, 3, 4]
    assert len(made.tokens) == choices.tokens
    assert np.array_equal(made.counts(), choices.counts)


def test_scores_and_choices_by_numpy(made: Record, seen: tuple[Seen, Choices]) -> None:
    published = load_file(next(MODEL.glob("*.safetensors")))
    for i, layer in enumerate(made.layers.tolist()):
        base = f"language_model.model.layers.{layer}.mlp.gate."
        weight, bias = (published[f"{base}{name}"].double().numpy() for name in ("weight", "e_score_correction_bias"))
        x = np.concatenate([x.double().numpy() for at, x, _ in seen[0] if at == layer])
        scores = 1 / (1 + np.exp(-x @ weight.T))
        assert np.array_equal(made.bias[i], bias.astype(np.float32))
        n_scored = len(made.scores)
        assert 0 < n_scored <= SCORED < len(x)
        assert np.allclose(made.scores[:, i], scores[:n_scored], rtol=2**-11, atol=1e-5)
        ranked = np.sort(scores + bias, axis=1)
        clear = ranked[:, -4] - ranked[:, -5] > 1e-5  # elsewhere float32 may choose otherwise
        assert clear.mean() > 0.95
        best = np.sort((scores + bias).argsort(axis=1)[:, -4:], axis=1)
        assert np.array_equal(made.experts[clear, i], best[clear])


def test_looks_ahead_by_numpy(made: Record, seen: tuple[Seen, Choices]) -> None:
    published = load_file(next(MODEL.glob("*.safetensors")))
    layers, n_scored = made.layers.tolist(), len(made.scores)
    inputs = [np.concatenate([x.double().numpy() for at, x, _ in seen[0] if at == layer]) for layer in layers]
    assert made.ahead is not None
    for i, layer in enumerate(layers):
        weight = published[f"language_model.model.layers.{layer}.mlp.gate.weight"].double().numpy()
        for back in (1, 2):
            found = made.ahead[:, i, back - 1]
            if i < back:
                assert not found.any()
            else:
                scores = 1 / (1 + np.exp(-inputs[i - back][:n_scored] @ weight.T))
                assert np.allclose(found, scores, rtol=2**-11, atol=1e-5)


def test_documents_lie_end_to_end(made: Record, chosen: tuple[list[Document], int]) -> None:
    drawn, n_scored = chosen
    at = 0
    turns = []
    for i, document in enumerate(drawn):
        ids = document.encoded.ids
        assert made.starts[i] == at
        assert made.tokens[at : at + len(ids)].tolist() == ids
        turns += [(at + start, at + stop, kind) for start, stop, kind in document.encoded.turns]
        at += len(ids)
    assert at == len(made.tokens)
    assert len(made.scores) == made.starts[n_scored]
    assert made.families.tolist() == [document.family for document in drawn]
    assert [(*turn, kind) for turn, kind in zip(made.turns.tolist(), made.kinds.tolist(), strict=True)] == turns
    ends = [stop - 1 for _, stop, _ in turns]
    assert (made.tokens[ends] == SPECIAL["<|im_end|>"]).all()
    assert not made.decoded[ends].any()
    assert made.decoded.sum() == sum(stop - start - 1 for start, stop, _ in turns)


def test_a_document_does_not_depend_on_the_others(made: Record, chosen: tuple[list[Document], int]) -> None:
    alone = record(MODEL, chosen[0][1:2], 1, ONE_THREAD)
    part = slice(made.starts[1], made.starts[2])
    assert np.array_equal(alone.experts, made.experts[part])
    assert np.array_equal(alone.scores, made.scores[part])
    assert alone.ahead is not None and made.ahead is not None
    assert np.array_equal(alone.ahead, made.ahead[part])


def test_decoding_token_by_token_chooses_the_same(made: Record, chosen: tuple[list[Document], int]) -> None:
    """The shortest document, in as many steps as it has tokens."""
    at = int(made.lengths.argmin())
    ids = chosen[0][at].encoded.ids
    steps: list[tuple[int, torch.Tensor]] = []

    def watch(moe: Moe, _: torch.Tensor, found: torch.Tensor) -> None:
        steps.append((moe.layer, found.sort(-1).values))

    engine = Engine(EngineConfig(MODEL, "cpu", "float32", "native", ONE_THREAD, n_pages=64), watch=watch)
    for position, token in enumerate(ids):
        engine.step(Batch((Row(0, (token,), position, tuple(range(64))),)))
    engine.close()
    part = slice(made.starts[at], made.starts[at] + len(ids))
    for i, layer in enumerate(made.layers.tolist()):
        one_by_one = torch.cat([found for number, found in steps if number == layer]).numpy()
        same = (one_by_one == made.experts[part, i]).all(axis=1)
        assert same.mean() > 0.97  # float32 rounds otherwise, which may tell where two experts are nearly equal


def test_only_held_out_conversations_are_drawn(vocabulary: Vocabulary, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Conversation] = []

    def watched(make: Make) -> Make:
        def made(rng: random.Random, held_out: bool) -> Conversation:
            assert held_out
            drawn.append(make(rng, held_out))
            return drawn[-1]

        return made

    monkeypatch.setattr(module, "FAMILIES", {name: (watched(make), n) for name, (make, n) in FAMILIES.items()})
    found, _ = documents(vocabulary, 20_000, SCORED)
    assert len(drawn) == len(found)
    assert {document.family for document in found} == set(FAMILIES)
    names = [item for conversation in drawn for item in conversation.copied if item in words.NAMES]
    assert len(names) > 20
    assert all(words.is_held_out(name) for name in names)


def test_one_document_of_each_family_is_scored_where_it_fits(vocabulary: Vocabulary) -> None:
    drawn, n_scored = documents(vocabulary, 25_000, 1_850)
    assert {document.family for document in drawn} == set(FAMILIES)
    first = [document.family for document in drawn[:n_scored]]
    assert len(set(first)) == len(first) >= 6
    scored = sum(document.n_tokens for document in drawn[:n_scored])
    assert scored <= 1_850
    for family in set(FAMILIES) - set(first):
        assert scored + min(d.n_tokens for d in drawn if d.family == family) > 1_850
    total = sum(document.n_tokens for document in drawn)
    assert 25_000 <= total < 25_000 + max(document.n_tokens for document in drawn)
    shorter, _ = documents(vocabulary, 1_000, 1_850)
    everything = [document.encoded.ids for document in drawn]
    assert all(document.encoded.ids in everything for document in shorter)


def test_more_are_scored_in_whole_rounds(vocabulary: Vocabulary) -> None:
    drawn, n_scored = documents(vocabulary, 25_000, 12_000)
    assert sum(document.n_tokens for document in drawn[:n_scored]) <= 12_000
    families = [document.family for document in drawn[:n_scored]]
    counts = [families.count(family) for family in FAMILIES]
    in_all = [sum(document.family == family for document in drawn) for family in FAMILIES]
    assert max(counts) > 1
    assert all(count >= min(max(counts) - 1, n) for count, n in zip(counts, in_all, strict=True))
    none, n_none = documents(vocabulary, 1_000, 0)
    assert n_none == 0 and none


def test_the_hash_is_of_config_and_weights(tmp_path: Path) -> None:
    files = {"config.json": b"{}", "b.safetensors": b"two", "a.safetensors": b"one", "tiktoken.model": b"no"}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    assert model_hash(tmp_path) == hashlib.sha256(b"{}onetwo").hexdigest()


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([str(MODEL), str(tmp_path / "r.npz"), "--tokens", "40", "--scored", "0"])
    found = read_record(tmp_path / "r.npz")
    assert len(found.tokens) >= 40
    assert len(found.scores) == 0
    assert found.model == model_hash(MODEL)
    assert capsys.readouterr().out.startswith(f"{len(found.tokens)} tokens of {len(found.starts)} conversations, ")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["none", "r.npz"], "No such file or directory: 'none/tiktoken.model'"),
        ([str(MODEL), "r.npz", "--tokens", "0"], "--tokens: expected at least 1"),
        ([str(MODEL), "r.npz", "--scored", "-1"], "--scored: expected at least 0"),
        ([str(MODEL), "none/r.npz"], "none/r.npz: expected a file in a directory that is there"),
        ([str(MODEL), "."], ".: expected a file in a directory that is there"),
    ],
)
def test_wrong_arguments(
    arguments: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(module, "record", lambda *_: pytest.fail("it ran"))
    with pytest.raises(SystemExit):
        main(arguments)
    assert said in capsys.readouterr().err.splitlines()[-1]
    assert not list(tmp_path.iterdir())


NO_BYTES = "".join(f"{base64.b64encode(b'%04d' % i).decode()} {i}\n" for i in range(2048)).encode()


@pytest.mark.parametrize("ranks", [b"YQ== 0\n", b"YQ==\n", b"", b"\xff 0\n", NO_BYTES])
def test_a_model_that_is_not_nano(tmp_path: Path, capsys: pytest.CaptureFixture[str], ranks: bytes) -> None:
    shutil.copy(MODEL / "config.json", tmp_path)
    (tmp_path / "tiktoken.model").write_bytes(ranks)
    with pytest.raises(SystemExit):
        main([str(tmp_path), str(tmp_path / "r.npz")])
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.endswith(f"{tmp_path}/tiktoken.model: expected nano's 2048 ranks; name a checkpoint of nano")
