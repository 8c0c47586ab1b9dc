# SPDX-License-Identifier: MIT
"""Memory with a second set of page tables over it: a virtual machine in the actor (actor_kvm.h).

The machine and a thread beside it write and read the same pages, while they are merged, zeroed,
split and unmerged: whoever reads an old frame, or writes to one, says so.
"""

from __future__ import annotations

import os
import random
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.kernel import race
from tests.kernel.actor import Region, Stage
from tests.kernel.contract import GROUP_ZERO, Result, State
from tests.kernel.wire import Client

PAGES, SEED = 512, 110
SECONDS = 5.0


@pytest.fixture(scope="module", autouse=True)
def kvm() -> Iterator[None]:
    """KVM inside the guest: emulated processors have it, others perhaps."""
    for driver in ("kvm_amd", "kvm_intel"):
        subprocess.run(["modprobe", driver], stderr=subprocess.DEVNULL)
    if not Path("/dev/kvm").exists():
        # kernels.toml accounts for this on kvm alone: emulated processors have it.
        accelerator = os.environ["MERGEMEM_ACCELERATOR"]
        pytest.skip(f"no KVM inside a guest that runs on {accelerator}")
    yield
    for driver in ("kvm_amd", "kvm_intel"):
        subprocess.run(["rmmod", driver], stderr=subprocess.DEVNULL)


def nominate(client: Client, region: Region) -> list[Result]:
    """MERGE of all pages that look equal to another, or like zeros, right now."""
    records = client.records(region)
    wanted = np.isin(records["state"], [State.ANON, State.ZERO, State.MERGED, State.HUGE])
    _, groups = np.unique(records["checksum"], return_inverse=True)
    candidates = [
        (
            region[int(n)].address,
            0,
            GROUP_ZERO if records["state"][n] == State.ZERO else int(groups[n]),
        )
        for n in np.flatnonzero(wanted)
    ]
    if not candidates:
        return []
    # As dense as the contract wants them.
    numbers = {group: n for n, group in enumerate(sorted({group for _, _, group in candidates}))}
    dense = [
        (address, process, group if group == GROUP_ZERO else numbers[group])
        for address, process, group in candidates
    ]
    return client.merge_candidates([region.actor.key], dense, split_percent=25)


@pytest.mark.parametrize("kind", ["private", "zeros", "huge"])
def test_machine(stage: Stage, client: Client, kind: str) -> None:
    actor = stage.start()
    address = actor.map(PAGES, "huge" if kind == "huge" else "private")
    region = Region(actor, address, PAGES, SEED, period=1)
    if kind == "zeros":
        actor.ask("clear", address, PAGES)
    else:
        actor.ask("fill", address, PAGES, SEED, 1)
    actor.ask("machine", address, PAGES)
    wanted = Result.ZEROED if kind == "zeros" else Result.SUCCESS
    results: Counter[Result] = Counter()
    chance = random.Random(1)

    def met() -> bool:
        machine_rounds, host_writes, *wrong = actor.ask("machine_so_far").split(" ", 2)
        assert not wrong, wrong
        return int(machine_rounds) > 20 and int(host_writes) > 100 and results[wanted] > PAGES

    for _ in race.rounds(SECONDS, met, lambda: results):
        results.update(nominate(client, region))
        if not chance.randrange(8):
            client.unmerge(actor.key, address, PAGES)
    machine_rounds, host_writes, *wrong = actor.ask("stop_machine").split(" ", 2)
    print(f"{kind}: {machine_rounds} rounds of the machine, {host_writes} writes beside it,")
    print(dict(results))
    assert not wrong, wrong
