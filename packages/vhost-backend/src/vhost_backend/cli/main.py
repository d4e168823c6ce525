"""Arguments, log lines, and errors as one line."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence

from .._version import __version__
from ..errors import VhostBackendError
from . import blk, demo

_COMMANDS = {"blk": blk, "demo": demo}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if "--print-capabilities" in arguments and arguments[0] in _COMMANDS:
        # "Backend program conventions": everything else on the command line is ignored.
        capabilities = getattr(_COMMANDS[arguments[0]], "CAPABILITIES", None)
        if capabilities is not None:
            print(capabilities)
            return 0
    options = _parser().parse_args(arguments)
    logging.basicConfig(
        level=[logging.WARNING, logging.INFO, logging.DEBUG][min(options.verbose, 2)],
        format="vhost-backend: %(message)s",
        stream=sys.stderr,
    )
    try:
        status: int = options.run(options)
    except VhostBackendError as error:
        print(f"vhost-backend: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vhost-backend",
        description="Virtio devices for virtual machines, served over vhost-user.",
    )
    parser.add_argument("--version", action="version", version=f"vhost-backend {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, module in _COMMANDS.items():
        command = commands.add_parser(
            name,
            help=module.HELP,
            description=module.DESCRIPTION,
            epilog=module.EPILOG,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add_argument(
            "-v", "--verbose", action="count", default=0, help="log more (twice: much more)"
        )
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return parser
