"""The file tools: what they do, and that nothing outside the workspace can be read, written or listed."""

import asyncio
import errno
import io
import os
import threading
from pathlib import Path

import pytest

from server.agents.files import MOST_READ, file_tools
from server.agents.tools import Tool, ToolError

SECRET = "the secret outside"


@pytest.fixture
def space(tmp_path: Path) -> Path:
    """A workspace full of traps, beside a secret."""
    (tmp_path / "secret.txt").write_text(SECRET)
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "secret.txt").write_text(SECRET)
    made = tmp_path / "space"
    (made / "sub" / "deep").mkdir(parents=True)
    (made / "a.txt").write_text("colour: blue\n")
    (made / "link").symlink_to("../secret.txt")
    (made / "absolute").symlink_to(tmp_path / "secret.txt")
    (made / "folder").symlink_to("../outside")
    (made / "up").symlink_to("..")
    (made / "sub" / "self").symlink_to(".")
    (made / "proc").symlink_to("/proc/self")
    (made / "dangling").symlink_to(tmp_path / "new.txt")
    os.mkfifo(made / "fifo")
    return made


def tools(space: Path) -> dict[str, Tool]:
    return {tool.declaration["function"]["name"]: tool for tool in file_tools(space)}


async def test_write_read_list(space: Path) -> None:
    there = tools(space)
    assert await there["read_file"].run({"path": "a.txt"}) == "colour: blue\n"
    assert (
        await there["write_file"].run({"path": "new/x/ä.txt", "content": "déjà\nvu"}) == "wrote 9 bytes to new/x/ä.txt"
    )
    assert (space / "new/x/ä.txt").read_text() == "déjà\nvu"
    await there["write_file"].run({"path": "./a.txt", "content": "red"})  # shorter: nothing of the old text is left
    assert await there["read_file"].run({"path": "sub/.././a.txt".replace("sub/../", "")}) == "red"
    assert (await there["list_files"].run({"path": "new"})) == "x/"
    assert "a.txt" in (await there["list_files"].run({"path": "."})).split("\n")
    (space / "raw").write_bytes(b"\xff\x00ok")
    assert await there["read_file"].run({"path": "raw"}) == "\N{REPLACEMENT CHARACTER}\0ok"


PATHS = [
    "../secret.txt", "sub/../../secret.txt", "/etc/passwd", "//etc/passwd", "link", "absolute", "folder/secret.txt",
    "up/secret.txt", "up/space/../secret.txt", "sub/self/../../../secret.txt", "sub/self/a.txt", "proc/environ",
    "proc/cwd/secret.txt", "proc/root/etc/passwd", "/proc/self/environ", "dangling", "fifo", "..", "", ".", "/", "\0",
    "a.txt\0.png", "sub", "missing.txt", "a.txt/b", "~/x", "x" * 300, "sub/" * 2000 + "x", "./../secret.txt",
    "....//secret.txt", "..\\secret.txt", "%2e%2e/secret.txt", "file:///etc/passwd", "/dev/stdin", "/dev/fd/0",
]  # fmt: skip


NEW = {"missing.txt", "~/x", "....//secret.txt", "..\\secret.txt", "%2e%2e/secret.txt", "file:///etc/passwd"}


@pytest.mark.parametrize("path", PATHS)
async def test_nothing_outside_is_read(space: Path, path: str) -> None:
    with pytest.raises(ToolError) as caught:
        await tools(space)["read_file"].run({"path": path})
    assert SECRET not in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("path", [path for path in PATHS if path not in NEW])
async def test_nothing_outside_is_written(space: Path, path: str) -> None:
    before = {file: file.read_bytes() for file in space.parent.rglob("*") if file.is_file() and not file.is_symlink()}
    with pytest.raises(ToolError):
        await tools(space)["write_file"].run({"path": path, "content": "overwritten"})
    assert all(file.read_bytes() == raw for file, raw in before.items())
    assert not (space.parent / "new.txt").exists()


@pytest.mark.parametrize("path", ["..", "up", "folder", "/", "proc", "sub/self", "proc/fd", "a.txt", "missing"])
async def test_nothing_outside_is_listed(space: Path, path: str) -> None:
    with pytest.raises(ToolError):
        await tools(space)["list_files"].run({"path": path})


async def test_a_directory_that_becomes_a_link_while_it_is_used(space: Path) -> None:
    """The race that checking a path before opening it would lose: 2,000 reads against a flipping name."""
    (space / "flip").mkdir()
    (space / "flip" / "secret.txt").write_text("inside")
    read, done = tools(space)["read_file"], threading.Event()

    def flip() -> None:
        while not done.is_set():
            (space / "flip").rename(space / "real")
            (space / "flip").symlink_to("../outside")
            (space / "flip").unlink()
            (space / "real").rename(space / "flip")

    flipping = threading.Thread(target=flip)
    flipping.start()
    seen = set()
    try:
        for _ in range(2000):
            try:
                seen.add(await read.run({"path": "flip/secret.txt"}))
            except ToolError:
                seen.add("refused")
    finally:
        done.set()
        flipping.join()
    assert seen <= {"inside", "refused"} and "inside" in seen


async def test_sizes(space: Path) -> None:
    (space / "big").write_bytes(b"x" * (MOST_READ + 1))
    with pytest.raises(ToolError, match="larger than"):
        await tools(space)["read_file"].run({"path": "big"})
    with pytest.raises(ToolError, match="more than"):
        await tools(space)["write_file"].run({"path": "huge", "content": "x" * (9 << 20)})
    assert not (space / "huge").exists()


async def test_a_full_disk_leaves_the_old_text(space: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(io.BytesIO):
        def write(self, data: object) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    def opened(file: int, mode: str) -> Full:
        os.close(file)
        return Full()

    there = tools(space)["write_file"]
    with monkeypatch.context() as patched, pytest.raises(ToolError, match=r"a\.txt: no space left on device"):
        patched.setattr("server.agents.files.open", opened, raising=False)
        await there.run({"path": "a.txt", "content": "new"})
    assert (space / "a.txt").read_text() == "colour: blue\n"
    assert not [name for name in os.listdir(space) if name.endswith(".part")]


async def test_many_at_once(space: Path) -> None:
    """Writers never mix, readers never see half a text, and each list of the workspace is whole."""
    there, texts = tools(space), {letter * n for letter, n in (("A", 400_000), ("B", 1000))}
    await there["write_file"].run({"path": "shared", "content": "A" * 400_000})
    whole = await there["list_files"].run({"path": "."})
    calls = [there["write_file"].run({"path": "shared", "content": text}) for text in texts for _ in range(10)]
    calls += [there["read_file"].run({"path": "shared"}) for _ in range(20)]
    calls += [there["list_files"].run({"path": ""}) for _ in range(20)]
    found = await asyncio.gather(*calls)
    assert set(found[20:40]) <= texts
    lists = ["\n".join(name for name in text.split("\n") if not name.endswith(".part")) for text in found[40:]]
    assert set(lists) == {whole}


async def test_a_name_that_is_no_text(space: Path) -> None:
    (space / os.fsdecode(b"odd\xff")).write_text("x")
    assert "odd\N{REPLACEMENT CHARACTER}" in await tools(space)["list_files"].run({"path": "."})
