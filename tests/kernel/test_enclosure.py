# SPDX-License-Identifier: MIT
"""What the soak runs judges in: when the time is up, nothing of a family goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
import time
from pathlib import Path

from tests.soak import enclosure


def daemonise(said: Path) -> int:
    """A grandchild in a session of its own that ignores what it can; and wait for ever."""
    if not os.fork():
        os.setsid()
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if not os.fork():
            said.write_text(f"{os.getpid()} {tempfile.mkdtemp()}")
            while True:
                time.sleep(60)
        os._exit(0)
    while True:
        time.sleep(60)


def test_cut_off(tmp_path: Path) -> None:
    said = tmp_path / "said"
    groups = {path.name for path in enclosure.GROUPS.iterdir()}
    assert enclosure.run(lambda: daemonise(said), 5.0) is None
    pid, directory = said.read_text().split()
    # Dead: gone, or a zombie that nobody has reaped.
    status = Path(f"/proc/{pid}/stat")
    assert not status.exists() or status.read_text().rpartition(") ")[2].startswith("Z")
    assert not Path(directory).exists()
    assert {path.name for path in enclosure.GROUPS.iterdir()} == groups


def test_left_behind_by_one_that_ends(tmp_path: Path) -> None:
    """An orphan goes with the rest; so does memory that nobody has mapped any more."""
    said = tmp_path / "said"

    def work() -> int:
        subprocess.run(["ipcmk", "--shmem", "4096"], check=True, stdout=subprocess.DEVNULL)
        (enclosure.SHARED_MEMORY / "left").write_text("behind")
        with subprocess.Popen(["sh", "-c", f"sleep 1000 & echo $! >{said}"]) as shell:
            shell.wait()
        return 7

    assert enclosure.run(work, 60.0) == 7
    assert not Path(f"/proc/{said.read_text().strip()}/exe").exists()
    assert not (enclosure.SHARED_MEMORY / "left").exists()
    segments = Path("/proc/sysvipc/shm")
    assert not segments.exists() or len(segments.read_text().splitlines()) == 1
