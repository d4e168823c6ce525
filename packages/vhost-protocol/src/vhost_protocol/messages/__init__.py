"""Every message as a value: what it holds and how its bytes lie; not when it is legal."""
