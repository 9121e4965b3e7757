"""How a command ends: an exit code and at most one line, whatever closed, filled up or was
interrupted on the way.

0: done. 1: it broke while it ran. 2: the user can mend it. 128 + the signal's number for an
interrupt (130), for SIGTERM (143) and SIGHUP (129) and for a reader of the output that has left
(141), as a shell would say. A server that serves takes SIGTERM and interrupts as its own, and
drains.

Imports only what Python has loaded when it starts: an interrupt before `run_command` ends with a
traceback.
"""

import errno
import os
import sys

TYPE_CHECKING = False  # as in `octavo`
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import TextIO

INTERRUPTED = 130
READER_LEFT = 141

_UNWRITABLE = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENOTDIR}


class Ended(SystemExit):
    """SIGTERM or SIGHUP has come. What is under way (a download, say) tidies up on its way out."""


def run_command(program: str, command: "Callable[[], int]") -> int:
    """Runs `command` and returns the exit code; `program` begins the line that says what went
    wrong.

    `SystemExit` (of argparse) passes through, unless its help could not be written.
    """
    open_closed_streams()
    try:
        with _EndingSignals():
            code = command()
            sys.stdout.flush()  # a full disk fails here, and not when Python ends
            return code
    except Ended as end:
        _say(f"{program}: ended by {end.args[0]}")
        return int(end.args[1])
    except SystemExit:
        reason = _output_error()
        if reason is None:
            raise
        _say(f"{program}: error: {reason}")
        return 2
    except KeyboardInterrupt:
        _say("\n" if sys.stderr.isatty() else "", f"{program}: interrupted")  # the terminal has shown ^C
        return INTERRUPTED
    except OSError as error:
        if isinstance(error, BrokenPipeError) and _reader_left():
            return READER_LEFT
        _say(f"{program}: error: {_output_error() or describe(error)}")
        return 2
    except ValueError as error:
        _say(f"{program}: error: {error}")
        return 2
    except RuntimeError as error:
        _say(f"{program}: error: {error}")
        return 1
    finally:
        # Python flushes both when it ends, and prints a traceback where that fails.
        for stream in (sys.stdout, sys.stderr):
            _give_up_if_broken(stream)


def open_closed_streams() -> None:
    """Puts /dev/null where standard input, output or error is closed.

    Else the next file or socket to be opened would be one of them, and what some library prints
    would go into it.
    """
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free: this one
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, mode, encoding="utf-8", closefd=False))


_raised: BaseException | None = None
"""By the last signal that `run_command` has seen."""


def raise_again() -> None:
    """Raises what a signal has raised before: where this is called, somebody has swallowed it."""
    if _raised is not None:
        raise _raised


def load_torch() -> None:
    """Imports torch, which takes seconds. Some of its lines swallow whatever is raised in them, so that
    a process which should end would go on: then it ends here.
    """
    import signal
    import threading

    global _raised
    takes = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    takes = takes and threading.current_thread() is threading.main_thread()
    if takes:
        signal.signal(signal.SIGINT, _interrupt)
    try:
        import torch  # noqa: F401
    finally:
        if takes:  # asyncio takes interrupts from this one only
            signal.signal(signal.SIGINT, signal.default_int_handler)
    raise_again()


def _interrupt(_number: int, _frame: object) -> None:
    global _raised
    _raised = KeyboardInterrupt()
    raise _raised


def _end(number: int, _frame: object) -> None:
    import signal

    global _raised
    signal.signal(number, signal.SIG_DFL)  # the second one ends at once
    _raised = Ended(signal.Signals(number).name, 128 + number)
    raise _raised


class _EndingSignals:
    """Inside, SIGTERM and SIGHUP raise `Ended`, once, unless they have another meaning already."""

    def __enter__(self) -> None:
        import signal
        import threading

        global _raised
        _raised = None
        self._taken: list[signal.Signals] = []
        if threading.current_thread() is threading.main_thread():
            wanted = (signal.SIGTERM, signal.SIGHUP)
            self._taken = [number for number in wanted if signal.getsignal(number) is signal.SIG_DFL]
        for number in self._taken:
            signal.signal(number, _end)

    def __exit__(self, *_: object) -> None:
        import signal

        for number in self._taken:
            signal.signal(number, signal.SIG_DFL)


def _reader_left() -> bool:
    """Whether nobody reads the standard output or error any more. Other pipes break too."""
    import select

    poll = select.poll()
    for stream in (sys.stdout, sys.stderr):
        try:
            poll.register(stream.fileno(), 0)
        except (OSError, ValueError):  # a stream of no file, in a test
            continue
    return any(events & (select.POLLERR | select.POLLHUP) for _, events in poll.poll(0))


def describe(error: OSError) -> str:
    """What failed and where; for a cache folder that cannot be written also the variable that moves
    it.
    """
    if error.strerror is None:
        return str(error)
    if not isinstance(error.filename, (str, bytes)):
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        return error.strerror + (" for the output, or for temporary files (set TMPDIR)" if full else "")
    path = os.fsdecode(error.filename)
    variable = _variable_of(path) if error.errno in _UNWRITABLE else None
    hint = f"; set {variable} to a folder that can be written" if variable else ""
    return f"{path}: {error.strerror}{hint}"


def _variable_of(path: str) -> str | None:
    """The environment variable that moves `path`, if that is in a cache, or a folder that a cache
    still lacks.
    """
    home = os.path.expanduser("~")
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.join(home, ".cache")
    for variable, folder in (
        ("XDG_CACHE_HOME", os.path.join(cache, "octavo")),
        ("HF_HOME", os.environ.get("HF_HOME") or os.path.join(cache, "huggingface")),
        ("TRITON_CACHE_DIR", os.environ.get("TRITON_CACHE_DIR") or os.path.join(home, ".triton")),
    ):
        if _lies_in(path, folder) or (_lies_in(folder, path) and not os.path.exists(path)):
            return variable
    return None


def _lies_in(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder.rstrip("/") + "/")


def _output_error() -> str | None:
    """Why the standard output cannot be written, if it cannot."""
    try:
        sys.stdout.flush()
    except OSError as error:
        return f"the standard output cannot be written: {error.strerror}"
    return None


def _say(*parts: str) -> None:
    try:
        print(*parts, sep="", file=sys.stderr, flush=True)
    except OSError:  # there is nobody to tell
        return


def _give_up_if_broken(stream: "TextIO") -> None:
    try:
        stream.flush()
    except OSError:
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, stream.fileno())
        os.close(nothing)
