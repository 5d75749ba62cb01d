"""The commands measure, plan, tune, doctor and simulate as typed: what they print, write and refuse."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from hybrid.config import ModelConfig
from placement.plan import write_plan
from placement.planner import shipped_profiles
from placement.probe import find_hardware
from placement.profile import write_profile
from server import planning
from server.__main__ import main
from server.planned import default_profile
from tests.reference import plans
from tests.reference.k25 import K25_TEXT

SMALL = Path(__file__).parents[1] / "reference" / "small_model.json"
A = "ddr5-4800-8ch_rtx4090"
C = "2x-ddr5-5600-8ch_rtx6000pro"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No profile of this machine unless a test makes one."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def k25(tmp_path: Path) -> str:
    """A config.json alone, with the published sizes."""
    path = tmp_path / "k25" / "config.json"
    path.parent.mkdir()
    path.write_text(json.dumps({"model_type": "kimi_k25", "eos_token_id": 163586, "text_config": K25_TEXT}))
    return str(path)


def said(capsys: pytest.CaptureFixture[str]) -> tuple[str, str]:
    captured = capsys.readouterr()
    return captured.out, captured.err


def test_a_plan_for_a_machine_and_a_model_that_are_not_here(k25: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", k25, "--profile", A]) == 0
    out, _ = said(capsys)
    assert "routed experts, int4" in out
    assert "570.76 GB" in out
    assert "tok/s" in out


def test_a_plan_is_written_read_and_compared(k25: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = tmp_path / "a.yaml", tmp_path / "c.yaml"
    assert main(["plan", k25, "--profile", A, "--out", str(first), "--json"]) == 0
    shown = json.loads(said(capsys)[0])
    written = yaml.safe_load(first.read_text())
    assert {key: value for key, value in written.items() if key not in ("document", "version")} == shown
    options = ["--goal", "swarm:50", "--explain", "--compare", str(first), "--out", str(second)]
    assert main(["plan", k25, "--profile", C, *options]) == 0
    out, _ = said(capsys)
    assert "\nwhy\n" in out
    assert A in out and C in out
    assert "swarm of 50" in out
    assert yaml.safe_load(second.read_text())["goal"]["concurrency"] == 50


def test_a_plan_is_compared_with_what_was_there_before(
    k25: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "plan.yaml"
    assert main(["plan", k25, "--profile", A, "--out", str(path)]) == 0
    assert main(["plan", k25, "--profile", C, "--out", str(path), "--compare", str(path)]) == 0
    assert A in said(capsys)[0]


@pytest.mark.parametrize(
    ("options", "key", "value"),
    [
        (["--context", "4096"], ("goal", "context"), 4096),
        (["--goal", "throughput", "--concurrency", "3"], ("goal", "concurrency"), 3),
        (["--dtype", "fp8"], ("settings", "weights"), "fp8"),
        (["--kv-dtype", "int8"], ("settings", "kv_dtype"), "int8"),
        (["--expert-format", "int8"], ("settings", "expert_format"), "int8"),
    ],
)
def test_flags_reach_the_plan(
    k25: str, tmp_path: Path, options: list[str], key: tuple[str, str], value: object
) -> None:
    path = tmp_path / "plan.yaml"
    profile = yaml.safe_load(shipped_profiles()[C].read_text())
    profile["kernels"].append(dict(profile["kernels"][0], name="numba/avx512vnni/int8/a8"))
    (tmp_path / "profile.yaml").write_text(yaml.safe_dump(profile))
    before, after = tmp_path / "before.yaml", path
    start = ["plan", k25, "--profile", str(tmp_path / "profile.yaml")]
    assert main([*start, "--out", str(before)]) == 0
    status = main([*start, *options, "--out", str(after)])
    assert status == 0
    found = yaml.safe_load(after.read_text())[key[0]][key[1]]
    assert found == value
    assert yaml.safe_load(before.read_text())[key[0]][key[1]] != value


def test_a_recorded_routing_reaches_the_plan(k25: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chosen = {str(layer): [1000] * 8 + [1] * 376 for layer in range(1, 61)}
    record = tmp_path / "routing.json"
    record.write_text(json.dumps({"document": "hybrid routing", "version": 1, "tokens": 1000, "chosen": chosen}))
    speeds = []
    for options in ([], ["--routing", str(record)]):
        assert main(["plan", k25, "--profile", C, "--json", *options]) == 0
        made = json.loads(said(capsys)[0])
        speeds.append(made["prediction"]["prefill"][-1]["tokens_per_second"])
    assert speeds[1] > 1.3 * speeds[0]  # eight experts of a layer read a prompt, not 384
    # Of these eight one each: decoding a second one on the device takes longer than the CPU does for the others.
    assert made["settings"]["slots"] == [1] * 60


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (["plan", "--json", "--explain"], "--json has the reasons in it"),
        (["plan", "--goal", "swarm:9", "--concurrency", "2"], "--concurrency beside --goal swarm:9"),
        (["simulate", "--plan", "x.yaml", "--dtype", "fp8"], "--dtype is settled by --plan x.yaml"),
        (["plan", "--out", "/nonexistent/p.yaml"], "/nonexistent/p.yaml: No such file or directory"),
        (["plan", "--compare", "/nonexistent/p.yaml"], "/nonexistent/p.yaml: cannot be read"),
        (["simulate", "--turns", "none"], "--turns"),
        (["simulate", "--goal", "swarm:2", "--plot", "/nonexistent/p.svg", "--output", "4"], "/nonexistent/p.svg"),
    ],
)
def test_one_line_for_each_mistake(k25: str, line: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    assert main([line[0], k25, "--profile", C, *line[1:]]) in (1, 78)
    _, err = said(capsys)
    (only,) = err.strip().splitlines()
    assert words in only


def test_other_hardware_is_not_this_machine(k25: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A default profile that was copied from elsewhere is left out, and told."""
    cache = tmp_path / "cache" / "hybrid"
    cache.mkdir(parents=True)
    (cache / "profile.yaml").write_text(shipped_profiles()[C].read_text())
    main(["plan", k25])
    out, err = said(capsys)
    assert "of other hardware than this machine" in err
    assert C not in out


def test_the_same_plan_twice_is_the_same_file(k25: str, tmp_path: Path) -> None:
    paths = [tmp_path / f"{i}.yaml" for i in range(2)]
    for path in paths:
        assert main(["plan", k25, "--profile", C, "--goal", "throughput", "--out", str(path)]) == 0
    assert paths[0].read_bytes() == paths[1].read_bytes()


def test_a_plan_loads_neither_torch_nor_numba_and_answers_soon(k25: str) -> None:
    code = (
        "import sys; from server.__main__ import main; status = main(sys.argv[1:]);"
        "print(*sorted({'torch', 'numba', 'matplotlib'} & set(sys.modules)), file=sys.stderr); sys.exit(status)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "plan", k25, "--profile", C], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr.strip()) == (0, "")


def test_what_does_not_fit_says_so_and_what_does(k25: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = smaller_ram(tmp_path, "256 GiB")
    assert main(["plan", k25, "--profile", small, "--servable"]) == 78
    out, err = said(capsys)
    assert len(err.strip().splitlines()) == 1
    assert "GB free" in err
    assert "the nearest plan that fits: experts mapped" in out


def smaller_ram(tmp_path: Path, size: str) -> str:
    values = yaml.safe_load(shipped_profiles()[C].read_text())
    values["hardware"]["ram"] = values["hardware"]["ram_installed"] = size
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(values))
    return str(path)


def broken(values: dict[str, Any], what: str) -> None:
    match what:
        case "wrong unit":
            values["memory"]["read"] = {1: "245 ms"}
        case "missing key":
            del values["hardware"]["cores"]
        case "unknown key":
            values["hardware"]["sockets"] = 2
        case "other version":
            values["version"] = 99
        case "other document":
            values["document"] = "plan"


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("wrong unit", "memory.read.1: expected a rate such as '34.5 GB/s', found '245 ms'"),
        ("missing key", "key hardware.cores is missing"),
        ("unknown key", "unknown key hardware.sockets"),
        ("other version", "version 99"),
        ("other document", "expected `document: profile`"),
    ],
)
def test_a_bad_profile_is_one_line(
    k25: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], what: str, words: str
) -> None:
    values = yaml.safe_load(shipped_profiles()[A].read_text())
    broken(values, what)
    path = tmp_path / "bad.yaml"
    path.write_text(yaml.safe_dump(values))
    assert main(["plan", k25, "--profile", str(path)]) == 78
    out, err = said(capsys)
    assert out == ""
    (line,) = err.strip().splitlines()
    assert str(path) in line
    assert words in line


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("wrong unit", "settings.ring: expected a size"),
        ("missing key", "key settings.threads is missing"),
        ("unknown key", "unknown key settings.thread; did you mean threads?"),
        ("other version", "version 0"),
    ],
)
@pytest.mark.parametrize("command", ["simulate", "compare", "serve"])
def test_a_bad_plan_is_one_line(
    k25: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], what: str, words: str, command: str
) -> None:
    path = tmp_path / "plan.yaml"
    assert main(["plan", k25, "--profile", A, "--out", str(path)]) == 0
    values = yaml.safe_load(path.read_text())
    if what == "wrong unit":
        values["settings"]["ring"] = "3 GB/s"
    elif what == "other version":
        values["version"] = 0
    else:
        threads = values["settings"].pop("threads")
        values["settings"] |= {"thread": threads, "threads": threads} if what == "unknown key" else {}
    path.write_text(yaml.safe_dump(values))
    said(capsys)
    calls = {
        "simulate": ["simulate", k25, "--profile", A, "--plan", str(path)],
        "compare": ["plan", k25, "--profile", A, "--compare", str(path)],
    }
    if command == "serve":
        environ = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
        started = [sys.executable, "-m", "server", "serve", "--port", "0", "--plan", str(path)]
        done = subprocess.run(started, capture_output=True, text=True, timeout=120, env=environ)
        status, err = done.returncode, done.stderr
    else:
        status, err = main(calls[command]), said(capsys)[1]
    assert status == 78
    line = err.strip().splitlines()[-1]
    assert str(path) in line
    assert words in line


def test_a_simulated_swarm(k25: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    workload = ["--goal", "swarm:4", "--shared", "256", "--private", "10..20", "--output", "12", "--turns", "2"]
    assert main(["simulate", k25, "--profile", C, *workload, "--tool-wait", "2", "--json"]) == 0
    report = json.loads(said(capsys)[0])
    assert report["requests_served"] == 8
    assert report["generated_tokens"] == 8 * 12
    assert report["makespan_seconds"] > 2


def test_a_simulated_trace_and_its_picture(k25: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    trace, picture = tmp_path / "trace.jsonl", tmp_path / "out.svg"
    lines = [{"timestamp": 1000 * i, "input_length": 100 + i, "output_length": 5} for i in range(3)]
    trace.write_text("\n".join(map(json.dumps, lines)))
    assert main(["simulate", k25, "--profile", C, "--trace", str(trace), "--plot", str(picture)]) == 0
    assert "3 requests answered" in said(capsys)[0]
    assert "<svg" in picture.read_text()


def test_simulating_needs_rates(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", str(SMALL), "--goal", "swarm:2"]) == 78
    assert "hybrid measure" in said(capsys)[1]


@pytest.mark.parametrize("text", ["swarm", "swarm:0", "swarm:-1", "fast", "swarm:1.5"])
def test_a_goal_that_is_none(k25: str, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["plan", k25, "--goal", text])
    assert caught.value.code == 2
    assert "swarm:N" in said(capsys)[1]


def test_a_profile_that_is_nowhere(k25: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", k25, "--profile", "rtx5090"]) == 78
    assert A in said(capsys)[1]


def edited(path: Path, values: dict[str, Any], *keys: Any, to: Any) -> str:
    """A file of these values with one of them replaced."""
    inner = values
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = to
    path.write_text(yaml.safe_dump(values))
    return str(path)


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line of a command that ends with 78."""
    said(capsys)
    assert main(list(arguments)) == 78
    (line,) = said(capsys)[1].strip().splitlines()
    return line


def test_simulating_with_a_plan_of_something_else(k25: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "plan.yaml"
    assert main(["plan", k25, "--profile", A, "--out", str(path)]) == 0
    line = refused(capsys, "simulate", k25, "--profile", C, "--plan", str(path))
    assert "which is other hardware than the profile" in line
    assert "config.json differs from this model's" in refused(
        capsys, "simulate", str(SMALL), "--profile", A, "--plan", str(path)
    )
    values = yaml.safe_load(path.read_text())
    other = edited(tmp_path / "slots.yaml", values, "settings", "slots", to=[1, 2])
    line = refused(capsys, "simulate", k25, "--profile", A, "--plan", other)
    assert f"{other}: settings.slots: expected none, or one for each of 60 MoE layers" in line


@pytest.mark.parametrize(
    ("keys", "value"),
    [
        (("memory", "read"), {}),
        (("kernels", 0, "seconds"), {}),
        (("kernels", 0, "seconds", 1), "0 us"),
        (("kernels", 0, "name"), "numba"),
        (("kernels", 0, "hidden"), 0),
        (("device", "kv_read"), "0 GB/s"),
        (("device", "attention_prefill"), "0 FLOP/s"),
        (("device", "gemms", 0, "size"), 0),
        (("link", "to_device"), "0 B/s"),
    ],
)
@pytest.mark.parametrize("command", ["plan", "simulate"])
def test_rates_that_are_none_are_one_line(
    k25: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], keys: tuple[Any, ...], value: Any, command: str
) -> None:
    values = yaml.safe_load(shipped_profiles()[A].read_text())
    path = edited(tmp_path / "bad.yaml", values, *keys, to=value)
    assert f"hybrid: {path}: {keys[0]}" in refused(capsys, command, k25, "--profile", path)


@pytest.mark.parametrize("key", ["page_size", "max_batch_tokens", "threads"])
def test_settings_that_are_none_are_one_line(
    k25: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], key: str
) -> None:
    path = tmp_path / "plan.yaml"
    assert main(["plan", k25, "--profile", A, "--out", str(path)]) == 0
    edited(path, yaml.safe_load(path.read_text()), "settings", key, to=0)
    expected = f"hybrid: {path}: settings.{key}: expected a whole number of at least 1, found 0"
    model = str(Path(k25).parent)
    for arguments in (["simulate", k25, "--profile", A], ["tune", model, "--profile", A]):
        assert refused(capsys, *arguments, "--plan", str(path)) == expected
    assert refused(capsys, "plan", k25, "--profile", A, "--compare", str(path)) == expected


def test_nobody_reads_on(k25: str) -> None:
    """As `hybrid plan … --json | true`."""
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "server", "plan", k25, "--profile", A, "--json"]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, timeout=60)
    os.close(writing)
    assert (done.returncode, done.stderr) == (1, "")


def test_a_fault_without_a_file_is_named(
    k25: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError("no such thing")

    monkeypatch.setattr(planning, "_make_plan", fail)
    assert main(["plan", k25]) == 1
    assert said(capsys)[1] == "hybrid: no such thing\n"


class Measured(Exception):
    """What a run of `hybrid measure` starts from."""


@pytest.mark.parametrize("changes", [{"cores": 1 << 20}, {"cpu_quota": 0.5}, {"cpu": "another"}])
def test_rates_of_other_cores_are_not_gone_on_with(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    """This machine's own profile is measured anew, a named one is left alone."""
    import placement.measure

    def caught(hardware: object, previous: object, *_: object) -> None:
        raise Measured(previous)

    monkeypatch.setattr(placement.measure, "measure", caught)
    hardware = find_hardware()
    named, own = tmp_path / "named.yaml", default_profile(os.environ)
    own.parent.mkdir(parents=True)
    for path in (named, own):
        write_profile(path, plans.profile(hardware))
        with pytest.raises(Measured) as started:
            main(["measure", *(["--out", str(path)] if path == named else [])])
        assert started.value.args[0].hardware == hardware
        write_profile(path, plans.profile(replace(hardware, **changes)))
    assert "of other hardware than this machine, or other cores; --again replaces it" in refused(
        capsys, "measure", "--out", str(named)
    )
    with pytest.raises(Measured) as started:
        main(["measure"])
    assert started.value.args == (None,)
    assert said(capsys)[1] == f"{own}: of other hardware than this machine, or other cores: measured anew\n"


def test_rates_of_other_cores_are_told_and_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Where nobody named the profile; `hybrid tune` refuses a named one."""
    hardware, path = find_hardware(), tmp_path / "plan.yaml"
    own = default_profile(os.environ)
    own.parent.mkdir(parents=True)
    write_profile(own, plans.profile(replace(hardware, cores=1 << 20)))
    assert main(["plan", str(SMALL), "--json"]) == 0
    out, err = said(capsys)
    assert json.loads(out)["prediction"] is None
    assert err == f"{own}: of other hardware than this machine, or other cores; run `hybrid measure`\n"
    write_plan(path, plans.plan(ModelConfig.from_json(json.loads(SMALL.read_text())), hardware))
    line = refused(capsys, "tune", str(SMALL), "--plan", str(path), "--profile", str(own))
    assert line.startswith(f"hybrid: --profile {own}: made on other hardware than this machine's, or with other cores")
