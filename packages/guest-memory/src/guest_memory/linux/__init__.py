"""Linux's system calls with raw addresses, which Python lacks. Nothing here knows guests."""
