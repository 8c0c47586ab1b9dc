# SPDX-License-Identifier: MIT
"""What is shipped to run the agent: alert rules, unit and DKMS file agree with the rest."""

import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

from mergemem_agent import __version__
from mergemem_agent.metrics import METRICS

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
RULES = DEPLOY / "prometheus"


@pytest.mark.parametrize(
    "command", ["check rules mergemem.rules.yaml", "test rules mergemem.rules.test.yaml"]
)
def test_alert_rules(command: str) -> None:
    promtool = shutil.which("promtool")
    assert promtool, "promtool comes with Debian's package prometheus"
    done = subprocess.run(
        [promtool, *command.split()], cwd=RULES, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_alert_rules_know_only_metrics_that_exist() -> None:
    used = set(re.findall(r"\bmergemem_\w+", (RULES / "mergemem.rules.yaml").read_text()))
    served = {metric.name for metric in METRICS} | {f"{metric.name}_total" for metric in METRICS}
    assert used <= served


def test_every_alert_has_a_test() -> None:
    alerts = set(re.findall(r"- alert: (\w+)", (RULES / "mergemem.rules.yaml").read_text()))
    tested = set(re.findall(r"alertname: (\w+)", (RULES / "mergemem.rules.test.yaml").read_text()))
    assert alerts == tested


def dkms(name: str) -> str:
    values = re.findall(rf'^{re.escape(name)}="(.*)"$', (DEPLOY / "dkms.conf").read_text(), re.M)
    assert len(values) == 1, name
    return str(values[0])


def test_dkms_has_the_modules_version() -> None:
    source = (ROOT / "kmod/main.c").read_text()
    (module_version,) = re.findall(r'MODULE_VERSION\("(.*)"\)', source)
    assert dkms("PACKAGE_VERSION") == module_version == __version__


def test_dkms_takes_the_supported_kernels_and_no_others() -> None:
    table = tomllib.loads((ROOT / "tests/vm/kernels.toml").read_text())
    names = [str(kernel["name"]) for kernel in table["kernel"]]
    accepted = re.compile(dkms("BUILD_EXCLUSIVE_KERNEL"))
    assert names
    for name in names:
        series = name.replace("x", "3")  # 7.x is whatever of the 7 series Debian has now
        assert accepted.search(f"{series}.10-amd64"), name
    for other in ("5.10.0-30-amd64", "6.10.9-amd64", "6.120.1", "16.1.0", "17.1.0", "8.0.1"):
        assert not accepted.search(other), other


def test_each_capability_of_the_unit_is_explained() -> None:
    unit = (DEPLOY / "mergemem.service").read_text()
    (line,) = re.findall(r"^CapabilityBoundingSet=(.+)$", unit, re.M)
    assert re.findall(r"^# - (CAP_\w+):", unit, re.M) == line.split()
