"""One vring: its settings, the queue made of them, its data path, and the lock around it all.

The lock knows that a worker may serve the ring from C (`ring_lease`). Otherwise nothing here knows
messages, workers or devices.
"""
