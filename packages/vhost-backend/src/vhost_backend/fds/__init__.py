"""File descriptors other than connections: eventfds and other signals, and listeners.

Nothing here knows rings or devices.
"""
