"""placement.planner: plans for the reference boxes and for machines that are too small, against exhaustive search."""

import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from placement.cost import Load, Setup, resolve, slot_values, step_cost
from placement.document import Measured
from placement.facts import Facts
from placement.forecast import Cache, cached_tokens, score
from placement.hardware import fingerprint
from placement.ledger import Wishes, place
from placement.plan import Goal, Plan, check_fresh, model_fingerprint, read_plan, write_plan
from placement.planner import UNUSED, DoesNotFit, facts_from, make_plan, nearest_plan, setup_of, shipped_profiles
from placement.profile import Device, Gemm, Kernel, Memory, Profile, read_profile
from placement.routing import Routing, uniform
from placement.slots import SlotMarket
from tests.reference.k25 import K25

GIB = 2**30
EXPERT = 24_772_608
SMALL, LARGE, TWO = "ddr5-4800-8ch_rtx4090", "ddr5-5600-12ch_h200", "2x-ddr5-5600-8ch_rtx6000pro"
LATENCY, BATCH, SWARM = Goal("latency", 8192, 1), Goal("throughput", 8192, 32), Goal("swarm", 9792, 100)
UNIFORM = uniform(K25)


def box(name: str, ram_gib: float | None = None) -> Profile:
    """A reference box, perhaps with other RAM."""
    profile = read_profile(shipped_profiles()[name])
    if ram_gib is None:
        return profile
    return replace(profile, hardware=replace(profile.hardware, ram=int(ram_gib * GIB)))


def plan(profile: Profile, goal: Goal = LATENCY, servable: bool = False, **wishes: Any) -> Plan:
    return make_plan(K25, facts_from(profile), profile, goal, Wishes(**wishes), UNIFORM, servable, name="K2.5")


def cpu_box(ram_gib: float = 800, read: dict[int, float] | None = None) -> Profile:
    """A machine without a GPU."""
    hardware = replace(box(SMALL, ram_gib).hardware, gpus=(), cores=16)
    flat = {rows: Measured(1e-3 * max(1, rows / 8)) for rows in (1, 8, 64)}
    rate = Measured(1e11)
    overheads = {name: Measured(1e-4) for name in ("per_step", "per_layer", "per_row")}
    device = Device(
        "cpu", "CPU", (Gemm("float32", 4096, flat),), rate, rate, rate, per_logit=Measured(1e-9), **overheads
    )
    kernel = Kernel("numba/avx2/int4/a8", 7168, 2048, flat)
    speeds = {threads: Measured(value) for threads, value in (read or {16: 1e11}).items()}
    return Profile("cpu box", "measured", "now", hardware, Memory(speeds), (kernel,), device)


@pytest.fixture(
    scope="module", params=[(name, goal) for name in (SMALL, LARGE, TWO) for goal in (LATENCY, BATCH, SWARM)]
)
def case(request: pytest.FixtureRequest) -> tuple[Profile, Goal, Plan]:
    name, goal = request.param
    return box(name), goal, plan(box(name), goal)


def used(plan: Plan, where: str) -> int:
    return sum(line.size for line in plan.ledger if line.where == where and line.what != UNUSED)


def reason(plan: Plan, what: str) -> str:
    (found,) = [f"{choice.value}: {choice.reason}" for choice in plan.choices if choice.what == what]
    return found


def speed(plan: Plan, batch: int = 1) -> float:
    assert plan.prediction is not None
    return next(point.tokens_per_second for point in plan.prediction.decode if point.size == batch)


def test_a_plan_adds_up_to_what_is_free(case: tuple[Profile, Goal, Plan]) -> None:
    profile, _, made = case
    facts, settings = facts_from(profile), made.settings
    sums = {where: sum(line.size for line in made.ledger if line.where == where) for where in ("device", "RAM")}
    assert sums == {"device": facts.device_free, "RAM": facts.ram_free}
    assert all(line.size >= 0 for line in made.ledger)
    page = 16 * 70272
    sizes = {(line.where, line.what.split(":")[0]): line.size for line in made.ledger}
    assert sizes["device", "KV"] == settings.pages_on_device * page
    assert sizes.get(("RAM", "KV"), 0) == settings.pages_in_ram * page
    assert sizes.get(("device", "routed experts, int4"), 0) == sum(settings.slots) * EXPERT
    assert settings.ring == 4 * EXPERT
    assert not settings.experts_leave_ram, "RAM holds them all"


def test_a_plan_does_what_the_goal_asks(case: tuple[Profile, Goal, Plan]) -> None:
    _, goal, made = case
    tokens = 16 * (made.settings.pages_on_device + made.settings.pages_in_ram)
    assert tokens >= cached_tokens(goal, goal.concurrency)
    assert made.settings.max_running >= goal.concurrency
    assert made.settings.max_model_len >= goal.context
    assert made.prediction is not None
    assert [point.size for point in made.prediction.decode][-1] == goal.concurrency
    assert (made.prediction.swarm is None) == (goal.kind != "swarm")


def test_every_choice_has_a_reason_in_one_line(case: tuple[Profile, Goal, Plan]) -> None:
    profile, _, made = case
    for choice in made.choices:
        assert choice.value and choice.reason and "\n" not in choice.value + choice.reason
    named = {choice.what for choice in made.choices}
    assert {"weights", "routed experts", "experts in VRAM", "KV pages", "embedding", "prefill", "step"} <= named
    assert {"requests", "threads", "bound by"} <= named
    assert ("memory nodes" in named) == (len(profile.hardware.nodes) > 1)


def test_the_split_of_vram_against_every_split(case: tuple[Profile, Goal, Plan]) -> None:
    """Every number of slots that the room of this plan allows, KV in the rest of VRAM and then in RAM, priced alike."""
    profile, goal, made = case
    settings, page = made.settings, 16 * 70272
    buffers = sum(line.size for line in made.ledger if line.what.startswith("buffers"))
    room = settings.pages_on_device * page + sum(settings.slots) * EXPERT + buffers
    setup = replace(setup_of(made, profile), kv_in_ram=0.0)
    market = SlotMarket(slot_values(resolve(K25, profile, replace(setup, slots=()), UNIFORM), goal.concurrency))

    def value(n: int) -> float:
        left = (room - n * EXPERT) / 70272
        in_ram = max(0, cached_tokens(goal, goal.concurrency) - left) * 61 / 59  # two layers of it need buffers
        on_device = int(left - in_ram * 2 / 61)
        if on_device < 0:
            return math.inf
        rates = resolve(K25, profile, replace(setup, slots=market.deal(n)), UNIFORM)
        return score(rates, goal, Cache(on_device, int(in_ram) + 1), settings.max_batch_tokens)

    best = min(value(n) for n in range(0, room // EXPERT, max(1, room // EXPERT // 60)))
    assert value(sum(settings.slots)) <= 1.03 * best


def test_a_plan_file_keeps_what_is_exact(case: tuple[Profile, Goal, Plan], tmp_path: Path) -> None:
    profile, _, made = case
    path = tmp_path / "plan.yaml"
    write_plan(path, made)
    again = read_plan(path)
    assert (again.settings, again.ledger, again.choices) == (made.settings, made.ledger, made.choices)
    assert (again.goal, again.needs, again.notes) == (made.goal, made.needs, made.notes)
    check_fresh(path, again, K25, fingerprint(profile.hardware))
    assert again.model_fingerprint == model_fingerprint(K25)


def test_a_plan_can_be_priced_again(case: tuple[Profile, Goal, Plan]) -> None:
    profile, _, made = case
    assert made.prediction is not None
    last = made.prediction.decode[-1]
    step = step_cost(resolve(K25, profile, setup_of(made, profile), UNIFORM), Load.decode(last.size, made.goal.context))
    assert step.seconds == pytest.approx(last.seconds)
    assert step.binding == last.binding


def test_512_gb_of_ram_and_96_of_vram_hold_k25_together() -> None:
    made = plan(box(TWO, 512))
    settings = made.settings
    assert settings.experts_leave_ram and not settings.experts_mapped
    assert {"experts in VRAM", "experts leaving RAM"} <= set(made.needs)
    in_ram = next(line.size for line in made.ledger if line.where == "RAM" and line.what.startswith("routed"))
    assert in_ram + sum(settings.slots) * EXPERT == 60 * 384 * EXPERT > 512 * GIB
    assert used(made, "RAM") <= 0.98 * 512 * GIB
    assert used(made, "device") <= 96 * GIB
    assert "RAM and VRAM add up" in reason(made, "routed experts")
    assert speed(made) == pytest.approx(speed(plan(box(TWO))), 0.02)


def test_256_gb_of_ram_say_what_comes_from_the_disk_and_what_it_costs() -> None:
    profile = box(TWO, 256)
    made = plan(profile)
    on_disk = next(line.size for line in made.ledger if line.where == "disk")
    outside = (60 * 384 - sum(made.settings.slots)) * EXPERT
    assert made.settings.experts_mapped and not made.settings.experts_leave_ram
    assert on_disk == outside - next(line.size for line in made.ledger if line.what.endswith("packed file"))
    (note,) = [note for note in made.notes if "disk" in note]
    setup = Setup("bfloat16", "numba/avx512vnni/int4/a8", made.settings.slots, from_disk=on_disk / outside)
    step = step_cost(resolve(K25, profile, setup, UNIFORM), Load.decode(1, 8192))
    # 480 experts a token, less those in VRAM; the missing share of the others at 10 GB/s.
    assert step.parts["disk"] == pytest.approx(480 * EXPERT * (1 - sum(setup.slots) / 23040) * on_disk / outside / 1e10)
    assert f"RAM lacks {on_disk / 1e9:.2f} GB: {on_disk / outside:.0%} of the experts outside VRAM" in note
    assert f"{1 / step.seconds:.3g} tok/s at batch 1, " in note
    assert setup_of(made, profile).from_disk == pytest.approx(on_disk / outside)
    assert "hybrid pack MODEL" in reason(made, "routed experts")
    assert reason(made, "bound by").startswith("disk: ")


def test_24_gb_take_narrow_weights_and_more_take_them_as_published() -> None:
    made = plan(box(SMALL))
    assert made.settings.weights == "int8"
    assert "bfloat16: leaves so little that prompts take" in reason(made, "weights")
    assert plan(box(SMALL), dtype="bfloat16").settings.weights == "bfloat16"
    large = plan(box(LARGE))
    assert large.settings.weights == "bfloat16"
    faster = speed(plan(box(LARGE), dtype="int8"))
    assert f"decode at batch 1 with {faster:.1f} tok/s instead of {speed(large):.1f}" in reason(large, "weights")


def test_experts_in_vram_give_way_to_kv_as_batches_grow() -> None:
    one, many = (plan(box(LARGE), Goal("throughput", 32768, n)) for n in (1, 100))
    assert sum(one.settings.slots) > sum(many.settings.slots)
    assert one.settings.pages_on_device < many.settings.pages_on_device


def test_a_slow_cpu_wants_experts_in_vram_and_kv_in_ram() -> None:
    """Every byte of KV is read in every step, an expert's not: KV goes first unless the CPU computes for long."""
    goal, fast = Goal("latency", 32768, 32), box(TWO)
    (kernel,) = fast.kernels
    seconds = {rows: Measured(20e-6 + 0.4e-3 * rows) for rows in kernel.seconds}
    slow = replace(fast, kernels=(replace(kernel, seconds=seconds),))
    made, other = plan(slow, goal), plan(fast, goal)
    assert sum(made.settings.slots) > 2000 and made.settings.pages_in_ram > made.settings.pages_on_device
    assert sum(other.settings.slots) == 0 and other.settings.pages_in_ram < made.settings.pages_in_ram
    most = (other.settings.pages_on_device - 100) * 16 * 70272  # and room for the buffers of the others
    assert speed(made, 32) > 1.02 * speed(plan(slow, goal, kv_bytes=most), 32)


def test_servable_is_what_place_says_today() -> None:
    """Where nothing says that experts in VRAM would pay."""
    for profile in (box(LARGE), cpu_box()):
        facts = facts_from(profile)
        wishes = Wishes("bfloat16" if facts.device == "cuda" else "float32", "native", None, 64, 512)
        made = make_plan(K25, facts, None, LATENCY, wishes, UNIFORM, True)
        today = place(K25, facts, wishes)
        assert made.needs == made.lacking == ()
        assert (made.settings.pages_on_device, made.settings.max_model_len) == (today.n_pages, today.max_model_len)
        assert (made.settings.max_batch_tokens, made.settings.max_running) == (512, 64)
        entries = [(line.where, line.what, line.size) for line in made.ledger]
        assert [(e.where, e.what, e.n_bytes) for e in today.entries] == entries[: len(today.entries)]


def test_24_gb_serve_k25_with_narrow_weights() -> None:
    made = plan(box(SMALL), servable=True)
    assert made.settings.weights == "int8" and made.lacking == ()
    assert "bfloat16: the device (NVIDIA GeForce RTX 4090) has 24.70 GB free" in reason(made, "weights")
    assert 16 * made.settings.pages_on_device > 50_000 and sum(made.settings.slots) > 100
    with pytest.raises(DoesNotFit, match=r"this fits: --dtype int8$") as caught:
        plan(box(SMALL), servable=True, dtype="bfloat16")
    nearest = caught.value.nearest
    assert nearest is not None and nearest.settings.weights == "int8"
    assert "other weights than bfloat16" in nearest.notes[0] and "\n" not in str(caught.value)
    for dtype in ("fp8", "int8"):
        assert plan(box(LARGE), servable=True, dtype=dtype).settings.weights == dtype


def test_narrow_kv_holds_twice_as_much_and_is_read_in_half_the_bytes() -> None:
    goal = Goal("throughput", 32768, 16)
    wide, narrow = (plan(box(SMALL), goal, servable=True, kv_dtype=kind) for kind in ("model", "fp8"))
    assert narrow.settings.kv_dtype == "fp8" and setup_of(narrow, box(SMALL)).kv == "fp8"
    assert narrow.settings.pages_on_device == pytest.approx(wide.settings.pages_on_device * 1152 / 584, rel=0.01)
    # Without rates too, and as the ledger says.
    size = next(line.size for line in narrow.ledger if line.what.startswith("KV"))
    assert size == narrow.settings.pages_on_device * 16 * 61 * 584


def test_servable_plans_have_experts_in_vram_where_they_pay() -> None:
    made = plan(box(LARGE), servable=True)
    assert sum(made.settings.slots) > 1000 and made.lacking == () and "experts in VRAM" in made.needs
    assert not made.settings.experts_leave_ram
    assert "batch 1 decodes" in reason(made, "experts in VRAM")


def test_servable_serves_as_many_as_the_goal_wants_and_the_pages_hold() -> None:
    made = plan(box(LARGE), Goal("throughput", 8192, 100), servable=True)
    assert made.settings.max_running == 100 and made.lacking == ()
    assert made.prediction is not None and made.prediction.decode[-1].size == 100
    long = plan(box(LARGE), Goal("throughput", 32768, 100), servable=True)
    held = 16 * long.settings.pages_on_device // 32768
    assert long.settings.max_running == held < 100
    asked = plan(box(LARGE), Goal("throughput", 8192, 100), servable=True, max_running=10)
    assert asked.settings.max_running == 10
    assert asked.prediction is not None and asked.prediction.decode[-1].size == 10


def test_servable_refuses_a_context_that_its_pages_do_not_hold() -> None:
    facts = Facts("cuda", "GPU", 20 * GIB, 19 * GIB, 768 * GIB, 760 * GIB)
    goal = Goal("latency", 100_000, 1)
    with pytest.raises(DoesNotFit, match=r"one request of 100000 tokens needs 7\.03 GB of KV pages and ") as caught:
        make_plan(K25, facts, box(LARGE), goal, Wishes(), UNIFORM, True)
    nearest = caught.value.nearest
    assert nearest is not None and nearest.needs == ()
    context = nearest.goal.context
    assert nearest.notes[0] == f"the nearest plan that fits: a context of {context} tokens instead of 100000"
    assert context <= 16 * nearest.settings.pages_on_device < context + 2000  # steps are sized after that


def test_a_plan_leaves_the_gpu_what_its_driver_takes() -> None:
    profile = box(LARGE)
    memory = profile.hardware.gpus[0].memory
    facts = facts_from(profile)
    assert (facts.device_total, facts.device_free) == (memory, memory - GIB)
    made = plan(profile, servable=True)
    # A server is told what is free once the driver and its own context have taken theirs.
    now = replace(facts, device_free=memory - GIB * 9 // 10)
    page = 16 * 70272
    wishes = Wishes("bfloat16", "native", made.settings.max_model_len, made.settings.max_running, 512)
    wishes = replace(wishes, max_batch_tokens=made.settings.max_batch_tokens)
    again = place(K25, now, replace(wishes, kv_bytes=made.settings.pages_on_device * page))
    assert again.n_pages == made.settings.pages_on_device


def test_throughput_takes_fewer_requests_at_once_where_that_is_faster() -> None:
    profile, goal = box(SMALL), Goal("throughput", 32768, 100)
    made = plan(profile, goal)
    assert made.prediction is not None
    best = made.prediction.decode[-1]
    assert best.tokens_per_second >= 0.99 * max(point.tokens_per_second for point in made.prediction.decode)
    assert made.settings.max_running == best.size < 100
    everyone = plan(profile, replace(goal, kind="latency"))  # as many at once as are asked for
    assert everyone.settings.max_running == 100
    ratio = best.tokens_per_second / speed(everyone, 100)
    assert ratio > 1.1
    assert f"100 would take {ratio:.2f} times as long in all" in reason(made, "requests")
    assert any(note.startswith(f"{best.size} requests run at once, not 100") for note in made.notes)
    assert plan(profile, goal, max_running=100).settings.max_running == 100


@pytest.mark.parametrize("agents", [5000, 100_000])
def test_a_swarm_that_cannot_run_at_once_waits_and_takes_no_room(agents: int) -> None:
    profile = box(SMALL)
    made, hundred = (plan(profile, Goal("swarm", 8192, n)) for n in (agents, 100))
    settings = made.settings
    tokens = 16 * (settings.pages_on_device + settings.pages_in_ram)
    assert 100 < settings.max_running <= (tokens - 8192) // 1600
    assert not settings.experts_mapped, "RAM has room for them"
    assert made.prediction is not None and hundred.prediction is not None
    assert made.prediction.decode[-1].size == settings.max_running
    assert made.prediction.swarm is not None and hundred.prediction.swarm is not None
    assert made.prediction.swarm.seconds < hundred.prediction.swarm.seconds * agents / 100
    assert any(f"not {agents}" in note and "wait" in note for note in made.notes)


def test_what_binds_counts_what_the_cpu_reads() -> None:
    made = plan(box(LARGE))
    slots = sum(made.settings.slots)
    outside = 480 * (1 - slots / 23040)  # of a token's experts, all equally likely
    assert slots > 1000
    assert f": {outside:.0f} experts, {outside * EXPERT / 1e9:.2f} GB at 430 GB/s at best" in reason(made, "bound by")
    slow = replace(cpu_box(), kernels=(replace(cpu_box().kernels[0], seconds={1: Measured(3e-3), 8: Measured(4e-3)}),))
    alone = plan(slow, Goal("latency", 256, 1))
    assert f": 480 experts, {480 * EXPERT / 1e9:.2f} GB at 100 GB/s at best" in reason(alone, "bound by")
    unknown = plan(replace(cpu_box(), memory=None))
    assert "inf" not in reason(unknown, "bound by")


def test_the_default_number_of_requests_is_called_that() -> None:
    assert reason(plan(box(LARGE)), "requests").count("64 is the default, for shorter ones; the pages hold") == 1
    assert "default" not in reason(plan(box(LARGE), Goal("throughput", 8192, 64)), "requests")


def test_the_command_that_packs_names_the_format() -> None:
    made = plan(box(LARGE, 700), expert_target="int8")
    assert made.settings.experts_mapped
    assert "run `hybrid pack MODEL --expert-format int8` first" in reason(made, "routed experts")


def test_servable_without_ram_names_the_packed_file() -> None:
    with pytest.raises(DoesNotFit, match=r"this fits: `hybrid pack MODEL`") as caught:
        plan(box(LARGE, 500), servable=True)
    nearest = caught.value.nearest
    assert nearest is not None and nearest.settings.experts_mapped and nearest.lacking == ()
    assert nearest.notes[0].startswith(
        "the nearest plan that fits: experts mapped from the file of `hybrid pack MODEL`"
    )


def test_a_shorter_context_is_the_nearest_plan() -> None:
    profile, goal = box(SMALL), Goal("latency", 262144, 1)
    facts = replace(facts_from(profile), device_total=18 * GIB, device_free=18 * GIB, ram_free=536 * GIB)
    with pytest.raises(DoesNotFit, match=r"one request of 262144 tokens needs 18\.42 GB of KV pages") as caught:
        make_plan(K25, facts, profile, goal, Wishes(), UNIFORM, False)
    nearest = caught.value.nearest
    assert nearest is not None
    context = nearest.goal.context
    assert nearest.notes[0] == f"the nearest plan that fits: a context of {context} tokens instead of 262144"
    assert nearest.settings.max_model_len >= context
    with pytest.raises(DoesNotFit):  # without rates, as the search goes: KV in RAM would need a link
        make_plan(K25, facts, None, replace(goal, context=context + 300), Wishes(), UNIFORM, False)


def test_wishes_that_stand_in_the_way_are_dropped_one_by_one() -> None:
    profile = box(SMALL)
    facts = facts_from(profile)
    with pytest.raises(DoesNotFit, match=r"--kv-memory is 40\.00 GB and .* are left") as caught:
        make_plan(K25, facts, profile, LATENCY, Wishes(kv_bytes=40 * 10**9), UNIFORM, False)
    assert caught.value.nearest is not None
    assert caught.value.nearest.notes[0] == "the nearest plan that fits: no --kv-memory"
    found = nearest_plan(K25, facts, profile, LATENCY, Wishes(dtype="float32"), UNIFORM, False)
    assert found is not None and "other weights than float32" in found.notes[0]
    tiny = replace(facts, device_total=10 * GIB, device_free=10 * GIB)
    with pytest.raises(DoesNotFit, match=r"10\.74 GB free and .* are needed, with weights in int8") as caught:
        make_plan(K25, tiny, profile, LATENCY, Wishes(), UNIFORM, False)
    assert caught.value.nearest is None


def test_kv_memory_is_kept_and_experts_take_the_rest() -> None:
    made = plan(box(TWO), kv_bytes=10**9, kv_ram=0)
    assert made.settings.pages_on_device == 10**9 // (16 * 70272)
    left = next(line.size for line in made.ledger if (line.where, line.what) == ("device", UNUSED))
    assert left < EXPERT + 16 * 70272
    assert reason(made, "KV pages").endswith("as asked")


def test_without_a_profile_rules_choose_and_nothing_is_predicted() -> None:
    profile = box(TWO, 512)
    facts, hardware = facts_from(profile), profile.hardware
    made = make_plan(K25, facts, None, SWARM, Wishes(), UNIFORM, False, hardware=hardware)
    assert (made.prediction, made.profile) == (None, "none")
    assert any("run `hybrid measure`" in note for note in made.notes)
    assert made.settings.experts_leave_ram and sum(made.settings.slots) > 0
    assert made.settings.threads == hardware.cores
    assert made.machine_fingerprint == fingerprint(hardware)
    bare = replace(profile, memory=None, kernels=(), device=None, link=None)
    assert make_plan(K25, facts, bare, SWARM, Wishes(), UNIFORM, False).settings == made.settings


@pytest.mark.parametrize(
    ("changes", "wishes", "told"),
    [
        ({"kernels": ()}, {}, "no figures of int4 experts"),
        ({"memory": None}, {"experts": "kt"}, "no figures of kt-kernel for int4"),
        ({}, {"isa": "amx"}, "on amx"),
        ({}, {"dtype": "float32"}, "no products in float32"),
    ],
)
def test_a_rate_that_the_profile_lacks_is_named(changes: dict[str, Any], wishes: dict[str, Any], told: str) -> None:
    made = plan(replace(box(LARGE), **changes), **wishes)
    assert made.prediction is None
    assert any(note.startswith("no prediction: ") and told in note for note in made.notes)


def test_rates_of_another_device_are_not_used() -> None:
    profile = box(LARGE)
    made = make_plan(K25, facts_from(cpu_box()), profile, LATENCY, Wishes(), UNIFORM, False)
    assert made.prediction is None and any("has rates of cuda, not cpu" in note for note in made.notes)


def test_on_the_cpu_one_memory_holds_everything() -> None:
    made = plan(cpu_box())
    settings = made.settings
    assert (settings.device, settings.weights, settings.slots, settings.ring) == ("cpu", "float32", (), 0)
    assert not settings.embedding_in_ram and settings.pages_in_ram == 0
    assert sum(line.size for line in made.ledger) == facts_from(cpu_box()).ram_free
    assert made.needs == ()
    mapped = plan(cpu_box(512))
    assert mapped.settings.experts_mapped and mapped.prediction is None
    assert any(note.startswith("no prediction: ") and "disk_read" in note for note in mapped.notes)
    timed = plan(replace(cpu_box(512), disk_read=Measured(5e9)))
    assert timed.settings.experts_mapped and speed(timed) < speed(made)


def test_a_small_model_takes_no_more_pages_than_can_run() -> None:
    model = replace(K25, num_hidden_layers=3, max_position_embeddings=10_000)
    profile = box(LARGE)
    made = make_plan(model, facts_from(profile), profile, LATENCY, Wishes(), uniform(model), False)
    assert made.settings.pages_on_device == 625 * 64
    assert made.settings.max_model_len == 10_000


def test_threads() -> None:
    read = {1: 20e9, 4: 70e9, 8: 99e9, 12: 100e9, 16: 90e9}
    made = plan(cpu_box(read=read))
    assert made.settings.threads == 12
    assert plan(cpu_box(read=read), threads=3).settings.threads == 3
    noisy = cpu_box()
    spread = {1: Measured(18e9, 8e9, 20e9), 2: Measured(9e9, 7e9, 11e9), 4: Measured(5e9, 4e9, 6e9)}
    assert plan(replace(noisy, memory=Memory(spread))).settings.threads == 2
    profile = cpu_box()
    limited = replace(profile, hardware=replace(profile.hardware, cpu_quota=5.5))
    assert plan(limited).settings.threads == 5
    assert "CPU quota" in reason(plan(limited), "threads")


def test_recorded_routing_gives_each_layer_slots_by_its_own_curve() -> None:
    rng = np.random.default_rng(0)
    flat = np.full((30, 384), 8 / 384)
    steep = np.minimum(rng.dirichlet(np.full(384, 0.5), 30) * 8, 1)
    routing = Routing(np.concatenate([flat, steep]), 1000)
    profile = box(LARGE)
    made = make_plan(K25, facts_from(profile), profile, LATENCY, Wishes(), routing, False)
    slots = made.settings.slots
    assert len(slots) == 60 and sum(slots) > 0
    rates = resolve(K25, profile, setup_of(made, profile), routing)
    even = resolve(K25, profile, replace(rates.setup, slots=(sum(slots) // 60,) * 60), routing)
    chosen, plain = (step_cost(one, Load.decode(1, 8192)).seconds for one in (rates, even))
    assert chosen < plain
    assert min(slots[:30]) != min(slots[30:])
    assert 1 / chosen == pytest.approx(speed(made))
    assert not any("equally likely" in note for note in made.notes)


def test_a_context_beyond_the_models_is_cut_and_told() -> None:
    made = plan(box(LARGE), Goal("latency", 10**6, 1))
    assert made.goal.context == 262144
    assert made.notes[0] == "planned for 262144 tokens of context, the most there can be"
    assert plan(box(LARGE), Goal("swarm", 100, 10)).goal.context == 9792


def test_more_requests_than_pages_wait() -> None:
    facts = Facts("cuda", "GPU", 32 * GIB, 32 * GIB, 540 * GIB, 536 * GIB)
    made = make_plan(K25, facts, box(TWO), Goal("throughput", 32768, 50), Wishes(), UNIFORM, False)
    held = 16 * (made.settings.pages_on_device + made.settings.pages_in_ram) // 32768
    assert made.settings.max_running == held < 50
    assert any(f"the pages hold {held} requests of 32768 tokens at once, not 50" in note for note in made.notes)


def test_planning_loads_neither_torch_nor_numba() -> None:
    code = "import sys, placement.planner, placement.report, placement.inventory; print(*sys.modules)"
    repo = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=repo, capture_output=True, text=True, check=True)
    assert not {"torch", "numba", "llvmlite"} & set(done.stdout.split())
