"""The real engine: settle what goes where, show the ledger and what is predicted, then load.

Runs in the engine process, which names `build_engine` by its path. Torch is imported here and nowhere else in `server`,
inside that function. Knows no requests and sends nothing.
"""

import logging
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from hybrid.config import EngineConfig, ModelConfig
from hybrid.routes import write_record
from offload.checkpoint import Checkpoint
from offload.config import PoolConfig
from offload.sources import packed_path
from offload.stream_split import StreamRates
from offload.topology import find_topology
from placement import report
from placement.cost import CostError
from placement.facts import Facts, read_facts
from placement.hardware import Hardware
from placement.ledger import (
    ROUTED,
    Placement,
    PlacementError,
    Wishes,
    fit,
    human,
    layout_of,
    page_bytes,
    place,
    room,
)
from placement.plan import Choice, Goal, Plan, engine_types
from placement.planner import ledger_lines, make_plan
from placement.probe import find_hardware
from placement.routing import uniform, write_routing
from placement.stream_rates import stream_rates_of
from server.account import Predict, predictor
from server.engine_process import Built, OnNotice, OnProgress, nothing
from server.options import SettingsError
from server.planned import Rates, default_profile, load_plan, load_rates, with_plan
from server.scheduler import SchedulerConfig
from server.settings import ServerSettings

if TYPE_CHECKING:
    from hybrid.engine import Engine
    from hybrid.served_record import ServedRecord

logger = logging.getLogger(__name__)

LAW = "every expert equally likely"  # as `account.py` predicts, whatever routing the plan was made with
DEFAULTS = {  # the plan's choices that a server settles itself: the setting, and why it is what it is
    "step": ("max_batch_tokens", "the server's default"),
    "requests": ("max_running", "the server's default"),
    "threads": ("threads", "one for each physical core, up to the CPU quota"),
}


def build_engine(settings: ServerSettings, progress: OnProgress, notice: OnNotice) -> Built:
    """The real engine: settle what goes where, show the ledger, then load.

    Raises ConfigError, CheckpointError, DocumentError, PlacementError or DeviceError (all ValueError) for what the
    operator can fix.
    """
    # Torch's OpenMP threads would otherwise spin between operations, on the cores that the expert workers need: with
    # other work on the machine a decode step of a tiny model took 600 ms instead of 21 (measured 2026-11-22).
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    progress("importing torch", 0, 0)
    with ThreadPoolExecutor(1) as beside:  # nvidia-smi takes a second, and so does torch
        asked = beside.submit(find_hardware, settings.model)
        from hybrid.engine import Engine
        from hybrid.served_record import ServedRecord

        hardware = asked.result()
    progress("placing the model", 0, 0)
    model = ModelConfig.from_directory(settings.model)
    rates = load_rates(settings, _default_profile(), hardware)
    facts, settings, plan = _settle(settings, model, hardware, rates)
    notice(report.table(plan))
    tokens = ServedRecord(settings.model, logger.warning) if _records_tokens(settings) else None
    watch = tokens.watch if tokens else None
    config = _engine_config(settings, plan, stream_rates_of(model, rates.profile, plan))
    engine = Engine(config, progress=progress, notice=notice, watch=watch)
    plan = _as_loaded(plan, engine)
    predict, words = _predictor(model, rates, plan)
    notice(f"steps are predicted with the profile {words}, {LAW}" if predict else f"no predictions: {words}")
    chosen = plan.settings
    sizes = SchedulerConfig(
        n_pages=chosen.pages_on_device,
        page_size=chosen.page_size,
        max_batch_tokens=chosen.max_batch_tokens,
        max_running=chosen.max_running,
        n_ram_pages=chosen.pages_kept,
    )
    return Built(
        step=tokens.recording(engine.step) if tokens else engine.step,
        close=engine.close,
        scheduler=sizes,
        max_model_len=min(chosen.max_model_len, sizes.capacity),
        device=facts.device_name,
        plan=plan,
        profile=words,
        predict=predict,
        record=_token_recorder(settings, tokens) if tokens else _recorder(settings, engine),
    )


def _settle(
    settings: ServerSettings, model: ModelConfig, hardware: Hardware, rates: Rates
) -> tuple[Facts, ServerSettings, Plan]:
    """What is free, the settings, and the plan: the one in the file with what is free now, or one made here."""
    plan = load_plan(settings.plan, model, hardware) if settings.plan else None
    if plan is not None:
        settings = with_plan(settings, plan, model)
    facts = read_facts(settings.device)
    wishes = _wishes(settings, _maps_packed_file(settings, model))
    if plan is not None:
        placement = _still_fits(plan, model, facts, wishes, settings.plan)
        notes = tuple(dict.fromkeys((*plan.notes, *placement.notes)))
        return facts, settings, replace(plan, ledger=ledger_lines(facts, placement), notes=notes)
    placement = place(model, facts, wishes)
    goal = Goal("throughput", min(_context(settings, model), placement.max_model_len), settings.max_running)
    plan = make_plan(
        model, facts, rates.profile, goal, wishes, uniform(model), True, hardware=hardware, name=settings.name
    )
    return facts, settings, replace(plan, choices=tuple(_asked(choice, settings) for choice in plan.choices))


def _asked(choice: Choice, settings: ServerSettings) -> Choice:
    """The planner hears a server's defaults as wishes, since they hold whatever a profile finds better."""
    if choice.reason != "as asked" or choice.what not in DEFAULTS:
        return choice
    field, reason = DEFAULTS[choice.what]
    by_default = getattr(settings, field) == getattr(ServerSettings(settings.model), field)
    return replace(choice, reason=reason) if by_default else choice


def _as_loaded(plan: Plan, engine: "Engine") -> Plan:
    """The plan with who runs the experts after the trial of --experts auto."""
    backend = engine.config.experts
    assert backend != "auto", "an engine knows who runs its experts"
    return replace(plan, settings=replace(plan.settings, experts=backend))


def _engine_config(settings: ServerSettings, plan: Plan, stream_rates: StreamRates | None) -> EngineConfig:
    chosen = plan.settings
    dtype, narrow = engine_types(chosen.weights)
    # On the CPU the device's part and the experts share cores and memory: nothing to gain there (tests.bench.overlap).
    overlaps = settings.overlap == "auto" and chosen.device == "cuda"
    return EngineConfig(
        model=settings.model,
        device=chosen.device,
        dtype=dtype,
        expert_format=settings.expert_format,
        pool=PoolConfig(chosen.threads, settings.expert_precision, chosen.isa),
        n_pages=chosen.pages_on_device,
        page_size=chosen.page_size,
        experts=settings.experts,
        expert_ram=_expert_ram(plan),
        n_ram_pages=chosen.pages_kept,
        narrow=narrow,
        kv_dtype=chosen.kv_dtype,
        embedding_in_ram=chosen.embedding_in_ram,
        ping_pong="auto" if overlaps else "off",
        handoff=overlaps,
        graphs=overlaps,
        ring_bytes=chosen.ring,
        stream_rates=stream_rates,
        vram_slots=chosen.slots,
    )


def _expert_ram(plan: Plan) -> int | None:
    """What the ledger leaves for the routed experts where the disk holds the rest; None where RAM holds them all."""
    routed = {line.where: line.size for line in plan.ledger if line.what.startswith(ROUTED)}
    return routed["RAM"] if "disk" in routed else None


def _still_fits(plan: Plan, model: ModelConfig, facts: Facts, wishes: Wishes, path: Path | None) -> Placement:
    """The ledger of a plan that was made before, with what is free now. Raises PlacementError."""
    if plan.settings.experts_mapped and not wishes.packed:
        raise PlacementError(f"{path}: the plan maps the experts from a packed file: run `hybrid pack MODEL` first")
    layout = layout_of(model, facts, wishes)
    layout = replace(
        layout,
        embedding_in_ram=plan.settings.embedding_in_ram,
        slots=plan.settings.slots,
        ring_experts=-(-plan.settings.ring // model.expert_geometry.expert_bytes(layout.expert_format)),
    )
    again = "free memory, or make a new plan with `hybrid plan`"
    needed, (spare, _) = plan.settings.pages_on_device * page_bytes(model, layout), room(model, facts, layout)
    if 0 <= spare < needed:
        raise PlacementError(
            f"{path}: the plan does not fit now: its {plan.settings.pages_on_device} pages need {human(needed)} and "
            f"{human(spare)} are left; {again}"
        )
    try:
        placement = fit(model, facts, layout)
    except PlacementError as error:
        raise PlacementError(f"{path}: the plan does not fit now: {error}; {again}") from None
    now, made = (placement.n_pages, placement.pages_kept), plan.settings
    assert now == (made.pages_on_device, made.pages_kept), "the pages are the plan's"
    return placement


def _context(settings: ServerSettings, model: ModelConfig) -> int:
    """Tokens of a request that a server's own plan is made for."""
    return min(Goal().context, settings.max_model_len or model.max_position_embeddings)


def _predictor(model: ModelConfig, rates: Rates, plan: Plan) -> tuple[Predict | None, str]:
    """The predictor of steps with its profile's name, or None and why."""
    if rates.profile is None:
        return None, rates.words
    try:
        return predictor(model, rates.profile, plan), rates.words
    except CostError as error:
        return None, str(error)


def _default_profile() -> Path | None:
    """Where `hybrid measure` writes; None for a user without a home, who can still name a profile."""
    try:
        return default_profile(os.environ)
    except SettingsError:
        return None


def _recorder(settings: ServerSettings, engine: "Engine") -> Callable[[bool], None]:
    """Writes the routing record, if one was asked for. An empty one is not written: an older one may lie there."""
    path = settings.record_routing
    if path is None:
        return nothing

    def write(last: bool) -> None:
        choices = engine.choices()
        if not choices.tokens:
            return
        try:
            write_routing(path, *choices)
        except OSError as error:  # the disk is full, the directory is gone: no reason to stop serving
            logger.warning("--record-routing %s: cannot be written: %s", path, error.strerror)

    return write


def _records_tokens(settings: ServerSettings) -> bool:
    return settings.record_routing is not None and settings.record_routing.suffix == ".npz"


def _token_recorder(settings: ServerSettings, tokens: "ServedRecord") -> Callable[[bool], None]:
    """Writes the record of single tokens at the end, and before that whenever it has doubled: a long one takes
    seconds, in which no step runs."""
    path, written = settings.record_routing, 0
    assert path is not None, "asked for"

    def write(last: bool) -> None:
        nonlocal written
        if tokens.n_tokens == written or (tokens.n_tokens < 2 * written and not last):
            return
        record = tokens.record()
        assert record is not None, "it has tokens"
        try:
            write_record(path, record)
        except OSError as error:
            logger.warning("--record-routing %s: cannot be written: %s", path, error.strerror)
            return  # tried again later, and at the end
        written = tokens.n_tokens

    return write


def _maps_packed_file(settings: ServerSettings, model: ModelConfig) -> bool:
    """Whether the experts will come from the file of `hybrid pack`."""
    from offload.store import packed_is_used

    fmt = model.expert_format if settings.expert_format == "native" else settings.expert_format
    if settings.experts == "kt" or not packed_path(settings.model, fmt).exists():
        return False
    checkpoint = Checkpoint(settings.model)
    try:
        return packed_is_used(
            checkpoint, model.expert_name, model.expert_geometry, model.moe_layers, settings.expert_format
        )
    finally:
        checkpoint.close()


def _wishes(settings: ServerSettings, packed: bool) -> Wishes:
    return Wishes(
        dtype=None if settings.dtype == "auto" else settings.dtype,
        expert_target=settings.expert_format,
        max_model_len=settings.max_model_len,
        max_running=settings.max_running,
        max_batch_tokens=settings.max_batch_tokens,
        kv_bytes=settings.kv_memory,
        kv_ram=settings.kv_ram,
        page_size=settings.page_size,
        packed=packed,
        precision=settings.expert_precision,
        experts="kt" if settings.experts == "kt" else "numba",
        isa=None if settings.isa == "auto" else settings.isa,
        kv_dtype=settings.kv_dtype,
        threads=settings.threads or len(find_topology().places),  # as --threads says, whatever a profile finds best
    )
