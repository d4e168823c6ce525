"""The command line: `vhost-backend COMMAND`, also `python -m vhost_backend`."""

from .main import main

__all__ = ["main"]
