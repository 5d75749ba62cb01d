"""Findings from facts: what is found, how bad it is, and in which order."""

import math
from dataclasses import replace

import pytest

from placement import checks
from placement.checks import Finding, Room, exit_status, in_order
from placement.ledger import HOST_RESERVE

GB = 10**9
ROOM = Room(
    "/models/M", experts=60 * GB, weights=4 * GB, packed=False, installed=128 * GB, allowed=128 * GB, free=100 * GB
)


def finding(severity: checks.Severity, gain: float | None = None) -> Finding:
    return Finding(severity, f"{severity} {gain}", "", "", gain)


def test_the_broken_lead_then_the_slow_by_gain_then_notes() -> None:
    expected = [
        finding("broken"),
        finding("slow"),  # not in use at all
        finding("slow", 3.0),
        finding("slow", 1.1),
        finding("note", 1.02),
        finding("note"),
    ]
    assert list(in_order(reversed(expected))) == expected


@pytest.mark.parametrize(
    ("severities", "status"),
    [((), 0), (("note",), 0), (("note", "slow"), 3), (("slow", "broken", "note"), 4), (("broken",), 4)],
)
def test_the_worst_finding_is_the_exit_status(severities: tuple[checks.Severity, ...], status: int) -> None:
    assert exit_status(finding(severity) for severity in severities) == status


def test_an_override_that_leaves_avx512_unused_is_slow() -> None:
    found = list(
        checks.tiers(
            ("avx512vnni", "avx512", "avx2", "portable"), "avx512vnni", "avx2", {1: (0.006, 0.005), 16: (0.04, 0.01)}
        )
    )
    [only] = found
    assert (only.severity, only.gain) == ("slow", pytest.approx(4.0))
    assert "--isa avx2" in only.what and "avx512vnni" in only.what
    assert "16 rows takes 40 ms instead of 10 ms" in only.why


def test_an_override_that_costs_nothing_is_a_note() -> None:
    [only] = checks.tiers(("avx512vnni", "avx2", "portable"), "avx512vnni", "avx2", {1: (0.0050, 0.0051)})
    assert (only.severity, only.gain) == ("note", 1.0)


def test_an_override_that_was_not_timed_is_slow() -> None:
    [only] = checks.tiers(("avx512vnni", "avx2", "portable"), "avx512vnni", "portable", {})
    assert (only.severity, only.gain) == ("slow", None)


def test_a_processor_without_avx512_is_a_note() -> None:
    [only] = checks.tiers(("avx2", "portable"), "avx2", "avx2", {})
    assert only.severity == "note" and "no AVX-512" in only.what
    assert list(checks.tiers(("avx512", "avx2", "portable"), "avx512", "avx512", {})) == []
    assert list(checks.tiers(("amx", "avx512vnni", "avx512", "avx2", "portable"), "avx512vnni", "amx", {})) == []


def test_amx() -> None:
    tiers: tuple[checks.Isa, ...] = ("amx", "avx512vnni", "portable")
    assert list(checks.amx(tiers[1:], "avx512vnni", permitted=False)) == []
    assert list(checks.amx(tiers, "amx", permitted=True)) == []
    [refused] = checks.amx(tiers, "avx512vnni", permitted=False)
    assert "does not permit" in refused.what
    [unused] = checks.amx(tiers, "avx512vnni", permitted=True)
    assert "--isa amx" in unused.remedy


@pytest.mark.parametrize(
    ("error", "wrong"), [(0.013, False), (checks.TOLERANCE, False), (0.07, True), (math.nan, True)]
)
def test_wrong_kernels_are_broken(error: float, wrong: bool) -> None:
    found = list(checks.kernels({("avx2", "fp8"): error, ("portable", "fp8"): 0.01}))
    assert [(f.severity, f.what) for f in found] == [("broken", "the avx2 kernels give wrong answers")] * wrong
    assert all("a small fp8 layer" in f.why for f in found)


@pytest.mark.parametrize(
    ("asked", "compared", "expected"),
    [
        (None, {}, None),
        (8, {}, None),
        (1, {1: (0.02, 0.01), 16: (0.4, 0.1)}, ("slow", 4.0, "1 of 8 cores work")),
        (4, {1: (0.03, 0.01)}, ("slow", 2.0, "4 of 8 cores work")),  # three times as fast with twice the cores: noise
        (7, {1: (0.0100, 0.0099)}, ("note", 0.0100 / 0.0099, "7 of 8 cores work")),
        (7, {1: (0.0090, 0.0099)}, ("note", 1.0, "7 of 8 cores work")),
        (16, {1: (0.03, 0.01)}, ("slow", 3.0, "16 workers share 8 cores")),
        (1, {}, ("slow", None, "1 of 8 cores work")),
    ],
)
def test_threads(
    asked: int | None, compared: checks.Compared, expected: tuple[checks.Severity, float | None, str] | None
) -> None:
    found = [(f.severity, f.gain, f.what.partition(": ")[2]) for f in checks.threads(asked, 8, 8, None, compared)]
    assert found == ([] if expected is None else [(expected[0], pytest.approx(expected[1]), expected[2])])


def test_a_quota_below_the_cores_is_a_note() -> None:
    [only] = checks.threads(None, 2, 8, 2.5, {})
    assert only.severity == "note" and "2.5 of 8 cores" in only.what
    assert list(checks.threads(None, 8, 8, 8.0, {})) == []


def test_huge_pages() -> None:
    [never] = checks.huge_pages("never", 1.0)
    assert (never.severity, never.gain) == ("slow", checks.HUGE_PAGES_GAIN)
    [few] = checks.huge_pages("madvise", 0.25)
    assert few.severity == "slow" and "25%" in few.what
    assert few.gain is not None and 1 < few.gain < checks.HUGE_PAGES_GAIN
    [most] = checks.huge_pages("madvise", 0.7)  # what that costs is within the noise
    assert most.severity == "note" and most.gain is not None and most.gain < checks.WORTH
    for setting in ("always", "madvise", "unknown"):
        assert list(checks.huge_pages(setting, 0.97)) == []
        assert list(checks.huge_pages(setting, None)) == []


def test_a_model_that_fits_is_no_finding() -> None:
    assert list(checks.room(replace(ROOM, free=64 * GB + HOST_RESERVE))) == []


@pytest.mark.parametrize(
    ("room", "severity", "words"),
    [
        (replace(ROOM, allowed=32 * GB, free=31 * GB), "broken", ("control group allows 32.00 GB", "hybrid pack")),
        (
            replace(ROOM, installed=32 * GB, allowed=32 * GB, free=30 * GB),
            "broken",
            ("machine has 32.00", "hybrid pack"),
        ),
        (replace(ROOM, free=64 * GB), "broken", ("64.00 GB of RAM are free", "end other programs")),
        (replace(ROOM, allowed=32 * GB, free=31 * GB, packed=True), "slow", ("control group", "from the disk")),
        (
            replace(ROOM, allowed=4 * GB, free=4 * GB, packed=True),
            "broken",
            ("control group", "raise memory.max", "else 4.54 GB"),
        ),
        (replace(ROOM, allowed=4 * GB, free=4 * GB), "broken", ("control group", "raise memory.max", "else 4.54 GB")),
    ],
)
def test_a_model_that_does_not_fit(room: Room, severity: str, words: tuple[str, ...]) -> None:
    [only] = checks.room(room)
    assert only.severity == severity
    line = f"{only.what} {only.why} {only.remedy}"
    assert all(word in line for word in (*words, "60.00 GB")), line
    assert ("hybrid pack" in line) == (room.free > 5 * GB and not room.packed), "a remedy that does not help"


def test_memory_that_cannot_be_pinned_is_broken() -> None:
    assert list(checks.pinning(None, 10**8, None)) == []
    [only] = checks.pinning("CUDA error: out of memory", 10**8, 8 << 20)
    assert only.severity == "broken" and "8.39 MB" in only.why


def test_a_gpu_that_torch_does_not_use_leads_the_slow() -> None:
    assert list(checks.cuda((), torch_sees=False, torch_build="2.13.0+cpu")) == []
    assert list(checks.cuda(("RTX",), torch_sees=True, torch_build="2.13.0")) == []
    [only] = checks.cuda(("RTX",), torch_sees=False, torch_build="2.13.0+cpu")
    assert in_order([finding("slow", 50.0), only])[0] is only


@pytest.mark.parametrize(("average", "cores", "found"), [(None, 2, 0), (0.4, 2, 0), (0.5, 2, 1), (3.0, 64, 0)])
def test_other_programs(average: float | None, cores: int, found: int) -> None:
    assert [f.severity for f in checks.load(average, cores)] == ["note"] * found


def test_the_governor() -> None:
    assert len(list(checks.governor("powersave", "acpi-cpufreq"))) == 1
    assert list(checks.governor("powersave", "intel_pstate")) == []
    assert list(checks.governor("performance", "acpi-cpufreq")) == []
    assert list(checks.governor(None, None)) == []


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ((None, None, None), None),
        (("1", "8192", "0"), None),
        (("0", "8192", None), "unprivileged_userns_clone"),
        ((None, "0", None), "max_user_namespaces"),
        ((None, "8192", "1"), "apparmor"),
    ],
)
def test_user_namespaces(settings: tuple[str | None, str | None, str | None], word: str | None) -> None:
    found = list(checks.sandboxes(*settings, bwrap=True))
    assert len(found) == (word is not None)
    assert all(f.severity == "note" and str(word) in f.why for f in found)
    assert [f.what for f in checks.sandboxes(None, None, None, bwrap=False)] == ["bwrap is not installed"]


def test_nodes_without_their_memory_are_slow() -> None:
    assert [f.severity for f in checks.nodes(["memory node 1: EPERM (Operation not permitted)"])] == ["slow"]
