# SPDX-License-Identifier: MIT
"""What the path of a control group tells: the systemd units in it, and the container around it.

Whoever runs in a container or service may often create groups below it, with names of any kind.
So nothing here may let a name from below decide that a process belongs to something *larger* than
it does: the container is always a leading part of the real path, and only units that systemd
itself can have created count.
"""

import re

_UNIT_SUFFIXES = (".service", ".scope", ".socket", ".mount", ".swap")

# Kubernetes: kubepods/burstable/pod<uid> as cgroupfs driver, and as systemd driver
# kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod<uid>.slice, where the uid has
# underscores. Containers of one pod trust each other: they may share network, volumes, processes.
_POD = re.compile(
    r"(?:[a-z-]*kubepods[a-z-]*-)?pod[0-9a-f]{8}(?:[-_][0-9a-f]{4}){3}[-_][0-9a-f]{12}(?:\.slice)?"
    r"|(?:[a-z-]*kubepods[a-z-]*-)?pod[0-9a-f]{32}(?:\.slice)?"  # static pods: a hash
)

# docker-<id>.scope, libpod-<id>.scope, cri-containerd-<id>.scope, crio-<id>.scope, docker/<id>:
# all container engines use 64 hexadecimal digits. LXC goes by name, before and after its 4.0.
_CONTAINER = re.compile(r"(?:.*[-:])?[0-9a-f]{64}(?:\.scope)?|lxc\.payload(?:\..+)?")
_LXC_PARENT = "lxc"


def units_of(cgroup: str) -> tuple[str, ...]:
    """Return the systemd units that a group lies in, outermost first.

    These are its slices and the service or scope in them, and for the services of a user's own
    manager also those in it::

        >>> units_of("/user.slice/user-1000.slice/user@1000.service/app.slice/web.service/worker")
        ('user.slice', 'user-1000.slice', 'user@1000.service', 'app.slice', 'web.service')
    """
    units = []
    for name in _names(cgroup):
        unit = name.removeprefix("_")  # systemd's escape for names that the kernel also uses
        if not unit.endswith((".slice", *_UNIT_SUFFIXES)):
            break
        units.append(unit)
        # Below its units, systemd leaves the tree to whoever runs in them, except that a user
        # manager goes on in the same way.
        if not unit.endswith(".slice") and not unit.startswith("user@"):
            break
    return tuple(units)


def container_of(cgroup: str) -> str:
    """Return the leading part of a group's path that is its pod, container or service.

    The innermost pod if there is one, else the innermost container, else the systemd service or
    scope (within a user's manager: that user's), else the whole path::

        >>> container_of("/system.slice/web.service/worker")
        '/system.slice/web.service'
    """
    names = _names(cgroup)
    for boundary in (_last_pod, _last_container, _last_unit):
        length = boundary(names)
        if length:
            return "/" + "/".join(names[:length])
    return cgroup


def _names(cgroup: str) -> list[str]:
    return [name for name in cgroup.split("/") if name]


def _last_pod(names: list[str]) -> int:
    """Return how many names lead to the innermost pod; 0 where there is none."""
    # "pod<uid>" alone means something only below kubepods.
    return max(
        (
            depth
            for depth, name in enumerate(names, 1)
            if _POD.fullmatch(name) and any("kubepods" in parent for parent in names[:depth])
        ),
        default=0,
    )


def _last_container(names: list[str]) -> int:
    return max(
        (
            depth
            for depth, name in enumerate(names, 1)
            if _CONTAINER.fullmatch(name) or (depth > 1 and names[depth - 2] == _LXC_PARENT)
        ),
        default=0,
    )


def _last_unit(names: list[str]) -> int:
    units = units_of("/".join(names))
    # A process in a bare slice is in no service: take its whole path.
    return len(units) if units and not units[-1].endswith(".slice") else 0
