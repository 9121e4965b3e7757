"""Flags and environment variables of TGI's launcher, and what becomes of each: the words of
`octavo serve` that ask for the same.

Each flag has a variable of its name in upper case, which counts where the flag is not given. What
only tunes TGI's own machinery is accepted with a line that says what happens instead; what asks for
something else is refused by name.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence

_ONE_PROCESS = "one process runs the model and the server"
_BATCHES = "every step takes as many tokens of waiting prompts as --max-batch-prefill-tokens leaves room for"

RENAMED = {
    "--model-id": "--model",
    "--num-shard": "--tensor-parallel-size",
    "--dtype": "--dtype",
    "--max-concurrent-requests": "--max-waiting",
    "--max-best-of": "--max-best-of",
    "--max-stop-sequences": "--max-stop-sequences",
    "--max-top-n-tokens": "--max-top-n-tokens",
    "--max-input-tokens": "--max-input-tokens",
    "--max-input-length": "--max-input-tokens",
    "--max-total-tokens": "--max-model-len",
    "--max-batch-prefill-tokens": "--max-num-batched-tokens",
    "--max-batch-size": "--max-num-seqs",
    "--cuda-memory-fraction": "--gpu-memory-utilization",
    "--hostname": "--host",
    "--port": "--port",
    "--api-key": "--api-key",
    "--payload-limit": "--max-body-size",
    "--graceful-termination-timeout": "--shutdown-timeout",
}
"""The value goes to the other flag as it is."""

DEFAULTS = {"--hostname": "0.0.0.0", "--port": "3000", "--graceful-termination-timeout": "90"}
"""Where the launcher's defaults are not those of `octavo serve`. TGI's limits of 128 requests and 2 MB
are not among them: they would refuse what can be served.
"""

WITHOUT_EFFECT = {
    "--disable-custom-kernels": "there is one set of kernels",
    "--disable-grammar-support": "a request that brings no grammar pays for none",
    "--enable-prefill-logprobs": "what a request asks for is computed for it alone",
    "--huggingface-hub-cache": "the variable HF_HOME moves Hugging Face's cache",
    "--json-output": "lines of the log are text",
    "--master-addr": _ONE_PROCESS,
    "--master-port": _ONE_PROCESS,
    "--max-batch-total-tokens": "the KV cache takes the memory that --cuda-memory-fraction leaves",
    "--max-client-batch-size": "a request of TGI's has one input",
    "--max-image-fetch-size": "only text is served",
    "--max-waiting-tokens": _BATCHES,
    "--prometheus-port": "metrics are on the server's own port, at /metrics",
    "--shard-uds-path": _ONE_PROCESS,
    "--startup-timeout": "the start has no time limit",
    "--trust-remote-code": "code that comes with a model is never run; a model that needs it is refused",
    "--usage-stats": "nothing is sent to anybody",
    "--validation-workers": "two threads tokenise",
    "--waiting-served-ratio": _BATCHES,
    "--weights-cache-override": "the variable HF_HOME moves Hugging Face's cache",
}
"""Accepted, with a line that says why nothing comes of it."""

NEUTRAL = {
    "--disable-usage-stats": ("true",),
    "--lora-adapters": ("",),
    "--revision": ("main",),
    "--sharded": ("false",),
}
"""With a value that says what happens anyway; accepted in silence. Any other value is refused."""

REFUSED = ("--cors-allow-origin", "--env", "--ngrok", "--ngrok-authtoken", "--ngrok-edge", "--otlp-endpoint",
           "--otlp-service-name", "--rope-factor", "--rope-scaling", "--tokenizer-config-path", "--watermark-delta",
           "--watermark-gamma")  # fmt: skip
"""Refused by name, as flags and as variables, but for `ENV`, which is no variable of TGI's."""

SWITCHES = frozenset(("--disable-custom-kernels", "--disable-grammar-support", "--disable-usage-stats",
                      "--enable-prefill-logprobs", "--env", "--json-output", "--ngrok",
                      "--trust-remote-code"))  # fmt: skip
"""Flags that need no value; their variables hold true or false."""

_QUANTIZATIONS = {
    "awq": "awq", "gptq": "gptq", "marlin": "gptq", "fp8": "fp8", "compressed-tensors": "compressed-tensors",
    "eetq": "int8",
}  # fmt: skip
_KV_DTYPES = {"fp8_e4m3fn": "fp8"}

_NOT_FROM_THE_ENVIRONMENT = frozenset(("--hostname", "--env"))
"""HOSTNAME is the name of the machine, which shells and containers set, and nobody's wish to listen
there.
"""


def serve_words(argv: Sequence[str], environment: Mapping[str, str], prog: str) -> tuple[list[str], list[str]]:
    """The words of `octavo serve` for a launcher's command line, and a line for each flag without
    effect. Ends the program, as argparse does, for what is refused.
    """
    parser = launcher_parser(prog)
    given = {flag: value for flag, value in vars(parser.parse_args(argv)).items() if value is not None}
    for flag in _flags():
        value = environment.get(_variable(flag), "").strip()
        if flag not in given and value and flag not in _NOT_FROM_THE_ENVIRONMENT:
            if flag in SWITCHES and value.lower() in ("false", "0", "no"):
                continue
            given[flag] = value
    words, lines = [], []
    for flag, value in {**DEFAULTS, **given}.items():
        if flag in RENAMED:
            words += [RENAMED[flag], value]
        elif flag in WITHOUT_EFFECT:
            lines.append(f"{flag} has no effect: {WITHOUT_EFFECT[flag]}")
        elif flag in NEUTRAL:
            if value.lower() not in NEUTRAL[flag]:
                parser.error(f"{flag} {value}: not supported yet")
        elif flag in _TRANSLATED:
            try:
                words += _TRANSLATED[flag](value)
            except ValueError as error:
                parser.error(f"{flag} {value}: {error}")
        else:
            parser.error(f"{flag}: not supported yet")
    return words, lines


def launcher_parser(prog: str) -> argparse.ArgumentParser:
    """The parser of the launcher; a flag's value is kept under the flag, as text."""
    parser = argparse.ArgumentParser(
        prog,
        description="Serve a model with the flags and environment variables of TGI's launcher.",
        allow_abbrev=False,
    )
    for flag in _flags():
        what = _help(flag)
        if flag in SWITCHES:
            parser.add_argument(flag, dest=flag, action="store_const", const="true", help=what)
        else:
            parser.add_argument(flag, dest=flag, metavar="VALUE", help=what)
    return parser


def _flags() -> list[str]:
    return [*RENAMED, *_TRANSLATED, *NEUTRAL, *WITHOUT_EFFECT, *REFUSED]


def _variable(flag: str) -> str:
    return flag.removeprefix("--").replace("-", "_").upper()


def _help(flag: str) -> str:
    if flag in RENAMED:
        default = f" [default: {DEFAULTS[flag]}]" if flag in DEFAULTS else ""
        text = f"{RENAMED[flag]} of octavo serve{default}"
    elif flag in WITHOUT_EFFECT:
        text = f"no effect: {WITHOUT_EFFECT[flag]}"
    elif flag in NEUTRAL:
        text = f"only {' or '.join(value or 'nothing' for value in NEUTRAL[flag])}"
    else:
        text = "as TGI has it" if flag in _TRANSLATED else "not supported yet"
    return text if flag in _NOT_FROM_THE_ENVIRONMENT else f"{text} [env: {_variable(flag)}]"


def _one_of(known: Mapping[str, str], flag: str) -> Callable[[str], list[str]]:
    def translate(value: str) -> list[str]:
        if value not in known:
            raise ValueError(f"not supported, only {', '.join(known)}")
        return [flag, known[value]]

    return translate


def _graphs(value: str) -> list[str]:
    """Batch sizes with commas between them; 0 for none."""
    sizes = [size.strip() for size in value.split(",")]
    return ["--enforce-eager"] if sizes == ["0"] else ["--cudagraph-capture-sizes", *sizes]


def _drafts(value: str) -> list[str]:
    """Tokens to guess by what a text says already, which is TGI's way without a drafter; 0 for none."""
    return [] if value == "0" else ["--spec-method", "ngram", "--spec-tokens", value]


_TRANSLATED: dict[str, Callable[[str], list[str]]] = {
    "--quantize": _one_of(_QUANTIZATIONS, "--quantization"),
    "--kv-cache-dtype": _one_of(_KV_DTYPES, "--kv-cache-dtype"),
    "--cuda-graphs": _graphs,
    "--speculate": _drafts,
}
