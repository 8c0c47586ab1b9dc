# SPDX-License-Identifier: MIT
"""Debian packages of any suite, fetched and unpacked beside the system, never installed.

apt runs on a private sources list with private lists, so the machine's own apt is not touched.
The mirror's address comes from the machine's own configuration.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from tests.vm.cache import cache_dir, content_key, locked
from tests.vm.steps import StepFailed, run

KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")


def sudo() -> list[str]:
    """What a command that needs root starts with."""
    return [] if os.geteuid() == 0 else ["sudo"]


def mirrors() -> tuple[str, str]:
    """The addresses that this machine gets Debian and its security updates from."""
    main, security = _configured()
    if not main:
        # apt tells its sources only once it has lists: a fresh container image has none.
        run([*sudo(), "apt-get", "update"])
        main, security = _configured()
    if not main:
        raise StepFailed("apt on this machine knows no Debian mirror")
    return main, security or main.rstrip("/") + "-security/"


def _configured() -> tuple[str, str]:
    form = "$(ORIGIN)|$(COMPONENT)|$(CODENAME)|$(REPO_URI)"
    main = security = ""
    for line in run(["apt-get", "indextargets", "--format", form]).splitlines():
        origin, component, codename, address = line.split("|", 3)
        if origin != "Debian" or component != "main":
            continue
        if codename.endswith("-security"):
            security = security or address
        else:
            main = main or address
    return main, security


@dataclass(frozen=True)
class Package:
    name: str
    version: str
    depends: str


class Archive:
    """A set of suites with lists of its own."""

    def __init__(self, suites: Iterable[str]) -> None:
        main, security = mirrors()
        lines = [
            f"deb [signed-by={KEYRING}] {security if suite.endswith('-security') else main} "
            f"{suite} main\n"
            for suite in suites
        ]
        self.root = cache_dir() / "apt" / content_key(lines)
        for directory in ("lists/partial", "cache/archives/partial"):
            (self.root / directory).mkdir(parents=True, exist_ok=True)
        (self.root / "sources.list").write_text("".join(lines), encoding="utf-8")
        # Nothing that this machine has installed or pinned may sway what is chosen.
        settings = {
            "Dir::Etc::SourceList": self.root / "sources.list",
            "Dir::Etc::SourceParts": "-",
            "Dir::Etc::Preferences": "/dev/null",
            "Dir::Etc::PreferencesParts": "-",
            "Dir::State::Lists": self.root / "lists",
            "Dir::State::status": "/dev/null",
            "Dir::Cache": self.root / "cache",
            "APT::Sandbox::User": "root",
            "APT::Install-Recommends": "false",
        }
        self.options = [
            word for item in settings.items() for word in ("-o", "=".join(map(str, item)))
        ]

    def update(self) -> None:
        with locked(self.root / "lists"):
            run(["apt-get", *self.options, "update"])

    def show(self, name: str) -> Package:
        text = run(["apt-cache", *self.options, "--no-all-versions", "show", name])
        if not text:
            raise StepFailed(f"no package {name}")
        return parse_stanza(text)

    def closure(self, names: Iterable[str], wanted: re.Pattern[str]) -> list[Package]:
        """The named packages and what they depend on, as far as the names match `wanted`."""
        found: dict[str, Package] = {}
        queue = list(names)
        while queue:
            name = queue.pop(0)
            if name not in found:
                found[name] = self.show(name)
                queue += [dep for dep in first_choices(found[name].depends) if wanted.match(dep)]
        return list(found.values())

    def unpack(self, packages: Iterable[Package], into: Path) -> None:
        """Download, verify (apt does) and unpack packages."""
        downloads = into.parent / f"{into.name}.debs"
        downloads.mkdir()
        wanted = [f"{package.name}={package.version}" for package in packages]
        run(["apt-get", *self.options, "download", *wanted], cwd=downloads)
        into.mkdir(exist_ok=True)
        for deb in sorted(downloads.iterdir()):
            run(["dpkg-deb", "-x", deb, into])
            deb.unlink()
        downloads.rmdir()


def parse_stanza(text: str) -> Package:
    """The first stanza of what `apt-cache show` prints."""
    stanza = text.split("\n\n", 1)[0]
    values = dict(
        line.split(": ", 1) for line in stanza.splitlines() if re.match(r"[\w-]+: ", line)
    )
    return Package(values["Package"], values["Version"], values.get("Depends", ""))


def first_choices(depends: str) -> list[str]:
    """The first alternative of each dependency, without versions."""
    return [part.split("|")[0].split("(")[0].strip() for part in depends.split(",") if part.strip()]
