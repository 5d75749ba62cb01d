"""Everything an operator can choose about one server, as one frozen value.

`args.py` derives flags, YAML keys and environment names from the fields (`help` in each field's metadata is the
flag's help text); `app.py`, `service.py`, `bridge.py` and the engine process read it. Nothing here parses anything.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from hybrid.config import KvDtype
from offload.config import Isa, Precision
from placement.plan import WeightDtype

Device = Literal["auto", "cpu", "cuda"]
Dtype = Literal["auto", WeightDtype]
ExpertTarget = Literal["native", "int8", "int4"]
ExpertBackend = Literal["numba", "kt", "auto"]
ExpertIsa = Literal["auto", Isa]
Overlap = Literal["auto", "off"]
LogLevel = Literal["debug", "info", "warning", "error"]


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """One server. Only `model` has no default here; sizes are bytes, times are seconds."""

    model: Path = field(metadata={"help": "checkpoint directory (Hugging Face layout)"})
    served_model_name: str | None = field(
        default=None, metadata={"help": "model name clients use (default: the directory's name)"}
    )

    host: str = field(default="127.0.0.1", metadata={"help": "address to listen on"})
    port: int = field(default=8000, metadata={"help": "TCP port to listen on; 0 takes a free one"})
    api_key: tuple[str, ...] = field(
        default=(), repr=False, metadata={"help": "key that clients must send; may be given several times"}
    )

    plan: Path | None = field(
        default=None,
        metadata={
            "file": True,
            "help": "plan of `hybrid plan`: sizes, formats, threads (default: planned at the start)",
        },
    )
    profile: Path | None = field(
        default=None,
        metadata={
            "file": True,
            "help": "measured rates of this machine (default: those `hybrid measure` wrote, if any)",
        },
    )
    record_routing: Path | None = field(
        default=None,
        metadata={
            "file": True,
            "help": "file to write how often each expert was chosen, every minute, when idle, and at the end; a name "
            "in .npz: every token's experts (docs/ROUTING.md)",
        },
    )

    device: Device = field(default="auto", metadata={"help": "where everything but the routed experts runs"})
    dtype: Dtype = field(
        default="auto",
        metadata={
            "help": "type of the device weights; auto is float32 on cpu and bfloat16 on cuda, or fp8 or int8 where "
            "that does not fit"
        },
    )
    expert_format: ExpertTarget = field(
        default="native", metadata={"help": "keep the routed experts as published, or quantise them at load"}
    )
    expert_precision: Precision = field(
        default="a8", metadata={"help": "activations of the routed experts: 8 or 16 bits per value"}
    )
    experts: ExpertBackend = field(
        default="numba",
        metadata={"help": "who runs the routed experts: our kernels, kt-kernel, or what a short trial finds faster"},
    )
    isa: ExpertIsa = field(
        default="auto",
        metadata={
            "help": "instructions of our expert kernels; auto takes the best that can run here, amx only if named"
        },
    )
    threads: int | None = field(
        default=None,
        metadata={"help": "worker threads for the experts (default: one for each physical core, up to the CPU quota)"},
    )

    overlap: Overlap = field(
        default="off",
        metadata={
            "help": "auto on cuda: workers start without waiting for the device, decode steps run from CUDA graphs and "
            "in halves where that pays; not timed on a GPU yet"
        },
    )

    max_model_len: int | None = field(
        default=None, metadata={"help": "longest prompt and answer together, in tokens (default: the model's)"}
    )
    kv_memory: int | None = field(
        default=None, metadata={"help": "bytes for the key-value pages (default: sized from what is free)"}
    )
    kv_ram: int | None = field(
        default=None,
        metadata={
            "help": "bytes of RAM for key-value pages of requests that wait, 0 for none (default: half of what is left "
            "beside a GPU, at most 64 GiB; none on the CPU, where it is the same memory)"
        },
    )
    kv_dtype: KvDtype = field(
        default="model", metadata={"help": "type of the key-value pages: as the model computes, or half the bytes"}
    )
    page_size: int = field(default=16, metadata={"help": "tokens in one key-value page"})
    max_batch_tokens: int = field(default=512, metadata={"help": "most new tokens computed in one step"})
    max_running: int = field(default=64, metadata={"help": "most sequences that generate at the same time"})

    max_queued_requests: int = field(
        default=512, metadata={"help": "sequences that may wait for their first token before 429 is answered"}
    )
    max_queued_tokens: int = field(
        default=1 << 20, metadata={"help": "prompt tokens that may wait before 429 is answered"}
    )
    drain_seconds: float = field(
        default=30.0, metadata={"help": "on SIGTERM, how long running requests may take to finish"}
    )
    stall_seconds: float = field(
        default=30.0, metadata={"help": "how long a client may stop reading its stream before it is cancelled"}
    )
    log_level: LogLevel = field(default="info", metadata={"help": "least severe log line that is written"})

    @property
    def name(self) -> str:
        """The model's name on the wire."""
        return self.served_model_name or self.model.resolve().name
