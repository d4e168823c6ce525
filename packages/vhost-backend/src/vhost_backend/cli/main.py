"""Parses the arguments, sets up the log, and prints an error as one line."""

from __future__ import annotations

import errno
import os
import sys

from .capabilities import CAPABILITIES

TYPE_CHECKING = False  # see the package's __init__
if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence
    from types import SimpleNamespace
    from typing import TextIO

# A command's module is imported only when that command is given.
_COMMANDS = {
    "blk": "serve a file or block device as a virtio disk",
    "demo": "make a disk, serve it, use it and check it, without a virtual machine",
}


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
    import gc

    # Drop the modules that only parsing needs: the daemon's modules reuse their 0.8 MiB.
    parsing = {"argparse", "gettext", "locale"} - sys.modules.keys()
    options = _parse(arguments)
    for name in parsing:
        sys.modules.pop(name, None)
    gc.collect()
    return _run(options)


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


def _parse(arguments: Sequence[str]) -> SimpleNamespace:
    import argparse
    from functools import partial
    from importlib import import_module
    from types import SimpleNamespace

    from .._version import __version__

    # Only --help needs the terminal's width, and asking for it imports two compression libraries.
    width = None if {"-h", "--help"} & set(arguments) else 80
    formatter = partial(argparse.RawDescriptionHelpFormatter, width=width)
    parser = argparse.ArgumentParser(
        prog="vhost-backend",
        formatter_class=formatter,
        description="Virtio devices for virtual machines, served over vhost-user.",
    )
    parser.add_argument("--version", action="version", version=f"vhost-backend {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    # Options before the command take no value, so the first word is the command.
    given = next((word for word in arguments if not word.startswith("-")), None)
    command = parser
    for name, what in _COMMANDS.items():
        if name != given:
            commands.add_parser(name, help=what, formatter_class=formatter)
            continue
        module = import_module(f".{name}", __package__)
        command = commands.add_parser(
            name,
            help=what,
            description=module.DESCRIPTION,
            epilog=module.EPILOG,
            formatter_class=formatter,
        )
        command.add_argument(
            "-v", "--verbose", action="count", default=0, help="log more (twice: much more)"
        )
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    options, unknown = parser.parse_known_args(arguments, SimpleNamespace())
    if unknown:
        command.error(f"unrecognized arguments: {' '.join(unknown)}{_meant(command, unknown)}")
    return options


def _meant(parser: argparse.ArgumentParser, unknown: list[str]) -> str:
    """A guess at the option that was meant."""
    from difflib import get_close_matches

    known = [option for action in parser._actions for option in action.option_strings]
    close = get_close_matches(unknown[0].split("=")[0], known, 1)
    return f" (is {close[0]} meant?)" if close else ""
