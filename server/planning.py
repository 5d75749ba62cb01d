"""The commands that decide before serving: measure, plan, tune, doctor, simulate, replay.

Joins placement's parts, prints what they say and turns their complaints into exit statuses. What needs torch or numba
is imported inside the command that needs it, so that `hybrid plan` answers in a second. Called by `__main__.py`.
"""

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from datetime import date
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from hybrid.config import ModelConfig
from hybrid.config_json import read_object
from hybrid.routes import read_record
from offload.config import PoolConfig
from offload.correction import write_correction
from placement import planner, replay, replay_report, report
from placement.cost import resolve
from placement.document import DocumentError, to_plain
from placement.hardware import fingerprint
from placement.inventory import Inventory, take_inventory
from placement.ledger import Wishes
from placement.plan import Goal, GoalKind, Plan, check_fresh, check_slots, read_plan, write_plan
from placement.probe import find_hardware, machine_name
from placement.profile import Profile, read_profile, write_profile
from placement.recall import Rehearsal
from placement.routing import Routing, check_record, read_routing, uniform
from server import ablation, simulate, simulate_report, timeline, workload
from server.options import SettingsError
from server.planned import default_profile
from server.planning_args import LENGTHS
from server.scheduler import SchedulerConfig

CONFIGURATION, FAILURE = 78, 1
CONCURRENCY: dict[GoalKind, int] = {"latency": 1, "throughput": 16, "swarm": 100}
SETTLED = {
    "context": None, "concurrency": None, "dtype": None, "kv_dtype": "model", "expert_format": "native",
    "servable": False,
}  # fmt: skip
USERS_COME = 60.0  # seconds after a swarm's start
CONTEXT = 8192  # tokens of a request, where nobody says and the model allows it

Environ = Mapping[str, str]
Show = Callable[[str, int, int], None]  # stage, done, of so many


def run(given: argparse.Namespace, environ: Environ) -> int:
    """Carry out one of the commands; returns its exit status."""
    commands: dict[str, Callable[[argparse.Namespace, Environ], int]] = {
        "measure": _measure, "plan": _plan, "tune": _tune, "doctor": _doctor, "simulate": _simulate,
        "replay": _replay,
    }  # fmt: skip
    # As in the engine's process, whose steps these commands time: torch's waiting threads must not spin on the cores
    # of the expert workers.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        return commands[given.command](given, environ)
    except ValueError as error:  # of a document, the model, the placement, a rate, a record, a workload
        _tell(f"hybrid: {error}")
        return CONFIGURATION
    except BrokenPipeError:  # nobody reads what is printed: `__main__.py` ends it
        raise
    except OSError as error:
        _tell(f"hybrid: {error.filename}: {error.strerror}" if error.filename else f"hybrid: {error}")
        return FAILURE


def _measure(given: argparse.Namespace, environ: Environ) -> int:
    from placement.measure import measure, show_profile

    out: Path = given.out or default_profile(environ)
    out.parent.mkdir(parents=True, exist_ok=True)
    hardware = find_hardware(out.parent, tell=_tell)
    previous = None
    if out.exists() and not given.again:
        previous = read_profile(out)
        if fingerprint(previous.hardware) != fingerprint(hardware):
            if given.out is not None:
                raise DocumentError(f"{out}: of other hardware than this machine, or other cores; --again replaces it")
            _tell(f"{out}: of other hardware than this machine, or other cores: measured anew")
            previous = None
    with _bar() as show:
        profile = measure(
            hardware,
            previous,
            given.seconds,
            lambda profile: write_profile(out, profile),
            show,
            _tell,
            given.device,
            out.parent,
        )
    _print(to_plain(profile) if given.json else show_profile(profile))
    _tell(f"written: {out}")
    return 0


def _plan(given: argparse.Namespace, environ: Environ) -> int:
    model = _model(given.model)
    if given.json and (given.explain or given.compare):
        raise SettingsError("--json has the reasons in it, and cannot show a comparison: leave out the other flag")
    other = read_plan(given.compare) if given.compare else None  # before --out, which may name the same file
    try:
        plan, status = _make_plan(given, environ, model), 0
    except planner.DoesNotFit as error:
        _tell(f"hybrid: {error}")
        if error.nearest is None:
            return CONFIGURATION
        plan, status = error.nearest, CONFIGURATION
        if given.out:
            _tell(f"not written: {given.out}: this is the nearest plan, not the one asked for")
    if given.out and status == 0:
        write_plan(given.out, plan)
    if given.json:
        _print(to_plain(plan))
    else:
        _print(_published(given.model).table())
        _print(report.table(plan))
    if given.explain:
        _print(report.explain(plan))
    if other is not None:
        _print(report.compare(plan, other))
    return status


def _make_plan(given: argparse.Namespace, environ: Environ, model: ModelConfig) -> Plan:
    """The plan that the flags ask for. Raises PlacementError, DocumentError, CostError, RoutingError."""
    profile = _profile(given.profile, environ)
    kind, agents = given.goal
    if kind == "swarm" and given.concurrency:
        raise SettingsError(f"--concurrency beside --goal swarm:{agents}: the goal says how many; leave one out")
    goal = Goal(
        kind,
        given.context or min(CONTEXT, model.max_position_embeddings),
        given.concurrency or agents or CONCURRENCY[kind],
    )
    wishes = Wishes(dtype=given.dtype, expert_target=given.expert_format, kv_dtype=given.kv_dtype)
    name = (given.model if given.model.is_dir() else given.model.parent).resolve().name
    return planner.make_plan(
        model,
        planner.facts_from(profile),
        profile if profile.device is not None else None,
        goal,
        wishes,
        _routing(given, model),
        given.servable,
        hardware=profile.hardware,
        name=name,
    )


def _tune(given: argparse.Namespace, environ: Environ) -> int:
    from placement.tune import text, tune

    model = _model(given.model)
    plan, profile = read_plan(given.plan), _profile(given.profile, environ)
    here = fingerprint(find_hardware())
    check_fresh(given.plan, plan, model, here)
    if fingerprint(profile.hardware) != here:
        raise DocumentError(
            f"--profile {given.profile}: made on other hardware than this machine's, or with other cores; "
            "leave it out, or run `hybrid measure`"
        )
    with _bar() as show:
        tuned = tune(given.model, plan, profile, given.seconds, lambda plan: write_plan(given.plan, plan), show, _tell)
    write_plan(given.plan, tuned)
    _print(text(tuned))
    return 0


def _doctor(given: argparse.Namespace, environ: Environ) -> int:
    from placement import diagnosis, doctor

    with _bar() as show:
        found = doctor.examine(given.model, PoolConfig(given.threads, "a8", given.isa), progress=show, tell=_tell)
    _print(diagnosis.to_json(found) if given.json else diagnosis.text(found))
    return found.status


def _simulate(given: argparse.Namespace, environ: Environ) -> int:
    model = _model(given.model)
    routing, profile = _routing(given, model), _profile(given.profile, environ)
    if given.plan:
        for name, value in SETTLED.items():
            if getattr(given, name) != value:
                raise SettingsError(f"--{name.replace('_', '-')} is settled by --plan {given.plan}; leave one out")
        plan = read_plan(given.plan)
        check_fresh(given.plan, plan, model, fingerprint(profile.hardware), f"the profile {profile.name}")
        check_slots(given.plan, plan, model)
    else:
        plan = _make_plan(given, environ, model)
    work = workload.read_trace(given.trace) if given.trace else _swarm(given)
    rates = resolve(model, profile, planner.setup_of(plan, profile), routing)
    settings = plan.settings
    config = SchedulerConfig(
        n_pages=settings.pages_on_device + settings.pages_in_ram,
        page_size=settings.page_size,
        max_batch_tokens=settings.max_batch_tokens,
        max_running=settings.max_running,
        n_ram_pages=settings.pages_kept,
    )
    work = workload.with_users(work, given.users, USERS_COME, given.seed)
    clock = simulate.clock(rates, settings.page_size)
    if given.ablate:
        with _bar() as show:
            found = ablation.ablate(work, config, clock, settings.max_model_len, show)
        _print(ablation.to_plain(found) if given.json else ablation.text(found))
        if given.plot and found.variants:
            ablation.plot(found, given.plot)
        return 0
    with _bar() as show:
        done = simulate.simulate(work, config, clock, settings.max_model_len, show)
    _print(simulate_report.to_json(done) if given.json else simulate_report.text(done))
    if given.plot:
        timeline.plot(done, given.plot)
    return 0


def _replay(given: argparse.Namespace, environ: Environ) -> int:
    record = read_record(given.record)
    expert = None
    if given.model:
        model = _model(given.model)
        check_record(given.record, record, model)
        expert = model.expert_geometry.expert_bytes(model.expert_format)
    if given.correction and record.ahead is None:
        raise SettingsError(f"--correction: {given.record} has no looks ahead to learn from (docs/ROUTING.md)")
    with _bar() as show:
        rehearsal = Rehearsal(record, show)
        cells = replay.replay(record, given.batch, given.residency, show)
    done = replay_report.Replay(record, rehearsal.foresight(), cells, expert)
    _print(replay_report.to_json(done) if given.json else replay_report.text(done))
    if given.correction:
        write_correction(given.correction, rehearsal.correction())
        _tell(f"written: {given.correction}")
    return 0


def _swarm(given: argparse.Namespace) -> workload.Workload:
    drawn = {
        flag: workload.Distribution.parse(getattr(given, flag.strip("-").replace("-", "_")), flag)
        for flag, _, _ in LENGTHS
    }
    _, agents = given.goal
    return workload.swarm(
        agents or CONCURRENCY["swarm"],
        given.shared,
        drawn["--private"],
        drawn["--output"],
        drawn["--turns"],
        drawn["--tool-tokens"],
        drawn["--tool-wait"],
        given.seed,
    )


def _published(path: Path) -> Inventory:
    file = path / "config.json" if path.is_dir() else path
    return take_inventory(read_object(file), str(file))


def _model(path: Path) -> ModelConfig:
    """A checkpoint directory, or a config.json alone. Raises ConfigError."""
    return ModelConfig.from_directory(path) if path.is_dir() else ModelConfig.from_json(read_object(path), str(path))


def _profile(named: str | None, environ: Environ) -> Profile:
    """A file, a shipped profile, or this machine's own; without one its facts alone, with no rates."""
    if named is not None:
        shipped = planner.shipped_profiles()
        if named not in shipped and not Path(named).is_file():
            raise DocumentError(f"--profile {named}: no such file; shipped profiles are {', '.join(shipped)}")
        return read_profile(shipped.get(named, Path(named)))
    path, hardware = default_profile(environ), find_hardware(tell=_tell)
    if os.path.exists(path):  # False, not an error, where the folder may not be searched
        profile = read_profile(path)
        if fingerprint(profile.hardware) == fingerprint(hardware):
            return profile
        _tell(f"{path}: of other hardware than this machine, or other cores; run `hybrid measure`")
    return Profile(machine_name(hardware), "measured", date.today().isoformat(), hardware)


def _routing(given: argparse.Namespace, model: ModelConfig) -> Routing:
    return read_routing(given.routing, model) if given.routing else uniform(model)


@contextlib.contextmanager
def _bar() -> Iterator[Show]:
    """Shows (stage, done, in all) on a terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty()) as bars:
        bar = bars.add_task("", total=None)
        yield lambda stage, done, total: bars.update(bar, description=stage, completed=done, total=total or None)


def _print(value: str | dict[str, Any]) -> None:
    # At once, so that a reader who has gone is noticed here and not while Python ends.
    print(value if isinstance(value, str) else json.dumps(value), flush=True)


def _tell(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
