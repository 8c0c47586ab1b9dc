# SPDX-License-Identifier: MIT
"""The agent of mergemem: finds equal pages in running processes and has the kernel merge them."""

__version__ = "0.3.0"
