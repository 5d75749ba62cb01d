"""How many pages RAM keeps for requests that wait."""

from dataclasses import replace

import pytest

from placement.facts import Facts
from placement.ledger import Layout, PlacementError, Wishes, fit, layout_of, page_bytes, place
from tests.reference.k25 import K25

GIB = 2**30
PAGE = 16 * 70_272  # bytes, K2.5 in bf16
BOX = Facts("cuda", "GPU", 48 * GIB, 47 * GIB, 800 * GIB, 768 * GIB)
WISHES = Wishes("bfloat16", max_model_len=8192, max_running=16)


@pytest.mark.parametrize("left", [0, 1, 20, 100, 140])
def test_half_of_what_is_left_up_to_a_limit(left: int) -> None:
    needed = BOX.ram_free - place(K25, BOX, replace(WISHES, kv_ram=0)).n_bytes("RAM") - 512 * 2**20
    facts = replace(BOX, ram_free=BOX.ram_free - needed + left * GIB)
    placement = place(K25, facts, replace(WISHES, max_model_len=262144))
    assert placement.pages_kept == min(left, 128) * GIB // 2 // PAGE
    assert sum(e.n_bytes for e in placement.entries if e.what.startswith("kept KV")) == placement.pages_kept * PAGE


def test_no_more_than_all_running_requests_could_fill() -> None:
    assert place(K25, BOX, WISHES).pages_kept == 16 * 512


@pytest.mark.parametrize(
    ("asked", "pages"), [(0, 0), (PAGE - 1, 0), (10 * PAGE + 5, 10), (100 * GIB, 100 * GIB // PAGE)]
)
def test_what_is_asked_for(asked: int, pages: int) -> None:
    plain, placement = place(K25, BOX, replace(WISHES, kv_ram=0)), place(K25, BOX, replace(WISHES, kv_ram=asked))
    assert placement.pages_kept == pages
    assert placement.n_bytes("RAM") == plain.n_bytes("RAM") + pages * PAGE
    assert placement.n_pages == plain.n_pages


def test_more_than_there_is_names_the_flag() -> None:
    with pytest.raises(
        PlacementError, match=r"RAM has 824\.63 GB free and 1\.\d+ TB are needed; this fits: no --kv-ram"
    ):
        place(K25, BOX, replace(WISHES, kv_ram=600 * GIB))


def test_on_the_cpu_only_if_asked_and_out_of_the_same_memory() -> None:
    facts = Facts("cpu", "CPU", *[700 * GIB] * 4)
    wishes = replace(WISHES, dtype="bfloat16", max_running=64, max_model_len=None)
    plain, asked = place(K25, facts, wishes), place(K25, facts, replace(wishes, kv_ram=40 * GIB))
    assert plain.pages_kept == 0 and asked.pages_kept == 40 * GIB // PAGE
    assert asked.n_pages == pytest.approx(plain.n_pages - 20 * GIB / PAGE, abs=2)  # half of what is left is for pages


def test_experts_that_overflow_ram_leave_none_and_what_is_kept_pushes_experts_out() -> None:
    facts = replace(BOX, ram_free=300 * GIB)
    mapped = replace(layout_of(K25, facts, WISHES), mapped=True)
    assert fit(K25, facts, mapped).pages_kept == 0
    asked = fit(K25, facts, replace(mapped, kept_in_ram=30 * GIB))
    lost = asked.from_disk - fit(K25, facts, mapped).from_disk
    assert lost * 570.76e9 == pytest.approx(30 * GIB, rel=1e-3)
    assert page_bytes(K25, Layout("bfloat16", "int4", None)) == PAGE
