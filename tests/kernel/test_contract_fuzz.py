# SPDX-License-Identifier: MIT
"""Malformed messages: refused whole, with an errno and a text, and nothing changed by any.

A few hundred are generated, from a fixed seed, by breaking good ones in ways of which each is a
mistake for sure; then some thousand bytes of pure noise, of which nobody can say what they ask.
test_fuzz.py sends what may be right or wrong, in far greater number.
"""

from __future__ import annotations

import errno
import random
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest

from tests.kernel.actor import PAGE_BYTES, Region, Stage
from tests.kernel.contract import (
    CANDIDATE,
    GROUP_ZERO,
    MAX_CANDIDATES,
    MAX_FULL_PAGES,
    MAX_PROCESSES,
    PROCESS,
    RECORD,
    Attribute,
    Command,
    Result,
    State,
    header_enum,
)
from tests.kernel.wire import (
    NLM_F_ACK,
    NLM_F_DUMP,
    NLM_F_REQUEST,
    Client,
    Refused,
    attribute,
    message,
)

SEED = 80
A = Attribute
USER_PAGES = (1 << 47) // PAGE_BYTES - 1
U64 = struct.Struct("=Q")
U32 = struct.Struct("=I")
# What a request may have besides what it must have.
OPTIONAL: dict[int, tuple[A, ...]] = {
    Command.CHECKSUM: (A.FULL_PAGES,),
    Command.MERGE: (A.FLAGS, A.SPLIT_PERCENT),
    Command.UNMERGE: (A.COUNT_ONLY,),
}


@dataclass
class Message:
    """A request that can be taken apart and broken."""

    command: int
    attributes: dict[int, bytes]
    flags: int = 0

    def payload(self) -> bytes:
        return b"".join(attribute(kind, data) for kind, data in self.attributes.items())


@dataclass(frozen=True)
class Scene:
    """Two equal regions, which a good message would merge, and good messages about them."""

    alice: Region
    bob: Region

    def good(self, command: int) -> Message:
        keys = [self.alice.actor.key, self.bob.actor.key]
        packed = [PROCESS.pack(key.pid, 0, key.start_time_ticks) for key in keys]
        of_range: dict[int, bytes] = {
            A.PROCESSES: packed[0],
            A.ADDRESS: U64.pack(self.alice.address),
            A.PAGES: U64.pack(self.alice.pages),
        }
        candidates = b"".join(
            CANDIDATE.pack(region[n].address, process, n)
            for n in range(self.alice.pages)
            for process, region in enumerate((self.alice, self.bob))
        )
        return {
            Command.CHECKSUM: Message(
                command, {**of_range, A.DEPTH: U32.pack(4096)}, flags=NLM_F_DUMP
            ),
            Command.MERGE: Message(
                command, {A.PROCESSES: b"".join(packed), A.CANDIDATES: candidates}
            ),
            Command.UNMERGE: Message(command, dict(of_range)),
        }[Command(command)]


@pytest.fixture
def scene_of_two(stage: Stage, client: Client) -> Iterator[Scene]:
    """Whatever a test sends: the pages keep their frames and their bytes, no page is counted."""
    scene = Scene(stage.start().region(4, SEED), stage.start().region(4, SEED))
    before = scene.alice.frames.tolist(), scene.bob.frames.tolist()
    info = client.info()
    yield scene
    assert (scene.alice.frames.tolist(), scene.bob.frames.tolist()) == before
    scene.alice.verify()
    scene.bob.verify()
    after = client.info()
    assert after == info
    # And they were good all the time: unbroken, the same messages do something.
    checksum, merge, unmerge = (
        scene.good(command) for command in (Command.CHECKSUM, Command.MERGE, Command.UNMERGE)
    )
    assert client.request(checksum.command, checksum.payload(), checksum.flags)
    (reply,) = client.request(merge.command, merge.payload())
    assert set(reply[A.RESULTS]) == {Result.SUCCESS}
    (reply,) = client.request(unmerge.command, unmerge.payload())
    assert U64.unpack(reply[A.UNMERGED]) == (scene.alice.pages,)


def missing(chance: random.Random, broken: Message) -> None:
    del broken.attributes[chance.choice(list(broken.attributes))]


def cut_short(chance: random.Random, broken: Message) -> None:
    kind = chance.choice(list(broken.attributes))
    data = broken.attributes[kind]
    short = chance.randrange(len(data))
    if kind in (A.PROCESSES, A.CANDIDATES) and short and short % 16 == 0:
        short -= 1
    broken.attributes[kind] = data[:short]


def too_long(chance: random.Random, broken: Message) -> None:
    kind = chance.choice(list(broken.attributes))
    extra = chance.randrange(1, 16)
    broken.attributes[kind] += chance.randbytes(extra)


def unknown_attribute(chance: random.Random, broken: Message) -> None:
    known = {A.PAD, *broken.attributes, *OPTIONAL.get(broken.command, ())}
    kind = chance.choice([n for n in (*A, max(A) + 1, 100, 0x3FFF) if n not in known])
    broken.attributes[kind] = chance.randbytes(chance.choice([0, 1, 8, 100]))


def unaligned(chance: random.Random, broken: Message) -> None:
    off = chance.randrange(1, PAGE_BYTES)
    if broken.command == Command.MERGE:
        set_candidate(chance, broken, 0, lambda address: address + off)
    else:
        (address,) = U64.unpack(broken.attributes[A.ADDRESS])
        broken.attributes[A.ADDRESS] = U64.pack(address + off)


def outside_of_user_memory(chance: random.Random, broken: Message) -> None:
    address = chance.choice([1 << 47, 1 << 56, 0xFFFF888000000000, (1 << 64) - PAGE_BYTES])
    if broken.command == Command.MERGE:
        set_candidate(chance, broken, 0, lambda _: address)
    else:
        broken.attributes[A.ADDRESS] = U64.pack(address)


def range_overflows(chance: random.Random, broken: Message) -> None:
    if broken.command == Command.MERGE:
        return outside_of_user_memory(chance, broken)
    (address,) = U64.unpack(broken.attributes[A.ADDRESS])
    to_wrap = ((1 << 64) - address) // PAGE_BYTES
    too_many = [USER_PAGES, to_wrap, to_wrap + 1, 1 << 52, (1 << 52) + 4, (1 << 64) - 1, 1 << 63, 0]
    broken.attributes[A.PAGES] = U64.pack(chance.choice(too_many))
    return None


def wrong_index(chance: random.Random, broken: Message) -> None:
    if broken.command == Command.MERGE:
        wrong = chance.choice([2, 3, 1 << 16, (1 << 31) + 1, (1 << 32) - 1])
        set_candidate(chance, broken, 1, lambda _: wrong)
    else:
        broken.attributes[A.PROCESSES] += broken.attributes[A.PROCESSES]


def wrong_group(chance: random.Random, broken: Message) -> None:
    if broken.command == Command.MERGE:
        count = len(broken.attributes[A.CANDIDATES]) // CANDIDATE.size
        wrong = chance.choice([count, count + 1, 1 << 31, GROUP_ZERO - 1])
        set_candidate(chance, broken, 2, lambda _: wrong)
    else:
        cut_short(chance, broken)


def wrong_depth(chance: random.Random, broken: Message) -> None:
    if broken.command == Command.CHECKSUM:
        depth = chance.choice([1, 63, 65, 4095, 4097, 4160, 1 << 31, (1 << 32) - 64])
        broken.attributes[A.DEPTH] = chance.choice([U32.pack(depth), b"", U64.pack(64)])
    else:
        too_long(chance, broken)


def wrong_options(chance: random.Random, broken: Message) -> None:
    """Of a right attribute: a number out of its range, or not of its length."""
    kind = chance.choice(OPTIONAL[broken.command])
    wrong = {
        A.FLAGS: [U32.pack(bit) for bit in (1 << 1, 1 << 31, (1 << 32) - 1)] + [b"", bytes(3)],
        A.SPLIT_PERCENT: [U32.pack(share) for share in (0, 101, 1 << 31)] + [b"", b"\x19"],
        A.COUNT_ONLY: [b"\x01", U32.pack(1)],
        A.FULL_PAGES: [b"", bytes(2), bytes(MAX_FULL_PAGES // 8 + 1)],
    }
    broken.attributes[kind] = chance.choice(wrong[kind])


def unknown_process_flag(chance: random.Random, broken: Message) -> None:
    processes = bytearray(broken.attributes[A.PROCESSES])
    at = chance.randrange(len(processes) // PROCESS.size) * PROCESS.size
    pid, _, start = PROCESS.unpack_from(processes, at)
    PROCESS.pack_into(processes, at, pid, 1 << chance.randrange(1, 32), start)
    broken.attributes[A.PROCESSES] = bytes(processes)


def too_many(chance: random.Random, broken: Message) -> None:
    kinds = [A.PROCESSES]
    if broken.command == Command.MERGE:
        kinds.append(A.CANDIDATES)
    kind = chance.choice(kinds)
    entry = broken.attributes[kind][:16]
    limit = MAX_PROCESSES if kind == A.PROCESSES else MAX_CANDIDATES
    broken.attributes[kind] = entry * (limit + chance.randrange(1, 90))


def empty_arrays(chance: random.Random, broken: Message) -> None:
    broken.attributes[chance.choice(list(broken.attributes))] = b""


def set_candidate(
    chance: random.Random, broken: Message, field: int, change: Callable[[int], int]
) -> None:
    """Change one field of one candidate."""
    candidates = bytearray(broken.attributes[A.CANDIDATES])
    at = chance.randrange(len(candidates) // CANDIDATE.size) * CANDIDATE.size
    values = list(CANDIDATE.unpack_from(candidates, at))
    values[field] = change(values[field])
    CANDIDATE.pack_into(candidates, at, *values)
    broken.attributes[A.CANDIDATES] = bytes(candidates)


MISTAKES = (
    missing,
    cut_short,
    too_long,
    unknown_attribute,
    unaligned,
    outside_of_user_memory,
    range_overflows,
    wrong_index,
    wrong_group,
    wrong_depth,
    wrong_options,
    unknown_process_flag,
    too_many,
    empty_arrays,
)


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.__name__)
@pytest.mark.parametrize("command", [Command.CHECKSUM, Command.MERGE, Command.UNMERGE])
def test_mistakes(
    client: Client,
    scene_of_two: Scene,
    command: Command,
    mistake: Callable[[random.Random, Message], None],
) -> None:
    chance = random.Random(f"{command.name} {mistake.__name__}")
    for _ in range(10):
        broken = scene_of_two.good(command)
        mistake(chance, broken)
        with pytest.raises(Refused) as refused:
            client.request(broken.command, broken.payload(), broken.flags)
        assert refused.value.errno in (errno.EINVAL, errno.ERANGE), broken
        assert refused.value.text, broken


@pytest.mark.parametrize("command", [Command.CHECKSUM, Command.MERGE, Command.UNMERGE])
def test_truncated_messages(client: Client, scene_of_two: Scene, command: Command) -> None:
    """Cut anywhere, with the length in the header put right."""
    good = scene_of_two.good(command)
    header = struct.pack("=BBH", command, 1, 0)
    flags = good.flags | NLM_F_REQUEST | NLM_F_ACK
    body = header + good.payload()
    # From the end of the generic header on: shorter ones are the netlink core's to refuse.
    for length in range(4, len(body) - 4, 4):
        with pytest.raises(Refused):
            client.exchange(message(client.family, flags, body[:length]))
    for length in range(4):
        with pytest.raises(Refused):
            client.exchange(message(client.family, flags, body[:length]))


@pytest.mark.parametrize("command", [0, 5, 6, 100, 255])
def test_unknown_commands(client: Client, scene_of_two: Scene, command: int) -> None:
    body = struct.pack("=BBH", command, 1, 0) + scene_of_two.good(Command.MERGE).payload()
    for flags in (0, NLM_F_DUMP):
        with pytest.raises(Refused) as refused:
            client.exchange(message(client.family, NLM_F_REQUEST | NLM_F_ACK | flags, body))
        assert refused.value.errno == errno.EOPNOTSUPP


@pytest.mark.parametrize(
    ("command", "flags"),
    [
        (Command.CHECKSUM, 0),
        (Command.INFO, NLM_F_DUMP),
        (Command.MERGE, NLM_F_DUMP),
        (Command.UNMERGE, NLM_F_DUMP),
    ],
)
def test_do_where_dump_is_meant(
    client: Client, scene_of_two: Scene, command: Command, flags: int
) -> None:
    payload = b"" if command == Command.INFO else scene_of_two.good(command).payload()
    with pytest.raises(Refused):
        client.request(command, payload, flags)


def test_wrong_attribute_types(client: Client, scene_of_two: Scene) -> None:
    """The same bytes under the number of another attribute, the nested flag, byte order."""
    for command in (Command.CHECKSUM, Command.MERGE, Command.UNMERGE):
        good = scene_of_two.good(command)
        for kind in good.attributes:
            for wrong in (kind | 0x8000, kind | 0x4000, 0, (kind % max(A)) + 1):
                items = {wrong if key == kind else key: d for key, d in good.attributes.items()}
                if len(items) < len(good.attributes):
                    continue
                broken = Message(command, items, good.flags)
                if wrong == kind | 0x4000:
                    # Only a hint about byte order, which strict parsing looks at for no type.
                    continue
                with pytest.raises(Refused):
                    client.request(broken.command, broken.payload(), broken.flags)


@pytest.mark.usefixtures("scene_of_two")
def test_info_takes_no_attributes(client: Client) -> None:
    for kind in (A.PROCESSES, A.PAGES, max(A) + 1):
        with pytest.raises(Refused) as refused:
            client.request(Command.INFO, attribute(kind, bytes(16)))
        assert refused.value.errno == errno.EINVAL
        assert refused.value.text


def test_noise(client: Client, scene_of_two: Scene) -> None:
    """Random attributes in random number: hardly ever an answer, never a change."""
    chance = random.Random(SEED)
    for _ in range(200):
        command = chance.choice([Command.CHECKSUM, Command.MERGE, Command.UNMERGE])
        items = {
            chance.randrange(24): chance.randbytes(chance.choice([0, 1, 4, 8, 16, 32, 200]))
            for _ in range(chance.randrange(6))
        }
        flags = chance.choice([0, NLM_F_DUMP])
        with pytest.raises(Refused):
            client.request(command, Message(command, items).payload(), flags)
    for _ in range(100):
        body = struct.pack("=B", chance.randrange(2, 5)) + chance.randbytes(chance.randrange(400))
        with pytest.raises(Refused):
            client.exchange(message(client.family, NLM_F_REQUEST | NLM_F_ACK, body))


def test_numbers_agree_with_the_header() -> None:
    """These tests have their own copy of the contract's numbers."""
    for name, ours in (
        ("command", Command),
        ("attribute", A),
        ("state", State),
        ("result", Result),
    ):
        prefixes = {"command": "CMD_", "attribute": "A_", "state": "STATE_", "result": ""}
        theirs = {
            key.removeprefix(prefixes[name]): number
            for key, number in header_enum(name).items()
            if not key.startswith("_") and not key.endswith("UNSPEC")
        }
        assert {item.name: item.value for item in ours} == theirs
    assert RECORD.itemsize == 16
