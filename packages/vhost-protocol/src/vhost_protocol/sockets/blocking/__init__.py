"""The blocking endpoints: derived from those for asyncio, but for the transport."""
