"""Flags of vLLM's command line, and options of its `LLM`, that Octavo has no option for, and what
becomes of each.

People bring their deploy lines along. A flag that asks for nothing but what happens here anyway, or
that only tunes vLLM's own machinery, is accepted, the latter with a line that says what happens
instead. A flag that asks for something else is refused by name: ignoring it would serve another
thing than was asked for.
"""

import argparse
import difflib
from collections.abc import Collection, Mapping, Sequence
from typing import Any

_NOT_LOGGED = "requests are not logged"
_ONLY_TEXT = "only text is served"
_ONE_PROCESS = "one process runs the model and the server"
_OWN_KERNELS = "kernels are written by hand, and nothing is compiled by torch"

SWITCHES = {
    "--async-scheduling": "on a GPU a step is always planned while another runs",
    "--disable-async-output-proc": "on a GPU outputs are always read while the next step runs",
    "--disable-cascade-attn": "there is no cascade attention",
    "--disable-custom-all-reduce": "one GPU has nothing to reduce",
    "--disable-fastapi-docs": "no documentation is served",
    "--disable-frontend-multiprocessing": _ONE_PROCESS,
    "--disable-log-requests": _NOT_LOGGED,
    "--disable-mm-preprocessor-cache": _ONLY_TEXT,
    "--disable-uvicorn-access-log": _NOT_LOGGED,
    "--enable-auto-tool-choice": "calls of tools are always told apart, where --tool-call-parser knows their format",
    "--enable-prompt-tokens-details": "the usage in an answer always has them",
    "--enable-request-id-headers": "every answer has an X-Request-Id",
    "--enable-tokenizer-info-endpoint": "/tokenizer_info is always there",
    "--interleave-mm-strings": _ONLY_TEXT,
    "--language-model-only": _ONLY_TEXT,
    "--skip-mm-profiling": _ONLY_TEXT,
    "--trust-remote-code": "code that comes with a model is never run; a model that needs it is refused",
    "--use-tqdm-on-load": "loading shows a progress bar on a terminal, and elsewhere none",
    "--use-v2-block-manager": "there is one block manager",
}
"""Without a value. Their `--no-` form is an effect we do not have, so it is refused, but for
`_BOTH_WAYS`.
"""

_BOTH_WAYS = {"--trust-remote-code", "--use-tqdm-on-load", "--disable-cascade-attn", "--disable-custom-all-reduce"}
"""Switches of things that are not here: turned on or off, the same happens."""

SETTINGS = {
    "--attention-backend": _OWN_KERNELS,
    "--code-revision": "code that comes with a model is never run",
    "--compilation-config": _OWN_KERNELS,
    "--disable-access-log-for-endpoints": _NOT_LOGGED,
    "--distributed-executor-backend": _ONE_PROCESS,
    "--download-dir": "hub models are kept in Hugging Face's cache, which the variable HF_HOME moves",
    "--h11-max-header-count": "headers have the limits of aiohttp",
    "--h11-max-incomplete-event-size": "headers have the limits of aiohttp",
    "--limit-mm-per-prompt": _ONLY_TEXT,
    "--max-context-len-to-capture": "see --cudagraph-capture-sizes",
    "--max-log-len": _NOT_LOGGED,
    "--max-parallel-loading-workers": "weights go straight to the device, one after another",
    "--max-seq-len-to-capture": "see --cudagraph-capture-sizes",
    "--media-io-kwargs": _ONLY_TEXT,
    "--mm-processor-cache-gb": _ONLY_TEXT,
    "--mm-processor-kwargs": _ONLY_TEXT,
    "--optimization-level": _OWN_KERNELS,
    "--prefix-caching-hash-algo": "prefixes are told apart by BLAKE3 under a secret key",
    "--safetensors-load-strategy": "weights are mapped into memory and go straight to the device",
    "--swap-space": "a request that has to give way is computed again, and nothing is swapped",
    "--uvicorn-log-level": "there is no uvicorn",
}
"""With one value, whatever it is."""

NEUTRAL = {
    "--api-server-count": ("1",),
    "--chat-template-content-format": ("auto",),
    "--config-format": ("auto", "hf"),
    "--convert": ("auto", "none", "embed"),
    "--cpu-offload-gb": ("0", "0.0"),
    "--data-parallel-size": ("1",),
    "--decode-context-parallel-size": ("1",),
    "--long-prefill-token-threshold": ("0",),
    "--max-long-partial-prefills": ("1",),
    "--max-num-partial-prefills": ("1",),
    "--model-impl": ("auto", "vllm"),
    "--nnodes": ("1",),
    "--node-rank": ("0",),
    "--num-lookahead-slots": ("0",),
    "--num-scheduler-steps": ("1",),
    "--pipeline-parallel-size": ("1",),
    "--preemption-mode": ("recompute",),
    "--prefill-context-parallel-size": ("1",),
    "--response-role": ("assistant",),
    "--revision": ("main",),
    "--scheduler-delay-factor": ("0", "0.0"),
    "--stream-interval": ("1",),
    "--tokenizer-mode": ("auto",),
    "--tokenizer-revision": ("main",),
}
"""With a value that says what happens anyway; accepted in silence. Any other value is refused."""

_SHORT = {"--pipeline-parallel-size": "-pp", "--data-parallel-size": "-dp", "--optimization-level": "-O"}

_UNSUPPORTED = """
--additional-config --all2all-backend
--allowed-local-media-path --attention-config --calculate-kv-scales --collect-detailed-traces --config
--data-parallel-address --data-parallel-backend --data-parallel-external-lb --data-parallel-hybrid-lb
--data-parallel-rank --data-parallel-rpc-port --data-parallel-size-local --data-parallel-start-rank
--default-chat-template-kwargs --default-mm-loras --disable-chunked-mm-input --disable-hybrid-kv-cache-manager
--disable-sliding-window --ec-transfer-config --enable-dbo --enable-eplb
--enable-expert-parallel --enable-force-include-usage --enable-log-deltas --enable-log-outputs --enable-log-requests
--enable-lora --enable-lora-bias --enable-mm-embeds --enable-prompt-embeds --enable-server-load-tracking
--enable-sleep-mode --enable-ssl-refresh --eplb-config
--exclude-tools-when-tool-choice-none --fully-sharded-loras --guided-decoding-backend --headless --hf-config-path
--hf-token --ignore-patterns --kernel-config --kv-events-config --kv-offloading-backend
--kv-offloading-size --kv-sharing-fast-prefill --kv-transfer-config --log-config-file --logits-processor-pattern
--logits-processors --lora-dtype --lora-extra-vocab-size --lora-modules --mamba-block-size --mamba-cache-dtype
--mamba-ssm-cache-dtype --master-addr --master-port --max-cpu-loras --max-lora-rank --max-loras
--max-num-queued-tokens --middleware --mm-encoder-tp-mode --model-loader-extra-config --moe-backend
--num-gpu-blocks-override --otlp-traces-endpoint --override-generation-config
--performance-mode --profiler-config --quantization-config
--reasoning-parser-plugin --return-tokens-as-token-ids --root-path --rope-scaling --rope-theta --scheduler-cls
--show-hidden-metrics-for-version --skip-tokenizer-init --ssl-ca-certs --ssl-cert-reqs
--ssl-certfile --ssl-ciphers --ssl-keyfile --structured-outputs-config --tokens-only --tool-parser-plugin --tool-server
--uds --worker-cls --worker-extension-cls
"""
UNSUPPORTED = frozenset(_UNSUPPORTED.split())
"""Refused by name. `--no-enable-...` of them asks for what happens, and is accepted: in silence,
but for `--no-enable-log-requests`, which people set on purpose.
"""


_WHOLE = frozenset({"--hf-overrides", "--override-pooler-config", "--pooler-config"})
"""Options of ours that take JSON, and no key of it (`--config.key`)."""


def add_vllm_flags(parser: argparse.ArgumentParser) -> None:
    """Has `parser` accept the harmless flags, which its help does not show; see `warnings_of`."""
    for flag, what in SWITCHES.items():
        names = [flag, flag.replace("--", "--no-", 1)] if flag in _BOTH_WAYS else [flag]
        parser.add_argument(*names, nargs=0, action=_NoEffect, what=what)
    parser.add_argument("--no-enable-log-requests", nargs=0, action=_NoEffect, what=_NOT_LOGGED)
    for flag, what in SETTINGS.items():
        parser.add_argument(*_names(flag), action=_NoEffect, what=what)
    for flag, values in NEUTRAL.items():
        parser.add_argument(*_names(flag), action=_OnlyNeutral, values=values)
    for flag in UNSUPPORTED:
        if flag.startswith("--enable-") and flag != "--enable-log-requests":
            parser.add_argument(
                flag.replace("--", "--no-", 1), action="store_true", dest=argparse.SUPPRESS, help=argparse.SUPPRESS
            )


def warnings_of(args: argparse.Namespace) -> list[str]:
    """One line for each flag that was given and has no effect."""
    return list(dict.fromkeys(getattr(args, "no_effect", ())))


def is_unsupported(flag: str) -> bool:
    """Whether `flag` is one of vLLM's, in either form and with or without a key (`--config.key`),
    that has no meaning here.
    """
    flag, dot, _ = flag.partition(".")
    if dot and flag in _WHOLE:
        return True
    known = UNSUPPORTED | SWITCHES.keys() | SETTINGS.keys() | NEUTRAL.keys()
    return flag in known or flag.replace("--no-", "--", 1) in known


def without_vllm_options(options: Mapping[str, Any], known: Collection[str]) -> tuple[dict[str, Any], list[str]]:
    """The same for keyword arguments: those of `known` names, and a line for each that has no
    effect. None and False ask for nothing, whichever of vLLM's options they are given to.

    Raises `ValueError` for what asks for something else, and for a name that is none.
    """
    ours, lines = {}, []
    for name, value in options.items():
        flag = "--" + name.replace("_", "-")
        if name in known:
            ours[name] = value
        elif flag in SWITCHES or flag in SETTINGS:
            if value is not None and value is not False:
                lines.append(f"{name} has no effect: {SWITCHES.get(flag) or SETTINGS[flag]}")
        elif flag in NEUTRAL or flag in UNSUPPORTED:
            allowed = NEUTRAL.get(flag, ())
            if value is not None and value is not False and str(value) not in allowed:
                only = f", only {' or '.join(allowed)}" if allowed else ""
                raise ValueError(f"{name} = {repr(value)[:100]}: not supported yet{only}")
        else:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.7)
            raise ValueError(f"{name}: no such option" + (f" (did you mean {near[0]}?)" if near else ""))
    return ours, lines


def _names(flag: str) -> list[str]:
    return [_SHORT[flag], flag] if flag in _SHORT else [flag]


class _NoEffect(argparse.Action):
    def __init__(self, option_strings: Sequence[str], *, what: str, nargs: int | None = None, **_: Any) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, nargs=nargs, help=argparse.SUPPRESS)
        self.what = what

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, _: Any, option_string: str | None = None
    ) -> None:
        line = f"{option_string} has no effect: {self.what}"
        namespace.no_effect = [*getattr(namespace, "no_effect", ()), line]


class _OnlyNeutral(argparse.Action):
    def __init__(self, option_strings: Sequence[str], *, values: Sequence[str], **_: Any) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, help=argparse.SUPPRESS)
        self.values = values

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        if values not in self.values:
            parser.error(f"{option_string} {values}: not supported yet, only {' or '.join(self.values)}")
