"""Tools for files inside one directory, and nowhere else.

A path is walked one component at a time from the open directory, without following links, so nothing outside can be
named: neither by `..`, nor by an absolute path, nor by a symbolic link, put there before or meanwhile. Called by
`swarm.py`.
"""

import asyncio
import contextlib
import errno
import os
import secrets
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from server.agents.tools import Json, Tool, ToolError, declared

MOST_READ = 1 << 20  # bytes of a file that is read
MOST_WRITTEN = 8 << 20
MOST_LISTED = 1000  # names
DEEPEST = 32  # directories; one is held open for each
NO_LINK = "a symbolic link, which is not followed"


@dataclass(frozen=True, slots=True)
class FileTool:
    """One of the three."""

    declaration: Json
    work: Callable[[dict[str, str]], str]

    async def run(self, arguments: dict[str, str]) -> str:
        """As `Tool`."""
        return await asyncio.to_thread(self.work, arguments)


def file_tools(workspace: Path) -> list[Tool]:
    """Read, write and list the files of `workspace`. Raises OSError where it is no directory."""
    space = _Workspace(workspace)
    return [
        FileTool(
            declared("read_file", "Read a text file of the workspace.", path=""),
            lambda given: space.read(given["path"]),
        ),
        FileTool(
            declared("write_file", "Write a text file.", content="", path=""),
            lambda given: space.write(given["path"], given["content"]),
        ),
        FileTool(
            declared("list_files", "List the files of a folder.", path=""),
            lambda given: space.listed(given["path"]),
        ),
    ]


class _Workspace:
    """The directory, held open: renaming it changes nothing."""

    def __init__(self, path: Path) -> None:
        self._root = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    def __del__(self) -> None:
        with contextlib.suppress(OSError, AttributeError):
            os.close(self._root)

    def read(self, path: str) -> str:
        with self._parent(path) as (directory, name):
            with _plainly(path), open(_plain_file(path, name, os.O_RDONLY, directory), "rb") as stream:
                raw = stream.read(MOST_READ + 1)
        if len(raw) > MOST_READ:
            raise ToolError(f"{path}: larger than {MOST_READ:,} bytes")
        return raw.decode(errors="replace")

    def write(self, path: str, content: str) -> str:
        raw = content.encode(errors="replace")
        if len(raw) > MOST_WRITTEN:
            raise ToolError(f"{path}: more than {MOST_WRITTEN:,} bytes")
        with self._parent(path, make=True) as (directory, name), _plainly(path):
            with contextlib.suppress(FileNotFoundError):
                there = os.stat(name, dir_fd=directory, follow_symlinks=False)
                if not stat.S_ISREG(there.st_mode):
                    raise ToolError(f"{path}: {NO_LINK if stat.S_ISLNK(there.st_mode) else 'not a plain file'}")
            # A file of its own, then one move: nobody reads half a text, and a full disk leaves the old one.
            part = f".{secrets.token_hex(8)}.part"
            file = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644, dir_fd=directory)
            try:
                with open(file, "wb") as stream:
                    stream.write(raw)
                os.replace(part, name, src_dir_fd=directory, dst_dir_fd=directory)
            except BaseException:
                with contextlib.suppress(OSError):
                    os.unlink(part, dir_fd=directory)
                raise
        return f"wrote {len(raw):,} bytes to {path}"

    def listed(self, path: str) -> str:
        parts = _parts(path)
        with contextlib.ExitStack() as opened:
            directory = self._descend(opened, path, parts, make=False)
            # Opened anew: the place in a directory belongs to the open file, and others list the workspace too.
            listing = _open(path, ".", os.O_RDONLY | os.O_DIRECTORY, directory)
            opened.callback(os.close, listing)
            with _plainly(path), os.scandir(listing) as entries:
                names = sorted(f"{one.name}/" if one.is_dir(follow_symlinks=False) else one.name for one in entries)
            names = [os.fsencode(name).decode(errors="replace") for name in names]
        more = [f"[{len(names) - MOST_LISTED:,} more]"] if len(names) > MOST_LISTED else []
        return "\n".join([*names[:MOST_LISTED], *more]) or "(empty)"

    @contextlib.contextmanager
    def _parent(self, path: str, make: bool = False) -> Iterator[tuple[int, str]]:
        """The open directory that the path's last component is in, and that component."""
        parts = _parts(path)
        if not parts:
            raise ToolError(f"{path!r}: name a file")
        with contextlib.ExitStack() as opened:
            yield self._descend(opened, path, parts[:-1], make), parts[-1]

    def _descend(self, opened: contextlib.ExitStack, path: str, parts: list[str], make: bool) -> int:
        directory = self._root
        for part in parts:
            if make:
                with _plainly(path), contextlib.suppress(FileExistsError):
                    os.mkdir(part, dir_fd=directory)
            directory = _open(path, part, os.O_RDONLY | os.O_DIRECTORY, directory)
            opened.callback(os.close, directory)
        return directory


def _parts(path: str) -> list[str]:
    """Components of a relative path. Raises ToolError for one that could lead out."""
    if "\0" in path:
        raise ToolError("path: a NUL character")
    if path.startswith("/"):
        raise ToolError(f"{path}: must be relative to the workspace")
    parts = [part for part in path.split("/") if part not in ("", ".")]
    if len(parts) > DEEPEST:
        raise ToolError(f"path: more than {DEEPEST} directories")
    if ".." in parts:
        raise ToolError(f"{path}: .. is not allowed")
    return parts


def _open(path: str, name: str, flags: int, directory: int) -> int:
    with _plainly(path):
        return os.open(name, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644, dir_fd=directory)


def _plain_file(path: str, name: str, flags: int, directory: int) -> int:
    """Open it if it is neither a directory nor a device nor a pipe, for which nobody waits here."""
    file = _open(path, name, flags | os.O_NONBLOCK, directory)
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise ToolError(f"{path}: not a plain file")
    return file


@contextlib.contextmanager
def _plainly(path: str) -> Iterator[None]:
    """What the system refuses, as one line for the model."""
    try:
        yield
    except OSError as error:
        why = NO_LINK if error.errno == errno.ELOOP else str(error.strerror).lower()
        raise ToolError(f"{path}: {why}") from None
