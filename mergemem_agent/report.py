# SPDX-License-Identifier: MIT
"""The report of ``mergemem estimate``, for people and as JSON; docs/estimate.md explains it."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from mergemem_agent.census import Census, DomainCensus
from mergemem_agent.gap import Unread
from mergemem_agent.pagemap import PAGE_BYTES
from mergemem_agent.quantity import format_percent, format_size
from mergemem_agent.tally import Tally


@dataclass(frozen=True)
class Estimate:
    """A census with what a person needs to judge it."""

    census: Census
    hints: tuple[str, ...]
    seconds: float

    def as_json(self) -> dict[str, Any]:
        """Return all figures, in pages; docs/estimate.md explains each."""
        result = self.census
        return {
            "page_bytes": PAGE_BYTES,
            "exact": result.sample == 1 and not result.limits,
            "sample": result.sample,
            "seconds": round(self.seconds, 3),
            "total": _figures(result.total)
            | {
                "zero_page_mappings": result.zero_page_mappings,
                "error_duplicates": result.error_duplicates,
            },
            "domains": [_domain_json(domain) for domain in result.domains],
            "gaps": [
                {
                    "pid": gap.pid,
                    "reason": gap.reason.name.lower(),
                    "detail": gap.detail,
                    "pages": gap.pages,
                }
                for gap in result.gaps
            ],
            "limits": [
                {"limit": limit.name.lower(), "effect": limit.effect, "needs": limit.needs}
                for limit in sorted(result.limits, key=lambda limit: limit.name)
            ],
            "hints": list(self.hints),
        }

    def report(self) -> Iterator[str]:
        """Return the lines of the report for people."""
        return map(_printable, self._lines())

    def _lines(self) -> Iterator[str]:
        result = self.census
        for domain in result.domains:
            users = "" if domain.uid is None or "user=" in domain.domain else f" user={domain.uid}"
            yield f"{domain.domain}{users}: {_count(len(domain.pids), 'process', 'processes')}"
            yield from _describe(domain.tally, domain.zero_page_mappings, domain.error_duplicates)
            yield ""
        if len(result.domains) > 1:
            yield f"all {len(result.domains)} domains"
            yield from _describe(result.total, result.zero_page_mappings, result.error_duplicates)
            yield ""
        yield from _section("hints", self.hints)
        yield from _section("not counted", _describe_gaps(result))
        yield from _section("limits of this estimate", _describe_limits(result))
        read = format_size(result.total.mapped * PAGE_BYTES)
        yield f"{read} of mappings looked at in {self.seconds:.1f} s; nothing was changed."


def _figures(tally: Tally) -> dict[str, int]:
    figures: dict[str, int] = asdict(tally)
    del figures["squares"]
    return figures | {
        "mergeable_duplicates": tally.mergeable_duplicates,
        "saved": tally.saved,
    }


def _domain_json(domain: DomainCensus) -> dict[str, Any]:
    return {
        "domain": domain.domain,
        "uid": domain.uid,
        "pids": list(domain.pids),
        **_figures(domain.tally),
        "zero_page_mappings": domain.zero_page_mappings,
        "error_duplicates": domain.error_duplicates,
    }


def _describe(tally: Tally, zero_page_mappings: int, error: int) -> Iterator[str]:
    def line(pages: int, text: str, indent: int = 0) -> str:
        return f"{format_size(pages * PAGE_BYTES):>{12 + indent}}  {text}"

    yield line(tally.frames, "of page frames, each counted once")
    share = format_percent(round(100 * tally.mergeable_duplicates / max(1, tally.frames), 1))
    doubt = f", give or take {format_size(error * PAGE_BYTES)}" if error else ""
    yield line(tally.mergeable_duplicates, f"would be freed by merging: {share}{doubt}")
    yield line(tally.duplicates_within, "equal to another page of the same process", 4)
    yield line(tally.duplicates_between, "equal to a page of another process", 4)
    rows = (
        (tally.saved, f"saved already: {tally.shared} frames have several mappings"),
        (tally.merged_mappings - tally.merged, f"of that by mergemem: {tally.merged} frames"),
        (tally.held_elsewhere, "duplicates that processes outside of this domain hold as well"),
        (tally.zero, "filled with zeros (not part of the gain)"),
        (zero_page_mappings, "of zeros that take no memory"),
        (tally.huge, "in huge pages (not part of the gain above)"),
        (tally.huge_duplicates, "more would be freed where the policy says huge: split"),
        (tally.ksm, "merged by KSM"),
        (tally.other, "of other kinds"),
    )
    for pages, text in rows:
        if pages:
            yield line(pages, text)


def _describe_gaps(result: Census) -> Iterator[str]:
    groups: dict[tuple[Unread, str], tuple[list[int], int]] = {}
    for gap in result.gaps:
        pids, pages = groups.get((gap.reason, gap.detail), ([], 0))
        groups[gap.reason, gap.detail] = ([*pids, gap.pid], pages + gap.pages)
    for (reason, detail), (pids, pages) in groups.items():
        size = f"{format_size(pages * PAGE_BYTES)} of " if pages else ""
        why = f" ({detail})" if detail else ""
        yield f"{size}{reason.value}{why}: {_some(pids)}"


def _describe_limits(result: Census) -> Iterator[str]:
    if result.sample < 1:
        percent = format_percent(round(100 * result.sample, 6))
        yield f"a sample of {percent} of contents was counted: figures are extrapolated"
    for limit in sorted(result.limits, key=lambda limit: limit.name):
        yield f"{limit.effect} (needs {limit.needs})"


def _some(pids: Sequence[int]) -> str:
    listed = " ".join(map(str, pids[:8]))
    more = f" and {len(pids) - 8} more" if len(pids) > 8 else ""
    return f"{'process' if len(pids) == 1 else 'processes'} {listed}{more}"


def _section(title: str, lines: Sequence[str] | Iterator[str]) -> Iterator[str]:
    lines = list(lines)
    if lines:
        yield f"{title}:"
        yield from (f"  - {line}" for line in lines)
        yield ""


def _count(number: int, singular: str, plural: str) -> str:
    return f"{number} {singular if number == 1 else plural}"


def _printable(line: str) -> str:
    """Escape what a terminal might obey: processes choose the names of their groups."""
    return "".join(
        character if character.isprintable() else ascii(character)[1:-1] for character in line
    )
