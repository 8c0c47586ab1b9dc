# SPDX-License-Identifier: MIT
"""The rig's command line; `make help` shows its everyday forms."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Callable, Sequence

from tests.vm import build, emulator, kernels, lint, provision, suite, tree, trixie
from tests.vm.cache import CHECKOUT
from tests.vm.guest import Guest, GuestError
from tests.vm.kernels import Kernel
from tests.vm.steps import StepFailed, step

Arguments = argparse.Namespace


def setup(arguments: Arguments) -> int:
    """Debian packages, virtual environments, kernels, tools."""
    provision.packages()
    provision.environments()
    _chosen(arguments)
    provision.tools()
    trixie.root()
    return 0


def kmod(arguments: Arguments) -> int:
    """Build the module."""
    provision.packages()
    for kernel in _chosen(arguments):
        print(build.module(tree.get(kernel)))
    return 0


def debug_kernel(_: Arguments) -> int:
    """Build the debug kernel, if the cache has none."""
    provision.packages()
    print(tree.get(kernels.debug()).image)
    return 0


def run(arguments: Arguments) -> int:
    """A command ($CMD if none is given), else a shell, in the guest."""
    provision.packages()
    provision.environments()
    guest = Guest(
        kernel=arguments.kernel or "newest",
        cpus=arguments.cpus,
        memory_mib=arguments.memory_mib,
        swap_mib=arguments.swap_mib,
        module=arguments.module,
        load_module=arguments.load_module,
        module_parameters=arguments.module_parameters,
    )
    command = arguments.command or os.environ.get("CMD", "")
    if command:
        guest.run(command, time_limit_seconds=arguments.time_limit_seconds).check()
    else:
        guest.shell().check()
    return 0


def all_tests(arguments: Arguments) -> int:
    """Everything CI runs."""
    with step("set up"):
        setup(arguments)
    return suite.run_stages(suite.everything(_chosen(arguments)))


def unit_tests(_: Arguments) -> int:
    """Unit tests, with the newest libraries and with those of Debian 12 and 13."""
    provision.packages()
    provision.environments()
    return suite.run_stages(suite.unit_stages())


def guest_tests(arguments: Arguments) -> int:
    """Tests on real kernels."""
    provision.packages()
    provision.environments()
    expression = arguments.expression or os.environ.get("K", "")
    return suite.run_stages(suite.guest_stages(_chosen(arguments), expression))


def check(arguments: Arguments) -> int:
    """Linters; all of them when none is named."""
    provision.packages()
    provision.environments()
    return 0 if lint.run(suite.REPORTS / "lint.xml", arguments.checks) else 1


def demo(_: Arguments) -> int:
    """The demo, in a guest with the newest kernel."""
    with step("set up"):
        provision.packages()
        provision.environments()
        build.module(tree.get(kernels.find("newest")))
    words = [str(provision.NEWEST / "bin/python"), "-m", "tests.demo.run"]
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(words, cwd=CHECKOUT, env=environment).returncode


def bench_kmod(arguments: Arguments) -> int:
    """The cost of one merge against KSM, on each kernel."""
    return _bench("kmod", arguments)


def bench_hints(arguments: Arguments) -> int:
    """What hints cost a storm of page faults, on each kernel."""
    return _bench("hints", arguments)


def bench_idle(arguments: Arguments) -> int:
    """What the agent takes while there is nothing to gain, at 4 GiB, on each kernel."""
    return _bench("idle", arguments)


def bench(arguments: Arguments) -> int:
    """The race against ksmd: $CASE, or all cases, on each kernel."""
    return _bench("race", arguments)


def _bench(name: str, arguments: Arguments) -> int:
    with step("set up"):
        provision.packages()
        provision.environments()
        build.helpers()
        chosen = _chosen(arguments)
        for kernel in chosen:
            build.module(tree.get(kernel))
    words = [str(provision.NEWEST / "bin/python"), "-m", f"tests.bench.{name}"]
    words += [kernel.name for kernel in chosen]
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(words, cwd=CHECKOUT, env=environment).returncode


def _chosen(arguments: Arguments) -> tuple[Kernel, ...]:
    """The kernels asked for, in the cache, and what runs them."""
    chosen = kernels.select(kernels.load(), arguments.kernel)
    for kernel in chosen:
        tree.get(kernel)
    emulator.command()
    return chosen


COMMANDS: dict[str, Callable[[Arguments], int]] = {
    "setup": setup,
    "kmod": kmod,
    "debug-kernel": debug_kernel,
    "run": run,
    "test": all_tests,
    "test-unit": unit_tests,
    "test-vm": guest_tests,
    "lint": check,
    "demo": demo,
    "bench-kmod": bench_kmod,
    "bench": bench,
    "bench-hints": bench_hints,
    "bench-idle": bench_idle,
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python3 -m tests.vm", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="command")
    for name, action in COMMANDS.items():
        command = commands.add_parser(name, help=action.__doc__, description=action.__doc__)
        command.set_defaults(action=action)
        command.add_argument("--kernel", default=os.environ.get("KERNEL"), help="such as 6.1")
    add = commands.choices["run"].add_argument
    add("--cpus", type=int, default=2)
    add("--memory-mib", type=int, default=2048)
    add("--swap-mib", type=int, default=0)
    add("--no-module", dest="module", action="store_false", help="don't build the module")
    add("--load-module", action="store_true")
    add("--module-parameters", default="")
    add("--time-limit-seconds", type=float, default=600)
    add("command", nargs="?", help="a command for the shell")
    commands.choices["test-vm"].add_argument("-k", dest="expression", help="for pytest")
    commands.choices["lint"].add_argument("checks", nargs="*", choices=[*lint.CHECKS, []])
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    chosen = _parser().parse_args(arguments)
    try:
        return int(chosen.action(chosen))
    except GuestError as verdict:
        print(f"{type(verdict).__name__}: {verdict}", file=sys.stderr)
        return verdict.exit_status
    except (StepFailed, kernels.TableError) as failure:
        print(f"error: {failure}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
