# SPDX-License-Identifier: MIT
"""`make planted`: one bug at a time in a copy of the module, and who notices it.

Each is planted by replacing a piece of the source that must be there exactly once, built for the
debug kernel, and met with the tests named here. What the detectors say is printed as a table.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.soak.journal import Event, Journal
from tests.vm import build, kernels, provision, tree
from tests.vm.cache import BUILD
from tests.vm.guest import Guest, GuestError
from tests.vm.kernels import Kernel
from tests.vm.steps import StepFailed, say, step

HOME = BUILD / "planted"
GUEST_SECONDS = 480
# The search for leaks takes its time for every MiB of it.
MEMORY_MIB = 2048
MERGES = "tests/kernel/test_merge.py::test_across_processes"
LONGEST_LINE = 110


@dataclass(frozen=True)
class Plant:
    """A bug: in which file, what is replaced by what, and the tests that it shall meet."""

    name: str
    file: str
    search: str
    replacement: str
    # For pytest.
    tests: str
    # Those of the same guest leave it in a state for the next.
    guest: int


PLANTS = (
    Plant(
        "a missing RSS adjustment",
        "attach.c",
        "\tcompat_add_mm_counter(mm, MM_FILEPAGES, file_pages);\n",
        "\t(void)file_pages;\n",
        MERGES,
        1,
    ),
    Plant(
        "a missing put: a shared page keeps a reference",
        "request.c",
        "\t\t\t\tput_page(request->groups[i].target);\n",
        "\t\t\t\tbarrier();\n",
        MERGES,
        1,
    ),
    Plant(
        "a use after free: the request's processes",
        "request.c",
        "\tif (request->targets)\n",
        "\tkvfree(request->targets);\n\tif (request->targets)\n",
        MERGES,
        1,
    ),
    Plant(
        "a missing TLB flush",
        "attach.c",
        "\tkernel_call(flush_tlb_mm_range)(range->mm, range->start, range->end,\n"
        "\t\t\t\t\tPAGE_SHIFT, false);\n",
        "\tbarrier();\n",
        "tests/kernel/test_writers.py::test_random_writers",
        5,
    ),
    Plant(
        "a missing unlock: the page-table lock stays held",
        "attach.c",
        "\t\tpte_unmap_unlock(pte, ptl);\n\t} else {\n",
        "\t\tbarrier();\n\t} else {\n",
        MERGES,
        2,
    ),
    Plant(
        "a missing unlock: the mmap_lock stays held",
        "target.c",
        "\tmmap_read_unlock(mm);\n",
        "\tbarrier();\n",
        MERGES,
        3,
    ),
    Plant(
        "a use after free: a mapping without a reference",
        "attach.c",
        "\t\tget_page(group->target);\n\t\tcompat_add",
        "\t\tcompat_add",
        MERGES,
        4,
    ),
)


@dataclass(frozen=True)
class Found:
    """Who noticed a planted bug."""

    name: str
    seconds: float
    kernel_log: tuple[str, ...]
    tests: tuple[str, ...]
    scans: tuple[str, ...]
    verdict: str

    @property
    def noticed(self) -> bool:
        return bool(self.kernel_log or self.tests or self.scans or self.verdict)


def sow(plant: Plant, kernel: Kernel, directory: Path) -> Path:
    """The module with the bug, built."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    build.copy_sources(directory)
    file = directory / plant.file
    text = file.read_text(encoding="utf-8")
    if text.count(plant.search) != 1:
        raise StepFailed(
            f"{plant.name}: kmod/{plant.file} has {text.count(plant.search)} times what is to be "
            f"replaced; change PLANTS in {Path(__file__).name}:\n{plant.search}"
        )
    file.write_text(text.replace(plant.search, plant.replacement), encoding="utf-8")
    build.make(tree.get(kernel), directory)
    return directory / "mergemem.ko"


def harvest(plants: Sequence[Plant], kernel: Kernel) -> list[Found]:
    """One guest, in which each of the bugs is met in turn; and who complains."""
    modules = {plant: sow(plant, kernel, HOME / str(PLANTS.index(plant))) for plant in plants}
    words = [str(provision.NEWEST / "bin/python"), "-m", "tests.soak.inside", "--plants"]
    words += [f"{module}={plant.tests}" for plant, module in modules.items()]
    environment = {"PYTHONDONTWRITEBYTECODE": "1", "MERGEMEM_WRITERS_SECONDS": "60"}
    # Swap because `inside.py` turns it off.
    machine = Guest(kernel=kernel, memory_mib=MEMORY_MIB, swap_mib=64, module=False)
    verdict = ""
    log: tuple[str, ...] = ()
    try:
        machine.run(words, env=environment, time_limit_seconds=GUEST_SECONDS)
    except GuestError as lost:
        lines = str(lost).splitlines()
        log = tuple(x.removeprefix("kernel log: ") for x in lines if x.startswith("kernel log:"))
        verdict = type(lost).__name__
    return [_found(plant, modules[plant], log, verdict) for plant in plants]


def _found(plant: Plant, module: Path, log: tuple[str, ...], verdict: str) -> Found:
    journal = Journal(module.with_name("journal.jsonl"))
    ended = journal.of("log")
    begun = journal.of("guest")
    return Found(
        plant.name,
        sum(e["seconds"] for e in journal.of("test")),
        # The log of the whole guest belongs to the plant that it was lost with.
        tuple(ended[0]["findings"]) if ended else log if begun else (),
        tuple(_failure(e) for e in journal.of("test") if e["outcome"] == "failed"),
        tuple(_scans(journal)),
        verdict if begun and not ended else "",
    )


def _failure(event: Event) -> str:
    lines = [x[1:].strip() for x in event["text"].splitlines() if x.startswith("E ")]
    # A kernel's report, which an assertion shows whole, is in the log already.
    said = [x for x in lines if "assert" in x or "Error" in x] or [*lines, event["text"][:200]]
    return f"{event['id'].rpartition('::')[2]}: {said[0]}"


def _scans(journal: Journal) -> list[str]:
    found = [
        f"{kind}: {len(event['leaks'])}, {_culprit(event['leaks'][0])}"
        for kind in ("page_owner", "kmemleak")
        for event in journal.of(kind)
        if event["leaks"]
    ]
    return found + [f"counters: {e['astray']}" for e in journal.of("counters") if e["astray"]]


def _culprit(stack: str) -> str:
    functions = re.findall(r"(\w+)\+0x[0-9a-f]+ \[mergemem\]", stack)
    return f"from {functions[0]}" if functions else stack.splitlines()[0]


def table(found: list[Found]) -> str:
    """For tests/README.md."""
    rows = ["| Planted | Kernel log | Tests | Scans | s |", "|---|---|---|---|---|"]
    for one in found:
        log, tests, scans = (
            "<br>".join(line[:LONGEST_LINE].replace("|", r"\|") for line in lines[:3]) or "-"
            for lines in (one.kernel_log, one.tests, one.scans)
        )
        log = f"{one.verdict}: {log}" if one.verdict else log
        rows.append(f"| {one.name} | {log} | {tests} | {scans} | {one.seconds:.0f} |")
    return "\n".join(rows)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python3 -m tests.soak.planted", description=__doc__)
    parser.add_argument("names", nargs="*", help="parts of names; all bugs without")
    parser.add_argument("--kernel", default="debug", help="another one notices less, but sooner")
    options = parser.parse_args()
    wanted, kernel = options.names, kernels.find(options.kernel)
    build.helpers()
    chosen = [p for p in PLANTS if not wanted or any(word in p.name for word in wanted)]
    found = []
    for guest in sorted({plant.guest for plant in chosen}):
        plants = [plant for plant in chosen if plant.guest == guest]
        with step(f"plant {'; '.join(plant.name for plant in plants)}"):
            found += harvest(plants, kernel)
    HOME.mkdir(exist_ok=True)
    lines = json.dumps([asdict(one) for one in found], indent=1)
    (HOME / "report.json").write_text(lines + "\n", encoding="utf-8")
    say(table(found))
    missed = [one.name for one in found if not one.noticed]
    for name in missed:
        say(f"NOT NOTICED: {name}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
