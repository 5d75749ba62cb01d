"""The command line of `hybrid`: its subcommands, and where the settings of `serve` come from.

A flag beats an environment variable, that beats the YAML file, that beats the default. Starts nothing.
Called by `__main__.py`.
"""

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from server import default_model, planning_args
from server.agents.budget import Limits
from server.options import Option, SettingsError, read_environment, read_file, refuse_settled, server_options
from server.planning_args import positive
from server.settings import ServerSettings

SOURCES = """\
Every option is also a key of the YAML file (without the dashes) and an environment variable (HYBRID_ and the name
in capitals): --max-model-len, max-model-len: and HYBRID_MAX_MODEL_LEN. A flag beats a variable, a variable beats the
file."""

LIMITS = (
    ("--max-seconds", "seconds", "seconds"),
    ("--max-total-tokens", "tokens", "tokens, read and written,"),
    ("--max-tool-calls", "tool_calls", "tool calls"),
    ("--max-subagents", "subagents", "sub-agents"),
)


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    top = argparse.ArgumentParser(
        prog="hybrid", description="Serve Kimi-K2.5-class models on one machine, routed experts in CPU RAM."
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_serve(commands)
    _add_chat(commands)
    _add_swarm(commands)
    _add_make_checkpoint(commands)
    _add_pack(commands)
    planning_args.add_commands(commands)
    commands.add_parser("version", help="print the versions of hybrid and what it runs on")
    return top


def serve_settings(
    given: argparse.Namespace, environ: Mapping[str, str], embedded: Callable[[], Path]
) -> ServerSettings:
    """Settings of `serve`; `embedded` is asked for the default model's directory only where no source names a model.

    Raises SettingsError naming the variable, or the file and key.
    """
    options = server_options()
    config = given.config or environ.get("HYBRID_CONFIG")
    from_file = read_file(Path(config), options) if config else {}
    flags = {option.field: getattr(given, option.field) for option in options if hasattr(given, option.field)}
    values: dict[str, Any] = {**from_file, **read_environment(environ, options), **flags}
    refuse_settled(values)
    if "model" not in values:
        values = {"served_model_name": default_model.NAME} | values | {"model": embedded()}
    if not values["model"].is_dir():
        raise SettingsError(f"--model {values['model']}: no such directory; name a checkpoint directory")
    return ServerSettings(**values)


def _add_serve(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    serve = commands.add_parser(
        "serve",
        help="start the server",
        description="Serve a checkpoint over an OpenAI-compatible HTTP interface.",
        epilog=SOURCES,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    serve.add_argument("--config", metavar="FILE", help="YAML file of options")
    for option in server_options():
        _add_option(serve, option)


def _add_option(serve: argparse.ArgumentParser, option: Option) -> None:
    # SUPPRESS: an attribute that is absent was not given, so that variable and file get their turn.
    common: dict[str, Any] = {"dest": option.field, "default": argparse.SUPPRESS, "help": described(option)}
    if option.kind == "switch":
        serve.add_argument(option.flag, action=argparse.BooleanOptionalAction, **common)
    elif option.kind == "choice":
        serve.add_argument(option.flag, choices=option.choices, **common)
    elif option.kind == "texts":
        serve.add_argument(option.flag, action=_Collect, type=_filled, metavar="TEXT", **common)
    else:
        metavar = {"path": "DIR", "file": "FILE", "text": "TEXT", "bytes": "SIZE"}.get(option.kind, "N")
        serve.add_argument(option.flag, type=_flag_type(option), metavar=metavar, **common)


def described(option: Option) -> str:
    """The help text with the default, unless the text tells it."""
    if option.field == "model":
        return f"{option.help} (default: {default_model.NAME}, the small demonstration model that ships with hybrid)"
    if option.default in (None, ()):
        return option.help
    return f"{option.help} (default: {option.default})"


def _flag_type(option: Option) -> Callable[[str], Any]:
    def convert(text: str) -> Any:
        try:
            return option.from_text(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"expected {option.expected}, found {text!r}") from None

    return convert


def _filled(text: str) -> str:
    if not text:  # "$KEY" of a shell where it is not set: an empty API key would let everyone in
        raise argparse.ArgumentTypeError("expected text that is not empty")
    return text


class _Collect(argparse.Action):
    """Gathers a repeated flag into a tuple."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        setattr(namespace, self.dest, (*getattr(namespace, self.dest, ()), values))


def _add_chat(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    chat = commands.add_parser(
        "chat",
        help="talk to a running server",
        description="Talk to a running server. With a prompt (or with text on standard input) one answer is printed; "
        "else a conversation starts. The answer goes to standard output, reasoning to standard error.",
    )
    chat.add_argument("prompt", nargs="*", help="what to ask")
    _add_upstream(chat)


def _add_upstream(command: argparse.ArgumentParser) -> None:
    """Which server is asked, and how."""
    command.add_argument("--url", default="http://127.0.0.1:8000", help="the server (default: %(default)s)")
    command.add_argument("--model", help="model name (default: the first one the server lists)")
    command.add_argument("--api-key", help="key to send (default: the variable HYBRID_API_KEY)")
    command.add_argument("--max-tokens", type=positive, metavar="N", help="longest answer (default: the server's)")
    mode = command.add_mutually_exclusive_group()
    mode.add_argument("--thinking", dest="thinking", action="store_true", default=None, help="let the model reason")
    mode.add_argument("--instant", dest="thinking", action="store_false", help="answer at once")


def _add_swarm(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    swarm = commands.add_parser(
        "swarm",
        help="give a task to an orchestrator and its sub-agents",
        description="Give a task to an orchestrator, which creates sub-agents and lets them work in parallel, against "
        "a running server (hybrid, or any that speaks OpenAI's chat completions with tools). The answer goes to "
        "standard output, the agents and the cost to standard error. Every turn and result is logged in --log.",
    )
    swarm.add_argument("task", nargs="+", help="what to do")
    _add_upstream(swarm)
    swarm.add_argument("--workspace", type=_filled, metavar="DIR", help="let agents read, write and list files in here")
    swarm.add_argument("--search-url", metavar="URL", help="let agents search the web with this SearXNG")
    swarm.add_argument("--log", type=Path, metavar="FILE", help="SQLite file of all runs (default: in XDG_STATE_HOME)")
    for flag, limit, what in LIMITS:
        swarm.add_argument(
            flag,
            dest=f"limit_{limit}",
            type=positive,
            metavar="N",
            default=int(getattr(Limits(), limit)),
            help=f"most {what} of the run (default: %(default)s)",
        )


def limits_of(given: argparse.Namespace) -> Limits:
    """The limits of `swarm`."""
    return Limits(**{limit: getattr(given, f"limit_{limit}") for _, limit, _ in LIMITS})


def _add_make_checkpoint(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    make = commands.add_parser(
        "make-checkpoint",
        help="write a random checkpoint in the published layout",
        description="Write a checkpoint of random weights in the published layout of the config's family.",
    )
    make.add_argument("--config", required=True, type=Path, metavar="FILE", help="config.json of the model to imitate")
    make.add_argument("--out", required=True, type=Path, metavar="DIR", help="directory to write; must be empty or new")
    make.add_argument("--seed", required=True, type=int, metavar="N", help="the weights are a function of it")
    make.add_argument(
        "--tokenizer", type=Path, metavar="DIR", help="directory to copy the tokenizer from (default: one of 256 bytes)"
    )


def _add_pack(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    pack = commands.add_parser(
        "pack",
        help="write a checkpoint's experts once in the order the kernels read them",
        description="Write a checkpoint's routed experts beside its shards, in the order the kernels read them. "
        "`hybrid serve` then maps that file: it starts sooner, and the experts may be larger than RAM. A run that was "
        "cut off goes on where it stopped.",
    )
    pack.add_argument("model", type=Path, metavar="MODEL", help="checkpoint directory (Hugging Face layout)")
    (option,) = (option for option in server_options() if option.field == "expert_format")
    pack.add_argument(option.flag, choices=option.choices, default=option.default, help=described(option))
