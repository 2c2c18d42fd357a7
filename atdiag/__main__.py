"""Entry point of the command line, also as ``python -m atdiag``: Ctrl-C exits quietly from the first moment."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import Any


def _leave(*_: Any) -> None:
    sys.exit(130)


def main() -> None:
    """Run the console script."""
    signal.signal(signal.SIGINT, _leave)
    from atdiag.cli import app

    signal.signal(signal.SIGINT, signal.default_int_handler)
    app.main()


if __name__ == "__main__":
    # ``python -m`` puts the working folder first on the path, and it may have packages called ablations or figures.
    if not sys.flags.safe_path and Path(sys.path[0]).resolve() != Path(__file__).resolve().parents[1]:
        del sys.path[0]
    main()
