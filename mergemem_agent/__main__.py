# SPDX-License-Identifier: MIT
"""`python -m mergemem_agent` is `mergemem`."""

import sys

from mergemem_agent.cli import main

if __name__ == "__main__":
    sys.exit(main())
