"""An `AsyncEngine` without a model: the real core, outbox and streams, over a thread that writes
scripted results.

Every request gets `answer`, then the end token; one with a grammar, tokens drawn evenly from those
that its mask allows where that rules the answer's out. Knobs let a test hold the engine, slow it down,
fail a row, or kill it; a test that wants to choose what comes when calls `Script.step` itself.
"""

import threading
import time
from types import SimpleNamespace
from typing import Any

import numpy as np

from octavo import _core
from octavo.config import EngineConfig
from octavo.engine.async_engine import AsyncEngine
from octavo.kernels.step.plan_format import Plan
from octavo.model_config import ModelConfig, RopeConfig
from octavo.pooling import Embeddings

VOCAB_SIZE = 300
VECTOR_SIZE = 4
END = 256  # the first id that is no byte
SAMPLE = 1  # flag of a row that draws a token
NAN = 1  # status of a row with NaN in its logits
MASK_WIDTH = 16  # words of a mask
MASKED = 2  # of one where every token is ruled out

SHAPE = ModelConfig(
    architecture="LlamaForCausalLM",
    vocab_size=VOCAB_SIZE,
    hidden_size=64,
    intermediate_size=192,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    max_position_embeddings=2048,
    rms_norm_eps=1e-5,
    rope=RopeConfig(theta=1e4),
    layer_windows=(0, 0),
    tie_word_embeddings=True,
    checkpoint_dtype="bfloat16",
)
"""What it says of the model that it does not have."""

TEMPLATE = (
    "{% if messages[0].role == 'assistant' %}{{ raise_exception('Roles must alternate. ' * 100) }}{% endif %}"
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}{% endfor %}"
    "{% if tools %}{{ tools | tojson }}{% endif %}"
    "{% if extra %}{% for _ in range(times or 1) %}{{ extra }}{% endfor %}{% endif %}"
)


def prompt_logprob(token: int) -> float:
    """The log probability of a token in a prompt, whatever comes before it."""
    return -token / 16


def embedding(mean: np.ndarray) -> np.ndarray:
    """Of a prompt whose tokens' ids have this mean (in the second place; 1 in the first)."""
    return np.array([mean[0], mean[1] / 64, -0.5, 0.25], np.float32)


class Script:
    """Stands where `Engine` and its parts stand: plans with the core, and answers each plan from
    the script.
    """

    def __init__(self, config: EngineConfig, max_model_len: int, num_blocks: int = 31) -> None:
        self.parts = self
        self.config = config.for_device("cpu")
        self.model_name = config.model_name
        self.model_config = SHAPE
        self.max_model_len = max_model_len
        self.tokenizer = _core.Tokenizer.bytes_only(VOCAB_SIZE)
        self.grammars = _core.GrammarCompiler(self.tokenizer, VOCAB_SIZE, [END])
        self.chat_template = _core.ChatTemplate(TEMPLATE)
        self.generation_defaults: dict[str, Any] = {}
        self.embeddings: Embeddings | None = Embeddings("mean", True, VECTOR_SIZE, "the script")
        self.generates = True
        self.report: Any = SimpleNamespace(verdict=None)
        self.failure: str | None = None
        self.step_started_at: float | None = None
        self.answer = b"Hello world"
        self.step_delay = 0.0
        self.first_delay = 0.0
        self.fail_after: int | None = None
        self.fail_slots: set[int] | None = None  # all of them
        self.fail_status = NAN
        self.death: str | None = None
        self.go = threading.Event()
        self.go.set()
        self._stop = threading.Event()
        self.core = _core.EngineCore(
            num_blocks=num_blocks,  # one is the null block: by default 480 tokens
            block_size=16,
            kv_windows=[0],
            max_num_seqs=self.config.max_num_seqs or 1,
            max_num_batched_tokens=self.config.max_num_batched_tokens or 1,
            max_model_len=max_model_len,
            vocab_size=VOCAB_SIZE,
            vector_size=VECTOR_SIZE,
            eos_token_ids=[END],
            max_waiting=config.max_waiting,
            tokenizer=self.tokenizer,
        )
        self._plan = np.zeros(self.core.plan_bytes, np.uint8)
        self._result = np.zeros(self.core.result_bytes, np.uint8)
        self.core.bind(0, self._plan, self._result)
        self._rng = np.random.default_rng(0)
        self._output_index = [0] * ((self.config.max_num_seqs or 1) + 1)
        self._sums = np.zeros((len(self._output_index), VECTOR_SIZE))

    def run(self) -> None:
        try:
            while not self._stop.is_set():
                self.go.wait()
                if self.death is not None:
                    raise RuntimeError(self.death)
                if not self.step():
                    self.core.wait(0.05, time.monotonic())
        except (RuntimeError, ValueError) as error:
            if self._stop.is_set():
                return  # the core has dropped the step that was in flight
            self.failure = str(error)
            self.core.fail_all("engine_dead", "The engine has stopped.")

    def step(self) -> bool:
        """One step from its plan to its results; false where there is nothing to do."""
        if self.core.schedule(0, time.monotonic()) is None:
            return False
        plan = Plan.read(self._plan)
        time.sleep(self.step_delay + (self.first_delay if plan.num_prefill_tokens else 0.0))
        self._write(plan)
        self.core.commit(0, time.monotonic())
        return True

    @property
    def is_stopped(self) -> bool:
        return self._stop.is_set()

    def stop(self) -> None:
        self._stop.set()
        self.go.set()
        self.core.shutdown()

    def close(self) -> None:
        """It has no memory to give back."""

    def _write(self, plan: Plan) -> None:
        words = self._plan.view(np.int32)
        targets = words[plan.prompt_targets_offset // 4 :][: plan.num_prompt_targets * 2].reshape(-1, 2)
        told = self._result.view(np.int32)[plan.padded_rows * plan.result_width : plan.vectors_start]
        told = told.reshape(len(targets), -1) if len(targets) else told[:0].reshape(0, 2)
        for (_, token), record in zip(targets.tolist(), told, strict=True):
            top, floats = plan.max_prompt_logprobs, record.view(np.float32)
            floats[0], record[1] = prompt_logprob(token), 2
            record[2 : 2 + top] = [65, token, *range(66, 64 + top)][:top]
            floats[2 + top :] = [-0.01, prompt_logprob(token), *(-9.0 - i for i in range(top))][:top]
        pools = words[plan.pools_offset // 4 :][: plan.num_pools * 7].reshape(-1, 7)
        vectors = self._result.view(np.float32)[plan.vectors_start : plan.result_words].reshape(-1, VECTOR_SIZE)
        tokens = words[plan.prefill_tokens_offset // 4 :][: plan.num_prefill_tokens]
        for slot, _, start, length, begins, count, vector in pools.tolist():
            here = tokens[start - plan.num_decode_tokens :][:length]
            self._sums[slot] = (0 if begins else self._sums[slot]) + np.array([len(here), here.sum(), 0, 0], float)
            if vector >= 0:
                vectors[vector] = embedding(self._sums[slot] / count)
        enters = words[plan.enters_offset // 4 :][: plan.num_enters * 16].reshape(-1, 16)
        for slot, _, output_index in enters[:, :3].tolist():
            self._output_index[slot] = output_index
        rows = words[plan.rows_offset // 4 :][: plan.padded_rows * 8].reshape(-1, 8)
        masks = np.zeros((plan.num_mask_rows, MASK_WIDTH), np.uint32)
        if plan.num_mask_rows:
            self.core.fill_masks(0, masks)
        results = self._result.view(np.int32)[: plan.padded_rows * plan.result_width].reshape(-1, plan.result_width)
        for row, result in zip(rows.tolist(), results, strict=True):
            slot, flags = row[0], row[3]
            if not flags & SAMPLE:
                continue
            index = self._output_index[slot]
            self._output_index[slot] += 1
            token = self.answer[index] if index < len(self.answer) else END
            if row[5] >= 0:
                allowed = np.flatnonzero(np.unpackbits(masks[row[5]].view(np.uint8), bitorder="little"))
                if token not in allowed and len(allowed):
                    token = int(self._rng.choice(allowed))
            fails = index == self.fail_after and (self.fail_slots is None or slot in self.fail_slots)
            result[:3] = (self.fail_status if fails else 0, 1, token)
            if plan.max_logprobs >= 0:
                top = plan.max_logprobs
                result.view(np.float32)[3] = -0.5
                result[4] = 1
                result[5 : 5 + top] = [token, *range(65, 64 + top)][:top]
                result.view(np.float32)[5 + top : 5 + 2 * top] = [-0.5, *(-1.0 - i for i in range(top))][:top]


class ScriptedEngine(AsyncEngine):
    """The engine that tests serve."""

    def __init__(
        self,
        *,
        max_num_seqs: int = 64,
        max_waiting: int = 1024,
        max_model_len: int = 512,
        num_blocks: int = 31,
        model: str = "org/tiny",
    ) -> None:
        config = EngineConfig(model=model, max_num_seqs=max_num_seqs, max_waiting=max_waiting, disable_log_stats=True)
        self.script = Script(config, max_model_len, num_blocks)
        super().__init__(self.script)  # type: ignore[arg-type]  # what it uses of an Engine, Script has
        self._thread.start()

    @property
    def num_unfinished(self) -> int:
        stats = self.stats()
        return int(stats["num_requests_running"] + stats["num_requests_waiting"])

    def hold(self) -> None:
        """No step is planned until `release`."""
        self.script.go.clear()

    def release(self) -> None:
        self.script.go.set()

    def die(self, why: str) -> None:
        """The engine thread ends by an error, before its next step."""
        self.script.death = why
        self.script.go.set()
