"""The options of `vhost-backend` and of its commands."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from importlib import import_module
from types import SimpleNamespace

from .._version import __version__

# What a command needs is imported when it is the one that was given.
_COMMANDS = {
    "blk": "serve a file or block device as a virtio disk",
    "demo": "make a disk, serve it, use it and check it, without a virtual machine",
}


def parse(arguments: Sequence[str]) -> SimpleNamespace:
    """The options of the command that was given, and its `run`; ends the program for wrong ones."""
    # Only --help cares how wide the terminal is. Asking imports shutil with two compression
    # libraries, 0.3 MiB of a daemon.
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
    """A guess at which option was meant."""
    from difflib import get_close_matches  # only for a mistake

    known = [option for action in parser._actions for option in action.option_strings]
    close = get_close_matches(unknown[0].split("=")[0], known, 1)
    return f" (is {close[0]} meant?)" if close else ""
