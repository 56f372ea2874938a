"""Where the command `sipo` begins: quiet when it is interrupted, also while the commands are still being imported."""

from __future__ import annotations

import logging
import os
import sys

INTERRUPTED = 130
"""What shells call a process that SIGINT ended."""


def main() -> None:
    try:
        # A stream that whoever started us has closed is no stream at all to Python.
        sys.stdout, sys.stderr = (stream or open(os.devnull, "w") for stream in (sys.stdout, sys.stderr))  # noqa: SIM115, PTH123
        if not (sys.stdout.isatty() and sys.stderr.isatty()):
            # Typer's own help and errors: what is redirected has no colours, whatever FORCE_COLOR or a CI system say.
            os.environ["_TYPER_FORCE_DISABLE_TERMINAL"] = "1"
        for stream in (sys.stdout, sys.stderr):
            stream.reconfigure(errors="replace")  # type: ignore[union-attr]  # a locale may lack letters of an answer

        import structlog

        from gateway.cli import app

        # What the library logs on its way the commands tell themselves; what it warns of goes where errors go.
        structlog.configure(
            wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING),
            logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        )
        app(prog_name="sipo")
    except KeyboardInterrupt:
        raise SystemExit(INTERRUPTED) from None
    except OSError as error:
        # What commands meet they tell themselves: this is where they print.
        if error.errno is None:
            raise
        print(f"error: the output cannot be written: {error.strerror}", file=sys.stderr)
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
