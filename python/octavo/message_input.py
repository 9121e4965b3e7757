"""Messages that a person types into a terminal, or that come line by line through a pipe.

On a terminal the line is edited with Python's readline, where Python has it, and earlier messages
come back with the arrow keys. A paste is one message however many lines it has, and is sent by the
Enter after it: GNU readline brackets pastes; elsewhere (libedit, no readline) lines that come
faster than a person types are one.
"""

import asyncio
import contextlib
import os
import select
import signal
import sys
import termios
import time
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import Any

PASTE_SECONDS = 0.03
"""Where pastes are not bracketed, what comes this soon after a line belongs to the same paste."""

_BRACKETS_ON, _BRACKETS_OFF = "\x1b[?2004h", "\x1b[?2004l"


class MessageInput:
    """Reads messages. `with` it, so that Ctrl-C means what `Interrupts` says and the terminal is
    left as it was.
    """

    def __init__(self, prompt: str) -> None:
        self.interactive = sys.stdin.isatty()
        self.interrupts = Interrupts()
        self._prompt = prompt if self.interactive else ""
        self._brackets = self.interactive and sys.stdout.isatty() and _edit_lines()

    def read(self) -> str:
        """The next message. Raises `EOFError` after the last, `KeyboardInterrupt` on Ctrl-C, and
        `ValueError` for what is no text.
        """
        with self.interrupts.raised():
            try:
                if self._prompt and not sys.stdout.isatty():
                    print(self._prompt, end="", file=sys.stderr, flush=True)
                    lines = [input()]
                else:
                    lines = [input(self._prompt)]
                if self.interactive and not self._brackets and _more_is_here():
                    lines += _rest_of_paste()
                text = "\n".join(lines)
                text.encode()  # where Python lets pass what it cannot decode
            except EOFError:
                if self.interactive and not self._brackets:
                    print(file=sys.stderr)  # what follows begins a line; with brackets readline sees to that
                raise
            except UnicodeError as error:
                raise ValueError(f"the standard input is not UTF-8: {error}") from None
        if self._brackets:
            # readline turned them off. What is pasted while an answer runs waits for the next line,
            # with its brackets.
            print(_BRACKETS_ON, end="", flush=True)
        return text

    def __enter__(self) -> "MessageInput":
        self.interrupts.install()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.interrupts.remove()
        if self._brackets and not isinstance(error, OSError):
            print(_BRACKETS_OFF, end="", flush=True)


def _edit_lines() -> bool:
    """Has `input` edit lines. Returns whether pastes come bracketed."""
    try:
        import readline
    except ImportError:
        return False
    if "libedit" in (readline.__doc__ or "") or os.environ.get("TERM", "dumb") == "dumb":
        return False
    readline.parse_and_bind("set enable-bracketed-paste on")  # the default since 8.1
    readline.parse_and_bind('"\t": tab-insert')  # there is nothing to complete
    return True


def _rest_of_paste() -> list[str]:
    """Lines up to the first that a person ended."""
    lines, waited = [], 0.0
    while waited < PASTE_SECONDS:
        since = time.monotonic()
        lines.append(input())
        waited = time.monotonic() - since
    return lines


def _more_is_here() -> bool:
    """Whether something waits in the terminal, also an unfinished line, which is not to be had
    while it edits lines.
    """
    before = termios.tcgetattr(sys.stdin)
    single = list(before)
    single[3] &= ~(termios.ICANON | termios.ECHO)
    termios.tcsetattr(sys.stdin, termios.TCSANOW, single)
    try:
        return bool(select.select([sys.stdin], [], [], PASTE_SECONDS)[0])
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSANOW, before)


class Interrupts:
    """What Ctrl-C does: it raises `KeyboardInterrupt` where a message is read, cancels the task
    that answers it, and is nothing in the moments between.

    A handler of its own, because asyncio's would remember an interrupt at the prompt for the answer
    that follows.
    """

    def __init__(self) -> None:
        self._reads = False
        self._task: asyncio.Task[Any] | None = None
        self._before: Any = None

    def install(self) -> None:
        """Takes SIGINT over; in the main thread."""
        self._before = signal.signal(signal.SIGINT, self._come)

    def remove(self) -> None:
        """Gives it back."""
        signal.signal(signal.SIGINT, self._before)

    @contextlib.contextmanager
    def raised(self) -> Iterator[None]:
        """Within, an interrupt is a `KeyboardInterrupt`."""
        try:
            self._reads = True
            yield
        finally:
            self._reads = False

    @contextlib.contextmanager
    def cancelling(self, task: "asyncio.Task[Any]") -> Iterator[None]:
        """Within, an interrupt cancels `task`."""
        self._task = task
        try:
            yield
        finally:
            self._task = None

    def _come(self, _number: int, _frame: FrameType | None) -> None:
        if self._task is not None:
            self._task.get_loop().call_soon_threadsafe(self._task.cancel)  # wakes the loop, too
        elif self._reads:
            raise KeyboardInterrupt
