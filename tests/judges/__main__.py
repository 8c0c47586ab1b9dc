# SPDX-License-Identifier: MIT
"""Run judges: in a guest at once, elsewhere in a guest that is booted for it.

Exit status 0: every judge was right, and enough of its pages were merged. 1: not so.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.judges import boot, catalogue, judge, provision, table
from tests.judges.judge import Finding
from tests.judges.merger import Settings
from tests.vm import kernels
from tests.vm.cache import BUILD
from tests.vm.steps import say

# The control directory that the rig mounts into its guests, and nobody else has.
IN_GUEST = Path("/run/vm/settings")
RESULTS = BUILD / "judges"


def main(words: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if words is None else words)
    options = _parser().parse_args(words)
    try:
        judges = catalogue.chosen(options.only)
    except LookupError as mistake:
        print(f"error: {mistake}", file=sys.stderr)
        return 2
    if options.list:
        print(table.listing(judges))
        return 0
    if options.table:
        print(table.markdown(_saved()), end="")
        return 0
    if options.prepare:
        provision.prepare()
        return 0
    if not IN_GUEST.exists():
        return boot.run(words, options.kernel)
    settings = Settings(
        zero=not options.no_zero,
        split=not options.no_split,
        plant=options.plant,
        idle=options.idle,
        seed=judge.environment_seed() if options.seed is None else options.seed,
    )
    return run(judges, settings, options.seconds, options.json)


def run(
    judges: Sequence[judge.Judge], settings: Settings, seconds: int | None, path: Path | None
) -> int:
    """Run judges one after the other, here; 0 if all is well."""
    boot.load_module()
    say(f"kernel {os.uname().release}, seed {settings.seed}\n{table.HEAD}")
    findings: list[Finding] = []
    for each in judges:
        findings.append(judge.run(each, settings, seconds))
        say(table.line(findings[-1]))
        if findings[-1].detail:
            say(findings[-1].detail)
    say(table.total(findings))
    save(findings, settings, path or RESULTS / f"{os.environ['MERGEMEM_KERNEL']}.json")
    if settings.plant:
        # A judge that found nothing wrong, where something was, is none.
        return int(any(finding.verdict in ("right", "not run") for finding in findings))
    return int(any(finding.verdict != "right" for finding in findings))


def save(findings: Sequence[Finding], settings: Settings, path: Path) -> None:
    """The results for programs."""
    text = {
        "kernel": os.uname().release,
        "seed": settings.seed,
        "planted_fault": settings.plant,
        "seconds": round(sum(finding.seconds for finding in findings), 1),
        "merged": sum(finding.account.merged for finding in findings),
        "wrong_results": sum(finding.wrong_results for finding in findings),
        "judges": [finding.as_dict() for finding in findings],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(text, indent=2) + "\n", encoding="utf-8")


def _saved() -> dict[str, dict[str, Any]]:
    """The last results of each kernel that has some."""
    found = {kernel.name: RESULTS / f"{kernel.name}.json" for kernel in kernels.load()}
    return {name: json.loads(path.read_text()) for name, path in found.items() if path.exists()}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python3 -m tests.judges", description=__doc__)
    add = parser.add_argument
    add("--list", action="store_true", help="the judges' names, and what they check")
    add("--table", action="store_true", help="the last results of each kernel, as Markdown")
    add("--prepare", action="store_true", help="only make what they need, on the host")
    add("--only", action="append", default=[], metavar="NAME", help="or the beginning of a name")
    add("--seconds", type=int, help="for each judge, instead of its own time")
    add("--json", type=Path, help="where to write results; default build/judges/KERNEL.json")
    add("--seed", type=int, help="of the merger's random choices; default: another each time")
    add("--kernel", default=os.environ.get("KERNEL") or "newest", help="of the guest to boot")
    add("--plant", action="store_true", help="prove the judges: all must find planted wrong bytes")
    add("--idle", action="store_true", help="merge nothing: is a complaint the judge's own?")
    add("--no-zero", action="store_true", help="nothing becomes the zero page")
    add("--no-split", action="store_true", help="no huge page is split")
    return parser


if __name__ == "__main__":
    sys.exit(main())
