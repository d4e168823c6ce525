"""A `VirtioDevice` behind the `VhostUserBackend` interface, and the workers that serve it.

What every back-end needs belongs elsewhere; here is what only devices have.
"""
