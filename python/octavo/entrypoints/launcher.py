"""`octavo-launcher`: TGI's deploy command with the program's name changed."""

import os
import sys

from octavo.ending import run_command

TYPE_CHECKING = False  # as in `octavo`
if TYPE_CHECKING:
    from collections.abc import Sequence

_NAME = "octavo-launcher"


def main(argv: "Sequence[str] | None" = None) -> int:
    """Serves until a signal comes; returns the exit code, see `octavo.ending`."""

    def command() -> int:
        from octavo import commands  # from here on an interrupt ends with a line
        from octavo.tgi_flags import serve_words

        words, lines = serve_words(sys.argv[1:] if argv is None else argv, os.environ, _NAME)
        for line in lines:
            print(f"{_NAME}: warning: {line}", file=sys.stderr)
        return commands.run_serve(commands.parse(commands.serve_parser(_NAME), words))

    return run_command(_NAME, command)


if __name__ == "__main__":
    sys.exit(main())
