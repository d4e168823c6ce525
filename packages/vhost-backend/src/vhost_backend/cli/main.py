"""Arguments, log lines, and errors as one line."""

from __future__ import annotations

import sys

from .capabilities import CAPABILITIES

TYPE_CHECKING = False  # see the package's __init__
if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import SimpleNamespace

# What a command needs is imported when it is the one that was given.
_COMMANDS = {
    "blk": "serve a file or block device as a virtio disk",
    "demo": "make a disk, serve it, use it and check it, without a virtual machine",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if "--print-capabilities" in arguments and arguments[0] in CAPABILITIES:
        # "Backend program conventions": everything else on the command line is ignored.
        print(CAPABILITIES[arguments[0]])
        return 0
    import gc

    # What parses is of no use later: 0.8 MiB, which the modules of the daemon take over.
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
        print(f"vhost-backend: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return status


def _parse(arguments: Sequence[str]) -> SimpleNamespace:
    import argparse
    from functools import partial
    from importlib import import_module
    from types import SimpleNamespace

    from .._version import __version__

    # Only --help cares how wide the terminal is, and asking imports two compression libraries.
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
    return parser.parse_args(arguments, SimpleNamespace())
