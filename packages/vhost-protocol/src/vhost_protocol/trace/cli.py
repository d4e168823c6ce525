"""``vhost-trace``: look at the traffic between a front-end and a back-end, live or recorded."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
from typing import IO, TextIO

from .proxy import Proxy
from .recording import TraceError, read_records
from .show import Printer


def replay(file: IO[str], out: TextIO, *, as_json: bool) -> int:
    """Print a recording; return how many rules were broken.

    Raises:
        TraceError: it is not a recording, or is damaged.
    """
    order, records = read_records(file)
    printer = Printer(out, as_json=as_json, order=order)
    for record in records:
        printer.record(record)
    return printer.violations


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    made = argparse.ArgumentParser(
        prog="vhost-trace",
        description="Show the vhost-user messages between a front-end and a back-end.",
        epilog="The front-end connects to --listen; the back-end listens on --connect.  With"
        " --read the exit status is 1 when a rule was broken, 2 when the recording cannot be read,"
        " else 0.",
    )
    made.add_argument("--listen", metavar="SOCKET", help="socket to make for the front-end")
    made.add_argument("--connect", metavar="SOCKET", help="socket of the back-end")
    made.add_argument("--write", metavar="FILE", help="record the traffic as well")
    made.add_argument("--read", metavar="FILE", help="show a recording (- is standard input)")
    made.add_argument("--json", action="store_true", help="print a line of JSON for each message")
    made.add_argument("--once", action="store_true", help="end with the first connection")
    return made


def main(argv: list[str] | None = None) -> int:
    """Run ``vhost-trace``; return its exit status."""
    arguments = parser()
    options = arguments.parse_args(argv)
    live = options.listen is not None and options.connect is not None
    if live == (options.read is not None) or (options.read and (options.listen or options.connect)):
        arguments.error("either --listen and --connect, or --read")
    if live and options.listen == options.connect:
        arguments.error("--listen and --connect are two sockets")
    if options.read and options.write:
        arguments.error("--write records live traffic; it does not go with --read")
    try:
        if options.read is None:
            return _trace(options)
        if options.read == "-":
            return 1 if replay(sys.stdin, sys.stdout, as_json=options.json) else 0
        with open(options.read, encoding="utf-8") as file:
            return 1 if replay(file, sys.stdout, as_json=options.json) else 0
    except BrokenPipeError:
        # The reader of our output has enough; keep the interpreter from writing more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        what = f"{error.filename}: {error.strerror}" if error.filename else f"{error}"
        print(f"vhost-trace: {what}", file=sys.stderr)
        return 2
    except (TraceError, UnicodeDecodeError) as error:
        print(f"vhost-trace: {error}", file=sys.stderr)
        return 2


def _trace(options: argparse.Namespace) -> int:
    with contextlib.ExitStack() as stack:
        recording = None
        if options.write is not None:
            recording = stack.enter_context(open(options.write, "w", encoding="utf-8"))
        printer = Printer(sys.stdout, as_json=options.json)
        proxy: Proxy | None = None
        told = False

        def end(*_: object) -> None:
            nonlocal told
            told = True
            if proxy is not None:
                proxy.stop()

        # Before a socket exists: from then on a signal has something to clean up.
        for number in (signal.SIGTERM, signal.SIGINT):
            stack.callback(signal.signal, number, signal.signal(number, end))
        proxy = Proxy(options.listen, options.connect, printer, recording)
        stack.callback(proxy.close)
        if told:
            proxy.stop()
        proxy.run(once=options.once)
    return 0 if proxy.recorded else 2
