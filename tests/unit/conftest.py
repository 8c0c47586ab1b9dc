# SPDX-License-Identifier: MIT
"""How property tests run: as long as they take, for a busy machine proves nothing wrong."""

from hypothesis import settings

settings.register_profile("patient", deadline=None)
settings.load_profile("patient")
