# SPDX-License-Identifier: MIT
"""Each allocation of each request fails once: the first, the second, and so on until none is left.

Whatever fails, a request is refused with an errno and has changed nothing, or it is done in part
and its answer says which part. No page has wrong bytes, and nothing is leaked. At the end, every
call of the module that allocates must have been seen to fail.

Needs a kernel with fault injection, which Debian's are not: KERNEL=debug.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.kernel import frames, injection
from tests.kernel.accounting import settled_free_pages
from tests.kernel.actor import MADV_DONTNEED, Region, Stage
from tests.kernel.contract import Result
from tests.kernel.injection import Failure, Site
from tests.kernel.module import Module
from tests.kernel.sharing import pairs
from tests.kernel.wire import Client, Refused

# Few pages: small arrays, which have no other memory to fall back to. Many: large ones, which do.
# Not so many that netlink takes the message from vmalloc(), which warns when that fails.
FEW_PAGES, MANY_PAGES = 6, 100
SEED = 40
# More than any request allocates here.
MOST = 2000
# Copying a page for its owner is the only thing the module has others allocate for.
ALLOCATES = re.compile(r"alloc|get_user_pages_remote")
# What netlink says when it has no memory, and a copy from or to us that fails.
EXPECTED = {errno.ENOMEM, errno.ENOBUFS, errno.EFAULT}
LEAK_PAGES = 300
FINIT_MODULE = 313
PLENTY = 10**6

hit: set[Site] = set()


class Hasty(Client):
    """Waits for no answer: all that will come is there when a request returns."""

    def __init__(self) -> None:
        super().__init__()
        self._socket.settimeout(0)


@pytest.fixture(scope="module", autouse=True)
def injected() -> Iterator[None]:
    """The kernel fails what it is told to."""
    if not injection.possible():
        pytest.skip("no fault injection")
    with injection.settings():
        yield


@pytest.fixture
def regions(stage: Stage, request: pytest.FixtureRequest) -> tuple[Region, Region]:
    """Equal pages of two processes."""
    pages: int = request.param
    return stage.start().region(pages, SEED), stage.start().region(pages, SEED)


def one_by_one(
    ask: Callable[[Hasty], object],
    check: Callable[[object], None],
    prepare: Callable[[], None] = lambda: None,
) -> int:
    """Ask again and again, each time with another failure, until nothing fails any more.

    `prepare` is spared. `check` gets the answer, or the error. Returns how many allocations failed.
    """
    outcomes: Counter[str] = Counter()
    for nth in range(1, MOST):
        prepare()
        with Hasty() as client:
            assert client.family
            outcome: object
            with Failure(nth) as failure:
                try:
                    outcome = ask(client)
                except OSError as error:
                    # BlockingIOError: the answer itself was lost.
                    outcome = error
        if not failure.happened:
            print(f"{nth - 1} failures: {dict(outcomes)}")
            assert not isinstance(outcome, OSError), outcome
            check(outcome)
            return nth - 1
        if isinstance(outcome, OSError) and not isinstance(outcome, BlockingIOError):
            assert outcome.errno in EXPECTED, (outcome, failure.site)
        if failure.site:
            hit.add(failure.site)
        said = errno.errorcode[outcome.errno or 0] if isinstance(outcome, OSError) else "answer"
        outcomes[f"{failure.site.function if failure.site else 'netlink'}: {said}"] += 1
        check(outcome)
    raise AssertionError(f"still failing after {MOST}")


def assert_honest(alice: Region, bob: Region, outcome: object, before: list[int]) -> None:
    """What the answer to a MERGE says is what became of the pages; all is undone after it."""
    frames_now = [*alice.frames.tolist(), *bob.frames.tolist()]
    half = len(alice)
    shared = [a == b for a, b in zip(frames_now[:half], frames_now[half:], strict=True)]
    alice.verify()
    bob.verify()
    if isinstance(outcome, list):
        for (mine, yours), is_shared in zip(outcome, shared, strict=True):
            assert (mine == Result.SUCCESS) == (yours == Result.SUCCESS) == is_shared
            assert {mine, yours} <= {Result.SUCCESS, Result.NOMEM, Result.HUGE}
    elif isinstance(outcome, Refused):
        assert frames_now == before
    with Client() as client:
        info = client.info()
        assert (info.shared_pages, info.shared_mappings) == (sum(shared), 2 * sum(shared))
        for region in (alice, bob):
            assert client.unmerge(region.actor.key, region.address, len(region))[0] == sum(shared)
        info = client.info()
        assert (info.shared_pages, info.shared_mappings) == (0, 0)
    frames.assert_distinct([*alice, *bob])


@pytest.mark.parametrize("regions", [FEW_PAGES, MANY_PAGES], indirect=True)
def test_merge(regions: tuple[Region, Region]) -> None:
    alice, bob = regions
    before: list[int] = []

    def prepare() -> None:
        before[:] = [*alice.frames.tolist(), *bob.frames.tolist()]

    free = settled_free_pages()
    failures = one_by_one(
        lambda client: client.merge(*pairs(alice, bob)),
        lambda outcome: assert_honest(alice, bob, outcome, before),
        prepare,
    )
    # At least one per shared page.
    assert failures > len(alice)
    assert free - settled_free_pages() < LEAK_PAGES


def test_merge_with_split(stage: Stage) -> None:
    """A huge page is split for a few of its pages."""
    whole = stage.start().region(512, SEED, kind="huge")
    alice = replace(whole, pages=FEW_PAGES)
    bob = stage.start().region(FEW_PAGES, SEED)
    before: list[int] = []

    def prepare() -> None:
        # A fresh one.
        whole.actor.ask("madvise", whole.address, len(whole), MADV_DONTNEED)
        whole.actor.ask("fill", whole.address, len(whole), SEED)
        before[:] = [*alice.frames.tolist(), *bob.frames.tolist()]

    def ask(client: Hasty) -> object:
        return client.merge(*pairs(alice, bob), split_percent=1)

    def check(outcome: object) -> None:
        assert_honest(alice, bob, outcome, before)
        whole.verify()

    assert one_by_one(ask, check, prepare) > FEW_PAGES


@pytest.mark.parametrize("regions", [FEW_PAGES], indirect=True)
def test_merge_of_zeros(regions: tuple[Region, Region]) -> None:
    """No page is needed for these, only memory for the request."""
    alice, bob = regions

    def prepare() -> None:
        for region in regions:
            region.actor.ask("clear", region.address, len(region))

    def check(outcome: object) -> None:
        left = [frame for region in regions for frame in region.frames.tolist() if frame]
        zero = [frame for frame in left if frames.has_flag(frame, frames.KPF_ZERO_PAGE)]
        if isinstance(outcome, list):
            assert outcome == [Result.ZEROED] * 2 * FEW_PAGES
            assert len(zero) == len(left)
        elif isinstance(outcome, Refused):
            assert not zero
        for region in regions:
            assert region.actor.ask("zeros", region.address, len(region)) == "1"

    assert one_by_one(lambda client: client.merge_zeros(*alice, *bob), check, prepare) > 5


@pytest.mark.parametrize("regions", [512], indirect=True)
def test_checksum(regions: tuple[Region, Region]) -> None:
    """A dump that allocates for each of its messages."""
    alice, _ = regions
    with Client() as client:
        expected = client.records(alice).tolist()

    def check(outcome: object) -> None:
        assert isinstance(outcome, OSError) or outcome == expected

    assert one_by_one(lambda client: client.records(alice).tolist(), check) > 1
    alice.verify()


@pytest.mark.parametrize("regions", [FEW_PAGES], indirect=True)
def test_unmerge(regions: tuple[Region, Region]) -> None:
    """Pages are copied until one cannot be: the count and NEXT say how far it came."""
    alice, bob = regions
    before: list[int] = []

    def prepare() -> None:
        with Client() as other:
            other.merge(*pairs(alice, bob))
        before[:] = alice.frames.tolist()

    def ask(client: Hasty) -> object:
        return client.unmerge(alice.actor.key, alice.address, len(alice))

    def check(outcome: object) -> None:
        changed = [a != b for a, b in zip(before, alice.frames.tolist(), strict=True)]
        alice.verify()
        bob.verify()
        if isinstance(outcome, tuple):
            unmerged, after = outcome
            assert changed == [n < unmerged for n in range(len(alice))]
            assert alice.address + unmerged * frames.PAGE_BYTES <= after
            if unmerged < len(alice):
                assert after == alice[unmerged].address
        elif isinstance(outcome, Refused):
            assert not any(changed)

    assert one_by_one(ask, check, prepare) > FEW_PAGES


def test_info() -> None:
    def check(outcome: object) -> None:
        assert isinstance(outcome, OSError) or outcome == 2

    assert one_by_one(lambda client: client.info().contract_version, check) > 1


def loads(descriptor: int) -> bool:
    """finit_module, by this thread: whether there was memory for it."""
    failed = ctypes.CDLL(None, use_errno=True).syscall(FINIT_MODULE, descriptor, b"", 0)
    assert not failed or ctypes.get_errno() == errno.ENOMEM
    return not failed


def test_load(module: Module, tmp_path: Path) -> None:
    """insmod fails, and leaves nothing behind that the next one would stumble over."""
    copy = tmp_path / "mergemem.ko"
    shutil.copy(module.path, copy)
    descriptor = os.open(copy, os.O_RDONLY)
    module.unload()
    with Failure(PLENTY, whole=True) as whole:
        assert loads(descriptor)
    # Kprobes and static calls are what the kernel brings; it warns when it has no memory for them.
    ours = {
        PLENTY - whole.left - (len(whole.asked) - 1 - index): site
        for index, site in enumerate(whole.asked)
        if site and site.function not in ("find_lookup", "mergemem_symbols_resolve")
    }
    refused = 0
    for nth, site in ours.items():
        module.unload()
        with Failure(nth) as failure:
            loaded = loads(descriptor)
        assert failure.happened
        if not loaded:
            refused += 1
            hit.add(site)
            assert loads(descriptor)
    print(f"{len(ours)} of {PLENTY - whole.left} allocations failed, {refused} loads")
    assert refused
    os.close(descriptor)


def test_every_call_failed(module: Module) -> None:
    """After all others: what the module's code calls, against what was seen to fail."""
    calls = injection.call_sites(module.path, ALLOCATES)
    assert len(calls) > 5
    missed = {site: callee for site, callee in calls.items() if site not in hit}
    print(f"{len(calls)} calls: {calls}")
    assert not missed
