"""placement.cost: against the worked figures of the reference, plain sums, Monte Carlo and brute force."""

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from hybrid.config import KEY_BLOCK, QUERY_BLOCK, ModelConfig
from placement.cost import (
    CostError,
    Load,
    Rates,
    Setup,
    default_kernel,
    prompt_seconds,
    resolve,
    slot_values,
    step_cost,
    stream_from_rows,
)
from placement.document import Measured
from placement.expert_cost import Device as ExpertDevice
from placement.expert_cost import ExpertRates, RowTable, expert_cost, group_layers
from placement.hardware import Gpu, Hardware
from placement.profile import Device, Gemm, Kernel, Link, Memory, Profile
from placement.routing import Routing, uniform
from tests.families import kimi_k25
from tests.reference.k25 import K25

KERNEL = "numba/avx512vnni/int4/a8"
EXPERT_BYTES = 24_772_608
EXPERT_FLOPS = 2 * 3 * 7168 * 2048
GB, TERA = 1e9, 1e12
KERNEL_ROWS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
GEMM_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)


def machine(ram: float, cpu: float, link: float | None, vram: float, device_flops: float) -> Profile:
    """A machine of rooflines, as the reference's three boxes are: bytes per second and FLOP/s."""

    def products(dtype: str, item: int) -> Gemm:
        size = 7168
        times = {m: max(size**2 * item / (0.75 * vram), 2 * m * size**2 / device_flops) for m in GEMM_ROWS}
        return Gemm(dtype, size, {m: Measured(t) for m, t in times.items()})  # type: ignore[arg-type]

    expert = {m: Measured(max(EXPERT_BYTES / ram, m * EXPERT_FLOPS / cpu)) for m in KERNEL_ROWS}
    zero = Measured(0.0)
    return Profile(
        "box",
        "datasheet",
        "2026",
        Hardware("CPU", 32, 2, None, (), (), ("avx512vnni",), 768 << 30, 768 << 30, "madvise", None,
                 (Gpu("GPU", 96 << 30, "9.0"),), "disk"),
        memory=Memory({32: Measured(ram)}),
        kernels=(Kernel(KERNEL, 7168, 2048, expert),),
        device=Device(
            "cuda", "GPU", (products("bfloat16", 2), products("fp8", 1)), kv_read=Measured(0.6 * vram),
            attention_decode=Measured(device_flops), attention_prefill=Measured(device_flops), per_step=zero,
            per_layer=Measured(80e-6), per_row=zero, per_logit=zero,
        ),
        link=None if link is None else Link(Measured(link), Measured(link)),
        disk_read=Measured(5 * GB),
    )  # fmt: skip


BOXES = {
    "a": (machine(245 * GB, 2 * TERA, 25 * GB, 1008 * GB, 80 * TERA), "fp8"),
    "b": (machine(430 * GB, 4 * TERA, 52 * GB, 4800 * GB, 400 * TERA), "bfloat16"),
    "c": (machine(500 * GB, 4 * TERA, 52 * GB, 1792 * GB, 220 * TERA), "bfloat16"),
}


def one_memory(profile: Profile) -> Profile:
    """The same rates with the CPU in the device's place."""
    assert profile.device is not None
    return replace(profile, device=replace(profile.device, kind="cpu"), link=None)


def rates(box: str, **setup: object) -> Rates:
    profile, weights = BOXES[box]
    return resolve(K25, profile, Setup(weights, KERNEL, **{"overlaps": False, **setup}), uniform(K25))  # type: ignore[arg-type]


def per_second(which: Rates, rows: int) -> float:
    return rows / step_cost(which, Load.decode(rows, 8192)).seconds


@pytest.mark.parametrize(
    ("box", "expected"),
    [("a", (14.4, 21, 23, 27)), ("b", (25.9, 37, 41, 48)), ("c", (22.3, 40, 45, 54))],
)
def test_decode_as_the_reference_works_it_out(box: str, expected: tuple[float, ...]) -> None:
    found = [per_second(rates(box), rows) for rows in (1, 8, 16, 32)]
    assert found == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize(("box", "device", "host"), [("a", 21, 49), ("b", 11, 28), ("c", 21, 24)])
def test_the_two_parts_of_a_token(box: str, device: float, host: float) -> None:
    parts = step_cost(rates(box), Load.decode(1, 8192)).parts
    assert parts["CPU experts"] * 1e3 == pytest.approx(host, rel=0.05)
    others = sum(seconds for name, seconds in parts.items() if name != "CPU experts")
    assert others * 1e3 == pytest.approx(device, rel=0.1)


@pytest.mark.parametrize(("box", "expected"), [("a", 46), ("b", 84), ("c", 88)])
def test_a_hundred_rows_with_and_without_their_spread(box: str, expected: float) -> None:
    # The reference gives every expert the mean of its rows. Beyond the CPU's ridge the hot ones cost more than the
    # cold ones save, so the mean flatters; with it, and without the copies of hidden states that it leaves out, its
    # figure comes out.
    which = rates(box)
    distinct = 384 * (1 - (1 - 8 / 384) ** 100)
    at_mean = 60 * distinct * which.experts.rows.seconds(100 * 8 / distinct)
    parts = step_cost(which, Load.decode(100, 8192)).parts
    flattered = 100 / (sum(parts.values()) - parts["CPU experts"] - parts["hand-over"] + at_mean)
    assert flattered == pytest.approx(expected, rel=0.1)
    assert 0.7 * flattered < per_second(which, 100) < flattered


@pytest.mark.parametrize(("box", "cpu", "hybrid"), [("a", (47, 47), (92, 406)), ("b", (95, 95), (188, 841))])
def test_prompts_as_the_reference_works_them_out(
    box: str, cpu: tuple[float, float], hybrid: tuple[float, float]
) -> None:
    on_cpu, streaming = rates(box, overlaps=True), rates(box, overlaps=True, streams=True)
    for tokens, slow, fast in zip((1024, 8192), cpu, hybrid, strict=True):
        assert tokens / prompt_seconds(on_cpu, tokens, None) == pytest.approx(slow, rel=0.1)
        assert tokens / prompt_seconds(streaming, tokens, None) == pytest.approx(fast, rel=0.1)


@pytest.mark.parametrize(("box", "expected"), [("a", 22), ("b", 22), ("c", 22)])
def test_the_rows_from_which_the_link_wins(box: str, expected: float) -> None:
    assert stream_from_rows(rates(box)) == pytest.approx(expected, rel=0.05)


def test_a_fast_link_wins_from_fewer_rows() -> None:
    """The link is data: at C2C's 450 GB/s copying is as fast as reading RAM, at PCIe 3 it takes twice PCIe 4."""
    profile, weights = BOXES["b"]
    assert profile.link is not None

    def from_rows(link: float) -> float | None:
        changed = replace(profile, link=Link(Measured(link), Measured(link)))
        return stream_from_rows(resolve(K25, changed, Setup(weights, KERNEL), uniform(K25)))  # type: ignore[arg-type]

    assert from_rows(450 * GB) == pytest.approx(1, abs=1.5)
    assert from_rows(12 * GB) == pytest.approx(4 * TERA / EXPERT_FLOPS * EXPERT_BYTES / (12 * GB), rel=0.05)
    without = resolve(K25, one_memory(profile), Setup(weights, KERNEL), uniform(K25))  # type: ignore[arg-type]
    assert stream_from_rows(without) is None


def test_bytes_of_one_token() -> None:
    moved = step_cost(rates("b"), Load.decode(1, 8192)).moved
    hidden = 2 * 4 * 7168 * 60
    assert moved["RAM"] == pytest.approx(480 * EXPERT_BYTES + hidden, abs=1)
    assert moved["link"] == hidden
    wide = sum(
        math.prod(shape) * (4 if ".mlp.gate." in name else 2)
        for name, shape in K25.tensor_shapes().items()
        if len(shape) == 2 and "embed" not in name
    )
    assert moved["VRAM"] == wide + 8192 * 70_272


def test_narrow_weights_leave_the_router_wide() -> None:
    router = 60 * 384 * 7168
    narrow = step_cost(rates("a"), Load.decode(1, 1)).moved["VRAM"]
    profile, _ = BOXES["a"]
    wide = step_cost(resolve(K25, profile, Setup("bfloat16", KERNEL), uniform(K25)), Load.decode(1, 1)).moved["VRAM"]
    kv = 70_272
    assert wide - narrow == pytest.approx((wide - kv - 4 * router) / 2)
    assert step_cost(rates("a", kv="int8"), Load.decode(1, 1)).moved["VRAM"] == narrow - kv + 61 * 584


def test_one_narrow_format_stands_in_for_the_other() -> None:
    load = Load.decode(4, 4096)
    profile, _ = BOXES["a"]
    fp8, int8 = (step_cost(resolve(K25, profile, Setup(w, KERNEL), uniform(K25)), load) for w in ("fp8", "int8"))
    assert fp8 == int8


def test_slots_take_experts_off_the_cpu() -> None:
    plain, cached = rates("b"), rates("b", slots=(59,) * 60)
    for rows in (1, 16):
        before, after = (step_cost(which, Load.decode(rows, 8192)) for which in (plain, cached))
        assert after.parts["CPU experts"] == pytest.approx(before.parts["CPU experts"] * (1 - 59 / 384))
        assert after.distinct == pytest.approx(before.distinct)
        assert after.moved["VRAM"] - before.moved["VRAM"] == pytest.approx(before.moved["RAM"] - after.moved["RAM"])


def test_values_of_slots_are_what_the_slots_save() -> None:
    chosen = np.random.default_rng(1).dirichlet(np.full(384, 0.3), 60) * 8
    routing = Routing(np.minimum(chosen, 0.95), 1000)
    profile, weights = BOXES["b"]

    def seconds(slots: tuple[int, ...]) -> float:
        setup = Setup(weights, KERNEL, slots=slots)  # type: ignore[arg-type]
        return step_cost(resolve(K25, profile, setup, routing), Load.decode(8, 100)).seconds

    values = slot_values(resolve(K25, profile, Setup(weights, KERNEL), routing), 8)  # type: ignore[arg-type]
    assert (np.diff(values, axis=1) <= 1e-12).all()
    assert (values[:, -1] == 0).all()  # the device would be done later than the CPU
    slots = tuple(int(n) // 4 for n in (values > 0).sum(1))  # few enough that the CPU is done last
    assert sum(slots) > 60
    saved = sum(values[layer, :n].sum() for layer, n in enumerate(slots))
    assert seconds(()) - seconds(slots) == pytest.approx(saved, rel=1e-6)


def test_kv_in_ram_crosses_the_link() -> None:
    cost = step_cost(rates("a", kv_in_ram=0.5), Load.decode(4, 8192))
    copied = 0.5 * 4 * 8192 * 70_272
    assert cost.parts["link"] == pytest.approx(copied / (25 * GB))
    on_device = step_cost(rates("a"), Load.decode(4, 8192))
    assert cost.parts["CPU experts"] - on_device.parts["CPU experts"] == pytest.approx(copied / (245 * GB))


def test_experts_on_the_disk_cost_their_bytes() -> None:
    cost = step_cost(rates("a", from_disk=0.25), Load.decode(1, 1))
    assert cost.parts["disk"] == pytest.approx(0.25 * 480 * EXPERT_BYTES / (5 * GB))
    assert cost.binding == "disk"


def test_overlap_hides_the_shared_expert() -> None:
    apart, beside = (step_cost(rates("c", overlaps=overlaps), Load.decode(1, 8192)) for overlaps in (False, True))
    shared = 60 * 3 * 7168 * 2048 * 2 / (0.75 * 1792 * GB)
    assert apart.seconds - beside.seconds == pytest.approx(shared, rel=0.01)
    assert sum(apart.parts.values()) == apart.seconds


def test_one_memory_means_one_after_the_other() -> None:
    profile, weights = BOXES["c"]
    alone = resolve(K25, one_memory(profile), Setup(weights, KERNEL), uniform(K25))  # type: ignore[arg-type]
    cost = step_cost(alone, Load.decode(3, 50))
    assert cost.seconds == pytest.approx(sum(cost.parts.values()))
    assert cost.moved["link"] == cost.moved["VRAM"] == 0


def test_the_expectation_against_many_draws() -> None:
    rng = np.random.default_rng(3)
    shares = rng.dirichlet(np.full(12, 0.5)) * 3
    shares = np.minimum(shares, 0.9)
    table = RowTable.of({1: 1.0, 2: 1.1, 4: 1.9, 8: 5.0})
    plain = ExpertRates(10, 1.0, table, 1e18, math.inf, 0.0, 0.0, ExpertDevice(1e18, 1e18))
    rows = rng.binomial(9, shares, (40_000, 12))
    simulated = np.array([table.seconds(m) for m in range(10)])[rows].sum(axis=1)
    cost = expert_cost(plain, group_layers(shares[None], ()), 9)
    assert cost.cpu == pytest.approx(simulated.mean(), abs=5 * simulated.std() / 200)
    assert cost.distinct == pytest.approx((rows > 0).sum(axis=1).mean(), rel=0.01)


def test_many_different_shares_are_read_off_between_some() -> None:
    shares = np.random.default_rng(5).dirichlet(np.full(384, 0.4)) * 8
    shares = np.clip(shares, 1e-4, 0.99)
    table = RowTable.of({1: 1.0, 2: 1.05, 4: 1.6, 8: 3.4, 16: 7.0})
    plain = ExpertRates(10, 1.0, table, 1e18, math.inf, 0.0, 0.0, ExpertDevice(1e18, 1e18))
    together = expert_cost(plain, group_layers(shares[None], ()), 32).cpu
    one_by_one = sum(expert_cost(plain, group_layers(np.array([[q]]), ()), 32).cpu for q in shares)
    assert together == pytest.approx(one_by_one, rel=0.01)


@pytest.mark.parametrize(("n_experts", "top_k", "steep"), [(384, 8, 0.0), (512, 2, 0.0), (384, 8, 1.2), (128, 1, 0.5)])
def test_long_prompts_take_the_mean_of_those_chosen(n_experts: int, top_k: int, steep: float) -> None:
    which = rates("a").experts
    weights = 1 / np.arange(1, n_experts + 1) ** steep
    layers = group_layers(np.minimum(weights / weights.sum() * top_k, 0.99)[None], ())
    below, above = (expert_cost(which, layers, tokens).cpu for tokens in (1024, 1025))
    assert above == pytest.approx(below, rel=0.04)


def test_layers_run_one_after_the_other() -> None:
    """The CPU of one layer hides nothing of another layer's device: sums of maxima, not the maximum of sums."""
    flat, steep = np.full(64, 1 / 64), np.append(1.0, np.full(63, 1e-9))
    shares = np.array([flat, steep] * 5)
    which = rates("a").experts
    beside = 1e-4
    together = expert_cost(which, group_layers(shares, (0, 1) * 5), 1, beside)
    alone = [expert_cost(which, group_layers(row[None], (n,)), 1, beside) for row, n in ((flat, 0), (steep, 1))]
    by_layer = [max(one.cpu, beside + one.vram) for one in alone]
    assert by_layer[0] != by_layer[1]
    assert together.path == pytest.approx(5 * sum(by_layer))


def test_hidden_states_cross_the_link_in_time() -> None:
    cost = step_cost(rates("a", overlaps=True), Load.prompt(8192))
    assert cost.parts["hand-over"] == pytest.approx(2 * 8192 * 7168 * 4 * 60 / (25 * GB))
    assert cost.moved["link"] == pytest.approx(2 * 8192 * 7168 * 4 * 60)
    profile, _ = BOXES["a"]
    slow = replace(profile, link=Link(Measured(25 * GB), Measured(1 * GB)))
    there = step_cost(resolve(K25, slow, Setup("fp8", KERNEL), uniform(K25)), Load.prompt(8192))
    assert there.seconds - cost.seconds == pytest.approx(8192 * 7168 * 4 * 60 * (1 / GB - 1 / (25 * GB)))


def test_copies_and_kernels_hold_each_other_up_as_measured() -> None:
    profile, _ = BOXES["a"]
    link = Link(
        Measured(25 * GB), Measured(25 * GB), to_device_beside_kernels=Measured(20 * GB), kernels_beside_copies=1.25
    )
    both = replace(profile, link=link)
    setup = Setup("fp8", KERNEL, streams=True)
    idle, busy = (step_cost(resolve(K25, p, setup, uniform(K25)), Load.prompt(4096)) for p in (profile, both))
    assert busy.parts["link"] * 20 * GB == pytest.approx(
        busy.moved["link"] * GB / GB - busy.parts["hand-over"] * 25 * GB
    )
    assert 1.15 < busy.seconds / idle.seconds < 1.3
    decode = [
        step_cost(resolve(K25, p, setup, uniform(K25)), Load.decode(4, 1)).parts["CPU experts"] for p in (profile, both)
    ]
    assert decode[0] == decode[1]


def test_the_streamed_prefix_is_the_best_of_all_subsets() -> None:
    rng = np.random.default_rng(11)
    for _ in range(20):
        shares = np.sort(rng.dirichlet(np.full(8, 0.7)) * 2)[::-1].clip(1e-3, 0.99)
        before, beside = rng.random(2) * 1e-3
        which = replace(rates("a").experts, ram_read=1e30)
        cost = expert_cost(which, group_layers(shares[None], ()), 400, beside, before)
        found = max(cost.link, before + max(cost.cpu, beside + cost.vram))
        copy = EXPERT_BYTES / (25 * GB) * (1 - (1 - shares) ** 400)
        on_cpu = [expert_cost(which, group_layers(np.array([[q]]), ()), 400).cpu for q in shares]
        on_device = np.maximum(copy * 25 * GB / which.device.read, shares * 400 * EXPERT_FLOPS / which.device.flops)
        everything = range(8)
        best = min(
            max(
                sum(copy[i] for i in chosen),
                before
                + max(sum(on_cpu[i] for i in everything if i not in chosen), beside + sum(on_device[list(chosen)])),
            )
            for n in range(9)
            for chosen in itertools.combinations(everything, n)
        )
        # Experts are whole, so another subset of as many may balance a little better than the hottest ones.
        assert best <= found * (1 + 1e-9) and found <= best + copy.max()


def test_the_split_beats_either_side_alone() -> None:
    tokens = 1024
    on_cpu = prompt_seconds(rates("a", overlaps=True), tokens, None)
    split = step_cost(rates("a", overlaps=True, streams=True), Load.prompt(tokens))
    all_streamed = 60 * 384 * EXPERT_BYTES / (25 * GB)
    assert split.seconds < 0.6 * min(on_cpu, all_streamed)
    assert split.parts["CPU experts"] == pytest.approx(split.parts["link"], rel=0.1)


@pytest.mark.parametrize(("new", "before"), [(1, 0), (100, 0), (512, 1500), (2048, 0), (3000, 700)])
def test_prompt_attention_counts_what_the_engine_computes(new: int, before: int) -> None:
    """The engine's own loops: blocks of keys against blocks of queries, unless all the keys are in the future."""
    pairs = 0
    for first in range(0, new, QUERY_BLOCK):
        queries = range(before + first, before + min(first + QUERY_BLOCK, new))
        for start in range(0, before + new, KEY_BLOCK):
            if start <= queries[-1]:
                pairs += len(queries) * (min(start + KEY_BLOCK, before + new) - start)
    heads, nope, rope, v, latent = 64, 128, 64, 128, 512
    naive = pairs * (nope + rope + v) + (before + new) * latent * (nope + v)
    absorbed = pairs * (2 * latent + rope) + new * latent * (nope + v)
    seconds = step_cost(rates("a"), Load.prompt(new, before)).parts["attention"]
    assert seconds * 80 * TERA == pytest.approx(61 * 2 * heads * min(naive, absorbed))


def test_a_prompt_in_chunks_is_the_sum_of_its_chunks() -> None:
    which = rates("a")
    chunks = [Load.prompt(512, 0, 0), Load.prompt(512, 512, 0), Load.prompt(76, 1024, 1)]
    assert prompt_seconds(which, 1100, 512) == pytest.approx(sum(step_cost(which, load).seconds for load in chunks))


def test_loads_of_a_batch() -> None:
    load = Load.of([(1, 99), (1, 199), (512, 0)])
    assert (load.decode_rows, load.context, load.chunks, load.sampled, load.tokens) == (2, 300, ((512, 0),), 3, 514)
    assert Load.of([(1, 7)]) == Load.decode(1, 8)


def test_what_is_remembered_is_what_is_computed() -> None:
    which = rates("b", streams=True, overlaps=True)
    loads = [Load.decode(5, 9), Load.prompt(700), Load.prompt(700, 9000), Load.decode(5, 90), Load.prompt(700)]
    fresh = [step_cost(rates("b", streams=True, overlaps=True), load) for load in loads]
    assert [step_cost(which, load) for load in loads] == fresh


def test_a_recorded_flat_routing_is_the_uniform_law() -> None:
    profile, weights = BOXES["a"]
    flat = Routing(np.full((60, 384), 8 / 384) * (1 + 1e-9 * np.arange(384)), 10)  # all different: the other path
    setup = Setup(weights, KERNEL)  # type: ignore[arg-type]
    recorded, law = (
        step_cost(resolve(K25, profile, setup, routing), Load.decode(20, 1)) for routing in (flat, uniform(K25))
    )
    assert recorded.seconds == pytest.approx(law.seconds, rel=1e-6)


def test_a_small_model_scales_by_its_weights() -> None:
    model = ModelConfig.from_json(kimi_k25())
    profile, _ = BOXES["b"]
    which = resolve(model, profile, Setup("bfloat16", KERNEL), uniform(model))
    assert which.experts.rows.seconds(1) == pytest.approx(
        EXPERT_BYTES / (430 * GB) * model.hidden_size * model.moe_intermediate_size / (7168 * 2048)
    )


def test_amx_is_taken_only_by_name() -> None:
    profile, _ = BOXES["a"]
    amx = replace(profile.kernels[0], name="numba/amx/int4/a8")
    both = replace(profile, kernels=(amx, *profile.kernels))
    assert default_kernel(both, "int4", "a8", None) == KERNEL
    assert default_kernel(both, "int4", "a8", "amx") == "numba/amx/int4/a8"


def test_one_row_of_a_table_and_many() -> None:
    table = RowTable.of({1: 1.0, 2: 1.5, 4: 2.0, 16: 10.0})
    rows = np.array([0, 0.25, 1, 1.5, 3, 4, 15, 16, 17, 400.0])
    by_hand = [0, 0.25, 1, 1.25, 1.75, 2, 10 - 8 / 12, 10, 10 + 8 / 12, 10 + 384 * 8 / 12]
    assert table.many(rows) == pytest.approx(by_hand)
    assert [table.seconds(float(m)) for m in rows] == pytest.approx(by_hand)
    assert [table.rows_at(t) for t in (0.0, 1.25, 12.0)] == pytest.approx([1, 1.5, 19])
    assert RowTable.of({1: 1.0, 2: 1.0, 8: 1.0}).rows_at(2.0) is None


def test_missing_figures_are_named() -> None:
    profile, _ = BOXES["a"]
    with pytest.raises(CostError, match="no products in float32; run `hybrid measure`"):
        resolve(K25, profile, Setup("float32", KERNEL), uniform(K25))
    with pytest.raises(CostError, match="no figures of numba/avx2/int4/a8"):
        resolve(K25, profile, Setup("fp8", "numba/avx2/int4/a8"), uniform(K25))
    with pytest.raises(CostError, match="no device rates"):
        resolve(K25, replace(profile, device=None), Setup("fp8", KERNEL), uniform(K25))
    with pytest.raises(CostError, match="no link between RAM and its device"):
        resolve(K25, replace(profile, link=None), Setup("fp8", KERNEL), uniform(K25))
    with pytest.raises(CostError, match="disk_read"):
        resolve(K25, replace(profile, disk_read=None), Setup("fp8", KERNEL, from_disk=0.1), uniform(K25))
    with pytest.raises(CostError, match="no entry for 1 row"):
        RowTable.of({2: 1.0})
    assert default_kernel(profile, "int4", "a8", None) == KERNEL
    with pytest.raises(CostError, match="int8 experts with a8 activations on avx2"):
        default_kernel(profile, "int8", "a8", "avx2")


def test_the_published_config_gives_the_same_model() -> None:
    folder = Path(__file__).parents[3] / "shared" / "kimi"
    if not (folder / "config.json").is_file():
        pytest.skip("the published config.json of Kimi-K2.5 is not beside the repository")
    published = ModelConfig.from_json(json.loads((folder / "config.json").read_text()))
    profile, weights = BOXES["a"]
    found = step_cost(resolve(published, profile, Setup(weights, KERNEL), uniform(published)), Load.decode(8, 8192))  # type: ignore[arg-type]
    assert found == step_cost(rates("a", overlaps=True), Load.decode(8, 8192))
