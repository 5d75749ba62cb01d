"""placement.profile: a profile comes back from its file, faults are named by file and key, medians are NumPy's."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from placement.document import DocumentError, Measured, to_plain
from placement.hardware import Cache, Gpu, Hardware, Node
from placement.profile import Device, Gemm, Kernel, Link, Memory, Profile, median_of, read_profile, write_profile

GIB = 2**30
HARDWARE = Hardware(
    cpu="EPYC 9334",
    cores=32,
    threads_per_core=2,
    cpu_quota=None,
    nodes=(Node(0, 16, 192 * GIB), Node(1, 16, 192 * GIB)),
    caches=(Cache(1, 32 * 2**10, 32), Cache(3, 32 * 2**20, 8)),
    tiers=("avx512vnni", "avx512", "avx2", "portable"),
    ram=380 * GIB,
    ram_installed=384 * GIB,
    huge_pages="madvise",
    memlock=8 * 2**20,
    gpus=(Gpu("NVIDIA L40S", 46068 * 2**20, "8.9", 4, None),),
    disk="nvme0n1 (solid state)",
)
BARE = Profile("a box", "datasheet", "vendors' pages", HARDWARE)
FULL = replace(
    BARE,
    source="measured",
    measured="2026-11-22",
    memory=Memory({1: Measured(20e9, 19e9, 20.5e9), 32: Measured(300e9)}, (Measured(150e9), Measured(149e9))),
    kernels=(
        Kernel("numba/avx512vnni/int4/a8", 7168, 2048, {1: Measured(1.2e-4, 1.1e-4, 1.3e-4), 64: Measured(9e-4)}),
        Kernel("numba/avx2/int4/a8", 7168, 2048, {1: Measured(2e-4)}),
    ),
    device=Device(
        kind="cuda",
        name="NVIDIA L40S",
        gemms=(Gemm("bfloat16", 4096, {1: Measured(5e-5), 2048: Measured(4e-4)}),),
        kv_read=Measured(500e9),
        attention_decode=Measured(20e12),
        attention_prefill=Measured(90e12),
        per_step=Measured(3e-4),
        per_layer=Measured(4e-5),
        per_row=Measured(2e-6),
        per_logit=Measured(1e-11),
    ),
    link=Link(Measured(25e9), Measured(24e9), kernels_beside_copies=1.25, to_device_beside_kernels=Measured(22e9)),
    disk_read=Measured(3.1e9, 2.9e9, 3.2e9),
    notes=("portable: no time left",),
)


@pytest.mark.parametrize("profile", [BARE, FULL])
def test_it_comes_back_from_its_file(tmp_path: Path, profile: Profile) -> None:
    """Figures keep four digits, so the second copy of a file is the first one."""
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    write_profile(first, profile)
    found = read_profile(first)
    write_profile(second, found)
    assert second.read_text() == first.read_text()
    assert read_profile(second) == found
    assert found.hardware == profile.hardware
    assert to_plain(found) == to_plain(profile)


def test_figures_keep_their_size(tmp_path: Path) -> None:
    write_profile(tmp_path / "profile.yaml", FULL)
    found = read_profile(tmp_path / "profile.yaml")
    assert found.memory is not None
    assert found.memory.read[1].low == pytest.approx(19e9)
    assert [item.value for item in found.memory.per_node] == pytest.approx([150e9, 149e9])
    assert found.kernels[0].seconds[64].value == pytest.approx(9e-4)
    assert found.device is not None
    assert found.device.per_logit.value == pytest.approx(1e-11)
    assert found.link is not None
    assert found.link.kernels_beside_copies == 1.25
    assert found.link.both_ways is None


def test_people_can_read_it(tmp_path: Path) -> None:
    path = tmp_path / "profile.yaml"
    write_profile(path, FULL)
    values = yaml.safe_load(path.read_text())
    assert (values["document"], values["version"]) == ("profile", 1)
    assert values["memory"]["read"] == {1: "20 GB/s [19 to 20.5]", 32: "300 GB/s"}
    assert values["kernels"][0]["seconds"][1] == "120 us [110 to 130]"
    assert values["hardware"]["ram_installed"] == "384 GiB"
    assert values["device"]["attention_prefill"] == "90 TFLOP/s"
    assert values["device"]["per_logit"] == "0.01 ns"


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (
            "to_device: 25 GB/s",
            "to_device: 25 GiB/s",
            "link.to_device: expected a rate such as '34.5 GB/s', found '25 GiB/s'",
        ),
        ("  kv_read: 500 GB/s\n", "", "key device.kv_read is missing"),
        ("huge_pages: madvise", "huge_pages: sometimes", "hardware.huge_pages: expected one of always, madvise, never"),
        (
            "kernels_beside_copies: 1.25",
            "kernels_beside_copy: 1.25",
            "unknown key link.kernels_beside_copy; did you mean",
        ),
        ("- avx2\n", "- avx3\n", "hardware.tiers[2]: expected one of amx, avx512vnni, avx512, avxvnni, avx2, portable"),
        ("dtype: bfloat16", "dtype: bf16", "device.gemms[0].dtype: expected one of float32, bfloat16, fp8, int8"),
        ("    64: 900 us", "    many: 900 us", "kernels[0].seconds.many: expected a whole number"),
        ("  kv_read: 500 GB/s", "  kv_read: 0 GB/s", "device.kv_read: expected a rate above 0, found '0 GB/s'"),
        (
            "to_device: 25 GB/s",
            "to_device: 25 GB/s [0 to 26]",
            "link.to_device: expected a rate above 0, found '0 GB/s'",
        ),
        (
            "attention_decode: 20 TFLOP/s",
            "attention_decode: 0 FLOP/s",
            "device.attention_decode: expected an arithmetic",
        ),
        ("    64: 900 us", "    64: 0 us", "kernels[0].seconds.64: expected a time above 0, found '0 us'"),
        ("    64: 900 us", "    0: 900 us", "kernels[0].seconds.0: expected a whole number of at least 1, found 0"),
        ("    1: 200 us", "    2: 200 us", "kernels[1].seconds: expected figures by rows, those of 1 row among them"),
        ("  size: 4096", "  size: 0", "device.gemms[0].size: expected a whole number of at least 1, found 0"),
        (
            "name: numba/avx2/int4/a8",
            "name: avx2",
            "kernels[1].name: expected backend/tier/format/precision, as numba/",
        ),
        ("    32: 300 GB/s", "    0: 300 GB/s", "memory.read.0: expected a whole number of at least 1, found 0"),
        (
            "kernels_beside_copies: 1.25",
            "kernels_beside_copies: 0.0",
            "link.kernels_beside_copies: expected a number above",
        ),
        ("  cores: 32\n", "  cores: 0\n", "hardware.cores: expected a whole number of at least 1, found 0"),
        ("version: 1", "version: 2", "profile version 2, this hybrid reads version 1; make it anew"),
        (
            "document: profile",
            "document: plan",
            "expected `document: profile`, found 'plan'; name the file of a profile",
        ),
    ],
)
def test_a_fault_is_one_line_with_the_file_and_the_key(tmp_path: Path, old: str, new: str, said: str) -> None:
    path = tmp_path / "profile.yaml"
    write_profile(path, FULL)
    text = path.read_text()
    assert text.count(old) == 1
    path.write_text(text.replace(old, new))
    with pytest.raises(DocumentError) as caught:
        read_profile(path)
    assert str(caught.value).startswith(f"{path}: {said}"), caught.value
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["memory.read", "kernels[0].seconds", "device.gemms[0].seconds"])
def test_a_table_without_figures_is_named(tmp_path: Path, key: str) -> None:
    path = tmp_path / "profile.yaml"
    write_profile(path, FULL)
    values = yaml.safe_load(path.read_text())
    inner = {"memory": values["memory"], "kernels": values["kernels"][0], "device": values["device"]["gemms"][0]}
    inner[key.split(".")[0].removesuffix("[0]")][key.split(".")[-1]] = {}
    path.write_text(yaml.safe_dump(values))
    with pytest.raises(DocumentError) as caught:
        read_profile(path)
    assert str(caught.value).startswith(f"{path}: {key}: expected figures by ")


def test_what_could_not_be_measured_may_be_left_out(tmp_path: Path) -> None:
    path = tmp_path / "profile.yaml"
    write_profile(path, BARE)
    values = yaml.safe_load(path.read_text())
    for key in ("memory", "kernels", "device", "link", "disk_read", "notes"):
        del values[key]
    path.write_text(yaml.safe_dump(values))
    assert read_profile(path) == BARE


def test_a_kernel_by_its_name() -> None:
    assert FULL.kernel("numba/avx2/int4/a8") is FULL.kernels[1]
    assert FULL.kernel("numba/avx2/int4/a16") is None
    assert BARE.kernel("numba/avx2/int4/a8") is None


@given(st.lists(st.floats(1e-9, 1e12), min_size=1, max_size=50))
def test_the_median_is_that_of_numpy(values: list[float]) -> None:
    before = list(values)
    found = median_of(values)
    assert found.value == pytest.approx(np.median(values), rel=1e-12)
    assert found.low is not None
    assert found.high is not None
    assert found.low <= found.value <= found.high
    assert values == before


@pytest.mark.parametrize(
    ("n", "low", "high"), [(1, 0, 0), (2, 0, 1), (5, 0, 4), (21, 1, 19), (41, 2, 38), (101, 5, 95), (1001, 50, 950)]
)
def test_the_spread_is_the_fifth_and_ninety_fifth_percentile(n: int, low: int, high: int) -> None:
    """At these sizes the percentile is a member, or next to one, so every definition agrees."""
    values = np.random.default_rng(n).permutation(n).astype(float)
    assert median_of(values.tolist()) == Measured((n - 1) / 2, low, high)
    if (n - 1) % 20 == 0:
        assert np.percentile(values, [5, 95]) == pytest.approx([low, high])
