"""`octavo serve | chat | generate | bench | version`.

Flags of the engine and of the server are derived from their dataclasses. Flags of vLLM that have no meaning here yet
are refused by name: ignoring one would serve something else than was asked for.
"""

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from octavo import __version__
from octavo.config import EngineConfig
from octavo.options import add_flags, from_flags
from octavo.server.config import ServerConfig

if TYPE_CHECKING:
    from octavo.terminal import Sampling

_VLLM_FLAGS = """
--allow-credentials --allowed-headers --allowed-methods --allowed-origins --async-scheduling
--chat-template-content-format --code-revision --compilation-config --config --config-format --cpu-offload-gb
--data-parallel-size --decode-context-parallel-size --default-mm-loras --disable-cascade-attn
--disable-custom-all-reduce --disable-hybrid-kv-cache-manager --disable-log-requests --disable-sliding-window
--distributed-executor-backend --download-dir --enable-auto-tool-choice --enable-eplb --enable-expert-parallel
--enable-force-include-usage --enable-log-requests --enable-lora --enable-prompt-embeds --enable-prompt-tokens-details
--enable-request-id-headers --enable-sleep-mode --guided-decoding-backend --headless
--hf-config-path --hf-overrides --hf-token --ignore-patterns --kv-cache-dtype --kv-events-config
--kv-offloading-backend --kv-offloading-size --kv-transfer-config --limit-mm-per-prompt --log-config-file
--logits-processors --long-prefill-token-threshold --lora-modules --max-cpu-loras --max-log-len --max-logprobs
--max-lora-rank --max-loras --max-num-partial-prefills --max-num-queued-tokens --max-parallel-loading-workers
--middleware --mm-processor-kwargs --model-impl --num-gpu-blocks-override --num-lookahead-slots --otlp-traces-endpoint
--override-generation-config --performance-mode --pipeline-parallel-size --preemption-mode --prefix-caching-hash-algo
--profiler-config --quantization-config --reasoning-parser --response-role --return-tokens-as-token-ids --revision
--root-path --rope-scaling --rope-theta --safetensors-load-strategy --scheduler-cls --skip-tokenizer-init
--spec-method --spec-model --spec-tokens --speculative-config --ssl-ca-certs --ssl-cert-reqs --ssl-certfile
--ssl-keyfile --stream-interval --structured-outputs-config --swap-space --task --tokenizer-mode --tokenizer-revision
--tool-call-parser --tool-parser-plugin --tool-server --trust-remote-code --uds --use-v2-block-manager --worker-cls
"""
UNSUPPORTED_VLLM_FLAGS = frozenset(_VLLM_FLAGS.split())
"""From vLLM's command line, without those that work."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns the exit code: 2 where the user can mend it."""
    parser = build_parser()
    args = parse(parser, sys.argv[1:] if argv is None else argv)
    try:
        return int(args.run(args))
    except (ValueError, OSError) as error:
        print(f"octavo: error: {error}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        print(f"octavo: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def build_parser() -> argparse.ArgumentParser:
    """The parser of `octavo`; each command's function is in the result's `run`."""
    parser = argparse.ArgumentParser("octavo", description="An LLM inference engine and server.", allow_abbrev=False)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    serve = commands.add_parser("serve", help="serve a model over HTTP", allow_abbrev=False)
    add_serve_flags(serve)
    serve.set_defaults(run=run_serve)

    chat = commands.add_parser("chat", help="talk to a model in the terminal", allow_abbrev=False)
    _add_model(chat)
    chat.add_argument("--system", help="what the model is told before the conversation")
    _add_sampling_flags(chat, max_tokens=None)
    add_flags(chat, EngineConfig, title="engine", skip=["model"])
    chat.set_defaults(run=run_chat)

    generate = commands.add_parser("generate", help="continue a text", allow_abbrev=False)
    generate.add_argument("prompt", help="text to continue; - reads it from the standard input")
    _add_sampling_flags(generate, max_tokens=256)
    add_flags(generate, EngineConfig, title="engine")
    generate.set_defaults(run=run_generate)

    from octavo.bench.commands import add_commands

    bench = commands.add_parser("bench", help="measure", allow_abbrev=False)
    add_commands(bench, lambda sub: add_flags(sub, EngineConfig, title="engine"))
    bench.set_defaults(run=run_bench)

    version = commands.add_parser("version", help="print the version")
    version.set_defaults(run=run_version)
    return parser


def parse(parser: argparse.ArgumentParser, argv: Sequence[str]) -> argparse.Namespace:
    """Parses as vLLM does (underscores in a flag count as dashes) and says which of its flags are not supported yet."""
    args, rest = parser.parse_known_args([_dashes(word) for word in argv])
    for word in rest:
        flag = word.partition("=")[0]
        if flag in UNSUPPORTED_VLLM_FLAGS or flag.replace("--no-", "--", 1) in UNSUPPORTED_VLLM_FLAGS:
            parser.error(f"{flag}: not supported yet")
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return args


def _dashes(word: str) -> str:
    if not word.startswith("--"):
        return word
    flag, equals, value = word.partition("=")
    return flag.replace("_", "-") + equals + value


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("positional_model", nargs="?", metavar="MODEL", help="the same as --model")
    add_model = parser.add_argument_group("model")
    add_model.add_argument(
        "--model", default=argparse.SUPPRESS, help=EngineConfig.__dataclass_fields__["model"].metadata["help"]
    )


def add_serve_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of `octavo serve`, which are also those of vLLM's `api_server` module."""
    _add_model(parser)
    add_flags(parser, ServerConfig, title="server")
    add_flags(parser, EngineConfig, title="engine", skip=["model"])


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
    """Without a model, a flag that takes several words may have taken the model's; the default model would be served
    in silence. Values are not shown: they may be keys.
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
    from octavo.server.serve import serve

    _log_to_stderr(logging.INFO)
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
    prompt = sys.stdin.read() if args.prompt == "-" else args.prompt
    return generate(engine_config(args), sampling(args), prompt)


def run_bench(args: argparse.Namespace) -> int:
    """`octavo bench`."""
    from octavo.bench.commands import run

    _log_to_stderr(logging.WARNING)
    return run(args, engine_config(args) if args.bench not in ("memory", "serve") else None)


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
    logging.basicConfig(
        level=level, format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr
    )
