# SPDX-License-Identifier: LGPL-2.1-or-later
"""What most tests share: a pair of hosts with a VM on each, and a migration between them."""
import os
import time

from harness.console import Passage
from harness.host import Host, LeakCheck
from harness.net import Network
from harness.sandbox import HarnessError, Skip
from harness.vm import Vm, kvm_works

MIGRATE_S = 60
FIELDS = {"name", "id", "role", "state", "reason", "ram_bytes", "blackout_us", "total_us", "sent_bytes",
          "data_pages", "zero_pages", "hole_pages", "faults", "mover_restarts", "mode", "rounds",
          "precopy_bytes", "postcopy_bytes", "dirty_pages_at_switch", "dirty_rate_pages_s",
          "unconfirmed_at_release", "adapter", "pid"}
FAULT_FIELDS = {"count", "p50_us", "p99_us", "p999_us", "max_us"}
# Slow enough that a phase lasts, fast enough that a test ends: 256 MiB take some 5 s.
SLOW_MBIT = 400
POSTCOPY = ("--mode", "postcopy")


def need(condition, sentence):
    if not condition:
        raise HarnessError(sentence)


class Pair:
    """
    Hosts a and b, the VM "vm1" running on a and awaited on b, ready for `migrate`.

    options are Vm's; `destination` holds those that differ for the VM on b; `used_mib` and `mode`/`rate`
    say what the guest does (used_mib 0: it need not boot).
    """

    name = "vm1"

    def __init__(self, sandbox, used_mib=96, mode="random", rate=2000, mbit=None, destination=None,
                 **options):
        self.sandbox = sandbox
        self.destination_options = {"incoming": True, **options, **(destination or {})}
        self.network = Network(sandbox)
        self.a = Host(sandbox, self.network, "a")
        self.b = Host(sandbox, self.network, "b")
        if options.get("accel") == "kvm" and not kvm_works(sandbox, self.a):
            raise Skip("KVM does not run a guest here")
        self.source = Vm(sandbox, self.a, self.name, **options)
        self.destination = Vm(sandbox, self.b, self.name, **self.destination_options)
        if used_mib:
            self.source.start_work(used_mib, mode, rate)
        self.network.limit(mbit)
        self.leaks = LeakCheck((self.a, self.b), (self.source, self.destination))
        self.begin_s = self.end_s = 0.0

    def receive(self):
        self.b.expect(0, "receive", self.name, "--qmp", self.destination.qmp_path)
        need(self.b.state(self.name) == "waiting", "a received session should be waiting")

    def begin(self, *options, to=None):
        """receive, then migrate in the background."""
        self.receive()
        return self.begin_again(*options, to=to)

    def begin_again(self, *options, to=None):
        """migrate in the background, to a destination that is waiting already."""
        self.begin_s = time.monotonic()
        return self.a.begin("migrate", self.name, "--qmp", self.source.qmp_path, "--to",
                            to or self.b.address, "--json", *options)

    def finish(self, verb, seconds=MIGRATE_S, code=0):
        answer = verb.wait(seconds)
        self.end_s = time.monotonic()
        need(answer.code == code, f"migrate should exit {code}: {answer}")
        return answer

    def migrate(self, *options, seconds=MIGRATE_S):
        """The whole way; returns the JSON."""
        result = self.finish(self.begin(*options), seconds).json
        self.check_done(result)
        return result

    def check_done(self, result):
        """Both sides say done, with all promised fields and figures that make sense."""
        sides = {"source": result, "source status": self.a.status(self.name),
                 "destination": self.b.status(self.name)}
        for side, session in sides.items():
            need(session is not None, f"{side}: no session to read after the end")
            need(set(session) == FIELDS, f"{side}: fields {sorted(set(session) ^ FIELDS)} differ from "
                                         "what was promised")
            need(set(session["faults"]) == FAULT_FIELDS, f"{side}: fault fields differ: {session}")
            need(session["state"] == "done", f"{side}: should be done: {session}")
            need(session["name"] == self.name and session["role"] == side.split()[0],
                 f"{side}: wrong name or role: {session}")
            pages = session["data_pages"] + session["zero_pages"] + session["hole_pages"]
            need(session["ram_bytes"] and pages, f"{side}: no pages counted: {session}")
        need(result["id"] == self.b.status(self.name)["id"], "the two sides differ in the session's id")

    def check_arrived(self):
        """The guest runs at b, never went back, and every page is right."""
        self.destination.console.wait_beats(20, 30)
        Passage(self.source.console, self.destination.console, self.begin_s, self.end_s).check()
        return self.destination.verify()

    def check_source_quit(self):
        code = self.source.wait_exit(10)
        need(code == 0, f"the source's QEMU should have quit with 0, not {code}: {self.source.said()}")

    def turn(self):
        """The other way round from now on: b is the source, and a QEMU waits on a."""
        for path in self.source.ram_files:
            os.unlink(path)
        self.a, self.b = self.b, self.a
        self.source, self.destination = self.destination, None
        self.fresh_destination()

    def fresh_destination(self):
        """Another QEMU that waits on b."""
        if self.destination:
            self.destination.kill()
            for path in self.destination.ram_files:
                os.unlink(path)
        self.destination = Vm(self.sandbox, self.b, self.name, **self.destination_options)
        self.leaks = LeakCheck((self.a, self.b), (self.source, self.destination))

    def check_stayed(self):
        """The guest runs at a with every page right, and never ran at b."""
        self.source.console.wait_beats(20, 30)
        self.source.verify()
        need(not self.destination.console.beats, "the guest ran at the destination too")

    def forget(self):
        """Forget the session on both sides (where there is one), then look for anything left."""
        for host in (self.a, self.b):
            if host.status(self.name):
                host.expect(0, "forget", self.name)
                need(host.status(self.name) is None, "a forgotten session is still there")
        self.leaks.check()
