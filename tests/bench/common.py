# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the benchmarks share: one guest moved once from host a to host b, by one of several ways."""
import argparse
import json
import os
import re
import signal
import statistics
import sys
import time
from collections import namedtuple

sys.path.insert(0, os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "e2e"))

from harness.artifacts import QemuBuild, qemu_of_release
from harness.console import Passage
from harness.host import Host
from harness.net import Network, enter_namespace
from harness.sandbox import HarnessError, Sandbox, Skip, run, wait_until
from harness.vm import Vm, process_cpu_s, thread_cpu_s

CALM_S = 2.0
AFTER_S = 2.0
SETTLE_S = 0.25  # after the end of a migration, before the guest is expected to be back at its speed
QEMU_PORT = 7500
MULTIFD_CHANNELS = 4
POSTCOPY_DOWNTIME_MS = 20
WAYS = ("qemu-preempt", "qemu-multifd", "memferry")
WRITES = ("idle", "hot", "random", "sequential")

# writes: which pages the guest rewrites; rate: pages a second, 0: as many as go;
# max_rounds: of memferry's, 0: its default.
Guest = namedtuple("Guest", "ram_mib used_mib writes rate max_rounds", defaults=(0,))


class GuestLost(HarnessError):
    """A guest did not survive its migration, or not with all its memory."""


def _unreaped(pid):
    """The children of a process, also those that have ended and whose CPU is not yet the parent's to tell."""
    with open(f"/proc/{pid}/task/{pid}/children", encoding="ascii") as children:
        return children.read().split()


class CpuMeter:
    """
    CPU of the VMs without their vCPU threads, and of memferry.

    A process's own figure contains its threads that have ended, that of a daemon its movers that have: nothing
    has to be looked at in between, which would take part of what is measured.
    """

    def __init__(self, vms, daemons):
        self.vms = {vm: [cpu["thread-id"] for cpu in vm.qmp("query-cpus-fast")] for vm in vms}
        self.daemons = daemons
        self.start_s = self._used_s()

    def _used_s(self):
        used_s = sum(process_cpu_s(host.process.pid) for host in self.daemons)
        for vm, vcpus in self.vms.items():
            used_s += process_cpu_s(vm.pid) - sum(thread_cpu_s(vm.pid, tid) for tid in vcpus)
        return used_s

    def total_s(self):
        """What was used since the start; every VM still exists."""
        for host in self.daemons:
            wait_until(lambda pid=host.process.pid: not _unreaped(pid), 10, "the movers have ended")
        return self._used_s() - self.start_s


class Bench:
    """
    Context manager: two hosts on one cable, with a memferryd each if `way` memferry is among the ways.

    options: what add_options() gives.
    """

    def __init__(self, options, ways):
        self.options = options
        self.ways = ways
        self.qemu = QemuBuild() if options.qemu == "host" else qemu_of_release(options.qemu)
        self.sandbox = Sandbox()
        self.network = None
        self.hosts = {}
        self.number = 0

    def __enter__(self):
        # The console's thread takes the time of heartbeats while this one polls.
        sys.setswitchinterval(0.0005)
        self.sandbox.__enter__()
        try:
            if self.options.huge:
                run("mount", "-t", "tmpfs", "-o", f"huge={self.options.huge}", "none", self.sandbox.ram)
            self._hold_memory()
            self.network = Network(self.sandbox)
            self.network.limit(self.options.mbit)
            self.hosts = {side: Host(self.sandbox, self.network, side, start="memferry" in self.ways)
                          for side in "ab"}
        except BaseException:
            self.sandbox.__exit__()
            raise
        return self

    def __exit__(self, *details):
        self.sandbox.__exit__(*details)

    def _hold_memory(self):
        """See tests/bench/ballast."""
        if not self.options.ballast:
            return
        log = os.path.join(self.sandbox.path, "ballast.log")
        process = self.sandbox.spawn(
            [os.path.join(os.path.dirname(os.path.abspath(__file__)), "ballast")], log)

        def ready():
            if process.poll() is not None:
                raise HarnessError(f"tests/bench/ballast ended: see {log}")
            with open(log, encoding="ascii") as file:
                return "ready" in file.read()

        wait_until(ready, 300, "the machine's free memory is held", interval=0.1)

    def describe(self):
        """One line on what was measured with: nothing compares without it."""
        version = ".".join(map(str, self.qemu.version()))
        load = " ".join(f"{value:.1f}" for value in os.getloadavg())
        limit = f", cable limited to {self.options.mbit} Mbit/s" if self.options.mbit else ""
        return (f"{time.strftime('%Y-%m-%d %H:%M')}, {os.cpu_count()} CPUs, Linux {os.uname().release}, "
                f"QEMU {version} (TCG), load {load}{limit}")

    def raw_limit(self):
        """iperf3's single stream over the cable, bytes a second; None without iperf3."""
        try:
            server = self.sandbox.spawn(
                enter_namespace(self.hosts["b"].namespace) + ["iperf3", "-s", "-1"],
                os.path.join(self.sandbox.path, "iperf.log"))
            time.sleep(0.3)
            text = run(*enter_namespace(self.hosts["a"].namespace), "iperf3", "-J", "-t", "2", "-c",
                       self.hosts["b"].address).stdout
            server.wait(10)
        except (HarnessError, FileNotFoundError):
            return None
        return json.loads(text)["end"]["sum_received"]["bits_per_second"] / 8

    def cable_bytes(self):
        """Bytes that crossed the cable so far, both ways."""
        text = run("ip", "-n", self.network.names["a"], "-s", "-j", "link", "show", "eth0").stdout
        stats = json.loads(text)[0]["stats64"]
        return stats["rx"]["bytes"] + stats["tx"]["bytes"]

    def measure(self, way, guest, attempts=3):
        """
        Figures of one migration, with "lost": how many guests were lost before one came through. All
        attempts lost: only that. A lost guest is told at once and is measured again with a new one.
        """
        for lost in range(attempts):
            try:
                return {**self._try(way, guest), "lost": lost}
            except GuestLost as error:
                print(f"{way}: guest lost: {error}", file=sys.stderr)
        return {"lost": attempts}

    def _try(self, way, guest):
        _check_memory(guest)
        self.number += 1
        trial = Trial(self, way, guest, f"{way}{self.number}")
        try:
            trial.start()
            try:
                return trial.measure()
            # A QEMU that dies closes its sockets under our hands.
            except (HarnessError, OSError, ValueError, KeyError, IndexError) as error:
                raise GuestLost(str(error)) from error
        finally:
            trial.close()


class Trial:
    """One VM booted on host a and the one that waits for it on host b."""

    def __init__(self, bench, way, guest, name):
        self.bench = bench
        self.options = bench.options
        self.hosts = bench.hosts
        self.way = way
        self.guest = guest
        self.vms = []
        for side in "ab":
            arriving = side == "b"
            self.vms.append(Vm(bench.sandbox, self.hosts[side], name, incoming=arriving, qemu=bench.qemu,
                               autostart=arriving and way != "memferry", ram_mib=guest.ram_mib,
                               **self._memory()))
        self.source, self.destination = self.vms

    def _memory(self):
        if self.way == "memferry" or self.options.qemu_memory == "tmpfs":
            return {"backends": ("tmpfs",)}
        # Without reserve=off Linux refuses more than the machine has, though hardly any gets used.
        return {"backends": (), "extra": (
            "-object", f"memory-backend-ram,id=ram0,size={self.guest.ram_mib}M,reserve=off",
            "-machine", "memory-backend=ram0")}

    def start(self):
        self.source.console.wait("READY", 120)
        self.source.console.ask(f"start {self.guest.used_mib} {self.guest.writes} {self.guest.rate}",
                                "FILLED", 300)
        # For the rate of work before.
        time.sleep(CALM_S + 0.5)

    def measure(self):
        move = {"qemu-preempt": move_by_preempt, "qemu-multifd": move_by_multifd,
                "memferry": move_by_memferry}[self.way]
        meter = CpuMeter(self.vms, self.hosts.values() if self.way == "memferry" else ())
        bytes_before = self.bench.cable_bytes()
        begin = time.monotonic()
        figures = move(self)
        end = time.monotonic()
        if self.way == "memferry":
            for host in self.hosts.values():
                host.expect(0, "forget", self.source.name)
        figures["total_s"] = end - begin
        figures["cpu_s"] = meter.total_s()
        figures["bytes"] = self.bench.cable_bytes() - bytes_before
        time.sleep(SETTLE_S + AFTER_S)
        self.destination.console.wait_beats(10, 60)
        passage = Passage(self.source.console, self.destination.console, begin, end)
        passage.check()
        figures["outage_s"] = passage.outage_s()
        figures["lost_s"] = Passage(self.source.console, self.destination.console, begin,
                                    end + SETTLE_S).lost_work_s(CALM_S)
        figures.update(speeds(passage, begin, end))
        if self.options.verify:
            self.destination.verify(600)
        elif self.destination.console.wrong():
            raise HarnessError(f"wrong pages: {self.destination.console.wrong()[:3]}")
        return figures

    def close(self):
        for vm in self.vms:
            vm.kill()
            vm.console.close()
            for path in vm.ram_files:
                os.unlink(path)


def _check_memory(guest):
    """Two copies of what the guest uses must fit, or the kernel would end something at random."""
    with open("/proc/meminfo", encoding="ascii") as info:
        free_mib = int(re.search(r"MemAvailable:\s*(\d+)", info.read())[1]) // 1024
    # Linux describes each page of the guest in 64 bytes of its memory.
    needed_mib = 2 * (guest.used_mib + guest.ram_mib // 64 + 300)
    if needed_mib > free_mib:
        raise Skip(f"two guests that use {guest.used_mib} of {guest.ram_mib} MiB need {needed_mib} MiB, "
                   f"but only {free_mib} MiB are free")


def speed(beats, begin_s, end_s):
    """Pages that the guest rewrote a second in that time; None if it said too little then."""
    beats = [beat for beat in beats if begin_s <= beat.at_s <= end_s]
    if len(beats) < 2:
        return None
    return (beats[-1].writes - beats[0].writes) / (beats[-1].at_s - beats[0].at_s)


def speeds(passage, begin_s, end_s):
    """The guest's speed before, during (all of it, and the part on either host) and after."""
    beats = passage.before + passage.after
    return {
        "speed_before": speed(beats, begin_s - CALM_S, begin_s),
        "speed_during": speed(beats, begin_s, end_s),
        "speed_source": speed(passage.before, begin_s, end_s),
        "speed_destination": speed(passage.after, begin_s, end_s),
        "speed_after": speed(beats, end_s + SETTLE_S, end_s + SETTLE_S + AFTER_S),
    }


def _start_qemu_migration(trial, capabilities, **parameters):
    for vm in (trial.source, trial.destination):
        known = {cap["capability"] for cap in vm.qmp("query-migrate-capabilities")}
        # Only the destination may have the last, and not every QEMU knows it.
        wanted = capabilities + ["postcopy-blocktime"] * (
            vm is trial.destination and "postcopy-ram" in capabilities)
        vm.qmp("migrate-set-capabilities", capabilities=[
            {"capability": name, "state": True} for name in wanted if name in known])
        vm.qmp("migrate-set-parameters", max_bandwidth=1 << 40, **parameters)
    uri = f"tcp:{trial.hosts['b'].address}:{QEMU_PORT}"
    trial.destination.qmp("migrate-incoming", uri=uri)
    trial.source.qmp("migrate", uri=uri)


def _wait_qemu_migration(trial, seconds):
    """
    Wait until both QEMUs are done; returns their answers and how many pages were left to send when the
    source was last seen running its guest.
    """
    seen = {"left": None}

    def finished():
        answers = [vm.qmp("query-migrate") for vm in (trial.source, trial.destination)]
        statuses = [answer.get("status") for answer in answers]
        if "failed" in statuses or "postcopy-paused" in statuses:
            raise HarnessError(f"QEMU's own migration failed: {answers}")
        ram = answers[0].get("ram", {})
        if statuses[0] == "active" and "remaining" in ram:
            seen["left"] = ram["remaining"] // 4096
        return answers if statuses == ["completed", "completed"] else None

    answers = wait_until(finished, seconds, "QEMU's migration completes", interval=0.01)
    return answers, seen["left"]


def bucket_percentile(buckets, share):
    """Upper end in us of the power-of-two bucket [2^i, 2^(i+1)) us that holds the percentile."""
    goal = sum(buckets) * share
    for index, count in enumerate(buckets):
        goal -= count
        if count and goal <= 0:
            return float(2 << index)
    return None


def move_by_preempt(trial):
    """QEMU's postcopy with preemption, switched to postcopy at once or after the first pass."""
    # With its default limit QEMU calls 300 ms of sending little enough to end without any postcopy.
    _start_qemu_migration(trial, ["postcopy-ram", "postcopy-preempt"], max_postcopy_bandwidth=0,
                          downtime_limit=POSTCOPY_DOWNTIME_MS)
    at_once = trial.options.qemu_start == "at-once"
    left = 0

    def ready():
        nonlocal left
        answer = trial.source.qmp("query-migrate")
        if answer["status"] in ("failed", "completed"):
            # Completed: after the pass so little was left that QEMU needed no postcopy.
            return answer["status"]
        ram = answer.get("ram", {})
        left = ram.get("remaining", 0) // 4096
        # Not dirty-sync-count: with postcopy-ram QEMU 11 looks at the dirty log every 50 ms.
        passed = ram.get("remaining", 0) <= ram.get("total", 0) // 32
        return "active" if answer["status"] == "active" and (at_once or passed) else None

    if wait_until(ready, 300, "QEMU's first pass ends", interval=0.002) == "active":
        trial.source.qmp("migrate-start-postcopy")
    (_, answer), _ = _wait_qemu_migration(trial, 300)
    buckets = answer.get("postcopy-latency-dist", [])
    return {"fault_p50_us": bucket_percentile(buckets, 0.5),
            "fault_p99_us": bucket_percentile(buckets, 0.99),
            "dirty_pages": left}


def move_by_multifd(trial):
    """QEMU's precopy over several connections, with its default limit of downtime (300 ms)."""
    _start_qemu_migration(trial, ["multifd"], multifd_channels=MULTIFD_CHANNELS)
    (answer, _), left = _wait_qemu_migration(trial, 300)
    return {"blackout_s": answer["downtime"] / 1e3, "dirty_pages": left,
            "rounds": answer["ram"]["dirty-sync-count"]}


def move_by_memferry(trial):
    hosts = trial.hosts
    name = trial.source.name
    hosts["b"].expect(0, "receive", name, "--qmp", trial.destination.qmp_path)
    # QEMU's own ways leave the source's QEMU where it is, too.
    verb = hosts["a"].begin("migrate", name, "--qmp", trial.source.qmp_path, "--to",
                            hosts["b"].address, "--json", "--mode", trial.options.mode, "--keep-source",
                            *(("--max-rounds", trial.guest.max_rounds) if trial.guest.max_rounds else ()))
    answer = verb.wait(300)
    if answer.code:
        raise HarnessError(f"memferry's migration failed: {answer}")
    report = answer.json
    faults = report["faults"]
    return {"fault_p50_us": faults["p50_us"] if faults["count"] else None,
            "fault_p99_us": faults["p99_us"] if faults["count"] else None,
            "blackout_s": report["blackout_us"] / 1e6,
            "dirty_pages": report["dirty_pages_at_switch"],
            "rounds": report["rounds"], "faults": faults["count"], "report": report}


def median(results, key):
    values = [result[key] for result in results if result.get(key) is not None]
    return statistics.median(values) if values else None


def ratio(value, other):
    return value / other if value is not None and other else None


def show(value, factor=1.0, width=12):
    """A figure with three digits that count, or a dash for none."""
    if value is None:
        return f"{'-':>{width}}"
    value *= factor
    return f"{value:{width}.0f}" if abs(value) >= 100 else f"{value:{width}.3g}"


def add_options(parser):
    """The options that every benchmark has."""
    parser.add_argument("--mode", choices=("hybrid", "postcopy", "precopy"), default="hybrid",
                        help="memferry's mode (hybrid)")
    parser.add_argument("--runs", type=int, default=3, help="of each (3)")
    parser.add_argument("--qemu", default="sid", metavar="RELEASE|host",
                        help="Debian release whose QEMU to take, or the host's own (sid)")
    parser.add_argument("--qemu-start", choices=("at-once", "first-pass"),
                        help="when qemu-preempt goes over to postcopy (as memferry's mode does: at once "
                             "with --mode postcopy, else after the first pass)")
    parser.add_argument("--mbit", type=int, help="limit the cable to that many Mbit/s")
    parser.add_argument("--ballast", action=argparse.BooleanOptionalAction, default=True,
                        help="have all memory touched before it is used, for a machine that is itself "
                             "virtual (yes; tests/bench/ballast says why)")
    parser.add_argument("--huge", choices=("never", "within_size", "always", "advise"),
                        help="put the RAM files on a tmpfs mounted with this option huge= (on /dev/shm as it "
                             "is); doc/performance.md says what it does")
    parser.add_argument("--verify", action=argparse.BooleanOptionalAction, default=True,
                        help="have the guest check all its memory after each run (yes)")
    parser.add_argument("--json", metavar="FILE", help="write every run's figures there")


def parse(parser):
    options = parser.parse_args()
    if not options.qemu_start:
        options.qemu_start = "at-once" if options.mode == "postcopy" else "first-pass"
    return options


def parse_ways(text):
    ways = text.split(",")
    if not ways or set(ways) - set(WAYS):
        raise ValueError
    return ways


def run_main(main, name):
    """Run main(); what went wrong is one sentence. Being terminated is like being interrupted."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        sys.exit(main())
    except (HarnessError, Skip) as error:
        sys.exit(f"{name}: {error}")
    except KeyboardInterrupt:
        sys.exit(f"{name}: interrupted")
