"""placement.ledger: bytes against sums made another way, and what it says when something does not fit."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybrid.config import ModelConfig
from hybrid.random_checkpoint import write_checkpoint
from offload.checkpoint import Checkpoint
from offload.config import ExpertFormat, Precision
from offload.kernels import activation
from placement.facts import Facts
from placement.ledger import (
    HOST_RESERVE,
    Layout,
    PlacementError,
    Wishes,
    fit,
    host_buffer_bytes,
    human,
    layout_of,
    place,
    room,
    weight_choices,
    workspace_bytes,
)
from placement.plan import WeightDtype
from placement.tensor_bytes import expert_bytes, weight_bytes
from tests.reference.k25 import K25
from tests.reference.k25 import K25_TEXT as K25_TEXT  # where other tests look for it

GIB = 2**30

EXPERT = 24_772_608  # bytes of one of K2.5's
WISHES = Wishes("bfloat16", "native", max_model_len=None, max_running=16, max_batch_tokens=512)
BUFFERS = 512 * (2 * 4 * 7168 + 9 * 7168 // 4 + 8 * 9 * 2048 // 4)  # of a step's 512 tokens, 2.25 bytes a value
WORKSTATION = Facts("cuda", "GPU", 48 * GIB, 47 * GIB, 768 * GIB, 760 * GIB)


def cpu(gib: float) -> Facts:
    free = int(gib * GIB)
    return Facts("cpu", "CPU", free, free, free, free)


def test_k25_against_its_model_card() -> None:
    # One expert is 24.77 MB, all are 570.8 GB; a cached token is 70.3 kB in bf16.
    assert expert_bytes(K25, "int4") == 60 * 384 * 24_772_608
    assert K25.kv_bytes_per_token(2) == 61 * (512 + 64) * 2
    groups = weight_bytes(K25, 2)
    assert groups["embedding"] == groups["output head"] == 163840 * 7168 * 2
    assert groups["dense MLP"] == 3 * 7168 * 18432 * 2
    assert groups["shared experts"] == 60 * 3 * 7168 * 2048 * 2
    assert groups["router (float32)"] == 60 * 384 * (7168 + 1) * 4
    per_layer = 7168 * 1536 + 1536 * 64 * 192 + 7168 * 576 + 512 * 64 * 256 + 64 * 128 * 7168
    norms_inside_attention = 1536 + 512
    assert groups["attention"] + groups["norms"] == 2 * (61 * (per_layer + norms_inside_attention + 2 * 7168) + 7168)
    # 595.15 GB less 570.76 GB of experts, 0.834 of vision tower and 0.109 of projector, plus 0.33 for a float32 router
    assert sum(groups.values()) == pytest.approx(23.77e9, rel=1e-3)


def test_weights_equal_the_tensors_of_a_checkpoint(tmp_path: Path) -> None:
    raw = json.loads((Path(__file__).parents[1] / "reference" / "small_model.json").read_text())
    write_checkpoint(raw, tmp_path / "m", 1, None)
    model = ModelConfig.from_directory(tmp_path / "m")
    tensors = Checkpoint(tmp_path / "m").tensors
    routed = [info for name, info in tensors.items() if ".mlp.experts." in name]
    shapes = sum(info.n_bytes for info in routed if info.name.endswith("weight_shape"))  # read once, not kept
    assert sum(info.n_bytes for info in routed) == expert_bytes(model, "int4") + shapes
    others = {name: info for name, info in tensors.items() if ".mlp.experts." not in name}
    elements = sum(math.prod(info.shape) * (4 if ".mlp.gate." in name else 2) for name, info in others.items())
    assert elements == sum(weight_bytes(model, 2).values())


def test_k25_on_a_workstation() -> None:
    placement = place(K25, WORKSTATION, WISHES)
    assert placement.max_model_len == 262144
    assert placement.n_pages * 16 >= 262144
    assert placement.n_bytes("device") <= WORKSTATION.device_free
    kept = placement.pages_kept * 16 * 70_272  # of 286 GB that are left
    assert 64 * GIB - 16 * 70_272 < kept <= 64 * GIB
    assert placement.n_bytes("RAM") == expert_bytes(K25, "int4") + BUFFERS + kept
    assert placement.notes == ()
    (experts,) = [entry for entry in placement.entries if entry.what == "routed experts, int4, packed"]
    assert (experts.where, experts.n_bytes) == ("RAM", 60 * 384 * 24_772_608)


def test_pages_are_capped_by_what_can_run() -> None:
    wishes = replace(WISHES, max_model_len=1000, max_running=3)
    assert place(K25, WORKSTATION, wishes).n_pages == 3 * 63


def test_a_shorter_context_is_the_nearest_remedy() -> None:
    facts = replace(WORKSTATION, device_total=32 * GIB, device_free=31 * GIB)
    with pytest.raises(PlacementError) as caught:
        place(K25, facts, replace(WISHES, max_model_len=262144))
    message = str(caught.value)
    assert message.startswith("one request of 262144 tokens needs 18.42 GB of KV pages and ")
    length = int(message.split("this fits: --max-model-len ")[1])
    place(K25, facts, replace(WISHES, max_model_len=length))
    with pytest.raises(PlacementError):
        place(K25, facts, replace(WISHES, max_model_len=length + 16))


def test_without_a_wish_the_context_is_shortened_and_told() -> None:
    facts = replace(WORKSTATION, device_total=32 * GIB, device_free=31 * GIB)
    placement = place(K25, facts, WISHES)
    assert 0 < placement.max_model_len < 262144
    assert placement.notes == (f"the longest request is {placement.max_model_len} tokens; the model allows 262144",)


def test_bfloat16_is_the_remedy_for_float32_weights() -> None:
    facts = replace(WORKSTATION, device_total=40 * GIB, device_free=39 * GIB)
    with pytest.raises(
        PlacementError, match=r"the device \(GPU\) has 41\.88 GB free and 50.* are needed; .*--dtype bfloat16$"
    ):
        place(K25, facts, replace(WISHES, dtype="float32"))


def test_a_card_too_small_for_any_setting() -> None:
    with pytest.raises(PlacementError, match="no single setting helps"):
        place(K25, replace(WORKSTATION, device_total=12 * GIB, device_free=11 * GIB), WISHES)


def test_a_card_too_small_for_bf16() -> None:
    """24 GB: narrow weights are named where bf16 was asked for, and taken where nothing was."""
    card = replace(WORKSTATION, device_total=24 * GIB, device_free=23 * GIB)
    with pytest.raises(PlacementError, match=r"24\.70 GB free and 2.\.\d+ GB are needed; this fits: --dtype int8$"):
        place(K25, card, WISHES)
    placement = place(K25, card, replace(WISHES, dtype=None))
    assert placement.entries == place(K25, card, replace(WISHES, dtype="int8")).entries
    assert placement.n_pages * 16 > 100_000
    published = replace(K25, expert_format="fp8")  # as Kimi-K2: its codes are kept
    assert weight_choices(published, card, replace(WISHES, dtype=None)) == ("bfloat16", "fp8")
    assert weight_choices(K25, cpu(100), replace(WISHES, dtype=None)) == ("float32",)


def test_the_experts_must_fit_in_ram() -> None:
    with pytest.raises(
        PlacementError, match=r"RAM has 816\.04 GB free and 1\.08 TB are needed for the experts; .*int4$"
    ):
        place(K25, WORKSTATION, replace(WISHES, expert_target="int8"))


def test_experts_that_must_become_bf16() -> None:
    model = replace(K25, expert_format="bf16")
    with pytest.raises(PlacementError, match=r"2\.03 TB are needed for the experts; .*int4$"):
        place(model, WORKSTATION, WISHES)
    entry = place(replace(model, num_hidden_layers=3), WORKSTATION, WISHES).entries[-3]
    assert (entry.what, entry.n_bytes) == ("routed experts, bf16, packed", 2 * 384 * 3 * 2 * 7168 * 2048)


def test_int4_is_the_remedy_where_it_fits() -> None:
    model = replace(K25, expert_format="bf16")
    with pytest.raises(PlacementError, match=r"fits: --expert-format int4$"):
        place(model, WORKSTATION, replace(WISHES, expert_target="int8"))


def test_experts_larger_than_ram_need_a_packed_file() -> None:
    small = replace(WORKSTATION, ram_total=128 * GIB, ram_free=120 * GIB)
    with pytest.raises(
        PlacementError,
        match=r"128\.85 GB free and 571\.30 GB are needed for the experts; this fits: `hybrid pack MODEL`",
    ):
        place(K25, small, WISHES)
    with pytest.raises(PlacementError, match=r"this fits: `hybrid pack MODEL --expert-format int8`"):
        place(K25, small, replace(WISHES, expert_target="int8"))
    placement = place(K25, small, replace(WISHES, packed=True))
    assert any("need 570.76 GB of RAM" in note for note in placement.notes)
    assert "routed experts, int4, from the packed file" in [entry.what for entry in placement.entries]


def test_cpu_counts_its_memory_once() -> None:
    small = replace(K25, num_hidden_layers=3)  # two layers of experts: 19 GB
    needed = sum(weight_bytes(small, 2).values()) + expert_bytes(small, "int4")
    placement = place(small, cpu(needed / GIB + 8), replace(WISHES, max_model_len=4096))
    assert placement.notes == ()
    assert placement.n_bytes("device") + placement.n_bytes("RAM") <= placement.facts.ram_free
    copied = replace(small, expert_format="bf16")
    wishes = replace(WISHES, max_model_len=4096, expert_target="int4")
    assert place(copied, cpu(needed / GIB + 8), wishes).n_bytes("RAM") == expert_bytes(small, "int4") + BUFFERS
    with pytest.raises(PlacementError):
        place(copied, cpu(needed / GIB), wishes)


def test_context_beyond_the_models() -> None:
    with pytest.raises(PlacementError, match="--max-model-len 300000: the model allows at most 262144 tokens"):
        place(K25, WORKSTATION, replace(WISHES, max_model_len=300000))


def test_kv_memory() -> None:
    placement = place(K25, WORKSTATION, replace(WISHES, max_model_len=1000, kv_bytes=10**9))
    assert placement.n_pages == 10**9 // (16 * 70272)
    with pytest.raises(PlacementError, match=r"--kv-memory is 90\.00 GB and .*; this fits: no --kv-memory$"):
        place(K25, WORKSTATION, replace(WISHES, max_model_len=1000, kv_bytes=90 * 10**9))
    with pytest.raises(PlacementError, match=r"fits: --max-model-len 14224$"):
        place(K25, WORKSTATION, replace(WISHES, max_model_len=20000, kv_bytes=10**9))


def test_human() -> None:
    assert [human(n) for n in (0, 999, 12_345_678, 570_760_888_320)] == ["0.0 kB", "1.0 kB", "12.35 MB", "570.76 GB"]


@given(
    device=st.sampled_from(["cpu", "cuda"]),
    vram=st.integers(1, 200),
    memory=st.integers(1, 1200),
    dtype=st.sampled_from(["float32", "bfloat16"]),
    target=st.sampled_from(["native", "int8", "int4"]),
    published=st.sampled_from(["int4", "bf16", "fp8"]),
    length=st.none() | st.integers(1, 262144),
    running=st.integers(1, 128),
    packed=st.booleans(),
    kv=st.none() | st.integers(1, 10**11),
)
def test_whatever_fits_really_fits(
    device: str, vram: int, memory: int, dtype: str, target: str, published: ExpertFormat, length: int | None,
    running: int, packed: bool, kv: int | None,
) -> None:  # fmt: skip
    model = replace(K25, expert_format=published)
    facts = cpu(memory) if device == "cpu" else Facts("cuda", "GPU", vram * GIB, vram * GIB, memory * GIB, memory * GIB)
    wishes = Wishes(dtype, target, length, running, 512, kv, packed=packed)  # type: ignore[arg-type]
    try:
        placement = place(model, facts, wishes)
    except PlacementError as error:
        assert "\n" not in str(error)
        return
    assert placement.n_pages * wishes.page_size >= placement.max_model_len >= 1
    assert length is None or placement.max_model_len == length
    assert placement.n_bytes("device") <= facts.device_free
    if not packed:
        needed = placement.n_bytes("RAM") + (placement.n_bytes("device") if device == "cpu" else 0)
        assert needed <= facts.ram_free
    elif not placement.notes and device == "cpu":
        assert placement.n_bytes("RAM") + placement.n_bytes("device") <= facts.ram_free


def bytes_of(layout: Layout, facts: Facts) -> dict[tuple[str, str], int]:
    """The ledger of K2.5 as (place, first word) to bytes; pages are told apart by their place."""
    found: dict[tuple[str, str], int] = {}
    for entry in fit(K25, facts, layout).entries:
        key = (entry.where, entry.what.split(" ")[0].rstrip(":,"))
        found[key] = found.get(key, 0) + entry.n_bytes
    return found


def test_narrow_weights_leave_norms_router_and_embedding_as_they_are() -> None:
    wide, narrow = weight_bytes(K25, 2), weight_bytes(K25, 2, "int8")
    rows = {"shared experts": 60 * (2 * 2048 + 7168), "dense MLP": 2 * 18432 + 7168, "output head": 163840}
    rows["attention"] = 61 * (1536 + 64 * 192 + 576 + 64 * 256 + 7168)
    for group, n_rows in rows.items():
        assert narrow[group] == wide[group] // 2 + 4 * n_rows
    for group in ("embedding", "norms", "router (float32)"):
        assert narrow[group] == wide[group]
    assert weight_bytes(K25, 2, "fp8") == narrow
    blocks = weight_bytes(replace(K25, expert_format="fp8"), 2, "fp8")  # kept as published, but for the head
    assert blocks["output head"] == narrow["output head"]
    assert blocks["shared experts"] == wide["shared experts"] // 2 + 60 * 4 * 3 * 16 * 56


def test_a_layout_that_uses_every_place() -> None:
    facts = Facts("cuda", "GPU", 96 * GIB, 96 * GIB, 520 * GIB, 520 * GIB)
    slots, page = (40,) * 60, 16 * 70272
    layout = Layout(
        "bfloat16", "int4", 50_000, max_running=4, slots=slots, experts_leave_ram=True, embedding_in_ram=True,
        ring_experts=4, kv_bytes=2000 * page, kv_in_ram=3000 * page + 5,
    )  # fmt: skip
    placement, found = fit(K25, facts, layout), bytes_of(layout, facts)
    assert (placement.n_pages, placement.pages_in_ram, placement.max_model_len) == (2000, 3000, 50_000)
    assert found["device", "routed"] == 2400 * EXPERT
    assert found["RAM", "routed"] == (60 * 384 - 2400) * EXPERT
    assert found["device", "ring"] == 4 * EXPERT
    assert found["device", "buffers"] == 2 * (3000 * page + 5) // 61
    assert (found["device", "KV"], found["RAM", "KV"]) == (2000 * page, 3000 * page)
    assert found["RAM", "embedding"] == 163840 * 7168 * 2
    assert ("device", "embedding") not in found
    assert placement.n_bytes("device") <= facts.device_free
    assert placement.n_bytes("RAM") + HOST_RESERVE <= facts.ram_free
    copies = replace(layout, experts_leave_ram=False)
    with pytest.raises(PlacementError, match=r"RAM has 558\.35 GB free and 571\.30 GB are needed for the experts"):
        fit(K25, facts, copies)
    with pytest.raises(PlacementError, match=r"RAM has 558\.35 GB free and .* are needed$"):
        fit(K25, facts, replace(layout, kv_in_ram=60 * 10**9))


def test_pages_in_ram_are_no_more_than_can_run() -> None:
    layout = Layout("bfloat16", "int4", 1000, max_running=2, kv_bytes=100 * 16 * 70272, kv_in_ram=10**9)
    placement = fit(K25, WORKSTATION, layout)
    assert (placement.n_pages, placement.pages_in_ram) == (100, 2 * 63 - 100)


def test_mapped_experts_that_ram_does_not_hold_are_on_the_disk() -> None:
    facts = Facts("cuda", "GPU", 96 * GIB, 96 * GIB, 256 * GIB, 250 * GIB)
    layout = Layout("bfloat16", "int4", 8192, mapped=True, slots=(45,) * 60)
    placement, found = fit(K25, facts, layout), bytes_of(layout, facts)
    outside = (384 - 45) * 60 * EXPERT
    assert found["RAM", "routed"] == 250 * GIB - HOST_RESERVE - BUFFERS
    assert found["disk", "routed"] == outside - found["RAM", "routed"]
    assert placement.from_disk == pytest.approx(found["disk", "routed"] / outside)
    assert fit(K25, WORKSTATION, replace(layout, slots=())).from_disk == 0


def test_wishes_that_leave_everything_open() -> None:
    assert layout_of(K25, WORKSTATION, Wishes()).weights == "bfloat16"
    assert layout_of(K25, cpu(1000), Wishes()).weights == "float32"
    placement = place(K25, WORKSTATION, Wishes())
    assert any(entry.what == "workspace for 512 tokens (estimate)" for entry in placement.entries)


@given(
    weights=st.sampled_from(["float32", "bfloat16", "fp8", "int8"]),
    vram=st.integers(8, 200),
    memory=st.integers(1, 1200),
    slots=st.integers(0, 100),
    leave=st.booleans(),
    embedding=st.booleans(),
    ring=st.sampled_from([0, 4]),
    mapped=st.booleans(),
    kv=st.integers(0, 10**11),
)
def test_every_expert_lies_somewhere(
    weights: WeightDtype, vram: int, memory: int, slots: int, leave: bool, embedding: bool, ring: int, mapped: bool,
    kv: int,
) -> None:  # fmt: skip
    facts = Facts("cuda", "GPU", vram * GIB, vram * GIB, memory * GIB, memory * GIB)
    layout = Layout(
        weights, "int4", None, mapped=mapped, slots=(slots,) * 60, experts_leave_ram=leave, embedding_in_ram=embedding,
        ring_experts=ring, kv_in_ram=kv,
    )  # fmt: skip
    try:
        placement = fit(K25, facts, layout)
    except PlacementError as error:
        assert "\n" not in str(error)
        return
    assert placement.n_bytes("device") <= facts.device_free
    assert placement.n_bytes("RAM") + HOST_RESERVE <= facts.ram_free
    routed = sum(entry.n_bytes for entry in placement.entries if entry.what.startswith("routed experts"))
    copies = 0 if leave or mapped else slots * 60 * EXPERT
    assert routed - copies == 60 * 384 * EXPERT


def test_buffers_of_a_step_take_ram_and_are_no_smaller_than_the_experts_own() -> None:
    """Against the buffers that `offload.experts` asks for, of every precision and format."""
    for fmt in get_args(ExpertFormat):
        for precision in get_args(Precision):
            layout = Layout("bfloat16", fmt, None, max_batch_tokens=4096)
            record = activation.layout("avx2", fmt, precision)
            needed = 4096 * (2 * 4 * 7168 + record.row_bytes(7168, fmt) + 8 * record.row_bytes(2048, fmt))
            found = host_buffer_bytes(K25, layout)
            assert needed <= found <= 2 * needed
            assert found == needed or precision == "a8"
    rows = 4096 * 8 * 2 * (7168 + 2048)
    assert host_buffer_bytes(K25, replace(layout, amx=True)) - host_buffer_bytes(K25, layout) == rows
    assert layout_of(K25, WORKSTATION, Wishes(isa="amx")).amx


def test_a_larger_step_leaves_less_ram() -> None:
    small, large = (Layout("bfloat16", "int4", None, max_batch_tokens=tokens) for tokens in (512, 4096))
    buffers = host_buffer_bytes(K25, large) - host_buffer_bytes(K25, small)
    assert buffers == 7 * BUFFERS
    assert room(K25, WORKSTATION, small)[1] - room(K25, WORKSTATION, large)[1] == buffers
    workspace = workspace_bytes(K25, large) - workspace_bytes(K25, small)
    assert room(K25, cpu(900), small)[0] - room(K25, cpu(900), large)[0] == buffers + workspace
    tight = replace(WORKSTATION, ram_free=expert_bytes(K25, "int4") + HOST_RESERVE + BUFFERS)
    assert place(K25, tight, WISHES).n_bytes("RAM") + HOST_RESERVE == tight.ram_free
    with pytest.raises(PlacementError, match=r"RAM has 571\.35 GB free and 571\.35 GB are needed"):
        place(K25, replace(tight, ram_free=tight.ram_free - 1), WISHES)
