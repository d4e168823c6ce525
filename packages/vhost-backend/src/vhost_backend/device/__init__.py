"""What the author of a device sees: the device, its requests, the stream of its state.

No worker, vring or message is known here.
"""
