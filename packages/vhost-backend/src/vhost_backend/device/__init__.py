"""The interface for authors of devices: the device, its requests, the stream of its state.

Nothing here knows workers, vrings or messages.
"""
