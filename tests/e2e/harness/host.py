# SPDX-License-Identifier: LGPL-2.1-or-later
"""A host: a network namespace, a runtime directory and a memferryd of its own."""
import json
import os
import re
import signal
import socket
import subprocess
import time
from collections import Counter

from .artifacts import program
from .net import enter_namespace
from .sandbox import HarnessError, alive, children_of, wait_until

ENDED = ("done", "failed", "cancelled")


class Answer:
    """What a run of the command line gave back."""

    def __init__(self, code, out, err):
        self.code = code
        self.out = out
        self.err = err

    @property
    def json(self):
        """Exactly one JSON object on stdout, nothing else: that is the promise."""
        try:
            return json.loads(self.out)
        except ValueError as error:
            raise HarnessError(f"not one JSON object on stdout ({error}): {self.out!r}, "
                               f"stderr: {self.err.strip()!r}") from error

    def __str__(self):
        return f"exit {self.code}, stdout {self.out.strip()!r}, stderr {self.err.strip()!r}"


class Verb:
    """A run of the command line in the background."""

    def __init__(self, sandbox, command):
        self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                                        stderr=subprocess.PIPE, text=True)
        sandbox.processes.append(self.process)

    def wait(self, seconds=60):
        try:
            out, err = self.process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            out, err = self.process.communicate()
            raise HarnessError(f"`{' '.join(self.process.args[3:])}` did not end within {seconds} s; "
                               f"it said: {out.strip()} {err.strip()}") from None
        return Answer(self.process.returncode, out, err)

    def interrupt(self):
        self.process.send_signal(signal.SIGINT)


class Host:
    """side: "a" or "b". `start` may be False to have a host without memferryd."""

    def __init__(self, sandbox, network, side, start=True, mount_namespace=None):
        self.sandbox = sandbox
        self.side = side
        self.namespace = network.names[side]
        self.address = network.addresses[side]
        self.runtime = os.path.join(sandbox.path, f"run-{side}")
        self.log = os.path.join(sandbox.path, f"memferryd-{side}.log")
        self.mount_namespace = mount_namespace
        self.wrapper = []  # what memferryd is started by, prlimit(1) say
        self.options = []  # of memferryd, beside those that every host needs
        self.process = None
        os.makedirs(self.runtime, exist_ok=True)
        if start:
            self.start()

    def start(self):
        self.process = self.sandbox.spawn(
            enter_namespace(self.namespace)
            + self.wrapper + [program("memferryd"), "--runtime-dir", self.runtime, "--listen",
                              f"{self.address}:7466"] + self.options,
            self.log)
        wait_until(lambda: self.process.poll() is not None or self._answers(), 10,
                   "memferryd opens its control socket")
        if self.process.poll() is not None:
            raise HarnessError(f"memferryd did not start: {self.said()}")

    def _answers(self):
        with socket.socket(socket.AF_UNIX) as end:
            return end.connect_ex(os.path.join(self.runtime, "control.sock")) == 0

    def said(self):
        with open(self.log, encoding="utf-8", errors="replace") as log:
            return log.read().strip()[-4000:]

    def begin(self, *verb):
        """Run the command line in the background."""
        return Verb(self.sandbox, [program("memferry"), "--runtime-dir", self.runtime,
                                   *map(str, verb)])

    def memferry(self, *verb, seconds=60):
        return self.begin(*verb).wait(seconds)

    def expect(self, code, *verb, seconds=60):
        """Run the command line; HarnessError unless it exits with that code."""
        answer = self.memferry(*verb, seconds=seconds)
        if answer.code != code:
            raise HarnessError(f"`memferry {' '.join(map(str, verb))}` should exit {code}: {answer}")
        return answer

    def status(self, name):
        """The session as JSON, or None if there is none."""
        answer = self.memferry("status", name, "--json")
        return answer.json if answer.code == 0 else None

    def state(self, name):
        session = self.status(name)
        return session["state"] if session else None

    def wait_state(self, name, states, seconds=60):
        """Poll until the session is in one of `states`; an ended session that is not among them fails."""
        states = (states,) if isinstance(states, str) else states
        deadline = time.monotonic() + seconds
        while True:
            session = self.status(name)
            state = session["state"] if session else None
            if state in states:
                return session
            if state in ENDED or time.monotonic() > deadline:
                raise HarnessError(f"session {name} on host {self.side} should become "
                                   f"{' or '.join(states)} but is {session}")
            time.sleep(0.01)

    def movers(self):
        """Process ids of this host's memferry-movers."""
        found = []
        for pid in children_of(self.process.pid):
            try:
                with open(f"/proc/{pid}/comm", encoding="ascii") as comm:
                    if comm.read().strip().startswith("memferry-mover"[:15]):
                        found.append(pid)
            except (FileNotFoundError, ProcessLookupError):
                continue
        return found

    def wait_movers(self, count, seconds=10):
        return wait_until(lambda: (found := self.movers()) and len(found) == count and found
                          or count == 0 and not found, seconds,
                          f"host {self.side} has {count} memferry-mover processes")

    def kill_mover(self):
        """kill -9 the host's mover; returns its process id."""
        pid = self.wait_movers(1)[0]
        os.kill(pid, signal.SIGKILL)
        return pid

    def stop(self, seconds=10):
        """SIGTERM; returns the exit code."""
        self.process.terminate()
        return self.process.wait(seconds)

    def check_alive(self):
        """memferryd lives, and no sanitizer complained in it or its movers."""
        if not alive(self.process.pid):
            raise HarnessError(f"memferryd on host {self.side} died: {self.said()}")
        with open(self.log, encoding="utf-8", errors="replace") as log:
            complaint = re.search(r"\S*runtime error:.*|(ERROR|WARNING): \w+Sanitizer.*", log.read())
        if complaint:
            raise HarnessError(f"host {self.side}: {complaint[0]}")


def open_files(pid):
    """What the descriptors of a process point at."""
    found = []
    for fd in os.listdir(f"/proc/{pid}/fd"):
        try:
            found.append(os.readlink(f"/proc/{pid}/fd/{fd}"))
        except FileNotFoundError:
            continue
    return found


def registered_mappings(pid):
    """Mappings of a process that are registered with a userfaultfd."""
    found = []
    mapping = ""
    with open(f"/proc/{pid}/smaps", encoding="utf-8", errors="replace") as smaps:
        for line in smaps:
            if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
                mapping = line.strip()
            elif line.startswith("VmFlags:") and {"um", "uw", "ui"} & set(line.split()):
                found.append(mapping)
    return found


class LeakCheck:
    """Made before a session, check() after it: nothing of the session may be left."""

    def __init__(self, hosts, vms):
        self.hosts = hosts
        self.descriptors = {host.process.pid: Counter(_kinds(host.process.pid)) for host in hosts}
        self.vms = vms

    def check(self):
        for host in self.hosts:
            host.check_alive()
            host.wait_movers(0)
            self._check_daemon(host)
        for vm in self.vms:
            if vm.process.poll() is None:
                self._check_vm(vm)
        strays = self.hosts[0].sandbox.strays()
        if strays:
            raise HarnessError(f"processes left behind: {strays}")

    def _check_daemon(self, host):
        pid = host.process.pid
        before = self.descriptors[pid]
        try:
            # A client's connection closes a moment after the client has exited (one may be in `before` too).
            wait_until(lambda: not Counter(_kinds(pid)) - before, 3, "")
        except HarnessError:
            raise HarnessError(f"memferryd on host {host.side} keeps descriptors: had {sorted(before.elements())}, "
                               f"has {sorted(_kinds(pid))}") from None
        with open(f"/proc/{pid}/maps", encoding="utf-8") as maps:
            kept = [line.strip() for line in maps if host.sandbox.ram in line]
        if kept:
            raise HarnessError(f"memferryd on host {host.side} still maps guest RAM: {kept}")
        sessions = [name for name in os.listdir(host.runtime) if name != "control.sock"
                    and not os.path.isdir(os.path.join(host.runtime, name))]
        for directory, _, files in os.walk(host.runtime):
            if directory != host.runtime:
                sessions += files
        if sessions:
            raise HarnessError(f"files left in host {host.side}'s runtime directory: {sessions}")

    @staticmethod
    def _check_vm(vm):
        # It is closed there a moment after the session.
        wait_until(lambda: not any("userfaultfd" in name for name in open_files(vm.pid)), 10,
                   f"QEMU {vm.name} (pid {vm.pid}) is left without a userfaultfd")
        mappings = registered_mappings(vm.pid)
        if mappings:
            raise HarnessError(f"QEMU {vm.name}'s memory is still registered: {mappings}")
        with open(f"/proc/{vm.pid}/status", encoding="ascii") as status:
            if re.search(r"^TracerPid:\s*[1-9]", status.read(), re.M):
                raise HarnessError(f"QEMU {vm.name} is still traced")


def _kinds(pid):
    """Descriptors by what they are, without the numbers that differ from run to run."""
    return [re.sub(r"\[?\d+\]?", "", name) for name in open_files(pid)]
