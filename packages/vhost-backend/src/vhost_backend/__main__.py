"""`python -m vhost_backend` is the same as the `vhost-backend` command."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
