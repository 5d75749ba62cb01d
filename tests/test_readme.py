"""The README's options table and file tree are those of the code."""

import re
from pathlib import Path

from server.args import described
from server.options import server_options

REPO = Path(__file__).resolve().parents[1]
README = (REPO / "README.md").read_text()
PACKAGES = ("server", "placement", "hybrid", "offload")


def section(title: str) -> str:
    """The text under one second-level heading."""
    found = re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", README, re.MULTILINE | re.DOTALL)
    assert found, f"README has no section {title!r}"
    return found[1]


def option_rows() -> list[str]:
    """The table as it must be: what `hybrid serve --help` says (tests/server/test_args.py holds the two together)."""
    rows = ["| `--config` | YAML file of options |"]
    for option in server_options():
        choices = f" ({', '.join(option.choices)})" if option.choices else ""
        rows.append(f"| `{option.flag}`{choices} | {described(option)} |")
    return rows


def tree() -> dict[str, str]:
    """Path to purpose, from the fenced block of the file section."""
    block = re.search(r"```text\n(.*?)```", section("Files"), re.DOTALL)
    assert block, "README's file section has no fenced block"
    found, folder = {}, ""
    for line in block[1].splitlines():
        name, _, purpose = line.strip().partition(" ")
        if not line.startswith(" "):
            folder = name if name.endswith("/") else ""
        if name.endswith("/"):
            found[name.rstrip("/")] = purpose.strip()
        else:
            found[f"{folder if line.startswith(' ') else ''}{name}"] = purpose.strip()
    return found


def test_options_table() -> None:
    rows = [line for line in section("Options of `hybrid serve`").splitlines() if line.startswith("| `--")]
    assert rows == option_rows()


def test_the_tree_lists_every_source_file() -> None:
    sources = [path for package in PACKAGES for path in (REPO / package).rglob("*.py")]
    sources = [path for path in sources if path.name != "__init__.py"] + list(REPO.glob("server/*.json"))
    listed = {path for path in tree() if path.split("/")[0] in PACKAGES and path.count(".")}
    assert listed == {str(path.relative_to(REPO)) for path in sources}


def test_the_tree_names_only_what_is_there_and_says_what_for() -> None:
    for path, purpose in tree().items():
        assert (REPO / path).exists(), path
        assert len(purpose) > 10, path


def test_the_endpoints_it_names_are_routes() -> None:
    app = (REPO / "server" / "app.py").read_text()
    paths = re.findall(r"`(/[\w/]+)`", section("First answer"))
    assert len(paths) >= 8
    assert [path for path in paths if f'"{path}"' not in app] == []


def test_two_commands_are_targets() -> None:
    makefile = (REPO / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", section("Two commands"), re.MULTILINE):
        assert f"\n{target}:" in makefile
