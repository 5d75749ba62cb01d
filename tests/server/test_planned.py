"""What a plan and a profile must be to be served: fresh, within the engine's abilities, and of this machine."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hybrid.config import ModelConfig
from offload.stream_split import StreamRates
from placement.document import DocumentError
from placement.facts import Facts
from placement.hardware import Hardware
from placement.ledger import ROUTED, Wishes
from placement.plan import Ability, Line, write_plan
from placement.probe import find_hardware
from placement.profile import write_profile
from server.engine_builder import _engine_config, _expert_ram, _still_fits
from server.options import SETTLED, SettingsError
from server.planned import check_files, load_plan, load_rates, with_plan
from server.settings import ServerSettings
from tests import families
from tests.reference import plans


@pytest.fixture(scope="module")
def hardware() -> Hardware:
    return find_hardware()


@pytest.fixture(scope="module")
def model() -> ModelConfig:
    return ModelConfig.from_json(families.kimi_k25(), "tiny")


def refusal(path: Path, model: ModelConfig, hardware: Hardware) -> str:
    with pytest.raises(DocumentError) as caught:
        load_plan(path, model, hardware)
    message = str(caught.value)
    assert message.startswith(str(path)) and "\n" not in message
    return message


def test_a_plan_becomes_settings(tmp_path: Path, model: ModelConfig, hardware: Hardware) -> None:
    path = tmp_path / "plan.yaml"
    write_plan(path, plans.plan(model, hardware, isa="avx2", threads=3))
    before = ServerSettings(model=tmp_path, port=1, api_key=("k",), plan=path)
    settings = with_plan(before, load_plan(path, model, hardware), model)
    assert (settings.device, settings.dtype, settings.expert_format) == ("cpu", "float32", "native")
    assert (settings.expert_precision, settings.experts, settings.isa, settings.threads) == ("a16", "numba", "avx2", 3)
    assert (settings.max_batch_tokens, settings.max_running, settings.max_model_len) == (48, 3, 200)
    latent = model.kv_lora_rank + model.qk_rope_head_dim
    page_bytes = 8 * model.num_hidden_layers * latent * 4  # tokens, layers, values, bytes of float32
    assert (settings.page_size, settings.kv_memory) == (8, 77 * page_bytes)
    assert (settings.port, settings.api_key, settings.plan) == (1, ("k",), path)
    changed = {name for name in ServerSettings.__slots__ if getattr(settings, name) != getattr(before, name)}
    assert changed <= set(SETTLED)


def test_formats_and_the_best_tier(model: ModelConfig, hardware: Hardware, tmp_path: Path) -> None:
    settings = ServerSettings(model=tmp_path)
    assert model.expert_format == "int4"
    assert with_plan(settings, plans.plan(model, hardware, expert_format="int8"), model).expert_format == "int8"
    assert with_plan(settings, plans.plan(model, hardware, weights="bfloat16"), model).dtype == "bfloat16"
    assert with_plan(settings, plans.plan(model, hardware), model).isa == "auto"


def test_a_stale_plan(tmp_path: Path, model: ModelConfig, hardware: Hardware) -> None:
    path = tmp_path / "plan.yaml"
    write_plan(path, plans.plan(model, hardware))
    other = replace(model, max_position_embeddings=model.max_position_embeddings + 1)
    assert "made for a test's model, whose config.json differs" in refusal(path, other, hardware)
    larger = replace(hardware, ram_installed=hardware.ram_installed + 2**30)
    assert "made for a test's machine, which is other hardware" in refusal(path, model, larger)
    limited = replace(hardware, ram=hardware.ram // 2)  # today's limit makes no other machine
    assert load_plan(path, model, limited).machine == "a test's machine"


@pytest.mark.parametrize(
    ("settings", "ability"),
    [
        ({"experts_leave_ram": True}, "experts leaving RAM"),
        ({"pages_in_ram": 5}, "KV streamed from RAM"),
    ],
)
def test_what_the_engine_does_not_do_is_refused(
    tmp_path: Path, model: ModelConfig, hardware: Hardware, settings: dict[str, object], ability: Ability
) -> None:
    path = tmp_path / "plan.yaml"
    write_plan(path, plans.plan(model, hardware, **settings))
    assert refusal(path, model, hardware).endswith(
        f"the plan needs {ability}, which this version does not run; make one with `hybrid plan --servable`"
    )


def test_slots_of_another_model_are_refused(tmp_path: Path, model: ModelConfig, hardware: Hardware) -> None:
    path = tmp_path / "plan.yaml"
    write_plan(path, plans.plan(model, hardware, slots=(0, 4)))
    assert "settings.slots: expected none, or one for each of 3 MoE layers" in refusal(path, model, hardware)
    write_plan(path, plans.plan(model, hardware, slots=(0, 4, 1)))
    assert load_plan(path, model, hardware).settings.slots == (0, 4, 1)


def test_all_that_is_lacking_is_named(tmp_path: Path, model: ModelConfig, hardware: Hardware) -> None:
    path = tmp_path / "plan.yaml"
    write_plan(path, plans.plan(model, hardware, experts_leave_ram=True, pages_in_ram=5))
    assert "the plan needs KV streamed from RAM, experts leaving RAM, which" in refusal(path, model, hardware)


def test_experts_that_cannot_be_made(tmp_path: Path, model: ModelConfig, hardware: Hardware) -> None:
    path = tmp_path / "plan.yaml"
    write_plan(path, plans.plan(model, hardware, expert_format="bf16"))
    assert "settings.expert_format: bf16 experts cannot be made of this model's int4" in refusal(path, model, hardware)


def test_a_ring_reaches_the_engine_and_its_bytes_the_ledger(
    tmp_path: Path, model: ModelConfig, hardware: Hardware
) -> None:
    one, gib = model.expert_geometry.expert_bytes("int4"), 2**30
    rates = StreamRates(1.0, 0.1, (1.0,), (0.2,), 0.2, 0.0, 0.0)
    for ring in (0, 4 * one):
        plan = plans.plan(model, hardware, device="cuda", weights="bfloat16", ring=ring)
        settings = with_plan(ServerSettings(model=tmp_path), plan, model)
        config = _engine_config(settings, plan, rates if ring else None)
        assert (config.ring_bytes, config.stream_rates) == (ring, rates if ring else None)
        wishes = Wishes("bfloat16", max_model_len=200, kv_bytes=settings.kv_memory, kv_ram=settings.kv_ram, page_size=8)
        facts = Facts("cuda", "GPU", 8 * gib, 7 * gib, 8 * gib, 7 * gib)
        placement = _still_fits(plan, model, facts, wishes, tmp_path)
        assert [entry.n_bytes for entry in placement.entries if entry.what.startswith("ring")] == [ring] * bool(ring)


def test_requests_longer_than_the_model_allows(tmp_path: Path, model: ModelConfig, hardware: Hardware) -> None:
    path, longest = tmp_path / "plan.yaml", model.max_position_embeddings
    write_plan(path, plans.plan(model, hardware, max_model_len=longest))
    load_plan(path, model, hardware)
    write_plan(path, plans.plan(model, hardware, max_model_len=longest + 1))
    assert f"settings.max_model_len: the model allows at most {longest} tokens" in refusal(path, model, hardware)


def test_rates(tmp_path: Path, hardware: Hardware) -> None:
    plain, default = ServerSettings(model=tmp_path), tmp_path / "profile.yaml"
    for missing in (None, default):
        rates = load_rates(plain, missing, hardware)
        assert rates.profile is None
        assert rates.words == "there is no profile of this machine: run `hybrid measure`"
    write_profile(default, plans.profile(hardware, "here"))
    rates = load_rates(plain, default, hardware)
    assert rates.profile is not None
    assert (rates.profile.name, rates.words) == ("here", "here")


@pytest.mark.parametrize("changes", [{"cpu": "another"}, {"cores": 1 << 20}, {"cpu_quota": 0.5}, {"tiers": ()}])
def test_a_profile_of_other_hardware(tmp_path: Path, hardware: Hardware, changes: dict[str, Any]) -> None:
    path = tmp_path / "profile.yaml"
    write_profile(path, replace(plans.profile(hardware, "there"), hardware=replace(hardware, **changes)))
    rates = load_rates(ServerSettings(model=tmp_path), path, hardware)
    assert rates.profile is None
    assert rates.words == "the profile there is of other hardware than this machine's: run `hybrid measure`"
    with pytest.raises(DocumentError, match=r"--profile .*profile\.yaml: made on other hardware"):
        load_rates(ServerSettings(model=tmp_path, profile=path), None, hardware)


def test_a_bad_profile(tmp_path: Path, hardware: Hardware) -> None:
    path = tmp_path / "profile.yaml"
    path.write_text("document: plan\n")
    rates = load_rates(ServerSettings(model=tmp_path), path, hardware)
    assert rates.profile is None
    assert "cannot be used" in rates.words
    with pytest.raises(DocumentError, match="expected `document: profile`"):
        load_rates(ServerSettings(model=tmp_path, profile=path), None, hardware)
    with pytest.raises(DocumentError, match="cannot be read"):
        load_rates(ServerSettings(model=tmp_path, profile=tmp_path / "none.yaml"), None, hardware)


def test_files_are_checked_before_anything_starts(tmp_path: Path, model: ModelConfig, hardware: Hardware) -> None:
    plain = ServerSettings(model=tmp_path)
    check_files(replace(plain, record_routing=tmp_path / "routing.json"), model)
    for record in (tmp_path, tmp_path / "none" / "routing.json"):
        with pytest.raises(SettingsError, match=f"--record-routing {record}: name a file in a directory"):
            check_files(replace(plain, record_routing=record), model)
    plan, profile = tmp_path / "plan.yaml", tmp_path / "profile.yaml"
    write_plan(plan, replace(plans.plan(model, hardware), model_fingerprint="0" * 12))
    with pytest.raises(DocumentError, match=r"plan\.yaml: made for"):
        check_files(replace(plain, plan=plan), model)
    with pytest.raises(DocumentError, match=r"profile\.yaml: cannot be read"):
        check_files(replace(plain, profile=profile), model)
    write_plan(plan, plans.plan(model, hardware))
    write_profile(profile, plans.profile(hardware))
    check_files(replace(plain, plan=plan, profile=profile), model)


def test_experts_get_what_the_ledger_leaves_them(model: ModelConfig, hardware: Hardware) -> None:
    """Only where the disk holds the rest: else what is free decides."""
    plan = plans.plan(model, hardware)
    ram, disk = Line("RAM", f"{ROUTED}, int4, from the packed file", 7000), Line("disk", f"{ROUTED} that", 500)
    other = Line("RAM", "experts' buffers for 48 tokens (estimate)", 30)
    assert _expert_ram(replace(plan, ledger=(ram, other))) is None
    assert _expert_ram(replace(plan, ledger=(ram, other, disk))) == 7000
