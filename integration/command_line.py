"""The command `lath`: parse, run, and turn every expected error into one line and exit code 2."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence

from lath.integration.store import ModelError
from lath.kernels.simd.isa import MissingInstructionsError

logger = logging.getLogger("lath")

# A mistake in what was asked for, or something missing on this machine. Anything else is a fault of
# ours and keeps its traceback.
_EXPECTED = (ValueError, NotImplementedError, ModelError, OSError, MissingInstructionsError)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line on `arguments` (default: of the process) and exit."""
    sys.exit(run(sys.argv[1:] if arguments is None else arguments))


def run(arguments: Sequence[str]) -> int:
    """Run the command line; returns the exit code."""
    try:
        from lath.integration.commands import app
    except ImportError as error:
        return _fail(f"the command line needs typer and rich: pip install 'lath[cli]' ({error})")
    try:
        code = app(list(arguments) or ["--help"], prog_name="lath", standalone_mode=False)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except Exception as error:
        return _explain(error)
    return code if isinstance(code, int) else 0


def _explain(error: Exception) -> int:
    logger.debug("the command failed", exc_info=error)
    if type(error).__name__ == "Abort":
        return _fail("interrupted", 130)
    # Errors of the parser know how to say what is wrong; the parser is a private matter of typer.
    if hasattr(error, "format_message"):
        return _fail(error.format_message())
    if isinstance(error, _EXPECTED):
        return _fail(str(error) or type(error).__name__)
    raise error


def _fail(message: str, code: int = 2) -> int:
    print(f"lath: {' '.join(message.split())}", file=sys.stderr)
    return code


if __name__ == "__main__":
    main()
