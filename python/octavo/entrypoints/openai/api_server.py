"""vLLM's deploy command with the package's name changed:
`python -m octavo.entrypoints.openai.api_server`.
"""

import sys

from octavo.ending import run_command

TYPE_CHECKING = False  # as in `octavo`
if TYPE_CHECKING:
    from collections.abc import Sequence


def main(argv: "Sequence[str] | None" = None) -> int:
    """Serves until a signal comes; returns the exit code, see `octavo.ending`."""

    def command() -> int:
        from octavo import commands  # from here on an interrupt ends with a line

        parser = commands.serve_parser("api_server")
        return commands.run_serve(commands.parse(parser, sys.argv[1:] if argv is None else argv))

    return run_command("api_server", command)


if __name__ == "__main__":
    sys.exit(main())
