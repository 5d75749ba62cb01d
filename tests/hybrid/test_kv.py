"""hybrid.kv: narrow entries against the values written, broken values, and the memory that a cache lists."""

import math
from dataclasses import replace

import pytest
import torch

from hybrid.config import KvDtype, ModelConfig
from hybrid.kv import LatentCache, allocate
from hybrid.widths import kv_bytes_per_token
from tests import families

CONFIG = ModelConfig.from_json(families.kimi_k25())
PAGE, N_PAGES = 4, 6
C, R = CONFIG.kv_lora_rank, CONFIG.qk_rope_head_dim
KINDS: tuple[KvDtype, ...] = ("model", "fp8", "int8")
NARROW: tuple[KvDtype, ...] = ("fp8", "int8")


def cache_of(kv_dtype: KvDtype, dtype: torch.dtype = torch.float32) -> LatentCache:
    return allocate(CONFIG, N_PAGES, PAGE, dtype, torch.device("cpu"), kv_dtype)


def latents(n: int, seed: int = 1) -> torch.Tensor:
    """Keys a hundred times as large as latents, and tokens of very different sizes."""
    rows = torch.randn((n, C + R), generator=torch.Generator().manual_seed(seed))
    rows[:, C:] *= 100
    return rows * torch.logspace(-2, 2, n)[:, None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_is_read_in_the_pages_order(kind: KvDtype, dtype: torch.dtype) -> None:
    cache, rows = cache_of(kind, dtype), latents(2 * PAGE).to(dtype)
    pages, layer = [4, 1], CONFIG.num_hidden_layers - 1
    slots = torch.tensor([page * PAGE + i for page in pages for i in range(PAGE)])
    order = torch.randperm(len(slots), generator=torch.Generator().manual_seed(2))
    cache.write(layer, slots[order], rows[order])
    found = cache.read(layer, torch.tensor([pages, [1, 0]]))
    assert found.shape == (2, 2 * PAGE, C + R) and found.dtype == dtype
    if kind == "model":
        assert torch.equal(found[0], rows)
    else:
        for part in (slice(0, C), slice(C, None)):  # each has a factor of its own, whatever the other's size
            exact = rows[:, part].double()
            error = (found[0, :, part].double() - exact).norm(dim=1) / exact.norm(dim=1)  # of each token
            # e4m3 is off by at most 2^-4; int8 by half of a 127th of the largest.
            assert 1e-4 < float(error.max()) < (0.01 if kind == "int8" else 0.04)
    assert torch.equal(found[1, :PAGE], found[0, PAGE:])
    assert not found[1, PAGE:].any()  # never written
    assert not any(cache.read(other, torch.tensor([[*range(N_PAGES)]])).any() for other in range(layer))


@pytest.mark.parametrize("kind", NARROW)
def test_values_that_the_codes_hold_come_back_exactly(kind: KvDtype) -> None:
    cache = cache_of(kind)
    most = 127.0 if kind == "int8" else 448.0
    rows = torch.randint(-8, 9, (PAGE, C + R), generator=torch.Generator().manual_seed(3)).float()
    rows[:, 0], rows[:, C] = most, -most  # so the factors are 1
    cache.write(0, torch.arange(PAGE), rows)
    assert torch.equal(cache.read(0, torch.tensor([[0]]))[0], rows)


@pytest.mark.parametrize("kind", KINDS)
def test_broken_values_become_zero_and_stay_alone(kind: KvDtype) -> None:
    """Factors too: a page's next owner multiplies by what the last one left."""
    cache, rows = cache_of(kind), latents(PAGE)
    clean = cache_of(kind)
    clean.write(0, torch.arange(PAGE), rows)
    broken = rows.clone()
    broken[1, 3], broken[1, C + 1], broken[2] = math.nan, -math.inf, math.nan
    cache.write(0, torch.arange(PAGE), broken)
    found, expected = (one.read(0, torch.tensor([[0, 1]])) for one in (cache, clean))
    assert torch.isfinite(found).all()
    assert all(torch.isfinite(part.float()).all() for part in cache.storage())
    assert not found[0, 2].any() and found[0, 1, 3] == 0 and found[0, 1, C + 1] == 0
    assert torch.equal(found[0, [0, 3]], expected[0, [0, 3]])
    assert found[0, 1, :3].any()  # what is left of the row


@pytest.mark.parametrize("kind", KINDS)
def test_the_listed_memory_is_all_of_it(kind: KvDtype) -> None:
    cache, other, rows = cache_of(kind), cache_of(kind), latents(PAGE)
    assert sum(part.nbytes for part in cache.storage()) == N_PAGES * PAGE * kv_bytes_per_token(CONFIG, 4, kind)
    layer = 1
    cache.write(layer, torch.arange(PAGE) + 2 * PAGE, rows)
    for mine, theirs in zip(cache.storage(), other.storage(), strict=True):  # a page moved by hand
        assert mine.shape[:3] == (CONFIG.num_hidden_layers, N_PAGES, PAGE)
        theirs[:, 5] = mine[:, 2]
    assert torch.equal(other.read(layer, torch.tensor([[5]])), cache.read(layer, torch.tensor([[2]])))
    assert other.read(layer, torch.tensor([[5]])).any()


def test_a_token_of_k25_takes_half() -> None:
    k25 = replace(CONFIG, num_hidden_layers=61, kv_lora_rank=512, qk_rope_head_dim=64)
    assert kv_bytes_per_token(k25, 2) == 70_272
    assert kv_bytes_per_token(k25, 2, "fp8") == kv_bytes_per_token(k25, 2, "int8") == 61 * (512 + 64 + 8)
