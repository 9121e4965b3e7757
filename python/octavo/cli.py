"""The way into `octavo` and out of it. What the commands are is in `octavo.commands`."""

import sys

from octavo.ending import run_command

TYPE_CHECKING = False  # as in `octavo`
if TYPE_CHECKING:
    from collections.abc import Sequence


def main(argv: "Sequence[str] | None" = None) -> int:
    """Runs one command and returns the exit code, see `octavo.ending`."""

    def command() -> int:
        from octavo.commands import run  # from here on an interrupt ends with a line

        return run(sys.argv[1:] if argv is None else argv)

    return run_command("octavo", command)
