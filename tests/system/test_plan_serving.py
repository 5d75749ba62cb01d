"""A real server under a plan: the plan's sizes, predicted against achieved, the routing record, and refusals."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import Mock

import pytest

from hybrid.config import ModelConfig
from hybrid.engine import Engine
from hybrid.routes import read_record
from offload.topology import find_topology
from placement.hardware import Hardware
from placement.plan import Plan, write_plan
from placement.probe import find_hardware
from placement.profile import write_profile
from placement.routing import read_routing
from server import engine_builder
from tests.reference import plans
from tests.system.serving import NO_STOP, ROOT, Server, environment, serving


@pytest.fixture(scope="module")
def hardware() -> Hardware:
    return find_hardware()


@pytest.fixture(scope="module")
def model(model_dir: Path) -> ModelConfig:
    return ModelConfig.from_directory(model_dir)


def command(model: Path, port: int, *flags: str) -> list[str]:
    """`hybrid serve` with nothing that a plan settles."""
    return [sys.executable, "-m", "server", "serve", "--model", str(model), "--port", str(port), *flags]


def served(model: Path, home: Path, *flags: str) -> AbstractContextManager[Server]:
    """A server whose user has measured nothing but what lies in `home`."""
    return serving(model, home / "stderr.txt", *flags, env=own(home), typed=command)


def own(home: Path) -> dict[str, str]:
    return environment() | {"XDG_CACHE_HOME": str(home)}


def until(reached: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < deadline
        time.sleep(0.05)


TABLE = "predicted_against_achieved"


def info(server: Server, steps: int = 0) -> dict[str, Any]:
    """The answer that knows of so many steps: an account comes a little later than the last token it counts."""
    deadline = time.monotonic() + 10
    while True:
        status, body = server.get("/v1/server/info")
        assert status == 200
        found: dict[str, Any] = json.loads(body)
        if sum(line["steps"] for line in found[TABLE]) >= steps or time.monotonic() > deadline:
            return found
        time.sleep(0.05)


def test_a_plan_and_a_profile_in_force(tmp_path: Path, model_dir: Path, model: ModelConfig, hardware: Hardware) -> None:
    plan, profile, record = tmp_path / "plan.yaml", tmp_path / "profile.yaml", tmp_path / "routing.json"
    write_plan(plan, plans.plan(model, hardware))
    write_profile(profile, plans.profile(hardware))
    flags = ("--plan", str(plan), "--profile", str(profile), "--record-routing", str(record))
    with served(model_dir, tmp_path, *flags) as server:
        log = server.log.read_text()
        # The ledger is drawn anew, with what is free now: the file's own has one line.
        assert "device KV: 77 pages of 8 tokens" in " ".join(log.split())
        assert "steps are predicted with the profile made-up, every expert equally likely" in log
        assert "what it will bring" not in log  # the plan was made without rates
        with server.client() as client:
            client.completions.create(model=server.name, prompt=[65] * 100, max_tokens=20, logit_bias=NO_STOP)
        found = info(server, 22)
    assert (found["plan"]["settings"]["pages_on_device"], found["max_model_len"]) == (77, 200)
    assert found["profile"] == "made-up"
    steps = {(line["step"], tuple(line.get("sequences", line.get("new_tokens")))): line for line in found[TABLE]}
    # A prompt of 100 tokens in steps of 48, 48 and 4; the last one draws the first of 20 tokens.
    assert {key: line["steps"] for key, line in steps.items()} == {
        ("decode", (1, 1)): 19,
        ("prompt", (33, 64)): 2,
        ("prompt", (3, 4)): 1,
    }
    assert all(line["achieved_median"] > 0 and line["predicted_median"] > 2e-3 for line in steps.values())
    routing = read_routing(record, model)
    assert routing.tokens == 100 + 19
    assert routing.shares.sum(axis=1) == pytest.approx([model.num_experts_per_tok] * len(model.moe_layers))


def test_a_record_of_single_tokens(tmp_path: Path, model_dir: Path, model: ModelConfig) -> None:
    record = tmp_path / "routing.npz"
    with served(
        model_dir, tmp_path, "--device", "cpu", "--kv-memory", "8MB", "--record-routing", str(record)
    ) as server:
        with server.client() as client:
            for prompt in ([65] * 70, [66, 67]):
                client.completions.create(model=server.name, prompt=prompt, max_tokens=9, logit_bias=NO_STOP)
    found = read_record(record)
    assert found.layers.tolist() == list(model.moe_layers)
    assert found.lengths.tolist() == [70 + 8, 2 + 8]
    assert found.tokens[:70].tolist() == [65] * 70
    assert found.turns.tolist() == [[70, 78], [80, 88]]
    assert read_routing(record, model).tokens == 88


def test_a_record_goes_on_beside_that_of_an_engine_that_died(
    tmp_path: Path, model_dir: Path, model: ModelConfig
) -> None:
    record = tmp_path / "routing.npz"
    sizes = ("--device", "cpu", "--kv-memory", "8MB")
    with served(model_dir, tmp_path, *sizes, "--record-routing", str(record)) as server, server.client() as client:
        client.completions.create(model=server.name, prompt=[65] * 70, max_tokens=9, logit_bias=NO_STOP)
        until(record.exists)
        (engine,) = (child for child in server.tree() if "engine_process" in " ".join(child.cmdline()))
        engine.kill()
        until(lambda: server.get("/readyz")[0] == 503)
        until(lambda: server.get("/readyz")[0] == 200)
        client.completions.create(model=server.name, prompt=[66] * 30, max_tokens=9, logit_bias=NO_STOP)
    assert read_record(record).lengths.tolist() == [70 + 8]
    assert read_record(tmp_path / "routing-2.npz").lengths.tolist() == [30 + 8]
    assert f"the routing record goes on in {tmp_path / 'routing-2.npz'}" in server.log.read_text()


def test_a_server_plans_for_itself(tmp_path: Path, model_dir: Path, model: ModelConfig, hardware: Hardware) -> None:
    (tmp_path / "hybrid").mkdir()
    write_profile(tmp_path / "hybrid" / "profile.yaml", plans.profile(hardware, "its-own"))
    sizes = ("--max-running", "4", "--max-model-len", "512", "--kv-memory", "8MB", "--device", "cpu")
    flags = ("--expert-precision", "a16", "--experts", "auto", "--served-model-name", "clever")
    with served(model_dir, tmp_path, *flags, *sizes) as server:
        log = server.log.read_text()
        assert "where the bytes go" in log
        assert "what it will bring (predicted from measured rates)" in log
        assert "steps are predicted with the profile its-own, every expert equally likely" in log
        with server.client() as client:
            client.completions.create(model="clever", prompt="abc", max_tokens=5, logit_bias=NO_STOP)
        found = info(server, 5)
    assert (found["model"], found["plan"]["model"]) == ("clever", "clever")
    settings = found["plan"]["settings"]
    assert (settings["max_running"], settings["max_model_len"], settings["expert_precision"]) == (4, 512, "a16")
    assert settings["threads"] == len(find_topology().places)  # though the profile read as fast with one
    latent = model.kv_lora_rank + model.qk_rope_head_dim
    assert settings["pages_on_device"] == 8_000_000 // (16 * latent * 4 * model.num_hidden_layers)
    assert settings["experts"] == "numba"
    reasons = {choice["what"]: choice["reason"] for choice in found["plan"]["choices"]}
    assert reasons["requests"] == reasons["KV pages"] == "as asked"
    assert reasons["step"] == "the server's default"
    assert reasons["threads"] == "one for each physical core, up to the CPU quota"
    assert found["profile"] == "its-own"
    assert [line["size"] for line in found["plan"]["prediction"]["decode"]] == [1, 2, 4]
    assert all(line["predicted_median"] > 2e-3 for line in found[TABLE])
    assert found["plan"]["machine_fingerprint"] == plans.plan(model, hardware).machine_fingerprint
    assert str(model_dir.parent) not in json.dumps(found) and str(tmp_path) not in json.dumps(found)


@pytest.mark.parametrize("made_for", ["nothing", "other hardware"])
def test_without_rates_one_line_says_so(tmp_path: Path, model_dir: Path, hardware: Hardware, made_for: str) -> None:
    words = "no predictions: there is no profile of this machine: run `hybrid measure`"
    if made_for == "other hardware":
        (tmp_path / "hybrid").mkdir()
        write_profile(tmp_path / "hybrid" / "profile.yaml", plans.profile(replace(hardware, cpu="another"), "old"))
        words = "no predictions: the profile old is of other hardware than this machine's: run `hybrid measure`"
    with served(model_dir, tmp_path, "--device", "cpu") as server:
        assert server.log.read_text().count(words) == 1
        found = info(server)
    assert found["plan"]["prediction"] is None
    assert f"no predictions: {found['profile']}" == words


def test_the_plan_says_who_runs_the_experts(model: ModelConfig, hardware: Hardware) -> None:
    loaded = cast(Engine, SimpleNamespace(config=SimpleNamespace(experts="kt")))
    assert engine_builder._as_loaded(plans.plan(model, hardware), loaded).settings.experts == "kt"


def test_a_user_without_a_home_has_no_default_profile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_builder.os, "environ", {})
    monkeypatch.setattr(Path, "home", Mock(side_effect=RuntimeError("could not determine home directory")))
    assert engine_builder._default_profile() is None


def refusal(model: Path, home: Path, *flags: str) -> str:
    """The last line of a start that ends with 78."""
    done = subprocess.run(
        command(model, 0, *flags), cwd=ROOT, env=own(home), capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 78, done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr.splitlines()[-1]


def other_model(plan: Plan) -> Plan:
    return replace(plan, model_fingerprint="0" * 12)


def other_machine(plan: Plan) -> Plan:
    return replace(plan, machine_fingerprint="0" * 12)


def beyond_the_engine(plan: Plan) -> Plan:
    return replace(plan, settings=replace(plan.settings, experts_leave_ram=True, pages_in_ram=5))


def not_packed(plan: Plan) -> Plan:
    return replace(plan, settings=replace(plan.settings, experts_mapped=True))


def too_large(plan: Plan) -> Plan:
    return replace(plan, settings=replace(plan.settings, pages_on_device=2**40))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (other_model, "made for a test's model, whose config.json differs"),
        (other_machine, "made for a test's machine, which is other hardware"),
        (beyond_the_engine, "the plan needs KV streamed from RAM, experts leaving RAM, which this version"),
        (not_packed, "the plan maps the experts from a packed file: run `hybrid pack MODEL` first"),
        (too_large, f"the plan does not fit now: its {2**40} pages need "),
    ],
)
def test_plans_that_are_refused(
    tmp_path: Path, model_dir: Path, model: ModelConfig, hardware: Hardware, change: Any, words: str
) -> None:
    path = tmp_path / "plan.yaml"
    write_plan(path, change(plans.plan(model, hardware)))
    assert f"{path}: {words}" in refusal(model_dir, tmp_path, "--plan", str(path))


def test_what_a_plan_settles_is_not_given_twice(tmp_path: Path, model_dir: Path) -> None:
    line = refusal(model_dir, tmp_path, "--plan", "p.yaml", "--threads", "2")
    assert line == "hybrid: --threads is settled by --plan p.yaml; leave one out"


def test_a_profile_of_other_hardware_is_refused_where_it_was_named(
    tmp_path: Path, model_dir: Path, hardware: Hardware
) -> None:
    path = tmp_path / "profile.yaml"
    write_profile(path, plans.profile(replace(hardware, cpu="another")))
    assert f"--profile {path}: made on other hardware" in refusal(model_dir, tmp_path, "--profile", str(path))
