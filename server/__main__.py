"""The `hybrid` command; `python -m server` is the same. Joins the parts and turns errors into exit statuses.

0 fine, 1 run-time failure, 2 usage, 78 configuration, 130 interrupted; `hybrid doctor` also 3 slow, 4 broken.
"""

import argparse
import asyncio
import contextlib
import json
import logging
import os
import platform
import sys
from collections.abc import Callable, Iterator, Mapping
from importlib import metadata
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from server import args, chat_client, default_model
from server.agents.journal import JournalError
from server.agents.run import RunFailed
from server.options import SettingsError
from server.upstream import Upstream, UpstreamError, server_url

FAILURE, CONFIGURATION, INTERRUPTED, TERMINATED = 1, 78, 130, 143


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns its exit status."""
    given = args.parser().parse_args(argv)
    commands: dict[str, Callable[[argparse.Namespace, Mapping[str, str]], int]] = {
        "serve": _serve,
        "chat": _chat,
        "swarm": _swarm,
        "make-checkpoint": _make_checkpoint,
        "pack": _pack,
        "version": _version,
        "measure": _planning,
        "plan": _planning,
        "tune": _planning,
        "doctor": _planning,
        "simulate": _planning,
        "replay": _planning,
    }
    try:
        return commands[given.command](given, os.environ)
    except KeyboardInterrupt:
        return INTERRUPTED
    except SettingsError as error:
        return _fail(str(error), CONFIGURATION)
    except BrokenPipeError:  # `hybrid … | head`: nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILURE


def _serve(given: argparse.Namespace, environ: Mapping[str, str]) -> int:
    settings = args.serve_settings(given, environ, _default_model)
    logging.basicConfig(level=settings.log_level.upper(), format="%(asctime)s %(levelname)s %(message)s")
    from server.app import run  # aiohttp takes a while to import: not for `hybrid version`

    return run(settings)


def _default_model() -> Path:
    model = default_model.directory()
    _tell(default_model.NOTICE)
    return model


def _chat(given: argparse.Namespace, environ: Mapping[str, str]) -> int:
    prompt = " ".join(given.prompt)
    is_terminal = sys.stdin is not None and sys.stdin.isatty()
    if sys.stdin is not None and not is_terminal:  # None: standard input is closed
        prompt = "\n".join(part for part in (prompt, sys.stdin.read().strip()) if part)
    client = chat_client.ChatClient(
        _upstream(given, environ),
        thinking=given.thinking,
        max_tokens=given.max_tokens,
    )
    try:
        if prompt or not is_terminal:
            asyncio.run(client.ask(prompt))
        else:
            chat_client.converse(client)
    except UpstreamError as error:
        return _fail(chat_client.printable(str(error)), FAILURE)
    return 0


def _swarm(given: argparse.Namespace, environ: Mapping[str, str]) -> int:
    from server import swarm

    try:
        tools = swarm.base_tools(Path(given.workspace) if given.workspace else None, given.search_url)
    except OSError as error:
        return _fail(f"--workspace {given.workspace}: {error.strerror}; name a directory", CONFIGURATION)
    asked = swarm.Swarm(
        _upstream(given, environ),
        tools,
        args.limits_of(given),
        chat_client.options(given.thinking, given.max_tokens),
        given.log or swarm.default_log(environ),
    )
    try:
        outcome = asyncio.run(asked.run(" ".join(given.task), Console(stderr=True)))
    except (RunFailed, JournalError) as error:
        return _fail(chat_client.printable(str(error)), FAILURE)
    except asyncio.CancelledError:
        return TERMINATED
    if sys.stdout is not None:
        sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
        print(chat_client.printable(outcome.answer) if sys.stdout.isatty() else outcome.answer)
    _tell(swarm.cost_of(outcome))
    return FAILURE if outcome.limit else 0


def _upstream(given: argparse.Namespace, environ: Mapping[str, str]) -> Upstream:
    return Upstream(server_url(given.url), given.model, given.api_key or environ.get("HYBRID_API_KEY"))


def _make_checkpoint(given: argparse.Namespace, environ: Mapping[str, str]) -> int:
    from hybrid.random_checkpoint import write_checkpoint

    try:
        config = json.loads(given.config.read_bytes())
    except OSError as error:
        return _fail(f"--config {given.config}: {error.strerror}", CONFIGURATION)
    except ValueError as error:
        return _fail(f"--config {given.config}: not JSON: {error}", CONFIGURATION)
    try:
        with _bar() as show:
            write_checkpoint(
                config,
                given.out,
                given.seed,
                given.tokenizer,
                progress=lambda done, total: show("writing", done, total),
            )
    except ValueError as error:
        return _fail(str(error), CONFIGURATION)
    except OSError as error:
        return _fail(f"--out {given.out}: {error.strerror}", FAILURE)
    print(given.out)
    return 0


def _pack(given: argparse.Namespace, environ: Mapping[str, str]) -> int:
    from hybrid.config import ModelConfig
    from offload.checkpoint import Checkpoint
    from offload.store import pack_store

    try:
        model = ModelConfig.from_directory(given.model)
        with _bar() as show:
            path, notices = pack_store(
                Checkpoint(given.model),
                model.expert_name,
                model.expert_geometry,
                model.moe_layers,
                given.expert_format,
                show,
            )
    except (ValueError, FileNotFoundError) as error:  # ConfigError and CheckpointError among them
        return _fail(str(error), CONFIGURATION)
    for line in notices:
        _tell(line)
    print(path)
    return 0


@contextlib.contextmanager
def _bar() -> Iterator[Callable[[str, int, int], None]]:
    """Shows (stage, bytes done, bytes in all) on a terminal."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty()) as bars:
        bar = bars.add_task("", total=None)
        yield lambda stage, done, total: bars.update(bar, description=stage, completed=done, total=total)


def _planning(given: argparse.Namespace, environ: Mapping[str, str]) -> int:
    from server import planning  # not for `hybrid version`

    return planning.run(given, environ)


def _version(given: argparse.Namespace, environ: Mapping[str, str]) -> int:
    print(f"hybrid {_installed('hybrid')}")
    print(f"Python {platform.python_version()}, torch {_installed('torch')}, numba {_installed('numba')}")
    return 0


def _installed(package: str) -> str:
    """The version from the package's metadata: importing torch only to ask would take seconds."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "(not installed)"


def _tell(text: str) -> None:
    if sys.stderr is not None:
        print(text, file=sys.stderr, flush=True)


def _fail(text: str, status: int) -> int:
    _tell(f"hybrid: {text}")
    return status


if __name__ == "__main__":
    sys.exit(main())
