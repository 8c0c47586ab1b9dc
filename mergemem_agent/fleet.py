# SPDX-License-Identifier: MIT
"""Fleets: processes of one program, and what their kinship says about an estimate.

A prefork fleet descends from one parent, has one layout of addresses, and loses the sharing that
fork gave it as it writes. Separately started processes have a layout each (ASLR), so even equal
data differ wherever they hold pointers.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mergemem_agent.census import Census, DomainCensus
from mergemem_agent.gap import Limit
from mergemem_agent.pagemap import PAGE_BYTES
from mergemem_agent.procfs import Process
from mergemem_agent.quantity import format_size

# Below this share of its frames a domain has little to gain. Idle interpreters with ASLR have 1 %
# of their frames in common, Java machines 18 % by their zeros and tables, prefork fleets 75 %.
LITTLE_SHARE = 0.10
FLEET_PROCESSES = 3
# Of programs with less of the memory than this, nobody needs to hear.
WORTH_SHARE = 0.05

_ADDR_NO_RANDOMIZE = 0x0040000  # include/uapi/linux/personality.h


@dataclass(frozen=True)
class Family:
    """Processes of one executable that descend from `root`, itself among them."""

    root: Process
    processes: tuple[Process, ...]

    @property
    def anonymous_bytes(self) -> int:
        """Resident anonymous memory, counted once for each process that maps it."""
        return sum(process.anonymous_bytes for process in self.processes)


def families(processes: Sequence[Process]) -> list[Family]:
    """Sort processes into families; one that stands alone is a family too.

    A parent that is not among `processes`, or runs another program, founds no family: its
    children have been through exec.
    """
    by_pid = {process.id.pid: process for process in processes}
    kin: dict[int, list[Process]] = defaultdict(list)
    for process in processes:
        kin[_root(process, by_pid).id.pid].append(process)
    return [Family(by_pid[pid], tuple(members)) for pid, members in kin.items()]


def _root(process: Process, by_pid: Mapping[int, Process]) -> Process:
    seen = {process.id.pid}  # pids can be recycled into a circle while /proc is read
    while True:
        parent = by_pid.get(process.parent_pid)
        if parent is None or parent.executable != process.executable or parent.id.pid in seen:
            return process
        seen.add(parent.id.pid)
        process = parent


def hints(
    census: Census, processes: Mapping[int, Process], proc_root: Path = Path("/proc")
) -> list[str]:
    """Say in plain words why the figures are as they are, and what could be done about it.

    `processes` are those of the census, by pid.
    """
    said: list[str] = []
    worth_bytes = WORTH_SHARE * sum(process.anonymous_bytes for process in processes.values())
    for domain in census.domains:
        programs: dict[str, list[Family]] = defaultdict(list)
        for family in families([processes[pid] for pid in domain.pids]):
            if family.root.executable:
                programs[family.root.executable].append(family)
        for program in programs.values():
            if sum(family.anonymous_bytes for family in program) >= max(1, worth_bytes):
                said += _fleet_hints(domain, program)
                said += _layout_hints(domain, program, proc_root)
        said += _held_hints(domain)
    said += _huge_page_hints(census, processes, proc_root)
    return list(dict.fromkeys(said))


def _share(domain: DomainCensus) -> float:
    return domain.tally.mergeable_duplicates / max(1, domain.tally.frames)


def _fleet_hints(domain: DomainCensus, program: Sequence[Family]) -> Iterator[str]:
    largest = max(program, key=lambda family: len(family.processes))
    if len(largest.processes) < FLEET_PROCESSES:
        return
    root = largest.root
    fleet = (
        f"{root.executable}, process {root.id.pid}, and its {len(largest.processes) - 1} "
        "descendants are a prefork fleet"
    )
    if _share(domain) < LITTLE_SHARE:
        yield (
            f"{fleet} that still shares most of what fork gave it, or has replaced it: estimate "
            "again after it has served requests for a while."
        )
    else:
        yield (
            f"{fleet}: its duplicates are copies that reference counts, garbage collection and "
            "writes made of shared pages. They come back as it goes on writing, so let the agent "
            "run; in Python, gc.freeze() before the fork makes fewer of them."
        )


def _layout_hints(
    domain: DomainCensus, program: Sequence[Family], proc_root: Path
) -> Iterator[str]:
    mode = _number(proc_root / "sys/kernel/randomize_va_space", 10)
    started = sum(_randomized(family.root, proc_root) for family in program)
    if mode and started >= 2 and _share(domain) < LITTLE_SHARE:
        yield (
            f"{started} processes of {program[0].root.executable} were started separately, and "
            f"address space layout randomization (kernel.randomize_va_space = {mode}) gives each "
            "of them other addresses: pages that hold pointers differ, though the data are the "
            "same. Workers that fork from one parent after it has loaded its data share far "
            "more; to see what the layout costs, start them under 'setarch -R' in a test."
        )


def _randomized(process: Process, proc_root: Path) -> bool:
    personality = _number(proc_root / str(process.id.pid) / "personality", 16)
    return not (personality or 0) & _ADDR_NO_RANDOMIZE


def _held_hints(domain: DomainCensus) -> Iterator[str]:
    if domain.tally.held_elsewhere * 20 > domain.tally.frames:
        yield (
            f"{format_size(domain.tally.held_elsewhere * PAGE_BYTES)} of duplicates in "
            f"{domain.domain} are mapped by processes outside of the domain or selection as well, "
            "and stay in memory for these: select the parent of a fleet with its workers."
        )


def _huge_page_hints(
    census: Census, processes: Mapping[int, Process], proc_root: Path
) -> Iterator[str]:
    if Limit.FRAME_FLAGS in census.limits:
        huge_bytes = sum(_anonymous_huge_bytes(pid, proc_root) for pid in processes)
        if huge_bytes:
            yield (
                f"{format_size(huge_bytes)} of these processes' memory is in huge pages, which "
                "are merged only with 'huge: split' in their policy, but could not be told apart "
                "from the rest here."
            )
    elif census.total.huge_duplicates * 20 > census.total.frames:
        yield (
            f"{format_size(census.total.huge_duplicates * PAGE_BYTES)} more are duplicates within "
            "huge pages: 'huge: split' in the policy of these processes merges most of them, and "
            "splits the huge pages that hold them."
        )


def _anonymous_huge_bytes(pid: int, proc_root: Path) -> int:
    try:
        lines = (proc_root / str(pid) / "smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("AnonHugePages:"))


def _number(path: Path, base: int) -> int | None:
    try:
        return int(path.read_text(), base)
    except (OSError, ValueError):
        return None
