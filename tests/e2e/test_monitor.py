# SPDX-License-Identifier: LGPL-2.1-or-later
"""memferry monitor: what it tells of a process that changes its layout exactly as it is told."""
import ctypes
import json
import os
import re
import signal
import socket
import subprocess
import time

from common import need
from harness.artifacts import program, test_program
from harness.sandbox import HarnessError, Skip, run, wait_until
from harness.testing import e2e
from monitored import (ANONYMOUS, AREA, BRK, DONTNEED, DONTNEED_LOCKED, DONTUNMAP, EXECVE, EXIT_GROUP,
                       FALLOCATE, FIXED, FREE, FTRUNCATE, GIB, KILL, LIMIT_S, MADVISE, MAYMOVE, MMAP,
                       MREMAP, MREMAP_FIXED, MUNMAP, Monitor, Obedient, PAGE, PIDFD_OPEN, PRIVATE, PROCESS_MADVISE,
                       PROT_RW, REASONS,
                       REMOVE, SHARED, SHMAT, SHMCTL, SHMDT, SHMGET, Victim, WAIT4, layout, raw, stat)


@e2e()
def monitor_each_call(sandbox):
    """Every call that changes the layout, by three threads in turns; ranges of up to 5 GiB."""
    victim = Victim(sandbox)
    pid, size = victim.pid, 16 * PAGE
    for area in range(8):
        victim.map(AREA + area * GIB, size)
    big = victim.map(AREA + 64 * GIB, 24 * GIB)
    fd = victim.memory_file(size)
    shared = victim.map(AREA + 8 * GIB, size, SHARED, fd)
    monitor = Monitor(sandbox, pid)
    for thread in (0, 1, 2):
        tid = victim.tids[thread]
        at = AREA + thread * 4 * PAGE

        victim.call(thread, MUNMAP, at, PAGE + 1)
        monitor.expect(raw(pid, tid, "unmap", at, at + 2 * PAGE, "munmap"))
        part = big + thread * 5 * GIB
        victim.call(thread, MADVISE, part, 5 * GIB, DONTNEED)
        victim.call(thread, MUNMAP, part, 5 * GIB)
        monitor.expect(raw(pid, tid, "remove", part, part + 5 * GIB, "dontneed"),
                       raw(pid, tid, "unmap", part, part + 5 * GIB, "munmap"))
        at += GIB
        victim.call(thread, MMAP, at, 2 * PAGE, PROT_RW, PRIVATE | ANONYMOUS | FIXED, 2**64 - 1, 0)
        monitor.expect(raw(pid, tid, "unmap", at, at + 2 * PAGE, "mmap-over"))
        at += GIB  # shrunk
        victim.call(thread, MREMAP, at, 3 * PAGE, PAGE, 0)
        monitor.expect(raw(pid, tid, "unmap", at + PAGE, at + 3 * PAGE, "mremap"))
        at += GIB  # moved, onto what is mapped there
        to = at + GIB
        victim.call(thread, MREMAP, at, 2 * PAGE, 2 * PAGE, MAYMOVE | MREMAP_FIXED, to)
        monitor.expect(raw(pid, tid, "unmap", to, to + 2 * PAGE, "mremap"),
                       raw(pid, tid, "remap", at, at + 2 * PAGE, "mremap", to),
                       raw(pid, tid, "unmap", at, at + 2 * PAGE, "mremap"))
        # Grown by moving, with the place the kernel's choice.
        new = victim.call(thread, MREMAP, to, 2 * PAGE, 2 * GIB, MAYMOVE)
        monitor.expect(raw(pid, tid, "remap", to, to + 2 * PAGE, "mremap", new),
                       raw(pid, tid, "unmap", to, to + 2 * PAGE, "mremap"))
        # What it has grown by is watched as well, by inheritance.
        victim.call(thread, MUNMAP, new + GIB, GIB)
        victim.call(thread, MUNMAP, new, GIB)
        monitor.expect(raw(pid, tid, "unmap", new + GIB, new + 2 * GIB, "munmap"),
                       raw(pid, tid, "unmap", new, new + GIB, "munmap"))
        at += 2 * GIB  # left behind
        new = victim.call(thread, MREMAP, at, PAGE, PAGE, MAYMOVE | DONTUNMAP, 0)
        victim.call(thread, MUNMAP, new, PAGE)
        monitor.expect(raw(pid, tid, "remap", at, at + PAGE, "mremap", new),
                       raw(pid, tid, "unmap", new, new + PAGE, "munmap"))
        at += GIB
        for advice in (DONTNEED, DONTNEED_LOCKED, FREE):
            victim.call(thread, MADVISE, at, PAGE + 5, advice)
            monitor.expect(raw(pid, tid, "remove", at, at + 2 * PAGE, "dontneed"))
        at = shared + thread * 4 * PAGE
        victim.call(thread, MADVISE, at, PAGE, DONTNEED)
        victim.call(thread, MADVISE, at, 3 * PAGE, REMOVE)
        monitor.expect(raw(pid, tid, "remove", at, at + PAGE, "dontneed"),
                       raw(pid, tid, "remove", at, at + 3 * PAGE, "remove"))
        # The same shared memory once more.
        new = victim.call(thread, MREMAP, shared, 0, PAGE, MAYMOVE)
        monitor.expect(raw(pid, tid, "remap", shared, shared, "mremap", new))
    # The advice that names its ranges in memory, which only newer kernels take for discarding (6.13).
    self_fd = victim.call(0, PIDFD_OPEN, pid, 0)
    vector = victim.map(AREA + 40 * GIB, PAGE)
    victim.write(vector, (AREA + 5 * GIB).to_bytes(8, "little") + (3 * PAGE).to_bytes(8, "little"))
    if victim.call(4, PROCESS_MADVISE, self_fd, vector, 1, DONTNEED, 0, check=False) >= 0:
        monitor.expect(raw(pid, victim.tids[4], "remove", AREA + 5 * GIB, AREA + 5 * GIB + 3 * PAGE, "dontneed"))
    # A change over several mappings, of which some are not watched: told for each that is.
    at = AREA + 6 * GIB
    victim.map(at + size, size)
    victim.map(at + 3 * size, size)
    victim.call(3, MUNMAP, at - PAGE, 8 * size)
    monitor.expect(raw(pid, victim.tids[3], "unmap", at - PAGE, at - PAGE + 8 * size, "munmap"))
    monitor.nothing_more()
    monitor.stop()


@e2e()
def monitor_heap(sandbox):
    """brk, up and down."""
    victim = Victim(sandbox)
    end = victim.call(0, BRK, 0)
    start = (end + PAGE - 1) & -PAGE
    victim.call(0, BRK, start + 8 * PAGE)
    monitor = Monitor(sandbox, victim.pid)
    victim.call(1, BRK, start + PAGE + 1)
    monitor.expect(raw(victim.pid, victim.tids[1], "unmap", start + 2 * PAGE, start + 8 * PAGE, "munmap"))
    monitor.stop()


@e2e()
def monitor_threads_at_once(sandbox):
    """Eight threads, 2000 events each, at the same time: all told, each in its order and to its thread."""
    victim = Victim(sandbox)
    length, rounds, threads = 4 * PAGE, 400, range(8)
    for thread in threads:
        victim.map(AREA + thread * GIB, length)
    monitor = Monitor(sandbox, victim.pid)
    for thread in threads:
        at = AREA + thread * GIB
        victim.tell(thread, "spin", rounds, at, length, at + GIB // 2)
    for thread in threads:
        need(victim.answer(thread) == 0, "the victim's calls fail")
    events = monitor.next(len(threads) * rounds * 5)
    monitor.nothing_more()
    for thread in threads:
        a, b = AREA + thread * GIB, AREA + thread * GIB + GIB // 2
        wanted = [("remove", a, 0, "dontneed"), ("remap", a, b, "mremap"), ("unmap", a, 0, "mremap"),
                  ("remap", b, a, "mremap"), ("unmap", b, 0, "mremap")] * rounds
        got = [(event["event"], event["start"], event["to"], event["reason"]) for event in events
               if event["tid"] == victim.tids[thread]]
        need(got == wanted, f"thread {thread}: {len(got)} events, {len(wanted)} were to come; "
             f"{sum(not event['tid'] for event in events)} are nobody's")
    monitor.stop()


@e2e()
def monitor_mapped_over(sandbox):
    """What is mapped over something that is watched is watched from its first moment on."""
    victim = Victim(sandbox)
    length, rounds, threads = 8 * PAGE, 500, range(4)
    for thread in threads:
        victim.map(AREA + thread * GIB, length)
    monitor = Monitor(sandbox, victim.pid)
    for thread in threads:
        victim.tell(thread, "call", rounds, MMAP, AREA + thread * GIB, length - 5, PROT_RW,
                    PRIVATE | ANONYMOUS | FIXED, 2**64 - 1, 0)
    for thread in threads:
        need(victim.answer(thread) == AREA + thread * GIB, "the victim's calls fail")
    events = monitor.next(rounds * len(threads))
    for thread in threads:
        at = AREA + thread * GIB
        got = [(event["event"], event["start"], event["end"], event["reason"]) for event in events
               if event["tid"] == victim.tids[thread]]
        need(got == [("unmap", at, at + length, "mmap-over")] * rounds, f"thread {thread}: {len(got)} events")
        victim.call(thread, MUNMAP, at, length)
        monitor.expect(raw(victim.pid, victim.tids[thread], "unmap", at, at + length, "munmap"))
    monitor.nothing_more()
    monitor.stop()


@e2e()
def monitor_same_call(sandbox):
    """Threads that make equal calls, and calls that differ in the advice only, at the same time."""
    victim = Victim(sandbox)
    fd = victim.memory_file(PAGE)
    victim.map(AREA, PAGE, SHARED, fd)
    monitor = Monitor(sandbox, victim.pid)
    rounds = 300
    for thread in range(4):
        victim.tell(thread, "call", rounds, MADVISE, AREA, PAGE, REMOVE if thread == 3 else DONTNEED)
    for thread in range(4):
        need(victim.answer(thread) == 0, "the victim's calls fail")
    events = monitor.next(4 * rounds)
    monitor.nothing_more()
    # Whose message was which can't always be told; then nothing is claimed.
    wrong = [event for event in events if event["tid"] and event["reason"] !=
             ("remove" if event["tid"] == victim.tids[3] else "dontneed")]
    need(not wrong, f"said with certainty, and wrong: {wrong[:3]}")
    told = {reason: sum(event["reason"] == reason for event in events) for reason in REASONS}
    need(told["remove"] <= rounds and told["dontneed"] <= 3 * rounds, f"more than were made: {told}")
    need(told["remove"] + told["dontneed"] + told["unknown"] == 4 * rounds, f"other reasons: {told}")
    print(f"  of {4 * rounds}: {told['remove']} remove, {told['dontneed']} dontneed, {told['unknown']} unknown")
    monitor.stop()


def advice_by_chance(count, seed, addr, pages):
    """What layout-victim's advise() does: (start, end, reason)."""
    for _ in range(count):
        seed = (seed * 6364136223846793005 + 1442695040888963407) % 2**64
        first = (seed >> 33) % pages
        length = 1 + (seed >> 45) % min(pages - first, 4)
        yield (addr + first * PAGE, addr + (first + length) * PAGE,
               "remove" if (seed >> 60) & 1 else "dontneed")


@e2e(limit_s=180)
def monitor_random_advice(sandbox):
    """Six threads discard by chance, often the same pages in another way: what is said is right, or not said."""
    victim = Victim(sandbox)
    pages, count, threads = 64, 500, range(6)
    fd = victim.memory_file(pages * PAGE)
    victim.map(AREA, pages * PAGE, SHARED, fd)
    monitor = Monitor(sandbox, victim.pid)
    left_open = 0
    for seed in (1, 20, 300):
        for thread in threads:
            victim.tell(thread, "advise", count, seed + thread, AREA, pages)
        for thread in threads:
            need(victim.answer(thread) == 0, "the victim's calls fail")
        events = monitor.next(len(threads) * count)
        wanted_of = {victim.tids[thread]: list(advice_by_chance(count, seed + thread, AREA, pages))
                     for thread in threads}
        for tid, wanted in wanted_of.items():
            rest = iter(wanted)
            got = [(event["start"], event["end"], event["reason"]) for event in events if event["tid"] == tid]
            need(all(each in rest for each in got),
                 f"seed {seed}: thread {tid} did not do this, or not in this order")
        every = [each for wanted in wanted_of.values() for each in wanted]
        need(sorted(each[:2] for each in every) == sorted((event["start"], event["end"]) for event in events),
             f"seed {seed}: other ranges than were discarded")
        left_open += sum(event["reason"] == "unknown" for event in events)
        for event in events:  # also where it is nobody's a reason is one that there was
            need(event["reason"] == "unknown" or (event["start"], event["end"], event["reason"]) in every,
                 f"seed {seed}: a reason that nobody gave: {event}")
    monitor.nothing_more()
    print(f"  {left_open} of {3 * len(threads) * count} reasons left open")
    need(left_open < len(threads) * count, "most reasons should be told")
    monitor.stop()


def child_of(victim, parent, thread, pipes, monitor):
    """Fork from a thread of `parent`; the child, and its number as the monitor tells it."""
    child_in, to_it, from_it, child_out = pipes
    parent.tell(thread, "fork", child_in, child_out)
    pid = parent.answer(thread)
    child = Obedient(to_it, from_it)
    child.pid = pid
    event = monitor.next(1)[0]
    need((event["event"], event["pid"], event["tid"], event["child"], event["reason"]) ==
         ("fork", parent.pid, parent.tids[thread], pid, "fork"), f"a fork of {pid} by {parent.pid}: {event}")
    need(victim.process.poll() is None, "the victim has ended")
    return child


@e2e()
def monitor_forks(sandbox):
    """A child, a grandchild, what they do, and how they end: by exit, exec and a crash."""
    victim = Victim(sandbox)
    victim.map(AREA, 16 * PAGE)
    path = victim.map(AREA + GIB, PAGE)
    monitor = Monitor(sandbox, victim.pid)
    child = child_of(victim, victim, 5, victim.child_pipes[0], monitor)
    grandchild = child_of(victim, child, 0, victim.child_pipes[1], monitor)
    other = child_of(victim, victim, 6, victim.child_pipes[2], monitor)

    at = AREA
    for each in (victim, child, grandchild, other):
        each.call(0, MUNMAP, at, PAGE)
        monitor.expect(raw(each.pid, each.tids[0], "unmap", at, at + PAGE, "munmap"))
    for each in (grandchild, child, victim):
        each.call(0, MADVISE, at + 2 * PAGE, PAGE, DONTNEED)
        monitor.expect(raw(each.pid, each.tids[0], "remove", at + 2 * PAGE, at + 3 * PAGE, "dontneed"))

    # exec: the new program is watched as well.
    program_path = test_program("layout-victim").encode() + b"\0"
    for each in (grandchild,):
        each.write(path, program_path.ljust(1024, b"\0") + path.to_bytes(8, "little") + bytes(8))
        each.tell(0, "call", 1, EXECVE, path, path + 1024, path + 1032)
        monitor.expect(raw(each.pid, each.pid, "exec", 0, 0, "exec"))
    # The end of its input is its end: it reads what the first process has as standard input.
    os.kill(grandchild.pid, signal.SIGTERM)
    monitor.expect(raw(grandchild.pid, 0, "exit", 0, 0, "exit"))
    child.call(0, WAIT4, grandchild.pid, 0, 0, 0)
    child.tell(0, "call", 1, EXIT_GROUP, 0)
    monitor.expect(raw(child.pid, 0, "exit", 0, 0, "exit"))
    other.tell(0, "call", 1, KILL, other.pid, signal.SIGSEGV)
    monitor.expect(raw(other.pid, 0, "exit", 0, 0, "exit"))
    # And the first one goes on.
    victim.call(1, MUNMAP, AREA + 4 * PAGE, PAGE)
    monitor.expect(raw(victim.pid, victim.tids[1], "unmap", AREA + 4 * PAGE, AREA + 5 * PAGE, "munmap"))
    monitor.stop()


@e2e()
def monitor_exec_and_exit(sandbox):
    """exec keeps the number: the new program is attached to anew; its exit ends the monitor."""
    victim = Victim(sandbox)
    path = victim.map(AREA, PAGE)
    monitor = Monitor(sandbox, victim.pid)
    victim.write(path, test_program("layout-victim").encode().ljust(1024, b"\0") +
                 path.to_bytes(8, "little") + bytes(8))
    victim.tell(3, "call", 1, EXECVE, path, path + 1024, path + 1032)
    monitor.expect(raw(victim.pid, victim.pid, "exec", 0, 0, "exec"))
    victim.map(AREA + GIB, 4 * GIB)
    time.sleep(0.5)
    victim.call(2, MUNMAP, AREA + GIB, 4 * GIB)
    monitor.expect(raw(victim.pid, victim.tids[2], "unmap", AREA + GIB, AREA + 5 * GIB, "munmap"))
    victim.tell(4, "call", 1, EXIT_GROUP, 0)
    monitor.expect(raw(victim.pid, 0, "exit", 0, 0, "exit"))
    monitor.ends()
    need(victim.process.wait(LIMIT_S) == 0, "the victim's exit code is another")


@e2e()
def monitor_crash(sandbox):
    """A process that is killed, in the middle of it all, ends its monitor."""
    victim = Victim(sandbox)
    victim.map(AREA, 4 * PAGE)
    monitor = Monitor(sandbox, victim.pid)
    victim.tell(1, "spin", 1000000, AREA, 4 * PAGE, AREA + GIB)
    monitor.next(100)
    victim.process.kill()
    monitor.ends()
    need(monitor.events()[-1]["event"] == "exit", "exit is the last event")


@e2e()
def monitor_leaves_no_trace(sandbox):
    """However it is ended, also when killed outright with events unread, the process is as before."""
    victim = Victim(sandbox)
    victim.map(AREA, 64 * PAGE)
    fd = victim.memory_file(64 * PAGE)
    victim.map(AREA + GIB, 64 * PAGE, SHARED, fd)
    before = layout(victim.pid)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        monitor = Monitor(sandbox, victim.pid)
        need(layout(victim.pid)[1:] == before[1:], "while it is attached, descriptors and signals are others")
        need(layout(victim.pid)[0] != before[0], "no mapping is registered")
        monitor.stop(number)
        need(layout(victim.pid) == before, f"after {number.name} something is left behind")

    monitor = Monitor(sandbox, victim.pid)
    monitor.process.send_signal(signal.SIGSTOP)
    for thread in range(4):
        victim.tell(thread, "call", 1, MADVISE, AREA + thread * PAGE, PAGE, DONTNEED)
    victim.tell(4, "fork", *victim.child_pipes[0][::3])
    time.sleep(0.3)  # until they wait
    monitor.process.kill()
    monitor.process.wait()
    for thread in range(4):
        need(victim.answer(thread) == 0, "what the victim was doing failed")
    child = Obedient(*victim.child_pipes[0][1:3])
    child.pid = victim.answer(4)
    need(child.call(0, MUNMAP, AREA, PAGE) == 0, "the child is not well")
    need(not any(" uw" in line for pid in (victim.pid, child.pid) for line in layout(pid)[0]),
         "a registration is left behind")
    need(layout(victim.pid) == before, "after SIGKILL something is left behind")
    # And it can be monitored again.
    monitor = Monitor(sandbox, victim.pid)
    victim.call(0, MUNMAP, AREA, PAGE)
    monitor.expect(raw(victim.pid, victim.tids[0], "unmap", AREA, AREA + PAGE, "munmap"))
    monitor.stop()


@e2e()
def monitor_interrupted_in_a_storm(sandbox):
    """Events keep coming while it is told to end, and when its output is closed."""
    victim = Victim(sandbox)
    for thread in range(4):
        victim.map(AREA + thread * GIB, 4 * PAGE)
    monitor = Monitor(sandbox, victim.pid)
    for thread in range(4):
        victim.tell(thread, "spin", 20000, AREA + thread * GIB, 4 * PAGE, AREA + thread * GIB + GIB // 2)
    monitor.next(1000)
    monitor.stop(signal.SIGTERM)

    there, back = os.pipe()
    process = subprocess.Popen([program("memferry"), "monitor", str(victim.pid), "--json"], stdout=back,
                               stderr=subprocess.DEVNULL)
    sandbox.processes.append(process)
    os.close(back)
    os.read(there, 1)
    os.close(there)
    for thread in range(4):
        need(victim.answer(thread) == 0, "what the victim was doing failed")
    victim.map(AREA + 9 * GIB, PAGE)  # in case there was no further event
    try:
        wait_until(lambda: process.poll() is not None, 5, "it notices")
    except HarnessError:
        process.terminate()
    process.wait(LIMIT_S)
    need(not any(" uw" in line for line in layout(victim.pid)[0]), "a registration is left behind")


@e2e()
def monitor_slow_reader(sandbox):
    """Nobody reads what is printed: the process waits at last, and nothing is lost."""
    victim = Victim(sandbox)
    victim.map(AREA, 4 * PAGE)
    there, back = os.pipe()
    process = subprocess.Popen([program("memferry"), "monitor", str(victim.pid), "--json"], stdout=back,
                               stderr=subprocess.PIPE, text=True)
    sandbox.processes.append(process)
    os.close(back)
    need("watching" in process.stderr.readline(), "it attaches")
    rounds = 12000  # 8 MiB of lines
    victim.tell(0, "spin", rounds, AREA, 4 * PAGE, AREA + GIB)
    time.sleep(2)
    with os.fdopen(there, encoding="ascii") as lines:
        for i in range(rounds * 5):
            event = json.loads(lines.readline())
            need(event["event"] == ("remove", "remap", "unmap", "remap", "unmap")[i % 5], f"event {i}: {event}")
        need(victim.answer(0) == 0, "what the victim was doing failed")
        process.send_signal(signal.SIGINT)
        need(not lines.readline(), "more than was done")
    need(process.wait(LIMIT_S) == 0, "it ends well")


@e2e()
def monitor_stuck_reader(sandbox):
    """Nobody reads what is printed, ever: told to end, it lets go of the process and says that lines are lost."""
    victim = Victim(sandbox)
    victim.map(AREA, 4 * PAGE)
    there, back = os.pipe()
    for rounds, number in ((12000, signal.SIGINT), (200, signal.SIGTERM)):  # more and less than has room
        process = subprocess.Popen([program("memferry"), "monitor", str(victim.pid), "--json"], stdout=back,
                                   stderr=subprocess.PIPE, text=True)
        sandbox.processes.append(process)
        need("watching" in process.stderr.readline(), "it attaches")
        victim.tell(0, "spin", rounds, AREA, 4 * PAGE, AREA + GIB)
        time.sleep(2)
        process.send_signal(number)
        need(process.wait(4) == 1, "lines are lost, and that is no success")
        need("cannot write to the standard output" in process.stderr.read(), "it says so")
        need(victim.answer(0) == 0, "what the victim was doing failed")
    os.close(back)
    os.close(there)


@e2e()
def monitor_reader_leaves(sandbox):
    """The reader goes while nothing happens: so does the monitor, without waiting for a next event."""
    victim = Victim(sandbox)
    there, back = os.pipe()
    process = subprocess.Popen([program("memferry"), "monitor", str(victim.pid)], stdout=back,
                               stderr=subprocess.DEVNULL)
    sandbox.processes.append(process)
    os.close(back)
    os.read(there, 1)
    os.close(there)
    need(process.wait(4) == 1, "it ends")
    need(not any(" uw" in line for line in layout(victim.pid)[0]), "a registration is left behind")


@e2e()
def monitor_new_mappings(sandbox):
    """What is mapped later is taken up, also where something else was before."""
    victim = Victim(sandbox)
    pid, tid = victim.pid, victim.tids[0]
    monitor = Monitor(sandbox, pid)
    for length in (PAGE, 3 * GIB):
        victim.map(AREA, length)
        time.sleep(1)
        victim.map(AREA, length)
        monitor.expect(raw(pid, tid, "unmap", AREA, AREA + length, "mmap-over"))
        time.sleep(1)
        victim.call(0, MUNMAP, AREA, length)
        monitor.expect(raw(pid, tid, "unmap", AREA, AREA + length, "munmap"))
    # A heap that grows under watch.
    start = (victim.call(0, BRK, 0) + PAGE - 1) & -PAGE
    for pages in (4, 8):
        victim.call(0, BRK, start + pages * PAGE)
        time.sleep(1)
    victim.call(0, BRK, start)
    monitor.expect(raw(pid, tid, "unmap", start, start + 8 * PAGE, "munmap"))
    monitor.stop()


@e2e()
def monitor_files(sandbox):
    """Holes punched and truncations, of which no event tells, by the process and by others."""
    victim = Victim(sandbox)
    pid, size = victim.pid, 256 * PAGE
    path = os.path.join(sandbox.ram, "ram")
    with open(path, "wb+") as file:
        file.write(b"x" * size)
    name = victim.map(AREA - 2 * GIB, PAGE)
    victim.write(name, path.encode() + b"\0")
    fd = victim.call(0, 2, name, os.O_RDWR, 0)
    victim.map(AREA, size, SHARED, fd)
    twice = victim.map(AREA + GIB, 16 * PAGE, SHARED, fd, offset=8 * PAGE)
    monitor = Monitor(sandbox, pid)
    keep, punch = 1, 2
    victim.call(0, FALLOCATE, fd, keep | punch, 100 * PAGE, 50 * PAGE)
    monitor.expect(raw(pid, 0, "remove", AREA + 100 * PAGE, AREA + 150 * PAGE, "punch"))
    with open(path, "rb+") as file:
        need(_fallocate(file.fileno(), keep | punch, 4 * PAGE, 8 * PAGE) == 0, "it can be punched")
        monitor.expect(raw(pid, 0, "remove", AREA + 4 * PAGE, AREA + 12 * PAGE, "punch"),
                       raw(pid, 0, "remove", twice, twice + 4 * PAGE, "punch"))
        # What is written is no news, and is missed again when it goes.
        file.seek(4 * PAGE)
        file.write(b"y" * PAGE)
        file.flush()
        time.sleep(0.5)
        need(_fallocate(file.fileno(), keep | punch, 4 * PAGE, PAGE) == 0, "it can be punched")
        monitor.expect(raw(pid, 0, "remove", AREA + 4 * PAGE, AREA + 5 * PAGE, "punch"))
        # An event tells of it: once is enough.
        victim.call(1, MADVISE, AREA + 200 * PAGE, 8 * PAGE, REMOVE)
        monitor.expect(raw(pid, victim.tids[1], "remove", AREA + 200 * PAGE, AREA + 208 * PAGE, "remove"))
        # It also tells of the other mapping, which loses the same pages.
        victim.call(2, MADVISE, AREA + 14 * PAGE, 4 * PAGE, REMOVE)
        monitor.expect(raw(pid, victim.tids[2], "remove", AREA + 14 * PAGE, AREA + 18 * PAGE, "remove"),
                       raw(pid, victim.tids[2], "remove", twice + 6 * PAGE, twice + 10 * PAGE, "remove"))
        monitor.nothing_more()
        file.truncate(20 * PAGE + 1)
        monitor.expect(raw(pid, 0, "remove", AREA + 21 * PAGE, AREA + size, "truncate"),
                       raw(pid, 0, "remove", twice + 13 * PAGE, twice + 16 * PAGE, "truncate"))
        file.truncate(size)
        monitor.nothing_more()
    monitor.stop()


@e2e()
def monitor_large_files(sandbox):
    """While a file is looked at that it takes long to look at, events are read as ever, also a child's."""
    victim = Victim(sandbox)
    pages = 100000
    fd = victim.memory_file(pages * PAGE)
    victim.map(AREA, pages * PAGE, SHARED, fd)
    with open(f"/proc/{victim.pid}/fd/{fd}", "rb+", buffering=0) as file:
        for page in range(0, pages, 2):
            os.pwrite(file.fileno(), b"x", page * PAGE)
        monitor = Monitor(sandbox, victim.pid)
        child = child_of(victim, victim, 5, victim.child_pipes[0], monitor)
        worst, at, page = [], AREA + 1024 * GIB, 0
        for _ in range(4):  # in each of them the file is looked at
            end, longest = time.monotonic() + 1.5, 0
            while time.monotonic() < end:
                if page < 600:  # a reason to look
                    need(_fallocate(file.fileno(), 3, page * PAGE, PAGE) == 0, "it can be punched")
                    page += 2
                for each in (victim, child):
                    begin = time.monotonic()
                    each.call(0, MMAP, at, PAGE, PROT_RW, PRIVATE | ANONYMOUS | FIXED, 2**64 - 1, 0)
                    each.call(0, MADVISE, AREA, PAGE, DONTNEED)
                    longest = max(longest, time.monotonic() - begin)
                file.seek(0)
                file.write(b"x")
            worst.append(longest)
    print("  at worst " + ", ".join(f"{longest * 1000:.1f} ms" for longest in worst))
    need(min(worst) < 0.06, "events wait while a file is looked at")
    wait_until(lambda: all(sum(event["pid"] == each.pid and event["reason"] == "punch" and
                               event["end"] == AREA + 599 * PAGE for event in monitor.events()) == 1
                           for each in (victim, child)), LIMIT_S, "the last hole is told for both")
    monitor.stop()


def _fallocate(fd, mode, offset, length):
    libc = ctypes.CDLL(None, use_errno=True)
    return libc.fallocate(fd, mode, ctypes.c_long(offset), ctypes.c_long(length))


@e2e()
def monitor_system_v(sandbox):
    """System V memory that is detached sends no event: found by comparison, its reason unknown."""
    victim = Victim(sandbox)
    segment = victim.call(0, SHMGET, 0, 16 * PAGE, 0o1600)  # IPC_PRIVATE, IPC_CREAT
    at = victim.call(0, SHMAT, segment, AREA, 0)
    victim.call(0, SHMCTL, segment, 0, 0)  # it goes with its last mapping
    victim.map(AREA + GIB, PAGE)
    monitor = Monitor(sandbox, victim.pid)
    victim.call(1, MADVISE, at, PAGE, REMOVE)
    victim.call(1, MUNMAP, AREA + GIB, PAGE)
    tid = victim.tids[1]
    monitor.expect(raw(victim.pid, tid, "remove", at, at + PAGE, "remove"),
                   raw(victim.pid, tid, "unmap", AREA + GIB, AREA + GIB + PAGE, "munmap"))
    victim.call(1, SHMDT, at)
    monitor.expect(raw(victim.pid, 0, "unmap", at, at + 16 * PAGE, "unknown"))
    monitor.nothing_more()
    monitor.stop()


def listens_for_execs():
    """Does this kernel have the process events connector (CONFIG_PROC_EVENTS), and may we use it?"""
    try:
        with socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM, 11) as connector:
            connector.bind((0, 1))
        return True
    except OSError:
        return False


@e2e()
def monitor_unprivileged(sandbox):
    """A process of an ordinary user, which may not make a full userfaultfd itself; many short-lived children."""
    shell = sandbox.spawn(["setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups", "sh", "-c",
                           "sleep 3; i=0; while [ $i -lt 100 ]; do (:); i=$((i+1)); done; "
                           "exec sh -c 'exec sh -c \"exec sh -c true\"'"],
                          os.path.join(sandbox.path, "shell.log"))
    wait_until(lambda: "(sh)" in stat(shell.pid), LIMIT_S, "the shell has begun")
    monitor = Monitor(sandbox, shell.pid)
    monitor.ends()
    events = monitor.events()
    forks = [event["child"] for event in events if event["event"] == "fork" and event["pid"] == shell.pid
             and event["reason"] == "fork"]
    # The first may have come before it was attached: `sleep`.
    need(len(forks) in (100, 101), f"{len(forks)} forks")
    print(f"  of {len(forks)} children {forks.count(0)} were not found")
    need(forks.count(0) < 50, "children are not found")
    exits = [event["pid"] for event in events if event["event"] == "exit"]
    need(sorted(exits) == sorted([child for child in forks if child] + [shell.pid]), "an exit for each fork: "
         f"{set(forks) ^ set(exits)}")
    need(exits[-1] == shell.pid, "its own is the last")
    if listens_for_execs():
        execs = [event["pid"] for event in events if event["event"] == "exec"]
        need(execs == [shell.pid] * 3, f"execs, each gone in a moment: {execs}")


@e2e()
def monitor_orphans(sandbox):
    """A child that is nobody's before it can be seen among the forking thread's: found by its memory."""
    victim = Victim(sandbox)
    victim.map(AREA, 4 * PAGE)
    monitor = Monitor(sandbox, victim.pid)
    other = child_of(victim, victim, 0, victim.child_pipes[0], monitor)
    # CLONE_PARENT: the new process is a child of this test.
    child_in, to_it, from_it, child_out = victim.child_pipes[1]
    victim.tell(1, "orphan", child_in, child_out)
    child = Obedient(to_it, from_it)
    child.pid = victim.answer(1)
    event = monitor.next(1)[0]
    need(event["event"] == "fork" and event["child"] == child.pid, f"a fork of {child.pid}: {event}")
    for each in (child, other):
        each.call(0, MUNMAP, AREA, PAGE)
        monitor.expect(raw(each.pid, each.pid, "unmap", AREA, AREA + PAGE, "munmap"))
    child.tell(0, "call", 1, EXIT_GROUP, 0)
    monitor.expect(raw(child.pid, 0, "exit", 0, 0, "exit"))
    monitor.stop()


@e2e()
def monitor_more_children_than_descriptors(sandbox):
    """With few descriptors it follows as many as it can, and keeps nobody waiting."""
    victim = Victim(sandbox)
    victim.map(AREA, 4 * PAGE)
    monitor = Monitor(sandbox, victim.pid, wrap=("prlimit", "--nofile=70"))
    for pipes in victim.child_pipes * 4:
        victim.tell(0, "fork", pipes[0], pipes[3])
        need(victim.answer(0) > 0, "a fork fails")
    need("more forked children than can be followed" in wait_until(
        lambda: "children" in monitor.text() and monitor.text(), LIMIT_S, "it says so"), "it says so")
    need([event["event"] for event in monitor.next(16)] == ["fork"] * 16, "every fork is told")
    victim.call(1, MUNMAP, AREA, PAGE)
    monitor.expect(raw(victim.pid, victim.tids[1], "unmap", AREA, AREA + PAGE, "munmap"))
    monitor.stop()


@e2e()
def monitor_huge_pages(sandbox):
    """hugetlbfs: calls round to huge pages, and a punch is found."""
    huge = 2 << 20
    with open("/proc/sys/vm/nr_hugepages", encoding="ascii") as file:
        before = int(file.read())

    def reserve(count):
        with open("/proc/sys/vm/nr_hugepages", "w", encoding="ascii") as file:
            file.write(str(count))

    sandbox.on_exit(lambda: reserve(before))
    reserve(before + 8)
    with open("/proc/sys/vm/nr_hugepages", encoding="ascii") as file:
        if int(file.read()) < before + 8:
            raise Skip("8 huge pages of 2 MiB can't be reserved here")
    victim = Victim(sandbox)
    fd = victim.memory_file(8 * huge, flags=4)
    victim.map(AREA, 8 * huge, SHARED, fd)
    for page in range(8):
        victim.write(AREA + page * huge, b"x")
    pid, tid = victim.pid, victim.tids[0]
    monitor = Monitor(sandbox, pid)
    victim.call(0, FALLOCATE, fd, 3, 2 * huge, huge)
    monitor.expect(raw(pid, 0, "remove", AREA + 2 * huge, AREA + 3 * huge, "punch"))
    victim.call(0, MADVISE, AREA + 3 * huge, huge, DONTNEED)
    victim.call(0, MADVISE, AREA + 4 * huge, huge, REMOVE)
    monitor.expect(raw(pid, tid, "remove", AREA + 3 * huge, AREA + 4 * huge, "dontneed"),
                   raw(pid, tid, "remove", AREA + 4 * huge, AREA + 5 * huge, "remove"))
    monitor.nothing_more()
    victim.call(0, MUNMAP, AREA + 6 * huge, 2 * huge)
    monitor.expect(raw(pid, tid, "unmap", AREA + 6 * huge, AREA + 8 * huge, "munmap"))
    victim.call(0, FTRUNCATE, fd, huge)
    monitor.expect(raw(pid, 0, "remove", AREA + huge, AREA + 6 * huge, "truncate"))
    monitor.stop()


TRACER = """
import ctypes, os, sys, time
libc = ctypes.CDLL(None)
libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
done = [libc.ptrace(0x4206, int(tid), None, None) for tid in os.listdir(f"/proc/{sys.argv[1]}/task")]
print("failed" if any(done) else "traced", flush=True)
time.sleep(600)
"""


@e2e()
def monitor_refuses(sandbox):
    """What can't be monitored is named, with the right exit code."""
    victim = Victim(sandbox)

    def refused(code, sentence, *args, wrap=()):
        done = run(*wrap, program("memferry"), "monitor", *args, check=False)
        need(done.returncode == code and re.search(sentence, done.stderr),
             f"monitor {args}: {done.returncode}, {done.stderr!r}; {code} and {sentence!r} were to come")
        need(not done.stdout, f"monitor {args} printed {done.stdout!r}")

    refused(2, "needs the id of a process")
    refused(2, "'init' is not the id of a process", "init")
    refused(2, "'-5' |there is no option", "-5")
    refused(2, "is not the id of a process", "0")
    refused(2, "is not the id of a process", "99999999999")
    refused(2, "one process at a time", "1", "2")
    refused(1, "there is no process", "4194303")
    refused(1, "there is no process", "4194303", "--json")
    refused(1, f"is a thread of process {victim.pid}", str(victim.tids[3]))
    kernel_thread = next((entry for entry in os.listdir("/proc") if entry.isdigit() and
                          int(stat(entry).rsplit(")", 1)[1].split()[6]) & 0x200000), None)
    if kernel_thread:
        refused(1, "is a kernel thread", kernel_thread)
    ended = subprocess.Popen(["true"])
    wait_until(lambda: " Z " in stat(ended.pid), LIMIT_S, "it has ended")
    refused(1, "has ended", str(ended.pid))
    ended.wait()
    headless = subprocess.Popen(["python3", "-c", "import ctypes, threading, time\n"
                                 "threading.Thread(target=time.sleep, args=(600,)).start()\n"
                                 "ctypes.CDLL(None).syscall(60, 0)"])  # exit(2) ends the thread alone
    sandbox.processes.append(headless)
    wait_until(lambda: " Z " in stat(headless.pid), LIMIT_S, "its first thread has ended")
    refused(1, "has ended while others go on", str(headless.pid))
    headless.kill()
    headless.wait()
    refused(1, "not permitted to watch", str(victim.pid), wrap=(
        "setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups", "--bounding-set", "-all"))

    for stream in (">&-", ">/dev/full"):
        done = run("sh", "-c", f"{program('memferry')} monitor {victim.pid} {stream}", check=False)
        need(done.returncode == 1 and "cannot write to the standard output" in done.stderr,
             f"monitor {stream}: {done.returncode}, {done.stderr!r}")
    # By a process of its own, which can end with the threads still in its hands.
    tracer = subprocess.Popen(["python3", "-c", TRACER, str(victim.pid)], stdout=subprocess.PIPE, text=True)
    sandbox.processes.append(tracer)
    need(tracer.stdout.readline() == "traced\n", "the test traces the victim")
    refused(1, f"python3 .pid {tracer.pid}. is tracing it already", str(victim.pid))
    tracer.kill()
    tracer.wait()
    before = layout(victim.pid)
    need(not any(" uw" in line for line in before[0]), "a refused monitor has registered something")


@e2e()
def monitor_beside_another_userfaultfd(sandbox):
    """Memory of another userfaultfd is left alone and said so; the rest is watched."""
    victim = Victim(sandbox)
    victim.map(AREA, 4 * PAGE)
    victim.map(AREA + GIB, 4 * PAGE)
    victim.tell(1, "uffd", AREA, 4 * PAGE)
    need(victim.answer(1) == 0, "the victim makes a userfaultfd")
    monitor = Monitor(sandbox, victim.pid)
    need("1 of another userfaultfd" in monitor.text(), f"it is not said: {monitor.text()}")
    victim.call(0, MUNMAP, AREA, 4 * PAGE)
    victim.call(0, MUNMAP, AREA + GIB, 4 * PAGE)
    monitor.expect(raw(victim.pid, victim.tids[0], "unmap", AREA + GIB, AREA + GIB + 4 * PAGE, "munmap"))
    monitor.stop()


@e2e()
def monitor_for_people(sandbox):
    """The lines without --json: a header, columns, the right words."""
    victim = Victim(sandbox)
    victim.map(AREA, 3 * GIB)
    victim.map(AREA + 4 * GIB, PAGE)
    out = os.path.join(sandbox.path, "lines")
    with open(out, "wb") as lines:
        process = subprocess.Popen([program("memferry"), "monitor", str(victim.pid)], stdout=lines,
                                   stderr=subprocess.PIPE, text=True)
    sandbox.processes.append(process)
    need(re.fullmatch(r"memferry: watching \d+ of \d+ mappings \(.* GiB\) of layout-victim "
                      r"\(pid \d+\).*\n",
                      process.stderr.readline()), "it says what it watches")
    victim.call(2, MUNMAP, AREA, 3 * GIB)
    victim.call(2, MREMAP, AREA + 4 * GIB, PAGE, PAGE, MAYMOVE | MREMAP_FIXED, AREA)
    victim.tell(2, "fork", *victim.child_pipes[0][::3])
    child = victim.answer(2)
    victim.process.kill()
    need(process.wait(LIMIT_S) == 0, "it ends with the process")
    with open(out, encoding="utf-8") as file:
        lines = file.read().splitlines()
    need(lines[0].split() == ["TIME", "PID", "TID", "EVENT", "RANGE", "SIZE", "REASON"], f"header: {lines[0]}")
    tid, pid = victim.tids[2], victim.pid
    wanted = [rf"{pid} +{tid}  unmap +200000000000-2000c0000000 +3.0 GiB  munmap",
              rf"{pid} +{tid}  remap +200100000000-200100001000 +4.0 KiB  mremap to 200000000000",
              rf"{pid} +{tid}  unmap +200100000000-200100001000 +4.0 KiB  mremap",
              rf"{pid} +{tid}  fork +- +-  fork of {child}",
              rf"{pid} +-  exit +- +-  exit"]
    rows = [line for line in lines[1:] if f" {pid} " in line]
    need(len(rows) == len(wanted), f"lines: {rows}")
    for row, want in zip(rows, wanted):
        need(re.fullmatch(r"\d\d:\d\d:\d\d\.\d{6} +" + want, row), f"{row!r} is not like {want!r}")
    column = lines[0].index("REASON")
    need(all(row[column - 1] == " " and row[column] != " " for row in rows), "the columns are not aligned")
