"""placement.facts: control groups bound what is free."""

from pathlib import Path

import pytest

from placement.facts import DeviceError, ram, read_facts


def group(path: Path, limit: str, used: int, cached: int = 0) -> None:
    path.mkdir(parents=True, exist_ok=True)
    (path / "memory.max").write_text(limit + "\n")
    (path / "memory.current").write_text(f"{used}\n")
    (path / "memory.stat").write_text(f"anon 5\nactive_file {cached // 2}\ninactive_file {cached - cached // 2}\n")


@pytest.fixture
def proc(tmp_path: Path) -> Path:
    path = tmp_path / "cgroup"
    path.write_text("4:memory:/old\n0::/a/b\n")
    return path


def test_the_tightest_group_counts(tmp_path: Path, proc: Path) -> None:
    root = tmp_path / "fs"
    group(root / "a", "3000000", 2_000_000, cached=500_000)
    group(root / "a" / "b", "max", 1)
    assert ram(proc, root) == (3_000_000, 1_500_000)
    group(root / "a" / "b", "1000000", 990_000)
    assert ram(proc, root) == (1_000_000, 10_000)


def test_an_overfull_group_has_nothing_free(tmp_path: Path, proc: Path) -> None:
    group(tmp_path / "fs" / "a", "1000", 5000)
    assert ram(proc, tmp_path / "fs") == (1000, 0)


def test_version_1_groups_count_too(tmp_path: Path) -> None:
    proc, root = tmp_path / "cgroup", tmp_path / "fs"
    proc.write_text("9:name=systemd:/a\n4:memory:/a/b\n1:cpu:/a\n0::/\n")
    for folder, limit, used in (("a", 3_000_000, 900_000), ("a/b", 9223372036854771712, 1)):
        group = root / "memory" / folder
        group.mkdir(parents=True, exist_ok=True)
        (group / "memory.limit_in_bytes").write_text(f"{limit}\n")
        (group / "memory.usage_in_bytes").write_text(f"{used}\n")
        (group / "memory.stat").write_text(
            "inactive_file 1\nactive_file 1\ntotal_inactive_file 100000\ntotal_active_file 50000\n"
        )
    assert ram(proc, root) == (3_000_000, 2_250_000)


def test_without_groups_the_machine_counts(tmp_path: Path) -> None:
    total, free = ram(tmp_path / "none", tmp_path)
    assert total >= free > 10**6


def test_the_cpu_is_one_memory() -> None:
    facts = read_facts("cpu")
    assert facts.device == "cpu"
    assert (facts.device_total, facts.device_free) == (facts.ram_total, facts.ram_free)


def test_a_missing_cuda_device_is_refused() -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    with pytest.raises(DeviceError, match="--device cuda: torch sees no CUDA device"):
        read_facts("cuda")
    assert read_facts("auto").device == "cpu"
