# SPDX-License-Identifier: MIT
"""The soak: everything there is, on the debug kernel, for a chosen time, and one report.

On the host, `__main__.py` boots guests, and `report.py` makes a report of the journal they leave.
In the guest, `inside.py` runs the tests of the module (`plugin.py` watches them) and the judges,
and looks for what is left behind (`leaks.py`, `counters.py`).

`planted.py` shows that bugs are found: it plants them, one at a time, in a copy of the module.
"""
