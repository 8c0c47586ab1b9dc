# SPDX-License-Identifier: MIT
"""The demo's acts, in the guest, as root.

    python -m tests.demo.guest DIRECTORY POLICY…

DIRECTORY holds `report_answer`, what the shop's books must say, computed outside. At the end
`facts.json` and `responses.log` are there, for report.py. A demo that cannot go on raises; whether
what it found is good enough is for the host to judge.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tests.demo import catalogue, fleet, frames, free_memory, latecomer, mergemem
from tests.demo.inspector import Inspector
from tests.demo.mergemem import Agent
from tests.demo.watch import Sample, Watch

HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
SCRATCH = Path("/run/demo")
LOGS = ("gunicorn.log", "agent.log", "responses.log")
QUIET_SECONDS = 15.0
LOOK_SECONDS = 5.0
# The agent has got what it can get when this long brought less than this part of the census.
SETTLED_SECONDS = 35  # more than the agent may let pass between two searches of the index
SETTLED_SHARE = 0.01
MERGE_LIMIT_SECONDS = 180.0
LATECOMERS_LIMIT_SECONDS = 90.0
PAGES_PER_MIB = 256
BAR_WIDTH = 24
INDENT, WIDTH = " " * 10, 100

STARTED = time.monotonic()


@dataclass(frozen=True)
class Instant:
    """Both witnesses at one instant: frames counted, and memory that the kernel has free."""

    sample: Sample
    mem_free_bytes: int
    per_cpu_lists_bytes: int


class Demo:
    """The acts, and what they hand on to each other."""

    def __init__(self, directory: Path, policies: Sequence[Path]) -> None:
        self.directory = directory
        self.policy_options = [word for policy in policies for word in ("--policy", str(policy))]
        self.inspector = Inspector((directory / "report_answer").read_bytes())
        self.facts: dict[str, Any] = {"kernel": os.uname().release}

    def run(self) -> None:
        """All acts; the fleet serves customers from the first to the last."""
        SCRATCH.mkdir(exist_ok=True)
        try:
            self.start_fleet()
            self.watch = Watch(lambda: self.fleet.pids)
            customers = self.start_customers()
            self.break_sharing()
            self.serve_unmerged()
            self.estimate()
            self.merge()
            self.serve_merged()
            self.check_merged()
            self.merge_latecomers()
            self.stop_agent()
            self.unmerge_one_worker()
            self.unload_module()
            self.read_everything()
            customers.terminate()
            if customers.wait(timeout=60):
                raise mergemem.CommandError("the customers ended in disorder")
            self.watch.stop()
            self.fleet.stop()
        finally:
            for log in LOGS:
                if (SCRATCH / log).exists():
                    shutil.copy(SCRATCH / log, self.directory)
        self.save()

    def start_fleet(self) -> None:
        announce("A web fleet starts")
        self.fleet = fleet.start(SCRATCH / "gunicorn.log")
        say(
            f"$ {' '.join(fleet.command()[1:])}",
            f"It runs as user {fleet.USER_ID} in the control group of a service: a master that",
            f"has loaded {catalogue.PRODUCTS:,} dicts, and {fleet.WORKERS} workers forked from it, "
            "which share all that at first.",
            "Transparent huge pages are as Debian has them: "
            f"{HUGE_PAGES.read_text(encoding='ascii').strip()}.",
        )

    def start_customers(self) -> subprocess.Popen[bytes]:
        log = str(SCRATCH / "responses.log")
        words = [sys.executable, "-m", "tests.demo.load", *map(str, fleet.ADDRESS), log]
        return subprocess.Popen(words)

    def break_sharing(self) -> None:
        with self.act("warm", "Customers come, the workers work, and fork's sharing breaks"):
            fresh = self.watch.sample()
            for _ in range(2):
                self.inspector.verify_objects(self.fleet.workers)
            self.inspector.verify_pages(self.fleet.workers)
            say(
                "Each worker has read every object, which writes its reference count, and has",
                "collected garbage, and has loaded a model of its own: "
                f"{mib(fresh.frames)} became {mib(self.watch.sample().frames)}.",
            )

    def serve_unmerged(self) -> None:
        with self.act("before", f"Customers only, {QUIET_SECONDS:.0f} s, for comparison"):
            time.sleep(QUIET_SECONDS)

    def estimate(self) -> None:
        with self.act("estimate", "$ mergemem estimate: what would merging give? No module needed"):
            say(*mergemem.run("estimate", *self.policy_options).splitlines())
            census = mergemem.run_json("estimate", "--json", *self.policy_options)
            self.facts["census"] = census
            small = int(census["total"]["mergeable_duplicates"])
            in_huge_pages = int(census["total"]["huge_duplicates"])
            self.census_frames = small + in_huge_pages
            if not self.census_frames:
                raise mergemem.CommandError(
                    "the estimate found no duplicates in a fleet that is full of them"
                )
            say(
                f"In frames: {small:,} mergeable duplicates, and {in_huge_pages:,} more in huge "
                "pages, which the policy lets mergemem split. Together they are the census.",
            )
        self.facts["before"] = asdict(self.instant())
        self.facts["huge_bytes_before"] = self.huge_bytes()

    def merge(self) -> None:
        with self.act("merge", "$ insmod mergemem.ko; mergemem agent: memory comes back"):
            mergemem.load_module()
            self.agent = Agent(self.policy_options, SCRATCH / "agent.log")
            say(
                f"$ mergemem agent {' '.join(self.policy_options)}",
                "That is the policy as shipped, and a larger budget of CPU time: an emulated",
                "processor runs Python some 16 times slower. Starting …",
            )
            self.agent.wait_until_ready()
            say("Ready. Pages are merged once two looks at them, some time apart, have agreed.")
            self.facts["agent_start_cpu_seconds"] = self.agent.cpu_seconds()
            self.wait_until_settled()

    def serve_merged(self) -> None:
        with self.act("after", f"Customers only, {QUIET_SECONDS:.0f} s, now merged"):
            time.sleep(QUIET_SECONDS)
            self.facts["after"] = asdict(self.watch.sample())
            self.facts["huge_bytes_after"] = self.huge_bytes()

    def check_merged(self) -> None:
        with self.act("check", f"$ curl {mergemem.METRICS_URL}; every known page is compared"):
            metrics = mergemem.scrape()
            self.facts["metrics"] = metrics
            say(*(f"{name} {value:,.0f}" for name, value in telling(metrics)))
            merged = self.watch.sample().merged_mappings
            say(f"(pagemap has {merged:,} mappings of merged pages in the fleet at this moment)")
            self.verify_pages()

    def merge_latecomers(self) -> None:
        title = "Hints at work: two new processes write the same, and then keep quiet"
        with self.act("hints", title), latecomer.Latecomers() as newcomers:
            last_write = newcomers.last_write_seconds()
            deadline = last_write + LATECOMERS_LIMIT_SECONDS
            while newcomers.merged_pages() < latecomer.PAGES and time.monotonic() < deadline:
                time.sleep(0.1)
            seconds = time.monotonic() - last_write
            merged = newcomers.merged_pages()
            self.facts["last_write_to_merged_seconds"] = seconds
            self.facts["latecomers_merged_pages"] = merged
            self.facts["hints"] = hints = mergemem.hints()
            say(
                f"{merged:,} pages of each were merged {seconds:.1f} s after the last write: "
                f"the kernel told of {hints['faults']:,.0f} first touches, of "
                f"{hints['events']:,.0f} forks, execs and exits, and lost {hints['lost']:,.0f} "
                f"(source: {hints['source']}). The policy wants two looks, two seconds apart.",
            )

    def stop_agent(self) -> None:
        announce("The agent gets SIGTERM")
        stopped = self.agent.stop()
        self.facts["agent"] = asdict(stopped)
        self.facts["end"] = asdict(self.instant())
        say(
            f"It ended with status {stopped.status} after {stopped.seconds:.2f} s, having used "
            f"{stopped.cpu_seconds:.1f} s of CPU in all."
        )
        if stopped.status:
            raise mergemem.CommandError("the agent did not end well, see build/demo/agent.log")

    def unmerge_one_worker(self) -> None:
        worker = self.fleet.workers[0]
        with self.act("unmerge", f"$ mergemem unmerge {worker}: one worker gets its own frames"):
            merged = self.watch.sample()
            say(*mergemem.run("unmerge", str(worker)).splitlines())
            say(f"{mib(merged.frames)} became {mib(self.watch.sample().frames)}.")
            self.verify_pages()
            time.sleep(LOOK_SECONDS)

    def unload_module(self) -> None:
        with self.act("unload", "$ rmmod mergemem: the others stay merged, and all keep serving"):
            mergemem.unload_module()
            self.verify_pages()
            time.sleep(LOOK_SECONDS)

    def read_everything(self) -> None:
        with self.act("read", "Every worker reads all it has: the kernel alone unshares now"):
            merged = self.watch.sample()
            self.inspector.verify_objects(self.fleet.workers)
            say(
                f"{mib(merged.frames)} became {mib(self.watch.sample().frames)}: the agent would "
                "merge them again, but it has gone."
            )
            self.say_verdict()
            time.sleep(LOOK_SECONDS)

    def save(self) -> None:
        self.facts |= {
            "census_duplicate_frames": self.census_frames,
            "inspected": self.inspector.findings.as_dict(),
            "samples": [asdict(sample) for sample in self.watch.samples],
            "acts": [asdict(act) for act in self.watch.acts],
        }
        (self.directory / "facts.json").write_text(json.dumps(self.facts), encoding="utf-8")

    # What the acts need -----------------------------------------------------------------------

    @contextmanager
    def act(self, name: str, title: str) -> Iterator[None]:
        """An act that the picture shows."""
        announce(title)
        with self.watch.act(name):
            yield

    def instant(self) -> Instant:
        """Ask both witnesses."""
        free_memory.drop_caches()
        free = free_memory.read()
        return Instant(self.watch.sample(), free.mem_free_bytes, free.per_cpu_lists_bytes)

    def huge_bytes(self) -> int:
        """How much the fleet has mapped as huge pages, in all of its processes."""
        return frames.huge_bytes(self.fleet.pids)

    def wait_until_settled(self) -> None:
        """Show progress each second, until nothing much comes back any more."""
        before = self.facts["before"]["sample"]["frames"]
        history: list[int] = []
        deadline = time.monotonic() + MERGE_LIMIT_SECONDS
        while time.monotonic() < deadline:
            time.sleep(1)
            now = self.watch.samples[-1]
            history.append(now.frames)
            share = max(0.0, (before - now.frames) / self.census_frames)
            say(
                f"fleet {mib(now.frames):>7}  {bar(share)} {share:4.0%} of the census"
                f"  {now.merged_mappings:7,} pages merged"
                f"  agent {self.agent.cpu_seconds():.1f} s CPU"
            )
            if len(history) > SETTLED_SECONDS and share > SETTLED_SHARE:
                recent = history[-1 - SETTLED_SECONDS] - now.frames
                if recent < SETTLED_SHARE * self.census_frames:
                    return
        say(f"Not settled after {MERGE_LIMIT_SECONDS:.0f} s; going on with what there is.")

    def verify_pages(self) -> None:
        self.inspector.verify_pages(self.fleet.workers)
        self.say_verdict()

    def say_verdict(self) -> None:
        found = self.inspector.findings
        say(
            f"So far {found.checked_pages:,} pages compared, {found.wrong_pages} wrong; "
            f"{found.checked_objects:,} objects read, {found.wrong_responses} wrong answers."
        )


def announce(title: str) -> None:
    print(f"\n[{time.monotonic() - STARTED:5.1f} s] {title}", flush=True)


def say(*lines: str) -> None:
    """Print below the announcement; what is too long for a terminal is folded."""
    for line in lines:
        folded = textwrap.wrap(line, WIDTH, subsequent_indent="    ", break_on_hyphens=False)
        # wrap() would eat the indentation of short lines, tables mostly.
        for part in folded if len(line) > WIDTH else [line]:
            print(f"{INDENT}{part}".rstrip(), flush=True)


def mib(frames: int) -> str:
    return f"{frames / PAGES_PER_MIB:,.0f} MiB"


def bar(share: float) -> str:
    full = round(min(1.0, share) * BAR_WIDTH)
    return f"[{'#' * full}{'.' * (BAR_WIDTH - full)}]"


def telling(metrics: dict[str, float]) -> list[tuple[str, float]]:
    """The few metrics that a person looks at first."""
    wanted = (
        "mergemem_shared", "mergemem_saved", "mergemem_freed", "mergemem_split", "mergemem_zero",
    )  # fmt: skip
    found = [(name, value) for name, value in metrics.items() if name.startswith(wanted)]
    return [(name, value) for name, value in found if value]


def main() -> int:
    """The whole of it."""
    parser = argparse.ArgumentParser(description="the demo, in the guest")
    parser.add_argument("directory", type=Path)
    parser.add_argument("policies", type=Path, nargs="+")
    arguments = parser.parse_args()
    try:
        Demo(arguments.directory, arguments.policies).run()
    except (fleet.FleetError, mergemem.CommandError) as failure:
        print(f"\nthe demo stopped: {failure}", flush=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
