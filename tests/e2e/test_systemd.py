# SPDX-License-Identifier: LGPL-2.1-or-later
"""memferryd as a service of a real systemd, under all that its unit forbids."""
import json
import os
import re
import shutil
import signal

from common import Pair, need
from harness.container import VM_USER, Container, UnitHost
from harness.host import LeakCheck, open_files
from harness.sandbox import HarnessError, wait_until
from harness.testing import e2e
from harness.vm import Vm

SYSCTL = "/proc/sys/vm/unprivileged_userfaultfd"
CAPABILITIES = {"dac_override": 1, "kill": 5, "setgid": 6, "setuid": 7, "sys_ptrace": 19, "sys_nice": 23,
                "checkpoint_restore": 40}


class UnitVm(Vm):
    """QEMU in a service of its own, as a user of its own, with -sandbox on."""

    class Build:
        """In the place of a QemuBuild."""

        def __init__(self, container):
            self.container = container

        def command(self):
            return [*self.container.enter(), "systemd-run", "--quiet", "--wait", "--pipe", "--collect",
                    "--uid", VM_USER, "--gid", VM_USER, "qemu-system-x86_64"]

    def __init__(self, container, host, name, **options):
        self.container = container
        super().__init__(container.sandbox, host, name, qemu=self.Build(container), sandboxed=True,
                         **options)

    def _memory(self, host, backends):
        self.container.run("chown", VM_USER, os.path.dirname(self.qmp_path), self.sandbox.ram)
        return super()._memory(host, backends)

    def _firmware(self):
        # What lies outside the sandbox is not to be seen in the container.
        arguments = []
        for argument in super()._firmware():
            if argument.startswith("/") and not argument.startswith(self.sandbox.path):
                argument = shutil.copy(argument, self.sandbox.path)
            arguments.append(argument)
        return arguments

    @property
    def pid(self):
        """QEMU's own process, not systemd-run's that waits for it."""
        for entry in os.listdir("/proc"):
            try:
                with open(f"/proc/{entry}/cmdline", encoding="utf-8", errors="replace") as line:
                    words = line.read().split("\0")
            except (FileNotFoundError, NotADirectoryError, ProcessLookupError):
                continue
            if os.path.basename(words[0]).startswith("qemu-system") and any(self.qmp_path in word for word in words):
                return int(entry)
        raise HarnessError(f"no QEMU {self.name} runs")


class UnitPair(Pair):
    """Hosts a and b in one container: the unit as it is installed, and its copy with another address."""

    def __init__(self, sandbox):
        self.sandbox = sandbox
        self.container = Container(sandbox)
        self.container.run("systemctl", "enable", "memferryd")
        self.a = UnitHost(self.container, "a", "memferryd", "/run/memferry", "127.0.0.1:7466")
        self.b = UnitHost(self.container, "b", "memferryd-b", "/run/memferryd-b", "127.0.0.2:7467")
        self.copy_unit("memferryd-b", "--runtime-dir /run/memferryd-b --listen 0.0.0.0:7467")
        self.a.start()
        self.b.start()
        self.source = self.destination = self.leaks = None
        self.begin_s = self.end_s = 0.0

    def copy_unit(self, name, arguments, program=None, service=""):
        """Install a copy of the unit that runs with other arguments, and may be another program."""
        with open(self.container.root + self.a.show("FragmentPath"), encoding="utf-8") as unit:
            text = unit.read()
        text = re.sub(r"(?m)^ExecStart=(.*)$",
                      lambda match: f"ExecStart={program or match[1]} {arguments}\n{service}", text)
        text = text.replace("RuntimeDirectory=memferry\n", f"RuntimeDirectory={name}\n")
        with open(f"{self.container.root}/etc/systemd/system/{name}.service", "w", encoding="utf-8") as unit:
            unit.write(text)
        self.container.run("systemctl", "daemon-reload")

    def start_vms(self):
        self.source = UnitVm(self.container, self.a, self.name)
        self.source.start_work(96, "random", 2000)
        self.start_destination()

    def start_destination(self):
        self.destination = UnitVm(self.container, self.b, self.name, incoming=True)
        self.leaks = LeakCheck((self.a, self.b), (self.source, self.destination))


def status_of(pid, task=None):
    """/proc/PID/status as a dictionary."""
    with open(f"/proc/{pid}/task/{task or pid}/status", encoding="ascii", errors="replace") as status:
        return {key: value.strip() for key, _, value in (line.partition(":") for line in status)}


def allow_vms_userfaultfd(sandbox, value):
    """What `memferry check` demands for a VMM that is not root's; put back at the end."""
    with open(SYSCTL, encoding="ascii") as sysctl:
        before = sysctl.read()
    sandbox.on_exit(lambda: put(SYSCTL, before))
    put(SYSCTL, value)


def put(path, text):
    with open(path, "w", encoding="ascii") as file:
        file.write(text)


def check_restrictions(pid):
    """What the unit leaves memferryd."""
    status = status_of(pid)
    allowed = sum(1 << bit for bit in CAPABILITIES.values())
    need(int(status["CapBnd"], 16) & ~allowed == 0, f"too many capabilities: {status['CapBnd']}")
    need(int(status["CapEff"], 16) & 1 << CAPABILITIES["sys_ptrace"], "no CAP_SYS_PTRACE")
    need(status["NoNewPrivs"] == "1" and status["Seccomp"] == "2", "memferryd runs without a filter")


def check_mover(pair, host, vm):
    """memferry-mover of a session: whose it is, what it may, where it is accounted."""
    pid = host.wait_movers(1)[0]
    status = wait_until(lambda: (now := status_of(pid))["CapEff"].strip("0") == "" and now, 5,
                        "the mover drops its capabilities")
    uid = int(pair.container.run("id", "-u", "memferry").stdout)
    need(status["Uid"].split() == [str(uid)] * 4, f"the mover should be user {uid}: {status['Uid']}")
    need(status["CapPrm"].strip("0") == "" and status["NoNewPrivs"] == "1" and status["Seccomp"] == "2",
         f"the mover kept privileges: {status}")
    need(os.sched_getscheduler(pid) == os.SCHED_RR, "the mover has no real-time priority")
    need(int(status["Seccomp_filters"]) > int(status_of(host.process.pid)["Seccomp_filters"]),
         "the mover has no filter of its own")
    # It is moved there once it has its orders.
    wait_until(lambda: cgroup_of(pid) == cgroup_of(vm.pid), 5, "the mover is in the cgroup of its VM")


def cgroup_of(pid):
    with open(f"/proc/{pid}/cgroup", encoding="ascii") as cgroup:
        return cgroup.read()


@e2e(limit_s=600)
def systemd_service(sandbox):
    """Start, stop, restart, death of the unit without a session; `memferry check` under its restrictions."""
    pair = UnitPair(sandbox)
    host = pair.a
    need(host.systemctl("is-enabled").stdout == "enabled\n", "the unit is not enabled")
    need(host.systemctl("is-active").stdout == "active\n", "the unit is not active")
    need(host.show("Type") == "notify", "the unit does not wait for READY")
    check_restrictions(host.process.pid)
    need(any("listens on 127.0.0.1" in line for line in host.journal("-p", "6..6")) and
         not any("<6>" in line for line in host.journal()), f"priorities are missing: {host.journal()}")
    need(any("0.0.0.0" in line for line in pair.b.journal("-p", "4..4")),
         f"no warning of a wide address: {pair.b.journal()}")
    host.expect(0, "status")

    answer = host.systemctl("reload", check=False)
    need(answer.returncode and "not applicable" in answer.stderr, f"reload should be refused: {answer}")
    need(host.show("MainPID") == str(inner_pid(host)), "reload did something")
    first = host.show("MainPID")
    host.systemctl("restart")
    need(host.show("MainPID") not in (first, "0"), "restart did not restart")
    host.expect(0, "status")
    os.kill(pair.container.outer_pid(host.show("MainPID")), signal.SIGKILL)
    wait_until(lambda: host.show("NRestarts") == "1" and host.show("SubState") == "running", 10,
               "systemd restarts a killed memferryd")
    host.expect(0, "status")
    host.stop()
    need((host.show("ActiveState"), host.show("Result"), host.show("ExecMainStatus")) ==
         ("inactive", "success", "0"), f"stopping failed: {host.said()}")
    host.expect(3, "status")
    host.start()
    host.expect(0, "status")

    check_under_unit(pair)
    check_bad_option(pair)


def inner_pid(host):
    return int(status_of(host.process.pid)["NSpid"].split()[-1])


def check_under_unit(pair):
    """`memferry check` as a service with the unit's restrictions: all that memferryd needs is permitted."""
    program = pair.container.run("sh", "-c", "command -v memferry").stdout.strip()
    report = "/run/memferry-check.json"
    pair.copy_unit("memferry-check", "check --json", program,
                   f"Type=oneshot\nRestart=no\nStandardOutput=truncate:{report}\n")
    pair.container.run("systemctl", "start", "memferry-check", check=False)
    rows = json.loads(pair.container.run("cat", report).stdout)
    # The child that is attached to inherits the unit's filter, which a VMM does not have: it is refused like
    # any VMM but QEMU that has a filter. systemd_migrate attaches to a QEMU.
    missing = {name: row["found"] for name, row in rows["checks"].items() if row["state"] == "missing"}
    need(set(missing) <= {"attach"} and "seccomp filter" in missing.get("attach", "seccomp filter"),
         f"not able under the unit: {missing}")


def check_bad_option(pair):
    """A mistake in the options is told once, not at every restart."""
    pair.copy_unit("memferryd-bad", "--listen nonsense")
    answer = pair.container.run("systemctl", "start", "memferryd-bad", check=False)
    bad = UnitHost(pair.container, "bad", "memferryd-bad", "/run/memferryd-bad", "")
    need(answer.returncode, "memferryd started with a wrong address")
    need((bad.show("ActiveState"), bad.show("NRestarts"), bad.show("ExecMainStatus")) ==
         ("failed", "0", "2"), f"it should fail once: {bad.said()}")
    need(any("nonsense" in line for line in bad.journal("-p", "3..3")), f"no error: {bad.said()}")


@e2e(limit_s=600)
def systemd_migrate(sandbox):
    """From unit to unit, QEMU as a user of its own; the units are stopped before and after RELEASE."""
    pair = UnitPair(sandbox)
    allow_vms_userfaultfd(sandbox, "0")
    pair.start_vms()
    answer = pair.b.expect(1, "receive", pair.name, "--qmp", pair.destination.qmp_path)
    need("vm.unprivileged_userfaultfd" in answer.err, f"the remedy is missing: {answer}")
    put(SYSCTL, "1")

    stop_before_release(pair)
    pair.receive()
    check_mover(pair, pair.b, pair.destination)
    limit_loopback(pair, True)
    verb = pair.begin_again("--mode", "postcopy", "--keep-source")
    pair.b.wait_state(pair.name, "postcopy")
    check_mover(pair, pair.a, pair.source)
    first = pair.b.kill_mover()
    wait_until(lambda: pair.b.movers() not in ([], [first]), 10, "the mover is replaced")
    check_mover(pair, pair.b, pair.destination)
    # The destination's memferryd goes only once its guest needs it no more.
    pair.b.stop(60)
    limit_loopback(pair, False)
    pair.finish(verb)
    pair.check_arrived()
    need((pair.b.show("ActiveState"), pair.b.show("Result")) == ("inactive", "success"),
         f"stopping failed: {pair.b.said()}")
    pair.b.start()
    pair.leaks = LeakCheck((pair.a, pair.b), (pair.source, pair.destination))
    pair.forget()


def stop_before_release(pair):
    """A waiting destination and a source that is still connecting: the guest is left alone."""
    pair.receive()
    pair.b.stop()
    need(not [name for name in open_files(pair.destination.pid) if "userfaultfd" in name],
         "a stopped memferryd left its userfaultfd in QEMU")
    need(pair.destination.qmp.status() in ("inmigrate", "prelaunch"), "the destination's QEMU is disturbed")
    pair.b.start()
    pair.receive()
    os.kill(pair.b.process.pid, signal.SIGSTOP)
    verb = pair.begin_again()
    pair.a.wait_state(pair.name, "connecting")
    pair.a.stop()
    os.kill(pair.b.process.pid, signal.SIGCONT)
    answer = verb.wait(20)
    need(answer.code in (1, 3), f"migrate should say that memferryd has gone: {answer}")
    pair.check_stayed()
    pair.a.start()
    pair.b.expect(0, "cancel", pair.name)
    pair.b.expect(0, "forget", pair.name)


def limit_loopback(pair, limited):
    """Make postcopy last, or go on at once."""
    tc = ["tc", "qdisc", "replace" if limited else "del", "dev", "lo", "root"]
    if limited:
        tc += ["tbf", "rate", "200mbit", "burst", "256kb", "latency", "50ms"]
    pair.container.network(*tc)
