# SPDX-License-Identifier: MIT
"""The report of a soak, made of its journal and of the kernel logs of its guests."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import asdict, dataclass
from typing import Any

from tests.soak.journal import Event, Journal

# Verdicts of judges that had too little time for one, on a kernel as slow as this.
IDLE = {"too few merges", "not run"}


@dataclass(frozen=True)
class Boot:
    """One guest of the soak, as the host saw it."""

    seconds: float
    findings: tuple[str, ...]
    # The log around the findings.
    excerpt: str
    # Why it ended before its time, if it did.
    lost: str


def make(journal: Journal, boots: list[Boot], settings: dict[str, Any]) -> dict[str, Any]:
    """What `report.json` holds."""
    tests, judges = journal.of("test"), journal.of("judge")
    failed = [e for e in tests if e["outcome"] == "failed"]
    wrong = [e for e in judges if _is_wrong(e)]
    counters = [e["astray"] for e in journal.of("counters")]
    leaks = {
        kind: [leak for e in journal.of(kind) for leak in e["leaks"]]
        for kind in ("page_owner", "kmemleak")
    }
    report = settings | {
        "clean": False,
        "kernel": next((e["release"] for e in journal.of("guest")), ""),
        "duration_seconds": round(sum(boot.seconds for boot in boots), 1),
        "checks": {
            "tests": len([e for e in tests if e["outcome"] != "skipped"]),
            "assertions": sum(e["assertions"] for e in tests),
            "judges": sum(e["status"] == 0 for e in judges),
            "leak_scans": len(journal.of("kmemleak")) + len(journal.of("page_owner")),
        },
        "mismatches": [{"name": e["id"], "round": e["round"], "text": e["text"]} for e in failed]
        + [{"name": e["name"], "text": str(e["verdicts"] or e["status"])} for e in wrong],
        "log_findings": [line for boot in boots for line in boot.findings],
        "leaks": leaks,
        "counters_not_returned": {k: v for astray in counters for k, v in astray.items()},
        "ran": _ran(tests) + [_judged(e) for e in judges],
        "not_run": _not_run(journal, boots),
        "broken": [e["what"] for e in journal.of("broken")],
        "guests": [asdict(boot) for boot in boots],
    }
    report["clean"] = not any(_problems(report).values())
    return report


def _problems(report: dict[str, Any]) -> dict[str, list[str]]:
    """Everything that keeps a soak from being clean, by kind. What time did not allow is not."""
    return {
        "wrong or failed": [f"{m['name']}: {m['text']}" for m in report["mismatches"]],
        "in the kernel log": report["log_findings"],
        "pages never put": report["leaks"]["page_owner"],
        "objects never freed": report["leaks"]["kmemleak"],
        "counters astray": [f"{k}: {v}" for k, v in report["counters_not_returned"].items()],
        "guests lost": [boot["lost"] for boot in report["guests"] if boot["lost"]],
        "broken": report["broken"]
        + ([] if report["checks"]["tests"] else ["no test ran"])
        + ([] if report["checks"]["leak_scans"] else ["no leak scan was made"]),
    }


def _is_wrong(event: Event) -> bool:
    """Whether a judge found something wrong, or broke. That it came to nothing here is neither."""
    if event["status"] is None:
        return False
    verdicts = {one["verdict"] for one in event["verdicts"]}
    return event["status"] != 0 and not (verdicts and verdicts <= IDLE)


def _came_to_nothing(event: Event) -> str:
    """Why a judge that was begun, and found nothing wrong, does not count; empty if it does."""
    if event["status"] is None:
        return f"cut off after {event['seconds']:.0f} s"
    (verdict,) = {one["verdict"] for one in event["verdicts"]} & IDLE or {""}
    return verdict and f"{verdict} in {event['seconds']:.0f} s"


def _ran(tests: list[Event]) -> list[dict[str, Any]]:
    """Files of tests: how many ended how, and their time."""
    files: dict[str, list[Event]] = defaultdict(list)
    for event in tests:
        files[event["id"].partition("::")[0]].append(event)
    return [
        {
            "name": name,
            "seconds": round(sum(e["seconds"] for e in events), 1),
            "rounds": max(e["round"] for e in events),
            "assertions": sum(e["assertions"] for e in events),
        }
        | {
            outcome: sum(e["outcome"] == outcome for e in events)
            for outcome in ("passed", "failed", "skipped")
        }
        for name, events in files.items()
    ]


def _judged(event: Event) -> dict[str, Any]:
    verdict: dict[str, Any] = {"name": f"judge {event['name']}", "status": event["status"]}
    for one in event["verdicts"]:
        verdict |= {
            k: one[k] for k in ("seconds", "verdict", "merged", "wrong_results") if k in one
        }
    return verdict


def _not_run(journal: Journal, boots: list[Boot]) -> list[dict[str, str]]:
    """Whatever was never run, with the reason."""
    missing = []
    ended = {e["id"] for e in journal.of("test")}
    begun = {e["id"] for e in journal.of("begin")}
    collected = dict.fromkeys(t for e in journal.of("collected") for t in e["tests"])
    for name in collected:
        if name not in ended:
            why = "the guest was lost while it ran" if name in begun else "the time was up"
            missing.append({"name": name, "reason": why})
    skipped = {e["id"]: e["text"] for e in journal.of("test") if e["outcome"] == "skipped"}
    missing += [{"name": name, "reason": f"skipped: {text}"} for name, text in skipped.items()]
    judged = {e["name"]: _came_to_nothing(e) for e in journal.of("judge")}
    begun = {e["name"] for e in journal.of("judge-begin")}
    for name in dict.fromkeys(n for e in journal.of("judges") for n in e["names"]):
        if name not in judged:
            why = "the guest was lost while it ran" if name in begun else "the time was up"
            missing.append({"name": f"judge {name}", "reason": why})
        elif judged[name]:
            missing.append({"name": f"judge {name}", "reason": judged[name]})
    if not journal.of("judges"):
        missing.append({"name": "judges", "reason": "no guest got as far as to list them"})
    return missing


def summary(report: dict[str, Any]) -> str:
    """For a human."""
    checks = report["checks"]
    minutes = report["duration_seconds"] / 60
    guests = f"{len(report['guests'])} guest(s), {report['cpus']} CPUs"
    made = f"{checks['tests']} tests with {checks['assertions']} assertions"
    lines = [f"soak on {report['kernel']}: {minutes:.1f} min, {guests}"]
    lines += [f"  {made}, {checks['judges']} judges, {checks['leak_scans']} leak scans"]
    for entry in report["ran"]:
        counts = ", ".join(
            f"{key} {entry[key]}"
            for key in ("passed", "failed", "skipped", "verdict", "merged")
            if entry.get(key)
        )
        lines.append(f"  {entry['name']:44} {entry.get('seconds', 0):7.1f} s  {counts}")
    reasons: dict[str, int] = defaultdict(int)
    for item in report["not_run"]:
        reasons[item["reason"]] += 1
    lines += [f"  not run: {count} ({reason})" for reason, count in reasons.items()]
    for kind, entries in _problems(report).items():
        lines += [f"  {kind}: {entry.splitlines()[0]}" for entry in entries if entry]
    lines.append("the soak is clean" if report["clean"] else "THE SOAK HAS FINDINGS")
    return "\n".join(lines)
