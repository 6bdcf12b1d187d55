# SPDX-License-Identifier: LGPL-2.1-or-later
"""Migrations that succeed."""
import mmap
import os
import struct
import time

from common import FIELDS, POSTCOPY, SLOW_MBIT, Pair, need
from harness.artifacts import qemu_of_release
from harness.host import Host
from harness.net import Network
from harness.sandbox import HarnessError, Skip, run
from harness.testing import e2e
from harness.vm import Vm


def whole_way(sandbox, *verb_options, **options):
    pair = Pair(sandbox, **options)
    result = pair.migrate(*verb_options)
    pair.check_source_quit()
    pair.check_arrived()
    pair.forget()
    return pair, result


@e2e()
def guest_finds_wrong_byte(sandbox):
    """The tests' own test: one flipped bit in the RAM file, and the guest says which page."""
    network = Network(sandbox)
    vm = Vm(sandbox, Host(sandbox, network, "a", start=False), "vm1")
    vm.start_work(64, "idle")
    vm.verify()
    with open(vm.ram_files[0], "r+b") as ram:
        memory = mmap.mmap(ram.fileno(), 0)
        page = next(at for at in range(0, len(memory), 4096) if is_pattern(memory[at:at + 4096]))
        memory[page + 2345] ^= 0x04
        memory.close()
    try:
        vm.verify()
    except HarnessError as error:
        need("1 wrong pages" in str(error) and "word=293" in str(error), f"said otherwise: {error}")
    else:
        raise HarnessError("the guest did not notice a flipped bit")


def is_pattern(page):
    """Neighbouring words differ by STEP of tests/guest/pattern_sum.c throughout."""
    words = struct.unpack("<512Q", page)
    return {(new - old) % (1 << 64) for old, new in zip(words, words[1:])} == {0x9e3779b97f4a7c15}


@e2e()
def migrate_linux(sandbox):
    """A Linux guest that writes and verifies as fast as it can."""
    whole_way(sandbox, rate=0)


@e2e()
def migrate_kvm(sandbox):
    """A guest under KVM: faults come from KVM's own accesses."""
    whole_way(sandbox, guest="bare", accel="kvm", ram_mib=64, used_mib=16, mode="random", rate=200)


@e2e()
def migrate_two_backends(sandbox):
    """A NUMA guest with two memory backends."""
    pair, _ = whole_way(sandbox, ram_mib=160, backends=("tmpfs", "tmpfs"), used_mib=200)
    need(pair.destination.console.beats, "no heartbeat")


@e2e()
def migrate_sandboxed(sandbox):
    """QEMU with -sandbox on at both ends."""
    whole_way(sandbox, sandboxed=True)


@e2e()
def migrate_hot_spot(sandbox):
    """Few pages written all the time, over a slow cable, one bulk stream."""
    pair = Pair(sandbox, mode="hot", rate=0, mbit=SLOW_MBIT)
    pair.migrate("--streams", "1")
    pair.check_arrived()
    pair.forget()


@e2e()
def migrate_many_streams(sandbox):
    """Eight bulk streams."""
    pair = Pair(sandbox, mode="sequential", rate=0)
    pair.migrate("--streams", "8")
    pair.check_arrived()
    pair.forget()


def compare_files(one, other):
    """Byte for byte; names the first page that differs."""
    with open(one, "rb") as left, open(other, "rb") as right:
        need(os.fstat(left.fileno()).st_size == os.fstat(right.fileno()).st_size, "sizes differ")
        page = 0
        while True:
            left_bytes, right_bytes = left.read(1 << 20), right.read(1 << 20)
            if left_bytes != right_bytes:
                for at in range(0, len(left_bytes), 4096):
                    if left_bytes[at:at + 4096] != right_bytes[at:at + 4096]:
                        raise HarnessError(f"page {page + at // 4096} of {other} differs from {one}")
            if not left_bytes:
                return
            page += len(left_bytes) // 4096


@e2e()
def migrate_paused(sandbox):
    """A paused guest with --keep-source: both RAM files must be equal, and it must run on from there."""
    paused(sandbox)


def paused(sandbox, *options):
    pair = Pair(sandbox, ram_mib=96, backends=("tmpfs", "tmpfs"))
    pair.source.qmp("stop")
    time.sleep(0.1)
    pair.migrate("--keep-source", *options)
    need(pair.destination.qmp.status() in ("paused", "prelaunch"), "a paused guest should arrive paused, "
         f"it is {pair.destination.qmp.status()}")
    need(pair.source.process.poll() is None, "--keep-source should leave the source's QEMU alone")
    need(pair.source.qmp.status() in ("paused", "postmigrate"),
         f"the source's QEMU should be left paused, it is {pair.source.qmp.status()}")
    for source_file, destination_file in zip(pair.source.ram_files, pair.destination.ram_files):
        compare_files(source_file, destination_file)
        held = [os.stat(path).st_blocks for path in (source_file, destination_file)]
        need(held[1] <= held[0], f"the destination holds {held[1]} blocks, the source only {held[0]}")
    pair.forget()
    pair.destination.qmp("cont")
    pair.check_arrived()


@e2e()
def migrate_keep_source_running(sandbox):
    """--keep-source with a running guest: the source's QEMU stays, paused."""
    pair = Pair(sandbox)
    pair.migrate("--keep-source")
    pair.check_arrived()
    need(pair.source.qmp.status() in ("paused", "postmigrate"),
         f"the source's QEMU should be left paused, it is {pair.source.qmp.status()}")
    pair.forget()


@e2e()
def migrate_detached(sandbox):
    """--detach returns at once; status follows to the end on both sides, forget removes."""
    pair = Pair(sandbox, mbit=SLOW_MBIT)
    pair.receive()
    answer = pair.a.expect(0, "migrate", pair.name, "--qmp", pair.source.qmp_path, "--to",
                           pair.b.address + ":7466", *POSTCOPY, "--detach", seconds=15)
    seen = set()
    refused = None
    while (session := pair.a.status(pair.name))["state"] not in ("done", "failed"):
        need(set(session) == FIELDS, f"status --json: fields differ: {session}")
        seen.add(session["state"])
        refused = refused or pair.a.memferry("forget", pair.name)
        time.sleep(0.05)
    need(session["state"] == "done", f"should be done: {session}; {answer}")
    need("postcopy" in seen, f"no postcopy was ever seen, only {seen}")
    need(refused.code == 1 and refused.err.strip(), f"forget while it runs should be refused: {refused}")
    pair.b.wait_state(pair.name, "done")
    listing = pair.a.expect(0, "status").out
    need(pair.name in listing and "done" in listing, f"status does not list the session: {listing!r}")
    pair.check_arrived()
    pair.forget()


@e2e()
def migrate_interrupted(sandbox):
    """Ctrl-C on migrate after RELEASE detaches: the session goes on to its end."""
    pair = Pair(sandbox, mbit=SLOW_MBIT)
    verb = pair.begin(*POSTCOPY)
    pair.a.wait_state(pair.name, "postcopy")
    verb.interrupt()
    answer = verb.wait(10)
    need("detach" in (answer.err + answer.out).lower() or "goes on" in answer.err,
         f"Ctrl-C after RELEASE should say that it detaches: {answer}")
    pair.end_s = time.monotonic()
    pair.a.wait_state(pair.name, "done")
    pair.b.wait_state(pair.name, "done")
    pair.check_arrived()
    pair.forget()


@e2e(limit_s=180)
def migrate_to_and_fro(sandbox):
    """One pair of daemons, four migrations in a row under one name: nothing piles up."""
    pair = Pair(sandbox)
    for _ in range(4):
        pair.migrate()
        pair.check_source_quit()
        pair.check_arrived()
        pair.forget()
        pair.turn()


@e2e()
def migrate_hugetlbfs(sandbox):
    """RAM on hugetlbfs with pages of 2 MiB."""
    whole_way(sandbox, backends=(huge_pages(sandbox, 256),), ram_mib=256)


def huge_pages(sandbox, mib):
    """A hugetlbfs with room for two VMs of that size; returns its path."""
    pages_file = "/proc/sys/vm/nr_hugepages"
    with open(pages_file, encoding="ascii") as pages:
        before = pages.read()
    wanted = mib + int(before)
    sandbox.on_exit(lambda: put(pages_file, before))
    put(pages_file, str(wanted))
    with open(pages_file, encoding="ascii") as pages:
        if int(pages.read()) < wanted:
            raise Skip(f"no {wanted} free huge pages of 2 MiB")
    mount = os.path.join(sandbox.path, "huge")
    os.mkdir(mount)
    run("mount", "-t", "hugetlbfs", "-o", "pagesize=2M", "none", mount)
    return mount


def put(path, text):
    with open(path, "w", encoding="ascii") as file:
        file.write(text)


def with_qemu_of(sandbox, release):
    qemu = qemu_of_release(release)
    whole_way(sandbox, qemu=qemu, rate=0)


@e2e(limit_s=600)
def migrate_qemu_trixie(sandbox):
    """QEMU 10.0."""
    with_qemu_of(sandbox, "trixie")


@e2e(limit_s=600)
def migrate_qemu_sid(sandbox):
    """QEMU 11.1."""
    with_qemu_of(sandbox, "sid")


@e2e(limit_s=600)
def migrate_qemu_sid_two_backends(sandbox):
    """QEMU 11.1 with two backends and -sandbox on."""
    whole_way(sandbox, qemu=qemu_of_release("sid"), ram_mib=160, backends=("tmpfs", "tmpfs"),
              used_mib=200, sandboxed=True)
