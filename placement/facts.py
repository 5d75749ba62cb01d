"""What this machine has free: the facts the ledger is drawn from.

Reads RAM from the operating system and the control group that bounds this process, device memory from torch (imported
only where a CUDA device is in question). Measures no speeds. The engine process calls `read_facts` once, at start.
"""

from dataclasses import dataclass
from typing import Literal

from offload.ram import ram

Device = Literal["cpu", "cuda"]


class DeviceError(ValueError):
    """The device that was asked for is not there."""


@dataclass(frozen=True, slots=True)
class Facts:
    """Bytes. Where the device is the CPU, device and RAM are one memory and the figures are equal."""

    device: Device
    device_name: str
    device_total: int
    device_free: int
    ram_total: int
    ram_free: int


def read_facts(device: Literal["auto", "cpu", "cuda"]) -> Facts:
    """Facts of this machine. "auto" takes CUDA where there is one. Raises DeviceError for a missing CUDA device."""
    total, free = ram()
    if device != "cpu":
        import torch

        if torch.cuda.is_available():
            device_free, device_total = torch.cuda.mem_get_info()
            name = torch.cuda.get_device_name()
            return Facts("cuda", name, int(device_total), int(device_free), total, free)
        if device == "cuda":
            raise DeviceError(
                "--device cuda: torch sees no CUDA device here; use --device cpu, or install a CUDA build"
            )
    return Facts("cpu", "CPU", total, free, total, free)
