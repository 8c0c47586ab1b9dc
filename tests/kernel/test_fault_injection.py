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
from tests.kernel.accounting import forgotten_frames
from tests.kernel.actor import MADV_DONTNEED, Region, Stage
from tests.kernel.contract import DEPTH_SAMPLE_BYTES, Attribute, Command, Result
from tests.kernel.injection import Failure, Site
from tests.kernel.module import Module
from tests.kernel.sharing import pairs
from tests.kernel.wire import Client, Refused
from tests.soak import leaks

# Few pages: small arrays, which have no other memory to fall back to. Many: large ones, which do.
# Not so many that netlink takes the message from vmalloc(), which warns when that fails.
FEW_PAGES, MANY_PAGES = 6, 100
SEED = 40
# More than any request allocates here.
MOST = 2000
# What allocates by its name, and what the module has others allocate for: copying a page for its
# owner, trimming a reply that was made with room to spare, and its family.
ALLOCATES = re.compile(r"alloc|get_user_pages_remote|netlink_unicast|genl_register_family")
# The reply to MERGE is made to measure: nothing to trim.
NEVER_ASKS = {("merge_doit", "netlink_unicast")}
# What netlink says when it has no memory, and a copy from or to us that fails.
EXPECTED = {errno.ENOMEM, errno.ENOBUFS, errno.EFAULT}
FINIT_MODULE = 313
PLENTY = 10**6
SLACK = 10

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
    with injection.resident(), injection.settings():
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
        outcomes[f"{failure.site or 'netlink'}: {said}"] += 1
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
    apart = [*alice.frames.tolist(), *bob.frames.tolist()]
    assert all(apart)
    assert len(set(apart)) == len(apart)


@pytest.mark.parametrize("regions", [FEW_PAGES, MANY_PAGES], indirect=True)
def test_merge(regions: tuple[Region, Region]) -> None:
    alice, bob = regions
    before: list[int] = []

    def prepare() -> None:
        before[:] = [*alice.frames.tolist(), *bob.frames.tolist()]

    failures = one_by_one(
        lambda client: client.merge(*pairs(alice, bob)),
        lambda outcome: assert_honest(alice, bob, outcome, before),
        prepare,
    )
    # At least one per shared page.
    assert failures > len(alice)


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
    """A dump that allocates for each of its messages, and reads its request up to the last."""
    alice, _ = regions
    every_other = range(0, len(alice), 2)

    def ask(client: Client) -> object:
        return client.records(alice, DEPTH_SAMPLE_BYTES, full=every_other).tolist()

    with Client() as client:
        expected = ask(client)

    def check(outcome: object) -> None:
        assert isinstance(outcome, OSError) or outcome == expected

    assert one_by_one(ask, check) > 1
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
    """The reply is taken apart later: what reads the header must not be met by the failure."""
    constant = {
        Attribute.CONTRACT_VERSION,
        Attribute.MODULE_VERSION,
        Attribute.FEATURES,
        Attribute.LIMITS,
        Attribute.TOTALS,
    }
    with Client() as client:
        (expected,) = client.request(Command.INFO, b"")

    def check(outcome: object) -> None:
        if isinstance(outcome, list):
            (reply,) = outcome
            assert {kind: reply[kind] for kind in constant} == {
                kind: expected[kind] for kind in constant
            }

    assert one_by_one(lambda client: client.request(Command.INFO, b""), check) > 1


def test_nothing_is_left(module: Module) -> None:
    """After all requests: what they took and nobody has let go, be it a single object.

    (How much memory is free says nothing here: KASAN keeps freed objects back.)
    """
    symbols = leaks.Symbols.read()
    module.unload()
    pages = forgotten_frames()
    # Those of the kernel are not ours to judge.
    objects = [text for text in leaks.unreferenced_objects(symbols) if leaks.MODULE in text]
    assert (pages, "\n".join(objects)) == ([], "")


def loads(descriptor: int) -> bool:
    """finit_module, by this thread: whether there was memory for it."""
    failed = ctypes.CDLL(None, use_errno=True).syscall(FINIT_MODULE, descriptor, b"", 0)
    assert not failed or ctypes.get_errno() == errno.ENOMEM
    return not failed


def areas_of_nobody() -> list[str]:
    """Memory of vmalloc() for a module that is gone: its caller has no name any more."""
    areas = Path("/proc/vmallocinfo").read_text().splitlines()
    return [area for area in areas if re.match(r"\S+ +\d+ 0xffffffff", area)]


def test_load(module: Module, tmp_path: Path) -> None:
    """insmod fails, and leaves nothing behind that the next one would stumble over."""
    copy = tmp_path / "mergemem.ko"
    shutil.copy(module.path, copy)
    descriptor = os.open(copy, os.O_RDONLY)
    if module.loaded:
        module.unload()
    before = areas_of_nobody()
    with Failure(PLENTY, within="sys_finit_module") as whole:
        assert loads(descriptor)
    ours = [frame for frame in whole.asked if frame]
    # By the time of a look at the trace, a module that was refused has no names any more.
    sites = {frame.place_in_page: frame.site for frame in ours}
    assert len(sites) == len(set(sites.values()))
    behind = len(whole.asked) - whole.asked.index(ours[0])
    # Too many at first: a number that is not reached says how many there are.
    total = PLENTY - whole.left + behind
    outcomes: Counter[str] = Counter()
    # From the last on: how many pages vmalloc() must ask for is not the same each time.
    for back in range(behind + SLACK):
        # One that was refused is not there, and must not be in the way of the next.
        if module.loaded:
            module.unload()
        with Failure(total - back) as failure:
            loaded = loads(descriptor)
        assert module.loaded == loaded
        if not failure.happened:
            total -= failure.left
            continue
        # It may have been a neighbour's, or none of ours.
        site = sites.get(failure.frame.place_in_page) if failure.frame else None
        if site:
            hit.add(site)
            outcomes[f"{site}: {'loaded' if loaded else 'refused'}"] += 1
    print(f"{len(ours)} of {PLENTY - whole.left} allocations are ours: {dict(outcomes)}")
    assert any(outcome.endswith("refused") for outcome in outcomes)
    if module.loaded:
        module.unload()
    assert loads(descriptor)
    os.close(descriptor)
    module.unload()
    assert areas_of_nobody() == before


def test_every_call_failed(module: Module) -> None:
    """After all others: what the module's code calls, against what was seen to fail."""
    calls = {
        site: callee
        for site, callee in injection.call_sites(module.path, ALLOCATES).items()
        if (site.function, callee) not in NEVER_ASKS
    }
    assert len(calls) > 5
    for site, callee in calls.items():
        print(f"{site}: {callee}{'' if site in hit else ' NEVER FAILED'}")
    assert hit >= calls.keys()
