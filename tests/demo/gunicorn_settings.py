# SPDX-License-Identifier: MIT
"""Gunicorn's settings, beyond what its command line says."""

from __future__ import annotations

import gc
from typing import Any

bind = "127.0.0.1:8000"
# Emulated processors are slow; the limit is there to catch what hangs.
timeout = 120
graceful_timeout = 10
# Its heartbeat file belongs into memory.
worker_tmp_dir = "/dev/shm"
# A thread for remote control, in newer versions; nobody asks for it here.
control_socket_disable = True


def post_request(_worker: Any, _request: Any, environ: dict[str, Any], _response: Any) -> None:
    """Collect garbage out of band: after the answer to a request that makes a lot of it."""
    if environ["PATH_INFO"] == "/report":
        gc.collect()
