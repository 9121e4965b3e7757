"""What grammars cost in throughput: the same streams with and without one, in paired turns.

`python -m bench.structured` on the default model; on a GPU for instance
`python -m bench.structured --model llama2-7b --load-format dummy --dtype bfloat16`. A model with dummy
weights has no tokenizer: it borrows another model's, whose tokens then stand for its own. The
schema has no end within the answer, so both sides write the same number of tokens.
"""

from __future__ import annotations

import argparse
import statistics
import time

from octavo import LLM, SamplingParams, StructuredOutputsParams
from octavo.weights.default_model import default_model_path

SCHEMA = {
    "type": "array",
    "minItems": 100_000,
    "items": {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 40},
            "kind": {"enum": ["person", "place", "thing"]},
            "size": {"type": "integer", "minimum": 0, "maximum": 9999},
            "notes": {"type": "array", "items": {"type": "string"}},
        },
        "required": ["name", "kind", "size", "notes"],
        "additionalProperties": False,
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model")
    parser.add_argument("--load-format", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--tokenizer", help="of a model with dummy weights [default: the default model's]")
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--input-len", type=int, default=128)
    parser.add_argument("--output-len", type=int, default=256)
    parser.add_argument("--turns", type=int, default=5)
    options = parser.parse_args()
    model = {} if options.model is None else {"model": options.model, "load_format": options.load_format}
    if options.load_format == "dummy":
        model["tokenizer"] = options.tokenizer or str(default_model_path())
    llm = LLM(
        **model,
        dtype=options.dtype,
        max_model_len=options.input_len + options.output_len,
        max_num_seqs=options.streams,
        enable_prefix_caching=False,
    )
    prompts = [{"prompt_token_ids": [5 + stream] * options.input_len} for stream in range(options.streams)]

    def seconds(wanted: StructuredOutputsParams | None) -> float:
        params = SamplingParams(max_tokens=options.output_len, ignore_eos=True, seed=1, structured_outputs=wanted)
        start = time.perf_counter()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        assert all(len(output.outputs[0].token_ids) == options.output_len for output in outputs)
        return time.perf_counter() - start

    wanted = StructuredOutputsParams(json=SCHEMA)
    seconds(None), seconds(wanted)  # what is made once
    pairs = [(seconds(None), seconds(wanted)) for _ in range(options.turns)]
    tokens = options.streams * options.output_len
    free, bound = (tokens / statistics.median(side) for side in zip(*pairs, strict=True))
    slower = [100 * (with_one / without - 1) for without, with_one in pairs]
    print(
        f"{options.streams} streams, {options.input_len} in, {options.output_len} out, medians of {options.turns} turns"
    )
    print(f"without a grammar {free:.1f} tok/s, with one {bound:.1f} tok/s")
    print(f"slower by {statistics.median(slower):.1f} % (turns: {', '.join(f'{share:.1f}' for share in slower)})")


if __name__ == "__main__":
    main()
