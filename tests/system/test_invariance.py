"""The same request gives the same greedy tokens however the server comes to compute it."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest
import torch

from tests.system.serving import Answer, Serve, Server, complete

LENGTHS = (5, 17, 33, 48, 61, 64, 90, 130)  # below, at and across borders of 16-token pages
N_NEW = 24


def prompts(lengths: tuple[int, ...] = LENGTHS) -> list[list[int]]:
    """Random byte tokens, one prompt for each length; no two share a page."""
    generator = torch.Generator().manual_seed(21)
    return [torch.randint(0, 256, (length,), generator=generator).tolist() for length in lengths]


def together(client: openai.OpenAI, name: str, asked: list[list[int]], n_new: int = N_NEW) -> list[Answer]:
    with ThreadPoolExecutor(len(asked)) as pool:
        return list(pool.map(lambda ids: complete(client, name, ids, n_new), asked))


@pytest.fixture(scope="module")
def alone(server: Server) -> list[Answer]:
    """Each prompt by itself, on the shared server, nothing cached."""
    with server.client() as client:
        answers = [complete(client, server.name, ids, N_NEW) for ids in prompts()]
    assert [answer.cached for answer in answers] == [0] * len(answers)
    assert len({answer.tokens for answer in answers}) == len(answers), "the prompts do not tell answers apart"
    return answers


def tokens(answers: list[Answer]) -> list[tuple[str, ...]]:
    return [answer.tokens for answer in answers]


def test_in_a_batch_of_eight(serve: Serve, model_dir: Path, alone: list[Answer]) -> None:
    with serve(model_dir, "--expert-precision", "a16") as server, server.client() as client:
        found = together(client, server.name, prompts())
        seen = server.metrics()
    assert tokens(found) == tokens(alone)
    assert seen["generation_tokens_total"] == len(LENGTHS) * N_NEW
    assert seen["engine_steps_total"] < len(LENGTHS) * N_NEW / 2, "hardly any steps were shared"


def test_with_a_shared_prefix(server: Server, client: openai.OpenAI, alone: list[Answer]) -> None:
    """The fixture has left every prompt's full pages behind; the last prompt token is always computed anew."""
    again = [complete(client, server.name, ids, N_NEW) for ids in prompts()]
    assert tokens(again) == tokens(alone)
    assert [answer.cached for answer in again] == [(length - 1) // 16 * 16 for length in LENGTHS]


def test_with_a_prefix_of_another_request(server: Server, client: openai.OpenAI, alone: list[Answer]) -> None:
    """A prompt that leaves a cached one in the middle of a page, then the cached one again."""
    whole = prompts()[-1]
    other = [*whole[:70], *reversed(whole[70:])]
    assert complete(client, server.name, other, N_NEW).cached == 64
    assert complete(client, server.name, whole, N_NEW).tokens == alone[-1].tokens


def test_with_chunked_prefill(serve: Serve, model_dir: Path, alone: list[Answer]) -> None:
    with (
        serve(model_dir, "--expert-precision", "a16", "--max-batch-tokens", "13") as server,
        server.client() as client,
    ):
        one_by_one = [complete(client, server.name, ids, N_NEW) for ids in prompts()[:-1]]
        found = together(client, server.name, prompts()[::-1])[::-1]  # chunks beside the others' decode rows
    assert tokens(one_by_one) == tokens(alone)[:-1]
    assert tokens(found) == tokens(alone)


def test_after_preemption(serve: Serve, model_dir: Path, server: Server, client: openai.OpenAI) -> None:
    """Eight requests that share a page and grow from 2 pages to 6 each, in 16 pages: some must give way."""
    first = prompts((16,))[0]
    asked = [first + ids for ids in prompts((4,) * 9)[1:]]
    expected = [complete(client, server.name, ids, 70).tokens for ids in asked]
    page = 16 * 4 * (64 + 16) * 4  # tokens, layers, latent and rope values, float32
    flags = ("--expert-precision", "a16", "--max-model-len", "256", "--kv-memory", str(16 * page))
    with serve(model_dir, *flags) as small, small.client() as its_client:
        complete(its_client, small.name, [*first, 0], 1)
        found = together(its_client, small.name, asked, 70)
        seen = small.metrics()
    assert tokens(found) == expected
    assert [answer.cached for answer in found] == [16] * 8
    assert seen["num_preemptions_total"] > 0
    assert seen["kv_cache_usage_perc"] == 0 and seen["num_requests_running"] == 0
