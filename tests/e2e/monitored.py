# SPDX-License-Identifier: LGPL-2.1-or-later
"""A process that changes its layout exactly as it is told (layout-victim), and its `memferry monitor`."""
import json
import os
import re
import signal
import subprocess
import time

from common import need
from harness.artifacts import program, test_program
from harness.sandbox import HarnessError, wait_until

PAGE = 4096
GIB = 1 << 30
LIMIT_S = 60  # for anything to happen on a busy machine

# System calls of x86-64 and their constants.
MMAP, MUNMAP, BRK, MREMAP, MADVISE, SHMGET, SHMAT, SHMCTL, SHMDT = 9, 11, 12, 25, 28, 29, 30, 31, 67
FTRUNCATE, FALLOCATE, MEMFD_CREATE, EXIT_GROUP, EXECVE, KILL, VFORK = 77, 285, 319, 231, 59, 62, 58
PIDFD_OPEN, PROCESS_MADVISE, WAIT4, CLOSE = 434, 440, 61, 3
PROT_RW, SHARED, PRIVATE, FIXED, ANONYMOUS, NORESERVE = 3, 1, 2, 0x10, 0x20, 0x4000
MAYMOVE, MREMAP_FIXED, DONTUNMAP = 1, 2, 4
DONTNEED, REMOVE, FREE, DONTNEED_LOCKED = 4, 9, 8, 24
KEYS = ["time_us", "pid", "tid", "event", "start", "end", "to", "reason"]
WORDS = {"unmap", "remap", "remove", "fork", "exit", "exec"}
REASONS = {"munmap", "mremap", "mmap-over", "dontneed", "remove", "fork", "truncate", "punch", "exit", "exec",
           "unknown"}
AREA = 0x200000000000  # far from where the kernel puts anything by itself


class Obedient:
    """A process (or a child it forked) that does what it is told, thread by thread."""

    def __init__(self, to_it, from_it):
        self.to_it, self.from_it = to_it, from_it
        self.tids, self.early, self.pid = {}, {}, 0

    def tell(self, thread, *words):
        os.write(self.to_it, (" ".join(map(str, (thread, *words))) + "\n").encode())

    def _line(self):
        line = b""
        while not line.endswith(b"\n"):
            byte = os.read(self.from_it, 1)
            if not byte:
                raise HarnessError("the victim has ended")
            line += byte
        return list(map(int, line.split()))

    def answer(self, thread):
        """The next result of a thread."""
        while not self.early.get(thread):
            who, tid, result = self._line()
            self.tids[who] = tid
            self.early.setdefault(who, []).append(result)
        return self.early[thread].pop(0)

    def call(self, thread, number, *args, check=True):
        """One system call; its result."""
        self.tell(thread, "call", 1, number, *args)
        result = self.answer(thread)
        if check and -4096 < result < 0:
            raise HarnessError(f"system call {number}{args} of the victim failed: {os.strerror(-result)}")
        return result

    def map(self, addr, length, flags=PRIVATE | ANONYMOUS | NORESERVE, fd=-1, offset=0):
        """Map something where nothing is."""
        need(self.call(0, MMAP, addr, length, PROT_RW, flags | FIXED, fd & (2**64 - 1), offset) == addr,
             "the victim's mapping is elsewhere")
        return addr

    def write(self, addr, data):
        """Into its memory, which has to be there."""
        with open(f"/proc/{self.pid}/mem", "r+b", buffering=0) as memory:
            memory.seek(addr)
            memory.write(data)

    def memory_file(self, length, flags=0):
        """A memfd; its number in the victim."""
        scratch = AREA - GIB
        self.map(scratch, PAGE)
        fd = self.call(0, MEMFD_CREATE, scratch, flags)  # its name is empty
        self.call(0, MUNMAP, scratch, PAGE)
        self.call(0, FTRUNCATE, fd, length)
        return fd


class Victim(Obedient):
    """layout-victim, with pipes for children."""
    CHILDREN = 4

    def __init__(self, sandbox):
        there, to_it = os.pipe()
        from_it, back = os.pipe()
        self.child_pipes = [(*os.pipe(), *os.pipe()) for _ in range(self.CHILDREN)]
        kept = [fd for each in self.child_pipes for fd in (each[0], each[3])]
        self.process = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", test_program("layout-victim")], stdin=there, stdout=back,
            pass_fds=kept)
        sandbox.processes.append(self.process)
        os.close(there)
        os.close(back)
        sandbox.on_exit(self.close)
        self.open_fds = [to_it, from_it, *(fd for each in self.child_pipes for fd in each)]
        super().__init__(to_it, from_it)
        self.pid = self.process.pid
        for thread in range(16):  # all are there
            self.call(thread, 39)

    def close(self):
        for fd in self.open_fds:
            os.close(fd)
        self.open_fds = []


class Monitor:
    """memferry monitor PID --json."""

    def __init__(self, sandbox, pid, *options, wrap=()):
        self.log = os.path.join(sandbox.path, f"monitor-{pid}-{len(sandbox.processes)}.log")
        self.process = sandbox.spawn([*wrap, program("memferry"), "monitor", str(pid), *(options or ("--json",))],
                                     self.log)
        self.seen = 0
        wait_until(lambda: "watching" in self.text() or self.process.poll() is not None, LIMIT_S,
                   "the monitor attaches")
        need(self.process.poll() is None, f"the monitor has ended: {self.text()}")

    def text(self):
        with open(self.log, encoding="utf-8") as log:
            return log.read()

    def events(self):
        """All that have been printed; each line is looked at."""
        found = []
        for line in self.text().splitlines():
            if not line.startswith("{"):
                need(line.startswith("memferry: "), f"a line that is neither event nor notice: {line!r}")
                continue
            event = json.loads(line)
            keys = KEYS + ["child"] if event["event"] == "fork" else KEYS
            need(list(event) == keys, f"the fields are {list(event)}")
            need(event["event"] in WORDS and event["reason"] in REASONS, f"odd words: {event}")
            need(all(isinstance(event[key], int) and event[key] >= 0 for key in keys
                     if key not in ("event", "reason")), f"numbers: {event}")
            if found:
                need(event["time_us"] >= found[-1]["time_us"], "time goes back")
            found.append(event)
        return found

    def next(self, count):
        """The next `count` events, when they are there."""
        wait_until(lambda: len(self.events()) >= self.seen + count or self.process.poll() is not None, LIMIT_S,
                   f"{count} more events after {self.seen}")
        events = self.events()[self.seen:self.seen + count]
        need(len(events) == count, f"{count} events were to come, only these did: {events}")
        self.seen += count
        return events

    def expect(self, *wanted):
        """Exactly these are next: (pid, tid, event, start, end, to, reason)."""
        got = [tuple(event[key] for key in KEYS[1:]) for event in self.next(len(wanted))]
        need(got == list(wanted), "wanted\n  " + "\n  ".join(map(str, wanted)) + "\ngot\n  " +
             "\n  ".join(map(str, got)))

    def nothing_more(self):
        time.sleep(0.3)
        more = self.events()[self.seen:]
        need(not more, f"more than was done: {more}")

    def stop(self, number=signal.SIGINT):
        self.process.send_signal(number)
        need(self.process.wait(LIMIT_S) == 0, f"the monitor left with {self.process.returncode}: {self.text()}")

    def ends(self):
        """It ends by itself, and well."""
        need(self.process.wait(LIMIT_S) == 0, f"the monitor left with {self.process.returncode}: {self.text()}")


def stat(pid):
    with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as file:
        return file.read()


def layout(pid):
    """What could show that somebody was there: mappings, their flags, descriptors, threads."""
    with open(f"/proc/{pid}/smaps", encoding="ascii", errors="replace") as smaps:
        lines = [line for line in smaps
                 if re.match(r"[0-9a-f]+-[0-9a-f]+ |VmFlags:", line)]
    fds = sorted(os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd"))
    with open(f"/proc/{pid}/status", encoding="ascii", errors="replace") as status:
        # Not SigQ: that is of all the user's processes.
        own = ("SigPnd", "SigBlk", "SigIgn", "SigCgt", "ShdPnd", "Threads", "Tracer")
        signals = [line for line in status if line.startswith(own)]
    return lines, fds, signals


def raw(pid, tid, event, start, end, reason, to=0):
    """An event as Monitor.expect() compares it."""
    return pid, tid, event, start, end, to, reason
