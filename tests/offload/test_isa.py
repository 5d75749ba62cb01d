from pathlib import Path

import pytest

from offload.isa import REQUIRED, available, choose, cpu_flags

ZEN3 = frozenset({"fpu", "avx", "avx2", "fma", "bmi2"})
ICELAKE = ZEN3 | {"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni"}
SKYLAKE_X = ICELAKE - {"avx512_vnni"}
ALDER_LAKE = ZEN3 | {"avx_vnni"}
SAPPHIRE_RAPIDS = ICELAKE | {"avx_vnni", "amx_tile", "amx_bf16"}


@pytest.mark.parametrize(
    ("flags", "tiers"),
    [
        (SAPPHIRE_RAPIDS - {"amx_bf16"}, ("avx512vnni", "avx512", "avxvnni", "avx2", "portable")),
        (ICELAKE, ("avx512vnni", "avx512", "avx2", "portable")),
        (SKYLAKE_X, ("avx512", "avx2", "portable")),
        (ALDER_LAKE, ("avxvnni", "avx2", "portable")),
        (ZEN3, ("avx2", "portable")),
        (frozenset({"avx2"}), ("portable",)),  # an avx2 without fma would not run the kernels
        (frozenset(), ("portable",)),
    ],
)
def test_the_best_tier_comes_first(flags: frozenset[str], tiers: tuple[str, ...]) -> None:
    assert available(flags) == tiers
    assert choose(None, flags) == tiers[0]
    assert [choose(tier, flags) for tier in tiers] == list(tiers)


def test_amx_is_asked_for_by_name_and_needs_permission(monkeypatch: pytest.MonkeyPatch) -> None:
    assert available(SAPPHIRE_RAPIDS)[0] == "amx"
    assert choose(None, SAPPHIRE_RAPIDS) == "avx512vnni"
    monkeypatch.setattr("offload.isa.permit_amx", lambda: True)
    assert choose("amx", SAPPHIRE_RAPIDS) == "amx"
    monkeypatch.setattr("offload.isa.permit_amx", lambda: False)
    with pytest.raises(ValueError, match="does not permit amx, choose avx512vnni or avx512"):
        choose("amx", SAPPHIRE_RAPIDS)


def test_a_tier_that_cannot_run_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"avx512vnni cannot run .*avx512_vnni.*choose avx512 or avx2 or portable"):
        choose("avx512vnni", SKYLAKE_X)


def test_an_unknown_tier_is_refused_with_the_choices() -> None:
    with pytest.raises(ValueError, match=r"'sse9'.*amx, avx512vnni, avx512, avxvnni, avx2, portable"):
        choose("sse9", ZEN3)  # type: ignore[arg-type]


def test_flags_are_read_from_the_first_processor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor\t: 0\nflags\t\t: fpu avx2 fma\n\nprocessor\t: 1\nflags\t\t: fpu\n")
    assert cpu_flags(cpuinfo) == {"fpu", "avx2", "fma"}
    assert cpu_flags(tmp_path / "none") == frozenset()
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    assert cpu_flags(cpuinfo) == frozenset()


def test_this_machine_has_a_tier_for_every_flag_it_lists() -> None:
    assert choose() == next(tier for tier in available() if tier != "amx")
    assert set(available()) == {isa for isa, needed in REQUIRED.items() if needed <= cpu_flags()}
