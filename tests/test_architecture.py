"""The rules of the house, checked on the files themselves: import direction, torch-free parts, sizes, no prints."""

import ast
import functools
import json
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]
PACKAGES = ("server", "placement", "hybrid", "offload")  # left may import right
SOURCES = tuple(sorted(path for package in PACKAGES for path in (REPO / package).rglob("*.py")))
TESTS = tuple(sorted((REPO / "tests").rglob("*.py")))
# Modules of placement that run real kernels and steps.
REAL = {"measure", "measure_device", "measure_kernels", "measure_link", "measure_timing", "tune", "doctor", "trial"}
TORCH_FREE = {
    *(path for path in SOURCES if path.parts[-2] == "server"),
    *(
        REPO / "hybrid" / f"{name}.py"
        for name in ("batch", "pages", "config", "config_json", "random_checkpoint", "routes", "widths")
    ),
    REPO / "hybrid" / "nano" / "load.py",
    *(
        REPO / "offload" / f"{name}.py"
        for name in (
            "config",
            "formats",
            "checkpoint",
            "correction",
            "kt_worker",
            "predict",
            "ram",
            "slots",
            "stream_split",
            "token_table",
            "topology",
        )
    ),
    # All but what runs real kernels and steps: `hybrid plan` answers in a second.
    *(path for path in SOURCES if path.parts[-2] == "placement" and path.stem not in REAL),
}
TERMINAL = {  # may print
    *(REPO / "server" / f"{name}.py" for name in ("__main__", "chat_client", "planning")),
    *(REPO / "hybrid" / "nano" / f"{name}.py" for name in ("evaluate", "load", "record")),
}
SPEAKING_INIT = REPO / "offload" / "kernels" / "__init__.py"  # names numba's cache directory: the one that does things
HEAVY = ("torch", "numba", "llvmlite", "transformers")

MOST_FILE, MOST_TEST_FILE, MOST_FUNCTION, MOST_TOTAL = 400, 600, 60, 34_000  # lines

# Imports modules by name in one fresh interpreter. Before each one everything of ours is forgotten, so that each must
# import on its own.
PROBE = """
import importlib, json, sys, warnings
warnings.simplefilter("error")
packages, heavy, modules = json.loads(sys.argv[1])
found = {}
for module in modules:
    for name in [name for name in sys.modules if name.split(".")[0] in packages]:
        del sys.modules[name]
    try:
        importlib.import_module(module)
    except BaseException as error:
        found[module] = repr(error)
        continue
    loaded = [name for name in heavy if name in sys.modules]
    if loaded:
        found[module] = "loads " + ", ".join(loaded)
print(json.dumps(found))
"""


@functools.cache
def syntax(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def module_name(path: Path) -> str:
    parts = path.relative_to(REPO).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def probe(paths: list[Path], heavy: tuple[str, ...]) -> dict[str, str]:
    """Modules that fail to import alone, or load one of `heavy`."""
    names = [module_name(path) for path in paths if path.name != "__main__.py"]
    command = [sys.executable, "-W", "error", "-c", PROBE, json.dumps([PACKAGES, heavy, names])]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    found: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    return found


def imports(path: Path) -> set[str]:
    """Top-level packages a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(syntax(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add((node.module or "").split(".")[0])
    return found


def test_the_lists_above_name_real_files() -> None:
    assert len(SOURCES) > 20
    missing = [str(path) for path in (*TORCH_FREE, *TERMINAL, SPEAKING_INIT) if not path.is_file()]
    assert missing == []


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_go_one_way(package: str) -> None:
    above = set(PACKAGES[: PACKAGES.index(package)]) | {"tests"}
    wrong = {str(path): imports(path) & above for path in SOURCES if path.is_relative_to(REPO / package)}
    assert {path: names for path, names in wrong.items() if names} == {}


def test_server_modules_never_name_torch_or_numba() -> None:
    wrong = {str(path): imports(path) & set(HEAVY) for path in SOURCES if path.is_relative_to(REPO / "server")}
    assert {path: names for path, names in wrong.items() if names} == {}


def test_the_torch_free_modules_load_no_torch() -> None:
    assert probe(sorted(TORCH_FREE), HEAVY) == {}


def test_every_other_module_imports_alone() -> None:
    assert probe([path for path in SOURCES if path not in TORCH_FREE], ("transformers",)) == {}


def test_the_command_loads_no_torch() -> None:
    code = "import sys, server.app; from server.__main__ import main; main(['version']); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.splitlines()[-1].split()) & set(HEAVY) == set(), (
        "the parent of `hybrid serve` must stay small"
    )


def test_an_init_is_a_docstring() -> None:
    for path in SOURCES:
        if path.name == "__init__.py" and path != SPEAKING_INIT:
            body = syntax(path).body
            assert len(body) == 1, path
            assert ast.get_docstring(syntax(path)), path


def test_every_module_says_what_it_is_for() -> None:
    assert [str(path) for path in SOURCES if not ast.get_docstring(syntax(path))] == []


def test_files_are_short() -> None:
    lengths = {path: len(path.read_text().splitlines()) for path in (*SOURCES, *TESTS)}
    limits = {path: MOST_FILE if path in SOURCES else MOST_TEST_FILE for path in lengths}
    assert {str(path): n for path, n in lengths.items() if n > limits[path]} == {}
    assert sum(lengths[path] for path in SOURCES) <= MOST_TOTAL


def test_functions_are_short() -> None:
    wrong = {}
    for path in SOURCES:
        for node in ast.walk(syntax(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                if length > MOST_FUNCTION:
                    wrong[f"{path}:{node.name}"] = length
    assert wrong == {}


def test_only_the_command_prints() -> None:
    for path in SOURCES:
        calls = [node for node in ast.walk(syntax(path)) if isinstance(node, ast.Call)]
        prints = [call.lineno for call in calls if isinstance(call.func, ast.Name) and call.func.id == "print"]
        assert path in TERMINAL or prints == [], (path, prints)


def test_library_code_reads_no_environment() -> None:
    entry_points = {
        *TERMINAL,
        SPEAKING_INIT,
        REPO / "server" / "engine_process.py",
        REPO / "server" / "engine_builder.py",
    }
    for path in SOURCES:
        tree = syntax(path)
        reads = [n.lineno for n in ast.walk(tree) if isinstance(n, ast.Attribute) and n.attr in ("environ", "getenv")]
        assert path in entry_points or reads == [], (path, reads)


def test_import_linter_agrees() -> None:
    pytest.importorskip("importlinter")
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command; lint_imports_command()"]
    done = subprocess.run([*command, "--no-cache"], cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
