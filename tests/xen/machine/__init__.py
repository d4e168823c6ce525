"""A Xen host under software emulation: fetched, built and booted by the tests.

Run it by hand from this folder's parent: ``python -m machine``.
"""
