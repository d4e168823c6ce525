"""Descriptors that are not sockets of a conversation: eventfds and other signals, listeners.

Nothing here knows rings or devices.
"""
