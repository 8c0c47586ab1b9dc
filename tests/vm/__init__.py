# SPDX-License-Identifier: MIT
"""The test rig: real Debian kernels in a throwaway virtual machine.

Standard library only: it runs with Debian's own python3 before any virtual environment exists.
"""
