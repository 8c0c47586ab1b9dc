# SPDX-License-Identifier: MIT
"""The demo: a prefork web fleet gives most of its memory back, with every byte still right.

On the host:

- run.py: boots the guest, then draws, reports and judges
- report.py, picture.py: what a person gets to see

In the guest:

- guest.py: the acts, in order; start reading here
- fleet.py: gunicorn, its workers and their control group
- application.py, catalogue.py, gunicorn_settings.py: the web shop that gunicorn serves, and its
  data, which anybody can compute again
- load.py: the customers, who check each answer
- latecomer.py: two processes that come late, to see how soon hints have them merged
- inspector.py: asks every worker to check all that it holds
- mergemem.py: the command `mergemem`, the module and the metrics, as an operator uses them
- watch.py, frames.py, free_memory.py: the memory, counted while time goes by
"""
