"""The command line as a process: standard streams, log lines, errors as one line, the status."""

from __future__ import annotations

import errno
import os
import sys

from .capabilities import CAPABILITIES

TYPE_CHECKING = False  # see the package's __init__
if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import SimpleNamespace
    from typing import TextIO


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    _open_standard_streams()
    try:
        try:
            status = _main(arguments)
        except SystemExit:  # --help, say
            sys.stdout.flush()
            raise
        if not status:
            # Flush now: here a failed write is an ordinary error, at the interpreter's end not.
            sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of our output has closed it
        _give_up_output(sys.stdout)
        return 128 + 13
    except OSError as error:
        _give_up_output(sys.stdout)
        what = f"{error.filename}: {error.strerror}" if error.filename else error.strerror or error
        hint = " (ulimit -n, LimitNOFILE)" if error.errno == errno.EMFILE else ""
        say(f"{what}{hint}")
        return 1
    finally:
        # Log lines that cannot be written would make the exit status 120.
        _give_up_output(sys.stderr)


def _open_standard_streams() -> None:
    """Open closed standard streams as /dev/null, and escape characters that stdout cannot encode.

    Otherwise the image could get descriptor 1 or 2, and log lines would be written into it.
    """
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number
            os.set_inheritable(fd, True)
    if sys.stdout is None:
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    if sys.stderr is None:
        sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
    reconfigure = getattr(sys.stdout, "reconfigure", None)
    if reconfigure is not None:
        reconfigure(errors="backslashreplace")


def say(text: str) -> None:
    """Print a line on stderr; a failure to write it (a full disk) is ignored."""
    try:  # noqa: SIM105
        print(f"vhost-backend: {text}", file=sys.stderr, flush=True)
    except OSError:
        pass


def _give_up_output(stream: TextIO) -> None:
    """If `stream` cannot be written, keep the interpreter from trying again when it ends."""
    try:
        stream.flush()
        return
    except OSError:
        pass
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, stream.fileno())
    os.close(null)


def _main(arguments: Sequence[str] | None) -> int:
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if "--print-capabilities" in arguments and arguments[0] in CAPABILITIES:
        # "Backend program conventions": everything else on the command line is ignored.
        print(CAPABILITIES[arguments[0]])
        return 0
    from .parser import parse  # here, so that --print-capabilities needs no argparse

    return _run(parse(arguments))


def _run(options: SimpleNamespace) -> int:
    import logging

    from ..errors import VhostBackendError

    logging.basicConfig(
        level=[logging.WARNING, logging.INFO, logging.DEBUG][min(options.verbose, 2)],
        format="vhost-backend: %(message)s",
        stream=sys.stderr,
    )
    try:
        status: int = options.run(options)
    except VhostBackendError as error:
        _give_up_output(sys.stdout)
        say(str(error))
        return 1
    return status
