"""What the engine needs of a profile to divide a layer's experts between link and CPU.

The division itself is `offload.stream_split`, which knows neither profiles nor models. Called by `hybrid serve` and by
the benchmark of streaming.
"""

from hybrid.config import ModelConfig
from offload.stream_split import StreamRates
from placement.cost import MEASURE, CostError, resolve
from placement.expert_cost import ExpertRates
from placement.ledger import PlacementError
from placement.plan import Plan
from placement.planner import setup_of
from placement.profile import Profile
from placement.routing import uniform


def stream_rates_of(model: ModelConfig, profile: Profile | None, plan: Plan) -> StreamRates | None:
    """None for a plan without a ring. Raises PlacementError where the profile lacks what the division needs."""
    if not plan.settings.ring:
        return None
    try:
        if profile is None:
            raise CostError(f"there is no profile of this machine; {MEASURE}")
        experts = resolve(model, profile, setup_of(plan, profile), uniform(model)).experts
        if not experts.link:
            raise CostError(f"profile {profile.name} has no link between RAM and its device; {MEASURE}")
    except CostError as error:
        raise PlacementError(f"the plan streams experts to the device, by this machine's rates: {error}") from None
    return stream_rates(experts)


def stream_rates(experts: ExpertRates) -> StreamRates:
    """The same figures that the plan was priced with."""
    return StreamRates(
        upload=experts.expert_bytes / experts.link,
        read=experts.expert_bytes / experts.ram_read,
        cpu_rows=tuple(map(float, experts.rows.rows)),
        cpu_seconds=tuple(map(float, experts.rows.values)),
        cpu_slope=experts.rows.slope,
        device_read=experts.expert_bytes / experts.device.read,
        device_row=experts.expert_flops / experts.device.flops,
        beside_copies=experts.beside_copies,
    )
