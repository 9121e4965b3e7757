"""The engine: one Rust core, one model runner, and the loop that keeps the device fed.

A step is planned by the core, launched in two halves (the forward pass, the sample), and committed
once its results are there. The device is never without work: the forward pass of step N+1 is in its
queue before the loop waits for step N. What step N+1 needs of step N's tokens it finds on the
device, since the sample of N is launched before.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import threading
import time
from collections.abc import Iterator

import torch

from octavo import _core
from octavo._core import EngineCore
from octavo.config import EngineConfig
from octavo.engine import process
from octavo.engine.setup import EngineParts, build_engine
from octavo.engine.step_buffers import Step
from octavo.layers.context import set_context
from octavo.layers.rotary import cos_sin_table

logger = logging.getLogger(__name__)

IDLE_WAIT_SECONDS = 1.0
"""How long the loop sleeps in the core before it looks whether it should stop."""


class Engine:
    """Steps the core and the runner. Not thread-safe but for the core itself: one thread calls
    `step` (or `run`).
    """

    def __init__(self, parts: EngineParts) -> None:
        self.parts = parts
        self.core: EngineCore = parts.core
        self.runner = parts.runner
        for slot, buffers in enumerate(parts.buffers):
            self.core.bind(slot, buffers.plan_array, buffers.result_array)
        # On a CPU a step has run when it is launched: there it is finished in the turn that began
        # it.
        self._overlap = parts.runner.device.type == "cuda"
        self._current: Step | None = None  # launched whole, not committed
        self._interrupted = False
        self._stop = threading.Event()
        self.interrupt_asked = threading.Event()
        """Set by who waits for the thread that steps: its next step raises `KeyboardInterrupt`."""
        self.is_closed = False
        self.failure: str | None = None
        self.step_started_at: float | None = None

    @classmethod
    def from_config(cls, config: EngineConfig) -> Engine:
        """Loads the model, takes the KV memory and captures graphs. Raises `ValueError` for what
        the user can mend, and `RuntimeError` in a process forked from one that had loaded a model.
        """
        if not isinstance(config, EngineConfig):
            raise ValueError(f"config: expected an EngineConfig, got {type(config).__name__}")
        process.claim()
        return cls(build_engine(config))

    def check_usable(self) -> None:
        """Raises `RuntimeError` where the engine has been closed, or belongs to a parent process."""
        process.check()
        if self.is_closed:
            raise RuntimeError("this LLM or engine has been closed, and its model is gone: make a new one")

    def step(self) -> bool:
        """One turn: launches the next step, commits the one before. False: there was nothing to do.

        An exception, also one from outside such as `KeyboardInterrupt`, leaves the turn half done;
        the next call drops what was under way, ends its requests with an error, and goes on with
        the others.
        """
        self.check_usable()
        if self.interrupt_asked.is_set():
            self.interrupt_asked.clear()
            raise KeyboardInterrupt
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
        step = self._plan()
        if step is None and self._current is None:
            return False
        failure = None
        try:
            if step is not None:
                self.runner.launch_forward(step)
            self._finish_current()
            if step is not None:
                self._fill_masks(step)
                self.runner.launch_sample(step)
            self._current = step
        except torch.OutOfMemoryError as error:
            if step is None:
                raise
            failure = str(error)
        if step is not None and failure is not None:  # the error is gone, and with its frames what they held
            self._drop(step, failure)
        if not self._overlap:
            self._finish_current()
        return True

    def _plan(self) -> Step | None:
        slot = 0 if self._current is None else 1 - self._current.slot
        if self.core.schedule(slot, time.monotonic()) is None:
            return None
        buffers = self.parts.buffers[slot]
        return Step(slot, buffers.read_plan(), buffers)

    def _finish_current(self) -> None:
        """Waits for the results of the step that was launched last, and commits them."""
        step, self._current = self._current, None
        if step is not None:
            step.buffers.wait()
            drafting, following = step.buffers.drafting.take(), step.buffers.following.take()
            self.core.commit(step.slot, time.monotonic(), drafting, following)

    def _fill_masks(self, step: Step) -> None:
        """Has the core write the grammar masks of a step. They need the tokens just committed, and
        the device is busy with the forward pass meanwhile.
        """
        count = step.plan.num_mask_rows
        if count:
            for fault in self.core.fill_masks(step.slot, self.runner.masks.rows(count)):
                logger.warning("step %d ended a request whose grammar failed: %s", step.plan.step_id, fault)

    def _drop(self, step: Step, error: str) -> None:
        """Fails a step that does not fit into memory: its requests end with an error, and the
        others go on.
        """
        torch.cuda.empty_cache()
        logger.error("step %d ran out of memory: %s", step.plan.step_id, error)
        self._wait_for_device()
        self._finish_current()  # unless it was before
        self.core.fail_step(step.slot, "out_of_memory", f"step {step.plan.step_id} did not fit into device memory")

    def _drop_interrupted(self) -> None:
        """Fails whatever steps the core holds: of a turn that was cut short, nothing tells which of
        them have run.
        """
        self._wait_for_device()
        self._current = None
        for slot in range(len(self.parts.buffers)):
            with contextlib.suppress(ValueError):  # the slot holds no step
                self.core.fail_step(slot, "step_interrupted", "the step was interrupted before it was done")
        self._interrupted = False

    def _wait_for_device(self) -> None:
        """Until no copy to or from the buffers is under way, also of a step that was not launched
        whole.
        """
        if self.runner.device.type == "cuda":
            torch.cuda.synchronize(self.runner.device)

    def run(self) -> None:
        """The engine thread: steps until `stop`. An error that is not one step's ends every request
        and marks the engine dead.
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
            self.core.fail_all(_core.ENGINE_DEAD, "The engine has stopped.")

    @property
    def is_stopped(self) -> bool:
        """`stop` was called: nothing will be served any more."""
        return self._stop.is_set()

    def stop(self) -> None:
        """Asks `run` to return after the current step."""
        self._stop.set()
        self.core.shutdown()

    def close(self) -> None:
        """Gives back the memory of model, KV pool, graphs and buffers; requests still running end
        with an error.

        Idempotent. Call it on the thread that steps, or after `run` has returned. What a caller
        still refers to (the runner, its tensors) stays; the core stays for its statistics and for
        deltas that nobody has taken yet.
        """
        if self.is_closed:
            return
        self.is_closed = True
        self.stop()
        device = self.runner.device
        with self._device_may_be_lost():
            self._wait_for_device()
        # Whoever keeps the closed engine keeps what it is made of in words (config, tokenizer,
        # report).
        self._current = None
        del self.runner, self.parts.runner, self.parts.buffers
        # What the process keeps of a step and of a model besides its engine.
        set_context(None)
        cos_sin_table.cache_clear()
        gc.collect()
        if device.type == "cuda":
            with self._device_may_be_lost():
                torch.cuda.empty_cache()

    @contextlib.contextmanager
    def _device_may_be_lost(self) -> Iterator[None]:
        """After an error of the device every call to it fails, and what it held is lost with the
        process.
        """
        try:
            yield
        except RuntimeError:
            logger.exception("the device does not answer any more")
