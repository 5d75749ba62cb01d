"""A plan and a profile of this machine with made-up figures, for the server's tests: no planner, nothing measured."""

from typing import Any

from hybrid.config import ModelConfig
from placement.document import Measured
from placement.hardware import Hardware, fingerprint
from placement.plan import Goal, Line, Plan, Settings, model_fingerprint
from placement.profile import Device, Gemm, Kernel, Memory, Profile

HIDDEN, INNER = 64, 32  # sizes that the made-up kernel was "timed" at


def plan(model: ModelConfig, hardware: Hardware, **settings: Any) -> Plan:
    """A plan for this model on this machine. `settings` replace single ones."""
    chosen: dict[str, Any] = {
        "device": "cpu",
        "weights": "float32",
        "expert_format": model.expert_format,
        "expert_precision": "a16",
        "experts": "numba",
        "isa": None,
        "threads": 1,
        "slots": (),
        "experts_leave_ram": False,
        "experts_mapped": False,
        "embedding_in_ram": False,
        "ring": 0,
        "stream_from_rows": None,
        "page_size": 8,
        "pages_on_device": 77,
        "pages_in_ram": 0,
        "max_batch_tokens": 48,
        "max_running": 3,
        "max_model_len": 200,
    }
    return Plan(
        model="a test's model",
        model_fingerprint=model_fingerprint(model),
        machine="a test's machine",
        machine_fingerprint=fingerprint(hardware),
        profile="none",
        goal=Goal(),
        settings=Settings(**(chosen | settings)),
        ledger=(Line("RAM", "routed experts", 1000),),
        choices=(),
        prediction=None,
    )


def profile(hardware: Hardware, name: str = "made-up", kernel: str = "numba/{}/int4/a16") -> Profile:
    """Rates of a CPU; `{}` in the kernel's name is the best tier that this machine takes by itself."""
    tier = next(tier for tier in hardware.tiers if tier != "amx")
    seconds = {rows: Measured(1e-6 * rows) for rows in (1, 2, 4, 64)}
    return Profile(
        name=name,
        source="measured",
        measured="never",
        hardware=hardware,
        memory=Memory({1: Measured(10e9), 2: Measured(5e9)}),
        kernels=(Kernel(kernel.format(tier), HIDDEN, INNER, seconds),),
        device=Device(
            kind="cpu",
            name="CPU",
            gemms=(Gemm("float32", 64, {rows: Measured(1e-6 * rows) for rows in (1, 64)}),),
            kv_read=Measured(10e9),
            attention_decode=Measured(1e10),
            attention_prefill=Measured(1e10),
            per_step=Measured(2e-3),
            per_layer=Measured(1e-4),
            per_row=Measured(1e-5),
            per_logit=Measured(1e-9),
        ),
    )
