"""The thread on which a caller who waits has his steps run.

The thread that loads a model has torch's workers of its own, and so has this one. Both together
make more threads than the machine has processors, and then libgomp spins for 1,000 rounds and not
for 300,000 at each end of a parallel product. Beside a neighbour that keeps the processors busy
those rounds eat the time slices of the very threads they wait for: SmolLM2 on two cores decoded 1.5
tok/s on the thread that had loaded it, and 11 on another.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TypeVar

from octavo.engine import process
from octavo.engine.engine import Engine

T = TypeVar("T")


class StepThread:
    """Runs work that steps an engine, one piece after another, whichever threads ask for it."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="octavo-steps")

    def run(self, work: Callable[[], T]) -> T:
        """What `work` returns or raises. An interrupt of the caller (Ctrl-C) comes out of the next
        step of his work, which may tidy up before he gets it.

        Raises `RuntimeError` where the engine has been closed, or belongs to a parent process.
        """
        self.engine.check_usable()
        interrupted = threading.Event()

        def interruptible() -> T:
            self.engine.interrupt_asked = interrupted
            return work()

        job = self._pool.submit(interruptible)
        try:
            return job.result()
        except BaseException:
            if not job.cancel() and not job.done():
                interrupted.set()
                wait([job])
            raise

    def close(self) -> None:
        """Closes the engine once the work of all threads is done, and ends this one. Idempotent."""
        if not self.engine.is_closed and not process.is_forked():
            self._pool.submit(self.engine.close).result()
            self._pool.shutdown()
