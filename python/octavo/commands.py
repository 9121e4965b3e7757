"""`octavo serve | chat | generate | quantize | evaluate | bench | top | version`: the flags of each command,
and what it runs.

Flags of the engine and of the server are derived from their dataclasses; `vllm_flags` says what
becomes of vLLM's others.
"""

import argparse
import difflib
import logging
import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from octavo import __version__
from octavo.config import EngineConfig
from octavo.options import add_flags, at_least, from_flags, parse_with
from octavo.server.config import ServerConfig
from octavo.vllm_flags import SETTINGS, add_vllm_flags, is_unsupported, warnings_of

if TYPE_CHECKING:
    from octavo.terminal import Sampling


def run(argv: Sequence[str]) -> int:
    """Runs the command of a command line and returns its exit code."""
    parser = build_parser()
    flag = argv[0].partition("=")[0] if argv else ""
    if flag.startswith("-") and flag not in _shown_flags(parser):
        parser.error(f"{flag}: flags come after the command")
    args = parse(parser, argv)
    return int(args.run(args))


class Parser(argparse.ArgumentParser):
    """argparse's own keeps silent where the help cannot be written."""

    def _print_message(self, message: str, file: Any = None) -> None:
        try:
            (sys.stderr if file is None else file).write(message)
        except BrokenPipeError:
            raise
        except OSError as error:
            raise ValueError(f"the standard output cannot be written: {error.strerror}") from None


def build_parser() -> argparse.ArgumentParser:
    """The parser of `octavo`; each command's function is in the result's `run`, its own parser in
    `parser`.
    """
    parser = Parser("octavo", description="An LLM inference engine and server.", allow_abbrev=False)
    parser.add_argument(
        "-v", "--version", action="version", version=f"octavo {__version__}", help="print the version and exit"
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, text: str, run: Callable[[argparse.Namespace], int]) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.", allow_abbrev=False)
        sub.set_defaults(run=run, parser=sub)
        return sub

    _add_serve_flags(command("serve", "serve a model over HTTP", run_serve))

    chat = command("chat", "talk to a model in the terminal", run_chat)
    _add_model(chat)
    chat.add_argument("--system", help="what the model is told before the conversation")
    _add_sampling_flags(chat, max_tokens=None)
    _add_engine_flags(chat, skip=["model"])

    generate = command("generate", "continue a text", run_generate)
    generate.add_argument("prompt", metavar="PROMPT", help="text to continue; - reads it from the standard input")
    _add_sampling_flags(generate, max_tokens=256)
    _add_engine_flags(generate)

    from octavo.evaluate.commands import add_arguments

    evaluate = command("evaluate", "measure a model's quality, alone or against another", run_evaluate)
    _add_model(evaluate)
    add_arguments(evaluate)

    from octavo.quantize.command import add_flags as add_quantize_flags

    add_quantize_flags(command("quantize", "make a checkpoint in 4 or 8 bits", run_quantize))

    from octavo.bench.commands import add_commands

    add_commands(command("bench", "measure", run_bench), _add_engine_flags)

    live = command("top", "watch a running server", run_top)
    live.add_argument("--url", default="http://127.0.0.1:8000", help="where it serves [default: %(default)s]")
    live.add_argument(
        "--interval",
        type=parse_with(at_least(0.05)),
        default=1.0,
        help="seconds between two looks [default: %(default)s]",
    )
    live.add_argument("--count", type=parse_with(at_least(1)), help="looks to take; default: until it is interrupted")

    command("version", "print the version", run_version)
    return parser


def parse(parser: argparse.ArgumentParser, argv: Sequence[str]) -> argparse.Namespace:
    """Parses as vLLM does (underscores in a flag count as dashes). What a flag means that is not
    ours is said in one line, under the usage of the command it was given to where that ends the
    program.
    """
    args, rest = parser.parse_known_args(_normalised(argv))
    chosen: argparse.ArgumentParser = getattr(args, "parser", parser)
    unknown = []
    for word in rest:
        flag = word.partition("=")[0]
        if is_unsupported(flag):
            chosen.error(f"{flag}: not supported yet")
        if flag.startswith("-"):
            near = difflib.get_close_matches(flag, _shown_flags(chosen), n=1, cutoff=0.7)
            unknown.append(f"{word} (did you mean {near[0]}?)" if near else word)
        else:
            unknown.append(word)
    if unknown:
        chosen.error(f"unrecognized arguments: {' '.join(unknown)}")
    for line in warnings_of(args):
        print(f"{parser.prog}: warning: {line}", file=sys.stderr)
    return args


def _normalised(argv: Sequence[str]) -> list[str]:
    """Flags with dashes for underscores, and those of `SETTINGS` without a key
    (`--flag.key value`).
    """
    words: list[str] = []
    for place, word in enumerate(argv):
        if word == "--":
            return [*words, *argv[place:]]
        match = re.fullmatch(r"(--[A-Za-z][\w-]*)((?:\.[\w.-]+)?)((?:=.*)?)", word, re.DOTALL)
        if match is None:
            words.append(word)
            continue
        flag, key, value = match.groups()
        flag = flag.replace("_", "-")
        words.append(flag + ("" if flag in SETTINGS else key) + value)
    return words


def _shown_flags(parser: argparse.ArgumentParser) -> list[str]:
    """The flags that a command's help lists, out of the help: argparse does not tell otherwise."""
    text = re.sub(r"\x1b\[[\d;]*m", "", parser.format_help())  # Python 3.14 colours it
    lines = re.findall(r"^  (-.*?)(?:  |$)", text, re.MULTILINE)
    return [flag for line in lines for flag in re.findall(r"(?<!\S)--?[a-z][\w-]*", line)]


def _add_engine_flags(parser: argparse.ArgumentParser, skip: Sequence[str] = ()) -> None:
    add_flags(parser, EngineConfig, title="engine", skip=skip)
    add_vllm_flags(parser)


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("positional_model", nargs="?", metavar="MODEL", help="the same as --model")
    add_model = parser.add_argument_group("model")
    add_model.add_argument(
        "--model", default=argparse.SUPPRESS, help=EngineConfig.__dataclass_fields__["model"].metadata["help"]
    )


def serve_parser(name: str) -> argparse.ArgumentParser:
    """The parser of vLLM's `api_server` module, which has the flags of `octavo serve`."""
    parser = Parser(name, description="Serve a model over HTTP.", allow_abbrev=False)
    _add_serve_flags(parser)
    return parser


def _add_serve_flags(parser: argparse.ArgumentParser) -> None:
    _add_model(parser)
    add_flags(parser, ServerConfig, title="server")
    _add_engine_flags(parser, skip=["model"])


def _add_sampling_flags(parser: argparse.ArgumentParser, max_tokens: int | None) -> None:
    shown = "up to the model's length" if max_tokens is None else max_tokens
    group = parser.add_argument_group(
        "sampling", "Where a flag is not given, the model's own default counts (see --generation-config), then ours."
    )
    group.add_argument("--max-tokens", type=int, help=f"longest answer [default: {shown}]")
    group.add_argument("--temperature", type=float, help="0: always the likeliest token [default: 0.7]")
    group.add_argument("--top-p", type=float, help="draw from this share of the probability [default: 1.0]")
    group.add_argument("--top-k", type=int, help="draw from this many tokens; 0: all [default: 0]")
    group.add_argument("--sampling-seed", type=int, help="makes the draws repeatable")
    parser.set_defaults(default_sampling={"temperature": 0.7, "max_tokens": max_tokens})


def engine_config(args: argparse.Namespace) -> EngineConfig:
    """The engine's configuration from parsed flags; a model may come by its flag or by its place."""
    by_place = getattr(args, "positional_model", None)
    by_flag = getattr(args, "model", None)
    if by_place is not None and by_flag is not None:
        raise ValueError(f"model: given twice, as {by_place!r} and with --model {by_flag!r}")
    if by_place is None and by_flag is None and hasattr(args, "positional_model"):
        _check_list_flags(getattr(args, "list_flags", ()))
    return from_flags(EngineConfig, args, **({"model": by_place} if by_place is not None else {}))


def _check_list_flags(uses: Sequence[tuple[str, Sequence[object]]]) -> None:
    """Without a model, a flag that takes several words may have taken the model's; the default
    model would be served in silence. Values are not shown: they may be keys.
    """
    for flag, values in uses:
        last = str(values[-1])
        if (
            len(values) > 1
            or last.startswith(("./", "../", "/", "~"))
            or last.endswith(".gguf")
            or os.path.exists(last)
        ):
            raise ValueError(
                f"model: none is given, and the last of the {len(values)} values of {flag} may be meant as one: "
                f"put the model before {flag}, or name it with --model"
            )


def run_serve(args: argparse.Namespace) -> int:
    """`octavo serve`."""
    _log_to_stderr(logging.INFO)
    logging.getLogger(__name__).info("octavo %s starts", __version__)  # the imports alone take seconds

    from octavo.server.serve import serve

    return serve(engine_config(args), from_flags(ServerConfig, args))


def run_chat(args: argparse.Namespace) -> int:
    """`octavo chat`."""
    from octavo.terminal import chat

    _log_to_stderr(logging.WARNING)
    return chat(engine_config(args), sampling(args), system=args.system)


def run_generate(args: argparse.Namespace) -> int:
    """`octavo generate`."""
    from octavo.terminal import generate

    _log_to_stderr(logging.WARNING)
    try:
        prompt = sys.stdin.read() if args.prompt == "-" else args.prompt
        prompt.encode()  # where Python lets pass what it cannot decode
    except UnicodeError as error:
        raise ValueError(f"{'the standard input' if args.prompt == '-' else 'PROMPT'} is not UTF-8: {error}") from None
    return generate(engine_config(args), sampling(args), prompt)


def run_quantize(args: argparse.Namespace) -> int:
    """`octavo quantize`."""
    from octavo.quantize.command import run

    _log_to_stderr(logging.WARNING)
    return run(args)


def run_bench(args: argparse.Namespace) -> int:
    """`octavo bench`."""
    from octavo.bench.commands import run

    _log_to_stderr(logging.WARNING)
    return run(args, engine_config(args) if args.bench not in ("memory", "serve") else None)


def run_evaluate(args: argparse.Namespace) -> int:
    """`octavo evaluate`."""
    from octavo.evaluate.commands import run

    _log_to_stderr(logging.WARNING)
    return run(args, engine_config(args))


def run_top(args: argparse.Namespace) -> int:
    """`octavo top`."""
    from octavo.top import run

    return run(args.url, args.interval, args.count)


def run_version(_: argparse.Namespace) -> int:
    """`octavo version`."""
    print(f"octavo {__version__}")
    return 0


def sampling(args: argparse.Namespace) -> "Sampling":
    """What the terminal commands draw with. Raises `ValueError` before a model is loaded."""
    from octavo.terminal import Sampling

    given = {name: getattr(args, name) for name in ("max_tokens", "temperature", "top_p", "top_k")}
    given["seed"] = args.sampling_seed  # --seed is the engine's
    return Sampling(args.default_sampling, {name: value for name, value in given.items() if value is not None})


def _log_to_stderr(level: int) -> None:
    """What Octavo says from `level` on, and warnings of the libraries it stands on."""
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr)
    logging.getLogger("octavo").setLevel(level)
