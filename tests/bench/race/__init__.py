# SPDX-License-Identifier: MIT
"""The race: ksmd and mergemem on identical processes, case by case, in one guest each.

    make bench                       # or with KERNEL=6.12 CASE="duplicates churn" ROUNDS=1

On the host:

- __main__.py: boots a guest for each case and kernel; start reading here
- figures.py, curve.py: what the guests wrote down, as figures
- targets.py: the promises, and the verdicts on them
- report.py: puts it all together; table.py, picture.py, beside.py: the tables, the plots

In the guest:

- cases.py: what runs in each case, and for how long
- guest.py: the rounds of one case
- race.py: one contestant on one fresh set of processes, watched
- contestant.py, ksm.py, service.py: the contestants
- workload.c, workload.py: the processes of most cases; prefork.py, fleet.py: those of the first
- server.py: Redis, and what it feels
- census.py, churn.py, interrupts.py: what is counted from outside
"""
