"""The plan and the rates that a server runs under: found, checked against this model and this machine, put to use.

Whatever does not belong here (another model, other hardware, something that this engine does not do) is one line and
ends the start. Decides no placement and knows no requests. `app.py` checks before the port is taken, and the engine
process reads both files again whenever it loads.
"""

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from hybrid.config import ModelConfig
from hybrid.widths import kv_bytes_per_token
from offload.config import ExpertFormat
from placement.document import DocumentError
from placement.hardware import Hardware, fingerprint
from placement.plan import Plan, check_fresh, check_slots, read_plan
from placement.probe import find_hardware
from placement.profile import Profile, read_profile
from placement.tensor_bytes import ITEM_BYTES
from server.options import SettingsError
from server.settings import ExpertTarget, ServerSettings

logger = logging.getLogger(__name__)

QUANTISED: dict[ExpertFormat, ExpertTarget] = {"int8": "int8", "int4": "int4"}


@dataclass(frozen=True, slots=True)
class Rates:
    """This machine's rates, and in words which they are, or why there are none."""

    profile: Profile | None
    words: str


def check_files(settings: ServerSettings, model: ModelConfig) -> None:
    """Refuse at once what the engine process would refuse later. Raises DocumentError, or SettingsError for a record
    that could not be written."""
    record = settings.record_routing
    if record is not None and (record.is_dir() or not os.access(record.parent, os.W_OK)):
        raise SettingsError(f"--record-routing {record}: name a file in a directory that can be written to")
    if settings.plan is None and settings.profile is None:
        return
    hardware = find_hardware(settings.model)
    if settings.plan is not None:
        load_plan(settings.plan, model, hardware)
    if settings.profile is not None:
        load_rates(settings, settings.profile, hardware)


def default_profile(environ: Mapping[str, str]) -> Path:
    """Where `hybrid measure` writes this machine's profile unless told otherwise, and `hybrid serve` looks for it.

    Raises SettingsError for a user without a home directory.
    """
    try:
        cache = Path(environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:  # a user id that the system does not know
        raise SettingsError("this user has no home directory: set XDG_CACHE_HOME, or name every file") from None
    return cache / "hybrid" / "profile.yaml"


def load_plan(path: Path, model: ModelConfig, hardware: Hardware) -> Plan:
    """The plan in a file. Raises DocumentError where it is bad, stale, or more than this engine does."""
    plan = read_plan(path)
    check_fresh(path, plan, model, fingerprint(hardware))
    if plan.lacking:
        raise DocumentError(
            f"{path}: the plan needs {', '.join(plan.lacking)}, which this version does not run; make one with "
            "`hybrid plan --servable`"
        )
    check_slots(path, plan, model)
    if plan.settings.max_model_len > model.max_position_embeddings:
        raise DocumentError(
            f"{path}: settings.max_model_len: the model allows at most {model.max_position_embeddings} tokens"
        )
    if plan.settings.expert_format not in (model.expert_format, *QUANTISED):
        raise DocumentError(
            f"{path}: settings.expert_format: {plan.settings.expert_format} experts cannot be made of this model's "
            f"{model.expert_format}; make a new plan with `hybrid plan`"
        )
    return plan


def load_rates(settings: ServerSettings, default: Path | None, hardware: Hardware) -> Rates:
    """The named profile, or the one in `default`, which is left out where it does not fit.

    Raises DocumentError for a named one that is bad or of other hardware.
    """
    path = settings.profile or default
    if path is None or (
        settings.profile is None and not os.path.exists(path)
    ):  # False, not an error, in a closed folder
        return Rates(None, "there is no profile of this machine: run `hybrid measure`")
    try:
        profile = read_profile(path)
    except DocumentError as error:
        if settings.profile is not None:
            raise
        logger.warning("%s", error)
        return Rates(None, "the profile of this machine cannot be used: run `hybrid measure --again`")
    if fingerprint(profile.hardware) == fingerprint(hardware):
        return Rates(profile, profile.name)
    if settings.profile is not None:
        raise DocumentError(
            f"--profile {path}: made on other hardware than this machine's, or other cores; run `hybrid measure` here"
        )
    return Rates(
        None,
        f"the profile {profile.name} is of other hardware than this machine's: run `hybrid measure`",
    )


def with_plan(settings: ServerSettings, plan: Plan, model: ModelConfig) -> ServerSettings:
    """The settings with what the plan settles; `plan` has passed `load_plan`."""
    chosen = plan.settings
    native = chosen.expert_format == model.expert_format
    page_bytes = chosen.page_size * kv_bytes_per_token(model, ITEM_BYTES[chosen.weights], chosen.kv_dtype)
    return replace(
        settings,
        device=chosen.device,
        dtype=chosen.weights,
        kv_dtype=chosen.kv_dtype,
        expert_format="native" if native else QUANTISED[chosen.expert_format],
        expert_precision=chosen.expert_precision,
        experts=chosen.experts,
        isa=chosen.isa or "auto",
        threads=chosen.threads,
        max_model_len=chosen.max_model_len,
        kv_memory=chosen.pages_on_device * page_bytes,
        kv_ram=chosen.pages_kept * page_bytes,
        page_size=chosen.page_size,
        max_batch_tokens=chosen.max_batch_tokens,
        max_running=chosen.max_running,
    )
