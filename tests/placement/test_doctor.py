"""The doctor on machines with a planted fault: that fault must be named first. And on models that are in disorder."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from hybrid.config import ModelConfig
from hybrid.random_checkpoint import write_checkpoint
from offload.config import Isa, PoolConfig
from offload.isa import available, choose
from offload.topology import find_topology
from placement import doctor, trial
from placement.checks import Finding
from placement.diagnosis import TINY, WAITING, Phase, Report, text, to_json
from placement.ledger import HOST_RESERVE
from placement.measure_timing import Effort, Sizes
from placement.tensor_bytes import expert_bytes, weight_bytes
from tests import families

SMALL = Sizes(
    hidden=512,
    inner=512,
    expert_bytes=8_000_000,
    read_bytes=1 << 24,
    effort=Effort(seconds=0.1, visit=0.005, longest=0.5),
)
DEFAULTS = PoolConfig()
BEST = choose()
WORSE = [tier for tier in ("portable", "avx2") if tier in available() and tier != BEST]


@pytest.fixture
def machine(tmp_path: Path) -> tuple[Path, Path]:
    """A /sys and a /proc/self with nothing wrong and little said."""
    system, process = tmp_path / "sys", tmp_path / "proc" / "self"
    write(system / "kernel" / "mm" / "transparent_hugepage" / "enabled", "always [madvise] never")
    write(process / "cgroup", "0::/job")
    return system, process


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("models") / "small"
    write_checkpoint(families.kimi_k25(), out, seed=1)
    return out


def write(path: Path, content: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content + "\n")


def examine(
    machine: tuple[Path, Path],
    model: Path | None = None,
    config: PoolConfig = DEFAULTS,
    tell: Callable[[str], None] = lambda line: None,
) -> Report:
    return doctor.examine(model, config, sizes=SMALL, system=machine[0], process=machine[1], tell=tell)


def test_a_machine_in_order(machine: tuple[Path, Path]) -> None:
    report = examine(machine)
    assert [f for f in report.findings if f.severity == "broken"] == []
    assert not any("--" in finding.what for finding in report.findings if finding.severity == "slow")
    names = [phase.name for phase in report.phases]
    assert names[:2] == ["8 experts, 1 row each", "8 experts, 16 rows each"]
    assert names[2:] == [f"step: 1 new token, {TINY}", f"step: a prompt of {trial.PROMPT} tokens, {TINY}"]
    assert all(0 < phase.share <= 1 for phase in report.phases[:2])
    assert report.read is not None and report.read > 1e8


def test_huge_pages_switched_off_are_named_first(machine: tuple[Path, Path]) -> None:
    write(machine[0] / "kernel" / "mm" / "transparent_hugepage" / "enabled", "always madvise [never]")
    report = examine(machine)
    assert report.findings[0].what == "huge pages are switched off"
    assert report.status == 3


def test_an_arena_outside_huge_pages_is_named_first(
    machine: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trial, "share_in_huge_pages", lambda address, smaps: 0.1)
    report = examine(machine)
    assert report.findings[0].what == "only 10% of a test arena lay in huge pages"
    assert report.status == 3


def test_one_thread_is_named_first(machine: tuple[Path, Path]) -> None:
    if len(find_topology().places) == 1:
        pytest.skip("this machine grants one core")
    report = examine(machine, config=PoolConfig(threads=1))
    assert report.workers == 1
    assert report.findings[0].what.startswith("--threads 1: 1 of ")
    # The measured gain may be lost in noise, the place may not.
    assert report.findings[0].gain is not None and report.findings[0].gain >= 1


@pytest.mark.parametrize("isa", WORSE)
def test_an_override_of_the_instructions_is_named_first(machine: tuple[Path, Path], isa: Isa) -> None:
    report = examine(machine, config=PoolConfig(isa=isa))
    assert report.isa == isa
    assert report.findings[0].what == f"--isa {isa} leaves {BEST} unused"
    if isa == "portable":
        assert report.findings[0].severity == "slow"
        assert report.status == 3


def test_a_control_group_below_the_experts_is_named_first(
    machine: tuple[Path, Path], checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)  # a GPU's memory would hold the other weights
    group = machine[0] / "fs" / "cgroup" / "job"
    model = ModelConfig.from_directory(checkpoint)
    others = sum(weight_bytes(model, 4).values()) + HOST_RESERVE
    limit = others + expert_bytes(model, "int4") // 2
    write(group / "memory.max", str(limit))
    write(group / "memory.current", "0")
    told: list[str] = []
    report = examine(machine, checkpoint, tell=told.append)
    first = report.findings[0]
    assert first.severity == "broken"
    assert first.what.startswith(f"the control group allows {limit / 1e6:.2f} MB of RAM and {checkpoint} needs ")
    assert f"`hybrid pack {checkpoint}`" in first.remedy
    assert report.status == 4
    assert any(str(checkpoint) in line and TINY in line for line in told), "the model was not loaded and nobody told"


def test_a_control_group_too_small_for_the_trial(machine: tuple[Path, Path], checkpoint: Path) -> None:
    group = machine[0] / "fs" / "cgroup" / "job"
    write(group / "memory.max", "1000000")
    write(group / "memory.current", "999999")
    told: list[str] = []
    report = examine(machine, checkpoint, tell=told.append)
    assert report.findings[0].what.startswith("the control group allows 1.00 MB")
    assert report.read is None and report.phases == ()
    assert any("nothing was timed" in line for line in told)


def test_a_model_that_fits_is_run_itself(machine: tuple[Path, Path], checkpoint: Path) -> None:
    report = examine(machine, checkpoint)
    assert [phase.name for phase in report.phases][2:] == [
        "step: 1 new token, small",
        f"step: a prompt of {trial.PROMPT} tokens, small",
    ]
    assert [f for f in report.findings if f.severity == "broken"] == []


def test_a_config_alone_is_enough(machine: tuple[Path, Path], checkpoint: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    write(bare / "config.json", (checkpoint / "config.json").read_text())
    told: list[str] = []
    report = examine(machine, bare, tell=told.append)
    assert report.phases[-1].name.endswith(TINY)
    assert any("no weights" in line for line in told)


def test_damaged_weights_are_broken(machine: tuple[Path, Path], checkpoint: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for file in checkpoint.iterdir():
        content = file.read_bytes()
        (damaged / file.name).write_bytes(content[: len(content) // 2] if file.suffix == ".safetensors" else content)
    report = examine(machine, damaged)
    assert report.findings[0].what == "no step of damaged can be run"
    assert report.status == 4


def test_wrong_kernels_keep_the_model_from_being_run(
    machine: tuple[Path, Path], checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trial, "kernel_error", lambda isa, precision, fmt: 0.5 if isa == BEST else 0.01)
    report = examine(machine, checkpoint)
    assert report.findings[0].what == f"the {BEST} kernels give wrong answers"
    assert report.phases[-1].name.endswith(TINY)


def test_what_linux_says_of_sandboxes_and_clocks(machine: tuple[Path, Path]) -> None:
    system, process = machine
    write(process.parent / "sys" / "user" / "max_user_namespaces", "0")
    write(process.parent / "loadavg", "99.00 0.00 0.00 1/100 1")
    write(system / "devices" / "system" / "cpu" / "cpu0" / "cpufreq" / "scaling_governor", "powersave")
    found = {finding.what: finding.severity for finding in examine(machine).findings}
    for start in ("tools cannot be sandboxed", "other programs were running: load average 99", "the processor is held"):
        assert [severity for what, severity in found.items() if what.startswith(start)] == ["note"], start


@pytest.mark.parametrize(
    ("config", "words"),
    [(PoolConfig(threads=0), "threads"), (PoolConfig(isa="avx9"), "--isa")],  # type: ignore[arg-type]
)
def test_wishes_that_cannot_be_met(machine: tuple[Path, Path], config: PoolConfig, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        examine(machine, config=config)


def test_a_model_that_is_not_there(machine: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"config\.json"):
        examine(machine, tmp_path / "absent")


def test_what_binds() -> None:
    near = Phase("near", 0.010, {"RAM": 0.009, "kernels": 0.004})
    assert (near.roofline, near.share, near.binding) == (0.009, pytest.approx(0.9), "RAM")
    far = Phase("far", 0.010, {"RAM": 0.001, "kernels": 0.002})
    assert (far.share, far.binding) == (pytest.approx(0.2), WAITING)


def test_as_text_and_as_json(machine: tuple[Path, Path]) -> None:
    found = Finding("slow", "--threads 1: 1 of 64 cores work", "because", "leave it out", 12.5)
    measured = examine(machine)
    phase = Phase("8 experts, 1 row each", 0.010, {"RAM": 0.009})
    report = Report(measured.machine, 1, BEST, 40e9, (phase,), (found,))
    lines = text(report).splitlines()
    assert "reads RAM at 40.0 GB/s" in lines[1]
    row = next(line for line in lines if line.startswith("8 experts"))
    assert row.split()[-6:] == ["10", "ms", "9", "ms", "90%", "RAM"]
    assert "slow    --threads 1: 1 of 64 cores work (12.5 times as fast without)" in lines
    assert "nothing is broken" not in text(report)
    values = json.loads(to_json(report))
    assert values["status"] == 3
    assert values["findings"] == [
        {"severity": "slow", "what": found.what, "why": "because", "remedy": "leave it out", "gain": 12.5}
    ]
    assert values["phases"][0]["binding"] == "RAM" and values["phases"][0]["share"] == pytest.approx(0.9)
    assert "nothing is broken" in text(Report(measured.machine, 1, BEST, None, (), ()))


def test_kernels_are_tried_in_the_models_own_format(
    machine: tuple[Path, Path], checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fault that is only in that format's kernels is found."""
    directory = tmp_path / "fp8"
    write_checkpoint(families.deepseek_v3(), directory, seed=1)
    assert ModelConfig.from_directory(directory).expert_format == "fp8"
    monkeypatch.setattr(trial, "kernel_error", lambda isa, precision, fmt: 0.5 if fmt == "fp8" else 0.01)
    tiers = [tier for tier in available() if tier != "amx"]
    for model, wrong in ((checkpoint, 0), (directory, len(tiers))):
        broken = [f for f in examine(machine, model).findings if f.severity == "broken"]
        assert len(broken) == wrong
        assert all("of a small fp8 layer" in f.why for f in broken)
