"""The engine: one Rust core, one model runner, and the loop that keeps the device fed.

Steady state: while step N+1 runs on the device, the loop waits for step N's results, commits them and plans step N+2 in
one crossing into Rust (`advance`), and launches it behind N+1. On a CPU a step has run when `launch` returns, so there
one step flies at a time.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import deque

import torch

from octavo._core import EngineCore, Plan
from octavo.config import EngineConfig
from octavo.engine.model_runner import ModelRunner
from octavo.engine.setup import EngineParts, build_engine
from octavo.engine.step_buffers import StepBuffers

logger = logging.getLogger(__name__)

IDLE_WAIT_SECONDS = 1.0
"""How long the loop sleeps in the core before it looks whether it should stop."""


class Engine:
    """Steps the core and the runner. Not thread-safe but for the core itself: one thread calls `step` (or `run`)."""

    def __init__(self, parts: EngineParts) -> None:
        self.config: EngineConfig = parts.config
        self.core: EngineCore = parts.core
        self.runner: ModelRunner = parts.runner
        self.tokenizer = parts.tokenizer
        self.chat_template = parts.chat_template
        self.max_model_len = parts.max_model_len
        self.generation_defaults = parts.generation_defaults
        self.report = parts.report
        self.model_name = parts.model_name
        self._buffers: tuple[StepBuffers, StepBuffers] = parts.buffers
        for slot, buffers in enumerate(self._buffers):
            self.core.bind(slot, buffers.plan_array, buffers.result_array)
        self._in_flight: deque[int] = deque()
        self._overlap = parts.runner.device.type == "cuda"
        self._interrupted = False
        self._stop = threading.Event()
        self.failure: str | None = None
        self.step_started_at: float | None = None

    @classmethod
    def from_config(cls, config: EngineConfig) -> Engine:
        """Loads the model, takes the KV memory and captures graphs. Raises `ValueError` for what the user can mend."""
        return cls(build_engine(config))

    def step(self) -> bool:
        """One turn: launches what can be launched, commits the oldest step. False: there was nothing to do.

        An exception, also one from outside such as `KeyboardInterrupt`, leaves the turn half done; the next call drops
        what was under way, ends its requests with an error, and goes on with the others.
        """
        self.step_started_at = time.monotonic()
        try:
            if self._interrupted:
                self._drop_interrupted()
            return self._turn()
        except BaseException:
            self._interrupted = True
            raise
        finally:
            self.step_started_at = None

    def _turn(self) -> bool:
        core, in_flight = self.core, self._in_flight
        if not in_flight and not self._launch(core.schedule(0, time.monotonic()), 0):
            return False
        if self._overlap and len(in_flight) == 1:
            slot = 1 - in_flight[0]
            self._launch(core.schedule(slot, time.monotonic()), slot)
        if in_flight:
            done = in_flight.popleft()
            self._buffers[done].wait()
            self._launch(core.advance(done, done, time.monotonic()), done)
        return True

    def _launch(self, plan: Plan | None, slot: int) -> bool:
        """Launches a planned step; one that does not fit into memory is dropped. False if nothing was planned."""
        if plan is None:
            return False
        try:
            self.runner.launch(plan, self._buffers[slot])
        except torch.OutOfMemoryError as error:
            # The step did not run; its requests end with an error and the others go on.
            torch.cuda.empty_cache()
            logger.error("step %d ran out of memory: %s", plan.step_id, error)
            self._drop_step(slot, "out_of_memory", f"step {plan.step_id} did not fit into device memory")
            return True
        self._in_flight.append(slot)
        return True

    def _drop_step(self, slot: int, code: str, message: str) -> None:
        self._wait_for_device()
        while self._in_flight:
            self.core.commit(self._in_flight.popleft(), time.monotonic())
        self.core.fail_step(slot, code, message)

    def _drop_interrupted(self) -> None:
        """Fails whatever steps the core holds: of a turn that was cut short, nothing tells which of them have run."""
        self._wait_for_device()
        self._in_flight.clear()
        for slot in range(len(self._buffers)):
            with contextlib.suppress(ValueError):  # the slot holds no step
                self.core.fail_step(slot, "step_interrupted", "the step was interrupted before it was done")
        self._interrupted = False

    def _wait_for_device(self) -> None:
        """Until no copy to or from the buffers is under way, also of a step that was not launched whole."""
        if self.runner.device.type == "cuda":
            torch.cuda.synchronize(self.runner.device)

    def run(self) -> None:
        """The engine thread: steps until `stop`. An error that is not one step's ends every request and marks the
        engine dead.
        """
        try:
            while not self._stop.is_set():
                if not self.step():
                    self.core.wait(IDLE_WAIT_SECONDS, time.monotonic())
        except BaseException as error:
            if self._stop.is_set():
                return  # the core has dropped the step that was in flight
            logger.exception("the engine stopped")
            self.failure = f"{type(error).__name__}: {error}"
            # Clients see this: the reason stays in the log and in `failure`.
            self.core.fail_all("engine_dead", "The engine has stopped and the server is about to exit.")

    @property
    def is_stopped(self) -> bool:
        """`stop` was called: nothing will be served any more."""
        return self._stop.is_set()

    def stop(self) -> None:
        """Asks `run` to return after the current step."""
        self._stop.set()
        self.core.shutdown()
