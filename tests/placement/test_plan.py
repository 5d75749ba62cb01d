"""placement.plan: numbers that nothing runs with, and plans that were made for something else."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from hybrid.config import ModelConfig
from placement.document import DocumentError
from placement.hardware import Hardware, Node, fingerprint
from placement.plan import Plan, Point, Prediction, check_fresh, check_slots, read_plan, write_plan
from tests import families
from tests.reference import plans

HARDWARE = Hardware(
    "CPU", 2, 1, None, (Node(0, 2, 1 << 30),), (), ("avx2",), 1 << 30, 1 << 30, "madvise", None, (), "disk"
)


@pytest.fixture(scope="module")
def model() -> ModelConfig:
    return ModelConfig.from_json(families.kimi_k25(), "tiny")


@pytest.fixture
def plan(model: ModelConfig) -> Plan:
    point = Point(1, 0.01, 100.0, "weights", measured=0.02)
    return replace(plans.plan(model, HARDWARE), prediction=Prediction((point,), (point,)))


def refusal(path: Path, check: Callable[[], object]) -> str:
    with pytest.raises(DocumentError) as caught:
        check()
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and "\n" not in message
    return message.removeprefix(f"{path}: ")


COUNTS = ("threads", "page_size", "pages_on_device", "max_batch_tokens", "max_running", "max_model_len")


@pytest.mark.parametrize(
    ("keys", "value", "said"),
    [
        *((("settings", name), 0, "expected a whole number of at least 1, found 0") for name in COUNTS),
        (("goal", "context"), 0, "expected a whole number of at least 1, found 0"),
        (("goal", "concurrency"), 0, "expected a whole number of at least 1, found 0"),
        (("prediction", "decode", 0, "size"), 0, "expected a whole number of at least 1, found 0"),
        (("prediction", "decode", 0, "seconds"), "0 s", "expected a time above 0, found '0 s'"),
        (("prediction", "prefill", 0, "measured"), "0 ms", "expected a time above 0, found '0 ms'"),
    ],
)
def test_numbers_that_nothing_runs_with(
    tmp_path: Path, plan: Plan, keys: tuple[Any, ...], value: object, said: str
) -> None:
    path = tmp_path / "plan.yaml"
    write_plan(path, plan)
    assert read_plan(path) == plan
    values = yaml.safe_load(path.read_text())
    inner = values
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value
    path.write_text(yaml.safe_dump(values))
    key = ".".join(map(str, keys)).replace(".0", "[0]")
    assert refusal(path, lambda: read_plan(path)) == f"{key}: {said}"


def test_slots_are_one_number_for_each_layer(tmp_path: Path, plan: Plan, model: ModelConfig) -> None:
    def with_slots(*slots: int) -> Plan:
        return replace(plan, settings=replace(plan.settings, slots=slots))

    layers, experts = len(model.moe_layers), model.n_routed_experts
    for slots in ((), (0,) * layers, (experts,) * layers):
        check_slots(tmp_path, with_slots(*slots), model)
    for slots in ((1,) * (layers - 1), (1,) * (layers + 1), (*(0,) * (layers - 1), experts + 1)):
        said = refusal(tmp_path, lambda slots=slots: check_slots(tmp_path, with_slots(*slots), model))  # type: ignore[misc]
        assert said.startswith(
            f"settings.slots: expected none, or one for each of {layers} MoE layers, of at most {experts}"
        )
        assert said.endswith(f"found {len(slots)}, the largest {max(slots)}")


def test_a_plan_of_another_machine_names_the_one_it_is_held_against(
    tmp_path: Path, plan: Plan, model: ModelConfig
) -> None:
    check_fresh(tmp_path, plan, model, fingerprint(HARDWARE))
    fewer = fingerprint(replace(HARDWARE, cores=1))
    assert "other hardware than this machine" in refusal(tmp_path, lambda: check_fresh(tmp_path, plan, model, fewer))
    other = refusal(tmp_path, lambda: check_fresh(tmp_path, plan, model, fewer, "the profile there"))
    assert "made for a test's machine, which is other hardware than the profile there" in other
