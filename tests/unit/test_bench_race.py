# SPDX-License-Identifier: MIT
"""What make bench makes of the samples that its guests wrote down."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.bench.race import cases, census, churn, curve, figures, interrupts, table, targets
from tests.bench.race.cases import FLAT_OUT, KSMD_HELD, MERGEMEM, MERGEMEM_HELD, NOBODY
from tests.bench.race.guest import order

READY = 100.0
DUPLICATES = 1000
SHARED_BY_FORK = 50
MAPPINGS = 2000


def sample(seconds: float, share: float, cpu_seconds: float) -> dict[str, float]:
    """A look, so many seconds after the processes were ready."""
    return {
        "at": READY + seconds,
        "mappings": MAPPINGS,
        "frames": MAPPINGS - SHARED_BY_FORK - round(share * DUPLICATES),
        "cpu_ns": round(cpu_seconds * 1e9),
        "user_ticks": cpu_seconds * 75,
        "system_ticks": cpu_seconds * 25,
    }


def run(
    name: str, *looks: tuple[float, float, float], instrumented: bool = False
) -> dict[str, Any]:
    """A run with these looks, which was asked for its census at the last of them."""
    samples = [sample(*look) for look in looks]
    contents = MAPPINGS - SHARED_BY_FORK - DUPLICATES
    return {
        "contestant": name,
        "instrumented": instrumented,
        "ready": READY,
        "start": {},
        "samples": samples,
        "at_census": {key: value for key, value in samples[-1].items() if key != "at"},
        "census": {"mappings": MAPPINGS, "contents": contents},
        "interrupts": {"tlb_shootdowns": 3, "function_calls": 4},
        "metadata_bytes": MAPPINGS * 60,
        "scanner_bytes": 1 << 20,
        "flushes": 25,
    }


def facts(*runs: dict[str, Any]) -> dict[str, Any]:
    nobody = run(NOBODY, (0.0, 0.0, 0.0)) | {
        "baseline": {"shared_by_fork": SHARED_BY_FORK, "duplicates": DUPLICATES}
    }
    return {
        "release": "6.12.0-test",
        "accelerator": "tcg",
        "host_load": 0.5,
        "guest_seconds": 60.0,
        "ticks_per_second": 100,
        "nobody": nobody,
        "runs": list(runs),
    }


FAST = ((-1.0, 0.0, 0.1), (0.5, 0.5, 0.3), (1.0, 0.96, 0.4), (2.0, 1.0, 0.5), (20.0, 1.0, 0.6))
SLOW = ((-1.0, 0.0, 1.0), (1.0, 0.5, 2.0), (4.0, 0.95, 4.0), (15.0, 1.0, 15.0), (20.0, 1.0, 20.0))
(WEIGHTS,) = cases.select("weights")


def test_a_curve_starts_its_clock_when_the_processes_are_ready() -> None:
    looks = curve.points(run(MERGEMEM, *FAST), SHARED_BY_FORK, DUPLICATES, 100)

    assert [round(one.seconds, 3) for one in looks] == [-1.0, 0.5, 1.0, 2.0, 20.0]
    assert looks[1].share == pytest.approx(0.5)
    assert looks[1].saved_bytes == 500 * 4096
    assert looks[1].system_share == pytest.approx(0.25)


def test_enough_is_reached_at_the_first_look_that_found_it() -> None:
    looks = curve.points(run(MERGEMEM, *FAST), SHARED_BY_FORK, DUPLICATES, 100)

    reached = curve.reached(looks)

    assert reached
    assert reached.seconds == 1.0
    assert reached.cpu_seconds == pytest.approx(0.4)
    assert curve.reached(looks[:2]) is None


def test_what_was_merged_before_the_clock_started_counts_from_its_start() -> None:
    looks = curve.points(
        run(FLAT_OUT, (-2.0, 1.0, 1.0), (0.5, 1.0, 3.5)), SHARED_BY_FORK, DUPLICATES, 100
    )

    reached = curve.reached(looks)

    assert reached
    assert reached.seconds == 0.5


def test_the_window_ends_with_the_last_look_in_it() -> None:
    looks = curve.points(run(FLAT_OUT, *SLOW), SHARED_BY_FORK, DUPLICATES, 100)

    assert curve.at(looks, 14.9).cpu_seconds == pytest.approx(4.0)
    assert curve.at(looks, 15.0).cpu_seconds == pytest.approx(15.0)
    assert curve.at(looks, -50.0).cpu_seconds == pytest.approx(1.0)


def test_figures_are_medians_over_the_rounds() -> None:
    slower = tuple((seconds, share, cpu * 3) for seconds, share, cpu in FAST)
    between = tuple((seconds, share, cpu * 2) for seconds, share, cpu in FAST)
    found = figures.figures(
        WEIGHTS, facts(run(MERGEMEM, *FAST), run(MERGEMEM, *slower), run(MERGEMEM, *between))
    )

    one = found["contestants"][MERGEMEM]

    assert one["rounds"] == 3
    assert one["cpu_seconds_to_95"] == pytest.approx({"median": 0.8, "lowest": 0.4, "highest": 1.2})
    saved_gib = 960 * 4096 / (1 << 30)
    assert one["cpu_per_gib_to_95"]["median"] == pytest.approx(0.8 / saved_gib)
    assert one["metadata_bytes_per_page"]["median"] == 60
    assert one["net_saved_bytes"]["median"] == 1000 * 4096 - MAPPINGS * 60 - (1 << 20)


def test_a_round_that_did_not_come_so_far_leaves_no_median() -> None:
    found = figures.figures(WEIGHTS, facts(run(MERGEMEM, *FAST), run(MERGEMEM, *FAST[:2])))

    assert found["contestants"][MERGEMEM]["cpu_seconds_to_95"] is None


def test_the_run_that_counts_flushes_is_timed_by_nobody() -> None:
    found = figures.figures(
        WEIGHTS, facts(run(FLAT_OUT, *FAST), run(FLAT_OUT, *SLOW, instrumented=True))
    )

    one = found["contestants"][FLAT_OUT]

    assert one["rounds"] == 1
    assert one["cpu_seconds_to_95"]["highest"] == pytest.approx(0.4)
    assert one["flushes_per_page"] == pytest.approx(0.025)


def test_memory_that_is_rewritten_is_no_part_of_the_census() -> None:
    (case,) = cases.select("churn")
    written = (case.processes - 1) * case.pages_each // churn.CHURN_PART

    told = run(NOBODY, (0.0, 0.0, 0.0))

    assert figures.stable_duplicates(case, told, SHARED_BY_FORK) == DUPLICATES - written


def test_verdicts_compare_with_flat_out_and_with_those_held() -> None:
    found = figures.figures(
        WEIGHTS,
        facts(
            run(MERGEMEM, *FAST),
            run(FLAT_OUT, *SLOW),
            run(MERGEMEM_HELD, *FAST),
            run(KSMD_HELD, *SLOW),
        ),
    )

    told = {verdict.target.name: verdict for verdict in targets.verdicts("weights", found)}

    to_95 = told["CPU per GiB saved, to 95 %, as a part of flat-out ksmd's"]
    assert to_95.value == pytest.approx((0.4 / 960) / (4.0 / 950))
    assert to_95.reached
    window = told["CPU per GiB saved, over the window, as a part of flat-out ksmd's"]
    assert window.value == pytest.approx(0.5 / 15.0)
    held = told["time to 95 %, both held to the same part of a core, as a part of ksmd's"]
    assert held.value == pytest.approx(0.25)
    assert held.reached


def test_no_figure_is_a_miss() -> None:
    found = figures.figures(WEIGHTS, facts(run(MERGEMEM, *FAST[:2]), run(FLAT_OUT, *SLOW)))

    verdict = targets.verdicts("weights", found)[0]

    assert verdict.value is None
    assert not verdict.reached


def breaks_of(**shares: float | None) -> dict[str, Any]:
    names = {"ours": MERGEMEM, "flat": FLAT_OUT}
    told = {
        names[name]: {"breaks": {"merged": 0 if share is None else 100, "share": share or 0.0}}
        for name, share in shares.items()
    }
    return {"contestants": told}


@pytest.mark.parametrize(
    ("found", "few", "fewer"),
    [
        (breaks_of(ours=0.01, flat=0.02), True, True),
        (breaks_of(ours=0.02, flat=0.01), True, False),
        (breaks_of(ours=0.06, flat=0.07), False, True),
        (breaks_of(ours=0.0, flat=0.0), True, False),
        (breaks_of(ours=None, flat=0.1), False, False),
    ],
)
def test_broken_merges_are_few_and_fewer_than_ksms(
    found: dict[str, Any], few: bool, fewer: bool
) -> None:
    assert [verdict.reached for verdict in targets.verdicts("churn", found)] == [few, fewer]


def array(numbers: list[int]) -> churn.Frames:
    return np.array(numbers, np.uint64)


def test_a_merge_is_broken_by_a_write_alone() -> None:
    written = churn.written_parts([4, 4])  # the last page of each
    looks = churn.Breaks(written)

    looks.look(0.0, [array([1, 2, 3, 4]), array([5, 6, 7, 8])])
    looks.look(1.0, [array([1, 2, 3, 4]), array([1, 6, 7, 4])])
    assert (looks.merged, looks.broken) == (4, 0)
    # The written page gets a frame of its own; the other pair is merged with a third frame.
    looks.look(2.0, [array([9, 2, 3, 4]), array([9, 6, 7, 10])])
    assert (looks.merged, looks.broken) == (4, 1)
    # Merged and broken again.
    looks.look(3.0, [array([9, 2, 3, 4]), array([9, 6, 7, 4])])
    looks.look(4.0, [array([9, 2, 3, 4]), array([9, 6, 7, 11])])
    assert (looks.merged, looks.broken) == (6, 2)


def test_what_was_broken_and_merged_between_two_looks_is_both() -> None:
    looks = churn.Breaks(np.array([True, True]))

    looks.look(0.0, [array([1]), array([1])])
    looks.look(1.0, [array([2]), array([2])])

    assert (looks.merged, looks.broken) == (4, 2)


def test_a_merge_that_lasts_a_minute_is_not_broken() -> None:
    looks = churn.Breaks(np.array([True, True]))

    looks.look(0.0, [array([1]), array([1])])
    looks.look(churn.BROKEN_SECONDS + 1, [array([1]), array([2])])

    assert (looks.merged, looks.broken) == (2, 0)


def test_pages_are_told_apart_by_any_bit_and_zeros_are_zero() -> None:
    pages = np.zeros((4, 4096), np.uint8)
    pages[1, 4095] = 128
    pages[2, 0] = 1
    pages[3, 4095] = 128

    found = census.checksums(pages.tobytes())

    assert found[0] == 0
    assert found[1] == found[3]
    assert len(set(found.tolist())) == 3


def test_interrupts_are_added_up_over_the_processors() -> None:
    text = """\
           CPU0       CPU1
  0:          9          0   IO-APIC   2-edge      timer
CAL:         11         31   Function call interrupts
TLB:          4          2   TLB shootdowns
ERR:          0
"""

    assert interrupts.read(text) == {"tlb_shootdowns": 6, "function_calls": 42}


def test_rounds_alternate_and_the_slow_run_once() -> None:
    turns = list(order(WEIGHTS, 2, cases.CONTESTANTS))

    assert [name for number, name, _ in turns if number == 0][:2] == [MERGEMEM, FLAT_OUT]
    assert [name for number, name, counts in turns if number == 1 and not counts] == [
        FLAT_OUT,
        MERGEMEM,
    ]
    assert [name for _, name, counts in turns if counts] == [MERGEMEM, FLAT_OUT]
    for name in cases.SLOW + cases.HELD:
        assert [told for _, told, _ in turns].count(name) == 1


def test_cases_are_chosen_by_name_or_number() -> None:
    assert [case.name for case in cases.select("5 weights")] == ["weights", "churn"]
    assert cases.select("") == cases.CASES
    with pytest.raises(ValueError, match="no case 'chrun'; the cases are prefork, weights"):
        cases.select("chrun")


def test_the_table_goes_between_its_markers(tmp_path: Path) -> None:
    document = tmp_path / "benchmarks.md"
    document.write_text(f"before\n{table.BEGIN}\nold\n{table.END}\nafter\n")
    found = figures.figures(WEIGHTS, facts(run(MERGEMEM, *FAST), run(FLAT_OUT, *SLOW)))

    table.rewrite(document, table.markdown({"6.12": {"weights": found}}, 9.4))

    text = document.read_text()
    assert text.startswith(f"before\n{table.BEGIN}\n* 6.12: Linux 6.12.0-test, emulated, load")
    assert text.endswith(f"{table.END}\nafter\n")
    assert "old" not in text
    assert "| 2 | CPU per GiB saved, to 95 %, as a part of flat-out ksmd's | at most 1/5 |" in text
    assert "0.099 reached" in text
    assert "no figure **missed**" in text  # nobody was held


def test_a_document_without_markers_is_left_alone(tmp_path: Path) -> None:
    document = tmp_path / "benchmarks.md"
    document.write_text("nothing here\n")

    with pytest.raises(ValueError, match="are missing"):
        table.rewrite(document, "tables\n")
    assert document.read_text() == "nothing here\n"
