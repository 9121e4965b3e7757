"""vLLM's deploy command with the package's name changed: `python -m octavo.entrypoints.openai.api_server`."""

import argparse
import sys
from collections.abc import Sequence

from octavo.cli import add_serve_flags, parse, run_serve


def main(argv: Sequence[str] | None = None) -> int:
    """Serves until a signal comes; returns the exit code: 2 where the user can mend it."""
    parser = argparse.ArgumentParser("api_server", description="Serve a model over HTTP.", allow_abbrev=False)
    add_serve_flags(parser)
    args = parse(parser, sys.argv[1:] if argv is None else argv)
    try:
        return run_serve(args)
    except (ValueError, OSError) as error:
        print(f"api_server: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
