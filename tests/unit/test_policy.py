# SPDX-License-Identifier: MIT
"""Which policy a process gets, and with whom it shares: globs, selectors, order, domains."""

import contextlib
import dataclasses
import fnmatch
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergemem_agent.cgroup_path import container_of, units_of
from mergemem_agent.policy import (
    DomainKind,
    Glob,
    GlobError,
    Policy,
    PolicySet,
    Selector,
    User,
    Verdict,
)
from mergemem_agent.procfs import Process, ProcessId

WEB = Process(
    id=ProcessId(42, 1000),
    parent_pid=1,
    uid=1000,
    executable="/usr/bin/python3.11",
    command_line=("gunicorn:", "worker", "[shop]"),
    cgroup="/system.slice/web.service/workers",
    anonymous_bytes=64 << 20,
    age_seconds=30.0,
    kernel_thread=False,
)
HEX = "0123456789abcdef" * 4
POD = "1b4e28ba-2fa1-11d2-883f-0016d3cca427"
POD_ = POD.replace("-", "_")


# --- globs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "text", "matches"),
    [
        ("/usr/bin/python3*", "/usr/bin/python3.11", True),
        ("/usr/bin/python3*", "/usr/bin/python3/evil", False),
        ("/usr/bin/*", "/usr/bin/", True),
        ("**/php-fpm*", "/usr/sbin/php-fpm8.2", True),
        ("**/php-fpm*", "php-fpm8.2", False),
        ("/srv/**/bin/python", "/srv/a/b/bin/python", True),
        ("/a?c", "/abc", True),
        ("/a?c", "/a/c", False),
        ("/a[/c", "", None),
        ("/a{b,c", "", None),
        ("/[a-c]x", "/bx", True),
        ("/[!a-c]x", "/bx", False),
        ("/[!a-c]x", "/dx", True),
        ("/a[!b]c", "/a/c", False),
        ("/[]]", "/]", True),
        ("/[!]]", "/]", False),
        ("/[*]", "/*", True),
        ("/[*]", "/x", False),
        ("/[^a]", "/^", True),
        ("/[z-a]", "", None),
        ("/[a/b]", "", None),
        ("/{bin,sbin}/x", "/sbin/x", True),
        ("/{bin,s*}/x", "/s/bin/x", False),
        ("/{bin,s**}/x", "/s/bin/x", True),
        ("/{,s}bin", "/bin", True),
        ("/a.c", "/abc", False),
        ("/a+(b)|c$\\d", "/a+(b)|c$\\d", True),
        ("/a\nb*", "/a\nb\nc", True),
        ("/a", "/a\n", False),
        ("**", "/a\nb", True),
        ("}", "}", True),
    ],
)
def test_globs(pattern: str, text: str, matches: bool | None) -> None:
    if matches is None:
        with pytest.raises(GlobError):
            Glob(pattern)
    else:
        assert Glob(pattern).matches(text) == matches


@given(st.text("ab*?[]!-", max_size=8), st.text("ab-!]*?", max_size=6))
def test_without_slashes_it_is_what_fnmatch_says(pattern: str, text: str) -> None:
    """Where both know the pattern: fnmatch takes an unclosed set for text."""
    try:
        glob = Glob(pattern)
    except GlobError:
        return
    assert glob.matches(text) == fnmatch.fnmatchcase(text, pattern)


@given(st.text(max_size=20))
def test_quoted_text_matches_itself_only(text: str) -> None:
    quoted = "".join(f"[{character}]" if character in "*?[{" else character for character in text)
    assert Glob(quoted).matches(text)
    assert not Glob(quoted).matches(text + "x")


@given(st.text("ab/*?[]{},!^-\\&~|", max_size=12), st.text("ab/", max_size=8))
def test_any_pattern_is_a_glob_or_a_glob_error(pattern: str, text: str) -> None:
    with contextlib.suppress(GlobError):
        Glob(pattern).matches(text)


@given(st.lists(st.sampled_from(["a", "bc", "*"]), max_size=4))
def test_a_star_never_crosses_a_slash(parts: list[str]) -> None:
    glob = Glob("/" + "/".join(parts))
    assert not glob.matches("/" + "/".join([*parts, "deeper"]))


# --- control groups ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cgroup", "container"),
    [
        ("/", "/"),
        ("/init.scope", "/init.scope"),
        ("/system.slice/web.service", "/system.slice/web.service"),
        ("/system.slice/web.service/sub/sub", "/system.slice/web.service"),
        (
            "/system.slice/system-postgresql.slice/postgresql@15-main.service",
            "/system.slice/system-postgresql.slice/postgresql@15-main.service",
        ),
        ("/user.slice/user-1.slice/session-3.scope", "/user.slice/user-1.slice/session-3.scope"),
        (
            "/user.slice/user-1.slice/user@1.service/app.slice/app-x.scope/y",
            "/user.slice/user-1.slice/user@1.service/app.slice/app-x.scope",
        ),
        ("/user.slice/user-1.slice/user@1.service/x", "/user.slice/user-1.slice/user@1.service"),
        (f"/system.slice/docker-{HEX}.scope/init", f"/system.slice/docker-{HEX}.scope"),
        (f"/docker/{HEX}", f"/docker/{HEX}"),
        (f"/docker/{HEX}/system.slice/x.service", f"/docker/{HEX}"),
        (f"/machine.slice/libpod-{HEX}.scope/container", f"/machine.slice/libpod-{HEX}.scope"),
        (
            f"/user.slice/user-1.slice/user@1.service/user.slice/libpod-{HEX}.scope/container",
            f"/user.slice/user-1.slice/user@1.service/user.slice/libpod-{HEX}.scope",
        ),
        ("/lxc.payload.web/system.slice/x.service", "/lxc.payload.web"),
        ("/lxc/web/system.slice/x.service", "/lxc/web"),
        (
            "/machine.slice/systemd-nspawn@a.service/payload/system.slice/x.service",
            "/machine.slice/systemd-nspawn@a.service",
        ),
        (f"/kubepods/burstable/pod{POD}/{HEX}", f"/kubepods/burstable/pod{POD}"),
        (f"/kubepods/pod{HEX[:32]}/{HEX}", f"/kubepods/pod{HEX[:32]}"),
        (
            f"/kubepods.slice/kubepods-burstable-pod{POD_}.slice/cri-containerd-{HEX}.scope",
            f"/kubepods.slice/kubepods-burstable-pod{POD_}.slice",
        ),
        (
            f"/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-pod{POD_}.slice/x.scope",
            f"/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-pod{POD_}.slice",
        ),
        (f"/docker/{HEX}/kubelet/kubepods/pod{POD}/x", f"/docker/{HEX}/kubelet/kubepods/pod{POD}"),
        ("/build/job-1", "/build/job-1"),
        ("/user.slice", "/user.slice"),
        # Who may create groups of any name in a service must not get out of it.
        (f"/system.slice/web.service/pod{POD}/x", "/system.slice/web.service"),
        ("/../other", "/../other"),
    ],
)
def test_container(cgroup: str, container: str) -> None:
    assert container_of(cgroup) == container


NAMES = st.sampled_from(
    ["kubepods", f"pod{POD}", HEX, "docker", "a.service", "b.slice", "lxc", "x", "user@1.service"]
)


@given(st.lists(NAMES, max_size=6))
def test_the_container_leads_its_own_path(names: list[str]) -> None:
    cgroup = "/" + "/".join(names)
    container = container_of(cgroup)
    assert cgroup == container or cgroup.startswith(container.rstrip("/") + "/")
    assert container_of(container) == container


@given(st.lists(NAMES, min_size=1, max_size=4), st.lists(NAMES, max_size=3))
def test_nothing_below_makes_a_container_larger(above: list[str], below: list[str]) -> None:
    outer = container_of("/" + "/".join(above))
    inner = container_of("/" + "/".join(above + below))
    assert inner == outer or inner.startswith(outer.rstrip("/") + "/")


@pytest.mark.parametrize(
    ("cgroup", "units"),
    [
        ("/", ()),
        ("/system.slice/web.service/evil.service", ("system.slice", "web.service")),
        ("/docker/x/system.slice/web.service", ()),
        ("/system.slice/_cpu.service", ("system.slice", "cpu.service")),
        (
            "/user.slice/user-1.slice/user@1.service/app.slice/a.service/b.service",
            ("user.slice", "user-1.slice", "user@1.service", "app.slice", "a.service"),
        ),
    ],
)
def test_units(cgroup: str, units: tuple[str, ...]) -> None:
    assert units_of(cgroup) == units


# --- selectors -----------------------------------------------------------------------------------

MATCHING = Selector(
    executable=Glob("**/python3*"),
    command_line=re.compile(r"gunicorn: worker \["),
    user=User(1000),
    cgroup=Glob("/system.slice/web*.service"),
    systemd_unit=Glob("web.*"),
    minimum_anonymous_bytes=64 << 20,
    minimum_age_seconds=30,
)
DIFFERENT = {
    "executable": dataclasses.replace(WEB, executable="/usr/bin/perl"),
    "command_line": dataclasses.replace(WEB, command_line=("gunicorn: master",)),
    "user": dataclasses.replace(WEB, uid=1001),
    "cgroup": dataclasses.replace(WEB, cgroup="/other/system.slice/web.service"),
    "systemd_unit": dataclasses.replace(WEB, cgroup="/system.slice/db.service/web.service"),
    "minimum_anonymous": dataclasses.replace(WEB, anonymous_bytes=(64 << 20) - 1),
    "minimum_age": dataclasses.replace(WEB, age_seconds=29.9),
}


def test_all_keys_match() -> None:
    assert MATCHING.matches(WEB)
    check = MATCHING.check(WEB)
    assert check.matched
    assert {key.key for key in check.keys} == set(DIFFERENT)


@pytest.mark.parametrize("key", sorted(DIFFERENT))
def test_each_key_must_match(key: str) -> None:
    assert not MATCHING.matches(DIFFERENT[key])
    check = MATCHING.check(DIFFERENT[key])
    assert not check.matched
    assert key in [each.key for each in check.keys if not each.matched]


def test_an_unreadable_executable_matches_nothing() -> None:
    assert not Selector(executable=Glob("**")).matches(dataclasses.replace(WEB, executable=""))


def test_a_cgroup_glob_takes_the_groups_below() -> None:
    assert Selector(cgroup=Glob("/system.slice")).matches(WEB)
    assert not Selector(cgroup=Glob("/system")).matches(WEB)
    assert Selector(cgroup=Glob("/")).matches(dataclasses.replace(WEB, cgroup="/"))


# --- order ---------------------------------------------------------------------------------------

ANYBODY = Selector(executable=Glob("**"))
NOBODY = Selector(user=User(4))


def policies(*entries: Policy) -> PolicySet:
    return PolicySet(policies=entries)


def test_the_first_match_wins() -> None:
    first, second = Policy("first", ANYBODY), Policy("second", ANYBODY)
    assert policies(first, second).match(WEB) is first
    explanation = policies(first, second).explain(WEB)
    assert explanation.winner is first
    assert len(explanation.checks) == 1


def test_an_excluded_process_goes_on_to_the_next_policy() -> None:
    first, second = Policy("first", ANYBODY, exclude=(NOBODY, MATCHING)), Policy("second", ANYBODY)
    assert policies(first, second).match(WEB) is second
    verdicts = [check.verdict for check in policies(first, second).explain(WEB).checks]
    assert verdicts == [Verdict.EXCLUDED, Verdict.MERGE]


def test_never_is_for_good() -> None:
    never, second = Policy("never", ANYBODY, merge=False), Policy("second", ANYBODY)
    assert policies(never, second).match(WEB) is None
    explanation = policies(never, second).explain(WEB)
    assert explanation.winner is never
    assert explanation.domain == ""
    assert explanation.checks[-1].verdict is Verdict.LEAVE_ALONE


def test_never_can_exclude_too() -> None:
    never = Policy("never", ANYBODY, exclude=(MATCHING,), merge=False)
    second = Policy("second", ANYBODY)
    assert policies(never, second).match(WEB) is second


def test_no_policy_no_merge() -> None:
    assert PolicySet().match(WEB) is None
    assert policies(Policy("nobody", NOBODY)).match(WEB) is None
    assert policies(Policy("nobody", NOBODY)).explain(WEB).winner is None


def test_kernel_threads_have_no_policy() -> None:
    thread = dataclasses.replace(WEB, kernel_thread=True)
    assert policies(Policy("all", Selector(user=User(1000)))).match(thread) is None
    assert policies(Policy("all", Selector(user=User(1000)))).explain(thread).winner is None


SELECTORS = st.sampled_from([ANYBODY, NOBODY, MATCHING, Selector(user=User(1000))])
POLICIES = st.builds(
    Policy,
    name=st.just("p"),
    select=SELECTORS,
    exclude=st.lists(SELECTORS, max_size=2).map(tuple),
    merge=st.booleans(),
)


@given(st.lists(POLICIES, max_size=5).map(tuple), st.sampled_from([WEB, *DIFFERENT.values()]))
def test_explain_agrees_with_match(entries: tuple[Policy, ...], process: Process) -> None:
    explanation = policies(*entries).explain(process)
    merged_by = explanation.winner if explanation.winner and explanation.winner.merge else None
    assert policies(*entries).match(process) is merged_by
    assert bool(explanation.domain) == (merged_by is not None)
    for check in explanation.checks:
        selected = check.select.matched
        excluded = any(each.matched for each in check.exclude)
        assert check.verdict.decides == (selected and not excluded)


# --- domains -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "domain"),
    [
        (DomainKind.USER, "user=1000"),
        (DomainKind.CGROUP, "cgroup=/system.slice/web.service"),
        (DomainKind.POLICY, "policy=shop"),
        (DomainKind.HOST, "host"),
        (DomainKind.USER_AND_CGROUP, "user=1000,cgroup=/system.slice/web.service"),
    ],
)
def test_domains(kind: DomainKind, domain: str) -> None:
    assert Policy("shop", ANYBODY, domain=kind).domain_of(WEB) == domain


def test_the_default_domain_is_user_and_cgroup() -> None:
    assert Policy("shop", ANYBODY).domain is DomainKind.USER_AND_CGROUP
