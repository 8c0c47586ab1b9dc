# SPDX-License-Identifier: MIT
"""Metrics for Prometheus: one collector over one snapshot, and the server that hands them out.

METRICS declares each metric once: its name, its kind, its labels, its sentence, and how its
samples are read from a Snapshot. docs/metrics.md is checked against it. No label ever names a
process: their number is unbounded, and a pid is nobody else's business.
"""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from socketserver import ThreadingMixIn
from typing import Final
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import CollectorRegistry, make_wsgi_app
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from mergemem_agent.contract import CONTRACT_VERSION, Result
from mergemem_agent.counts import Snapshot
from mergemem_agent.error import MergememError
from mergemem_agent.hint import LOSSES
from mergemem_agent.word import Stage

log = logging.getLogger(__name__)

# Label values, then the value, of one sample.
Sample = tuple[tuple[str, ...], float]

_REQUEST_SECONDS: Final = 10.0


@dataclass(frozen=True)
class Declaration:
    """One metric. Names of counters go without their _total here."""

    name: str
    kind: type[CounterMetricFamily] | type[GaugeMetricFamily]
    labels: tuple[str, ...]
    sentence: str
    samples: Callable[[Snapshot], Iterable[Sample]]

    def family(self, snapshot: Snapshot) -> Metric:
        """Return the metric with all of its samples."""
        family = self.kind(self.name, self.sentence, labels=self.labels)
        for labels, value in self.samples(snapshot):
            family.add_metric(labels, value)
        return family


def _one(value: Callable[[Snapshot], float]) -> Callable[[Snapshot], Iterable[Sample]]:
    return lambda snapshot: [((), float(value(snapshot)))]


def _by_policy_count(name: str) -> Callable[[Snapshot], Iterable[Sample]]:
    return lambda snapshot: [
        ((policy,), getattr(counts, name)) for policy, counts in snapshot.counts.policies.items()
    ]


def _by_policy_memory(name: str) -> Callable[[Snapshot], Iterable[Sample]]:
    return lambda snapshot: [
        ((policy,), getattr(memory, name)) for policy, memory in snapshot.memory.items()
    ]


def _of_module(*values: tuple[tuple[str, ...], str]) -> Callable[[Snapshot], Iterable[Sample]]:
    """Read values such as "totals.shared_pages"; there are none while no module is loaded."""

    def samples(snapshot: Snapshot) -> Iterator[Sample]:
        for labels, path in values if snapshot.module else ():
            part, name = path.split(".")
            yield labels, float(getattr(getattr(snapshot.module, part), name))

    return samples


def _agent_info(snapshot: Snapshot) -> Iterable[Sample]:
    return [((snapshot.agent_version, str(CONTRACT_VERSION)), 1.0)]


def _module_info(snapshot: Snapshot) -> Iterable[Sample]:
    module = snapshot.module
    return [((module.module_version, str(module.contract_version)), 1.0)] if module else []


def _reloads(snapshot: Snapshot) -> Iterable[Sample]:
    state = snapshot.reload
    return [(("success",), float(state.successes)), (("failure",), float(state.failures))]


def _results(snapshot: Snapshot) -> Iterable[Sample]:
    return [((result.name.lower(),), snapshot.counts.results[result]) for result in Result]


def _nominated(snapshot: Snapshot) -> Iterable[Sample]:
    return [((kind,), count) for kind, count in snapshot.counts.nominated.items()]


STAGES: Final = ("targets", "scan", "index", "merge")


def _errors(snapshot: Snapshot) -> Iterable[Sample]:
    return [((stage,), snapshot.counts.errors[stage]) for stage in STAGES]


def _stage_seconds(snapshot: Snapshot) -> Iterable[Sample]:
    return [((stage,), snapshot.counts.cpu_seconds.get(stage, 0.0)) for stage in STAGES]


def _cpu_seconds(snapshot: Snapshot) -> Iterable[Sample]:
    return [(("user",), snapshot.user_seconds), (("system",), snapshot.system_seconds)]


def _pressure(snapshot: Snapshot) -> Iterator[Sample]:
    state = snapshot.pressure
    for resource, percent in (("memory", state.memory_percent), ("cpu", state.cpu_percent)):
        if percent is not None:
            yield (resource,), percent / 100


def _moves(snapshot: Snapshot) -> Iterable[Sample]:
    return [
        ((before.name.lower(), after.name.lower()), float(pages))
        for before, after, pages in snapshot.counts.flow.moves()
    ]


def _held(snapshot: Snapshot) -> Iterable[Sample]:
    flow = snapshot.counts.flow
    return [((stage.name.lower(),), float(flow.held(stage))) for stage in Stage if stage]


def _hints(snapshot: Snapshot) -> Iterable[Sample]:
    return [((outcome,), float(count)) for outcome, count in snapshot.queue.hints.items()]


def _costs(snapshot: Snapshot) -> Iterable[Sample]:
    return [((part,), seconds) for part, seconds in snapshot.queue.cost_seconds.items()]


def _hint_source(snapshot: Snapshot) -> Iterable[Sample]:
    return [((snapshot.hints.source.value,), 1.0)]


def _hint_faults(snapshot: Snapshot) -> Iterable[Sample]:
    hints = snapshot.hints
    return [
        (("first_touch",), hints.first_touches),
        (("write_protect",), hints.write_protect_faults),
    ]


def _hints_lost(snapshot: Snapshot) -> Iterable[Sample]:
    return [((reason,), snapshot.hints.lost.get(reason, 0)) for reason in LOSSES]


_COUNTER: Final = CounterMetricFamily
_GAUGE: Final = GaugeMetricFamily

# fmt: off
METRICS: Final = tuple(
    Declaration(*row)
    for row in (
        # --- who is speaking ---
        ("mergemem_build_info", _GAUGE, ("version", "contract_version"),
         "Version of the agent and of the contract that it speaks; always 1.", _agent_info),
        ("mergemem_module_info", _GAUGE, ("version", "contract_version"),
         "Version of the loaded kernel module and of its contract; always 1.", _module_info),
        ("mergemem_module_loaded", _GAUGE, (),
         "1 while the agent talks to the kernel module, else 0.",
         _one(lambda s: s.module is not None)),
        # --- policies and targets ---
        ("mergemem_policy_reload_success", _GAUGE, (),
         "1 when the last attempt to load the policies succeeded; 0: older ones are in force.",
         _one(lambda s: s.reload.succeeded)),
        ("mergemem_policy_reload_success_timestamp_seconds", _GAUGE, (),
         "When policies were last loaded successfully, in seconds since the epoch.",
         _one(lambda s: s.reload.succeeded_at)),
        ("mergemem_policy_reloads", _COUNTER, ("result",),
         "Attempts to load the policies.", _reloads),
        ("mergemem_targets", _GAUGE, ("policy",),
         "Processes that a policy has chosen.", _by_policy_memory("targets")),
        # --- hints ---
        ("mergemem_hints_source", _GAUGE, ("source",),
         "Where hints come from: bpf, perf (no kinds of faults), or proc (none); always 1.",
         _hint_source),
        ("mergemem_hints_sampling", _GAUGE, (),
         "One page fault in so many is counted.", _one(lambda s: s.hints.sampling)),
        ("mergemem_hints_faults", _COUNTER, ("kind",),
         "Page faults of targets that hints told of: those counted, times the sampling.",
         _hint_faults),
        ("mergemem_hints_events", _COUNTER, (),
         "Forks, execs and exits that the kernel told of.", _one(lambda s: s.hints.events)),
        ("mergemem_hints_lost", _COUNTER, ("reason",),
         "Page faults, events and watched processes of which no hint came.", _hints_lost),
        # --- scan ---
        ("mergemem_scan_queue_regions", _GAUGE, (),
         "Regions of 2 MiB of all targets.", _one(lambda s: s.queue.regions)),
        ("mergemem_scan_queue_due_regions", _GAUGE, (),
         "Regions that wait to be scanned now.", _one(lambda s: s.queue.due)),
        ("mergemem_scan_queue_dropped_regions", _GAUGE, (),
         "Regions that are not scanned, as a process has more than the queue holds.",
         _one(lambda s: s.queue.dropped)),
        ("mergemem_scan_overdue_seconds", _GAUGE, (),
         "For how long the region that waits longest has been due to be scanned.",
         _one(lambda s: s.queue.overdue_seconds)),
        ("mergemem_scan_cost_seconds", _GAUGE, ("part",),
         "CPU time of one region, of one page sampled, read in full, or searched; an average.",
         _costs),
        ("mergemem_scan_hints", _COUNTER, ("outcome",),
         "Hints by what they did: region, mapping; or why they were dropped: process, late.",
         _hints),
        ("mergemem_scanned_pages", _COUNTER, ("policy",),
         "Pages that were found in scanned regions, whatever their state.",
         _by_policy_count("scanned")),
        ("mergemem_checksummed_pages", _COUNTER, ("policy",),
         "Pages that were read in full for their checksum.", _by_policy_count("checksummed")),
        ("mergemem_sampled_pages", _COUNTER, ("policy",),
         "Pages of which only a sample of 256 bytes was read.", _by_policy_count("sampled")),
        ("mergemem_settled_pages", _COUNTER, ("policy",),
         "Pages that became candidates, by two equal checksums far enough apart.",
         _by_policy_count("settled")),
        ("mergemem_stage_pages", _COUNTER, ("stage", "outcome"),
         "Pages that left a stage of the scan, by the stage that they went to; absent: none.",
         _moves),
        ("mergemem_held_pages", _GAUGE, ("stage",),
         "Pages in a stage of the scan: all that came into it less all that left it.", _held),
        ("mergemem_broken_pages", _COUNTER, ("policy",),
         "Merged pages that were found written to, and so private again.",
         _by_policy_count("broken")),
        ("mergemem_remembered_pages", _GAUGE, ("policy",),
         "Pages that the agent remembers a checksum of.", _by_policy_memory("remembered_pages")),
        ("mergemem_zero_pages", _GAUGE, ("policy",),
         "Pages filled with zeros that take a frame each, as last scanned; in no other figure.",
         _by_policy_memory("zero_pages")),
        ("mergemem_huge_pages", _GAUGE, ("policy",),
         "4 KiB pages inside of huge pages and large folios, as last scanned.",
         _by_policy_memory("huge_pages")),
        # --- merge ---
        ("mergemem_nominated_pages", _COUNTER, ("domain",),
         "Pages sent to the kernel module to be merged, by kind of trust domain.", _nominated),
        ("mergemem_merged_pages", _COUNTER, ("result",),
         "Nominated pages by what the kernel made of them; result success is a page merged.",
         _results),
        ("mergemem_freed_pages", _COUNTER, (),
         "Frames that merging small pages has freed; one shared by fork goes with its last part.",
         _one(lambda s: s.counts.freed_pages)),
        ("mergemem_split_freed_pages", _COUNTER, (),
         "Frames freed by merges that split huge pages; not in mergemem_freed_pages_total.",
         _one(lambda s: s.counts.split_freed_pages)),
        ("mergemem_split_huge_pages", _COUNTER, ("policy",),
         "Huge pages and large folios that were split for merges: what these gains have cost.",
         _by_policy_count("split_folios")),
        ("mergemem_zeroed_pages", _COUNTER, ("policy",),
         "Zero-filled pages that the kernel's zero page has replaced; never part of saved bytes.",
         _by_policy_count("zeroed")),
        ("mergemem_zero_freed_pages", _COUNTER, (),
         "Frames freed by the kernel's zero page; not in mergemem_freed_pages_total.",
         _one(lambda s: s.counts.zero_freed_pages)),
        ("mergemem_unmerged_pages", _COUNTER, (),
         "Pages given frames of their own again, since the module was loaded.",
         _of_module(((), "counters.unmerged_pages"))),
        ("mergemem_shared_pages", _GAUGE, (),
         "Frames that are merged pages right now.", _of_module(((), "totals.shared_pages"))),
        ("mergemem_shared_mappings", _GAUGE, (),
         "Mappings of merged pages right now.", _of_module(((), "totals.shared_mappings"))),
        ("mergemem_shared_saved_bytes", _GAUGE, (),
         "Memory that merged pages save right now, on the whole host.",
         _of_module(((), "totals.saved_bytes"))),
        ("mergemem_saved_bytes", _GAUGE, ("policy",),
         "Each policy's part of the memory that merged pages save, as last scanned.",
         _by_policy_memory("saved_bytes")),
        # --- the caps: shared pages cannot be swapped ---
        ("mergemem_policy_shared_bytes", _GAUGE, ("policy",),
         "Each policy's part of the memory that shared pages take, as last scanned.",
         _by_policy_memory("shared_bytes")),
        ("mergemem_policy_shared_limit_bytes", _GAUGE, ("policy",),
         "max_shared of a policy; missing where it has none.",
         lambda s: [((name,), float(memory.max_shared_bytes)) for name, memory in s.memory.items()
                    if memory.max_shared_bytes is not None]),
        ("mergemem_agent_shared_limit_bytes", _GAUGE, (),
         "max_shared of the agent; missing where it has none.",
         lambda s: [] if s.max_shared_bytes is None else [((), float(s.max_shared_bytes))]),
        ("mergemem_module_shared_limit_bytes", _GAUGE, (),
         "max_shared_bytes of the kernel module; 0: no limit.",
         _of_module(((), "limits.max_shared_bytes"))),
        ("mergemem_capped_pages", _COUNTER, ("policy",),
         "Pages that were not nominated, as the policy's or the agent's max_shared was reached.",
         _by_policy_count("capped")),
        # --- huge pages, by the module's own count ---
        ("mergemem_module_split_folios", _COUNTER, (),
         "Huge pages and large folios split for anybody, since the module was loaded.",
         _of_module(((), "counters.split_folios"))),
        ("mergemem_module_split_failures", _COUNTER, (),
         "Huge pages and large folios that were to be split and were in use.",
         _of_module(((), "counters.split_failures"))),
        # --- cost ---
        ("mergemem_cpu_seconds", _COUNTER, ("mode",),
         "CPU time of the agent; system holds the kernel module's work for it.", _cpu_seconds),
        ("mergemem_stage_cpu_seconds", _COUNTER, ("stage",),
         "CPU time, user and system, by stage.", _stage_seconds),
        ("mergemem_policy_cpu_seconds", _COUNTER, ("policy",),
         "CPU time, user and system, that was spent for a policy.",
         _by_policy_count("cpu_seconds")),
        ("mergemem_budget_ratio", _GAUGE, (),
         "CPU time that the agent may take at present, as a ratio of one core.",
         _one(lambda s: s.budget_percent / 100)),
        ("mergemem_pressure_ratio", _GAUGE, ("resource",),
         "Share of ten seconds in which some task waited for memory or CPU; missing: not known.",
         _pressure),
        ("mergemem_errors", _COUNTER, ("stage",),
         "Requests and reads that failed; a process that ends is no error.", _errors),
    )
)
# fmt: on


class SnapshotCollector(Collector):
    """Yields METRICS from the snapshot that is current at the time of the scrape."""

    def __init__(self, current: Callable[[], Snapshot]) -> None:
        """Ask `current` for a snapshot at each scrape; it is called in the server's thread."""
        self._current = current

    def collect(self) -> Iterator[Metric]:
        """Yield each metric once."""
        snapshot = self._current()
        for declaration in METRICS:
            yield declaration.family(snapshot)


class _Server(ThreadingMixIn, WSGIServer):
    """One thread for each scrape, so that one that hangs delays no other."""

    daemon_threads = True

    def __init__(self, address: tuple[str, int], handler: type[WSGIRequestHandler]) -> None:
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        super().__init__(address, handler)

    def server_bind(self) -> None:
        # WSGIServer's own would ask DNS for the name of the address.
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = str(self.server_address[0]), self.server_address[1]
        self.setup_environ()


class _Handler(WSGIRequestHandler):
    timeout = _REQUEST_SECONDS  # for a client that connects and then says nothing

    def log_message(self, format: str, *arguments: object) -> None:  # noqa: A002
        log.debug("metrics: " + format, *arguments)


class MetricsServer:
    """Serves /metrics in a thread of its own, from start to close()."""

    def __init__(self, address: str, port: int, current: Callable[[], Snapshot]) -> None:
        """Listen; port 0 takes a free one. Raises MergememError when that is not possible."""
        registry = CollectorRegistry(auto_describe=False)
        registry.register(SnapshotCollector(current))
        try:
            self._server = make_server(
                address, port, make_wsgi_app(registry), _Server, handler_class=_Handler
            )
        except OSError as failure:
            raise MergememError(
                f"metrics cannot be served on {address} port {port}: {failure.strerror}",
                hint="choose another metrics address or port in the policy file",
            ) from None
        self.port = self._server.server_port
        self._closing = False
        self._thread = threading.Thread(target=self._serve, name="metrics", daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        # Unlike serve_forever(), which looks several times a second whether it shall end.
        while not self._closing:
            self._server.handle_request()

    def close(self) -> None:
        """Stop listening."""
        self._closing = True
        # Nobody can connect any more, and who waits for somebody to connect wakes up.
        self._server.socket.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._server.server_close()
