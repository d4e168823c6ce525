"""One vring: what the front-end configured, the queue made of it, and the lock around both.

Nothing here knows messages, workers or devices.
"""
