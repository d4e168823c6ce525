"""Run every check of this folder, in an order in which later ones may rest on earlier ones."""

import importlib
import time

from .report import run, say


def main() -> None:
    """Import the modules with checks, so that they register them; then run them."""
    for name in ("own_grants", "foreign", "guest_grants", "regions", "ring", "daemon", "leftovers"):
        started = time.monotonic()
        try:
            importlib.import_module(f".{name}", __package__)
        except Exception as error:
            say(f"import {name}", False, started, error=repr(error))
    run()


main()
