"""Both ends of every socket, blocking and asyncio."""
