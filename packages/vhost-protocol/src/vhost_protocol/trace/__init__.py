"""Traffic between two programs, seen from the side: shown, recorded and judged."""
