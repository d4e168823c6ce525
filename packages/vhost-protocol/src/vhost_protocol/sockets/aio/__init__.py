"""The endpoints for asyncio: the source of the blocking ones too, see scripts/derive-blocking."""
