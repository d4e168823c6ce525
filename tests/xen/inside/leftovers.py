"""The last check: what the hypervisor itself says is still mapped."""

import re
from typing import Any

from .libxen import debug_key, guest
from .maps import mapped
from .report import check


@check
def grant_tables_by_debug_key() -> dict[str, Any]:
    """The hypervisor's own list of active grants (debug key g) has none of the guest."""
    who = guest()
    text = debug_key("g")
    assert "gnttab_usage_print" in text, text[-2000:]
    _, _, rest = text.partition(f"d{who.domid} ")
    active = re.findall(r"^\(XEN\)\s+\[0x[0-9a-f]+\].*$", rest, re.MULTILINE)
    assert not active, active
    assert not mapped("/dev/xen/gntdev")
    (_,) = mapped("/dev/xen/privcmd")  # libxen's own view of the guest's grant table
    return {"printed": text[-1500:]}
