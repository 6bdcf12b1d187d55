# SPDX-License-Identifier: LGPL-2.1-or-later
"""All sessions of a host share memferryd's event loop: what takes long for one must not stop the others."""
import os
import time

from common import need
from harness.host import open_files, registered_mappings
from harness.sandbox import children_of, run, wait_until
from harness.testing import e2e
from test_process import Pair, Program

OPENAT = "257"  # x86-64, as all that attaches


class Gate:
    """Who opens one of these files of /proc waits there until open(): a FIFO lies over each."""

    def __init__(self, sandbox, *paths):
        self.fifo = os.path.join(sandbox.path, f"gate-{time.monotonic_ns()}")
        self.paths = []
        os.mkfifo(self.fifo)
        sandbox.on_exit(self.open)
        for path in paths:
            run("mount", "--bind", self.fifo, path)
            self.paths.append(path)

    @staticmethod
    def holds(host):
        """Does a thread of the host's memferryd stand there, or a process that it made to attach?"""
        for pid in (host.process.pid, *children_of(host.process.pid)):
            try:
                for tid in os.listdir(f"/proc/{pid}/task"):
                    with open(f"/proc/{pid}/task/{tid}/syscall", encoding="ascii") as call:
                        if call.read().startswith(OPENAT + " "):
                            return True
            except (FileNotFoundError, ProcessLookupError):
                continue
        return False

    def await_somebody(self, host):
        wait_until(lambda: self.holds(host), 20, f"memferryd on host {host.side} comes to {self.paths}")

    def open(self):
        """The next one finds the file itself; who waits finds the end of an empty one."""
        for path in self.paths:
            run("umount", "-l", path, check=False)
        self.paths = []
        os.close(os.open(self.fifo, os.O_RDWR))


def smaps_of(program):
    return [f"/proc/{program.pid}/smaps"]


def calls_of(program):
    """Where it is looked up, by nobody but who attaches, what a thread is doing."""
    return [f"/proc/{program.pid}/task/{tid}/syscall" for tid in os.listdir(f"/proc/{program.pid}/task")]


def another_migrates(pair):
    """All of it, beside what the first session is waiting for."""
    source = Program(pair.sandbox, pair.a, "other")
    destination = Program(pair.sandbox, pair.b, "other", waits=True)
    pair.b.expect(0, "receive", "other", "--pid", destination.pid, "--load", destination.command("load"),
                  "--resume", destination.command("resume"))
    pair.a.expect(0, "migrate", "other", "--pid", source.pid, "--pause", source.command("pause"), "--save",
                  source.command("save"), "--to", pair.b.address, "--mode", "hybrid")
    destination.works()
    for host in pair.a, pair.b:
        host.expect(0, "forget", "other")
    destination.kill()


def left_alone(program):
    """Nothing of memferry's is left in it, or will not be in a moment."""
    wait_until(lambda: not any("userfaultfd" in name for name in open_files(program.pid))
               and not registered_mappings(program.pid), 10, f"nothing is left in {program.name}")


@e2e()
def look_keeps_nobody_waiting(sandbox):
    """Memory is looked at in smaps, for as long as it takes, while another session comes and goes."""
    pair = Pair(sandbox, "--ops", "wv")
    pair.receive()
    gate = Gate(sandbox, *smaps_of(pair.source))
    verb = pair.begin("--mode", "postcopy")
    gate.await_somebody(pair.a)
    need(pair.a.state(pair.name) == "connecting", "the session should be there")
    another_migrates(pair)
    need(gate.holds(pair.a) and verb.process.poll() is None, "the look should not be over")
    pair.a.expect(0, "cancel", pair.name)
    pair.finish(verb, code=1)
    gate.open()
    wait_until(lambda: not gate.holds(pair.a), 10, "the look is over")
    pair.check_stayed()

    # Once more, when it is to be paused.
    verb = pair.begin("--mode", "hybrid", "--bandwidth", "8M")
    pair.a.wait_state(pair.name, "precopy")
    gate = Gate(sandbox, *smaps_of(pair.source))
    pair.a.expect(0, "switch", pair.name)
    gate.await_somebody(pair.a)
    need(pair.a.state(pair.name) == "precopy", "it should not be paused before that")
    pair.source.works()
    pair.a.expect(0, "cancel", pair.name)
    pair.finish(verb, code=1)
    need(gate.holds(pair.a), "the look should not be over")
    gate.open()
    left_alone(pair.source)
    pair.check_stayed()
    pair.fresh_destination()
    pair.migrate("--mode", "postcopy")
    pair.check_arrived()
    pair.forget()


@e2e()
def arming_keeps_nobody_waiting(sandbox):
    """A target that can't be attached to yet keeps its own session waiting, and can be given up."""
    pair = Pair(sandbox, "--ops", "wv")
    gate = Gate(sandbox, *calls_of(pair.destination))
    verb = pair.b.begin("receive", pair.name, *pair.destination_commands())
    gate.await_somebody(pair.b)
    need(pair.b.state(pair.name) == "waiting", "the session should be there")
    need(gate.holds(pair.b) and verb.process.poll() is None, "arming should not be over")
    pair.b.expect(0, "cancel", pair.name)
    pair.finish(verb, code=1)
    # The next one of the same target begins when the first is through with it.
    verb = pair.b.begin("receive", pair.name, *pair.destination_commands())
    wait_until(lambda: pair.b.state(pair.name) == "waiting", 10, "the next session is there")
    gate.open()
    pair.finish(verb)

    # A program stands still while it is being watched; not for longer than it is wanted.
    gate = Gate(sandbox, *calls_of(pair.source))
    verb = pair.begin("--mode", "hybrid")
    gate.await_somebody(pair.a)
    need(pair.source.state() == "T" and pair.a.state(pair.name) == "connecting", "it should stand still")
    pair.a.expect(0, "cancel", pair.name)
    pair.finish(verb, code=1)
    need(gate.holds(pair.a), "it should still be waited for")
    pair.source.works()
    gate.open()
    left_alone(pair.source)
    pair.finish(pair.begin("--mode", "hybrid"))
    pair.check_arrived()
    pair.forget()


@e2e()
def closing_keeps_nobody_waiting(sandbox):
    """What is left in a target is closed after the session, but before memferryd ends."""
    pair = Pair(sandbox, "--ops", "wv")
    pair.receive()
    gate = Gate(sandbox, *calls_of(pair.destination))
    pair.b.expect(0, "cancel", pair.name)
    need(pair.b.state(pair.name) == "cancelled", "it should be over")
    need("stays open" not in pair.b.said(), "that was not waited for")
    gate.await_somebody(pair.b)
    need(any("userfaultfd" in name for name in open_files(pair.destination.pid)), "it can't be closed yet")
    pair.b.process.terminate()
    gate.open()
    need(pair.b.process.wait(20) == 0, "memferryd should end")
    left_alone(pair.destination)
