#!/usr/bin/env python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""The demo (contrib/demo starts it): a Linux guest moves between two hosts while it checks its memory."""
import signal
import sys
import time

from harness.console import Passage
from harness.host import Host
from harness.net import Network
from harness.sandbox import HarnessError, Sandbox, Skip
from harness.vm import Vm

RAM_MIB = 1024
USED_MIB = 400
CALM_S = 2.0
CABLE_MBIT = 1000


def say(text=""):
    print(text, flush=True)


def show_progress(host, name, verb):
    """A line for every new state and every half second, until `migrate` has ended."""
    shown, shown_at_s = None, 0.0
    while verb.process.poll() is None:
        session = host.status(name)
        now_s = time.monotonic()
        if session and (session["state"] != shown or now_s - shown_at_s >= 0.5):
            shown, shown_at_s = session["state"], now_s
            where = "the guest runs on b" if shown in ("postcopy", "drained", "done") else "the guest runs on a"
            say(f"    {shown:10}  {session['sent_bytes'] >> 20:4} MiB sent   {where}")
        time.sleep(0.02)


def summary(session, passage, pages, hosts):
    faults = session["faults"]
    mib = 1 << 20
    say()
    say("What happened:")
    say(f"    The guest now runs on host b ({hosts['b'].address}); QEMU on host a has ended.")
    say(f"    It checked all of its {pages} pages ({pages // 256} MiB) after the move: not one byte is wrong.")
    say(f"    It was paused for {session['blackout_us'] / 1000:.1f} ms; the longest silence its users saw "
        f"was {passage.outage_s() * 1000:.0f} ms (its heartbeat is 5 ms).")
    say(f"    Everything took {session['total_us'] / 1e6:.2f} s: of {session['ram_bytes'] // mib} MiB of RAM, "
        f"{session['sent_bytes'] / mib:.0f} MiB were sent;")
    say(f"    {session['hole_pages']} pages had never been used and {session['zero_pages']} were zero, so they "
        "cost nothing.")
    if faults["count"]:
        say(f"    {faults['count']} times the guest touched a page before it had come: half of those waits "
            f"were under {faults['p50_us']:.0f} us, 99 % under {faults['p99_us']:.0f} us.")
    say()


def demo(sandbox):
    say("Two hosts, a (10.77.0.1) and b (10.77.0.2), made of network namespaces and joined by 1 Gbit/s; "
        "memferryd on each.")
    network = Network(sandbox)
    network.limit(CABLE_MBIT)
    hosts = {side: Host(sandbox, network, side) for side in "ab"}
    say(f"Host a boots Linux with {RAM_MIB} MiB in a stock QEMU (no KVM needed), host b starts a QEMU that "
        "waits...")
    source = Vm(sandbox, hosts["a"], "vm1", ram_mib=RAM_MIB)
    destination = Vm(sandbox, hosts["b"], "vm1", ram_mib=RAM_MIB, incoming=True)
    source.start_work(USED_MIB, "random", 2000)
    say(f"The guest fills {USED_MIB} MiB with a pattern, then rewrites and verifies pages without a pause.")
    time.sleep(CALM_S)
    say()
    say("On host b:  memferry receive vm1 --qmp vm1.qmp")
    hosts["b"].expect(0, "receive", "vm1", "--qmp", destination.qmp_path)
    say(f"On host a:  memferry migrate vm1 --qmp vm1.qmp --to {hosts['b'].address}")
    begin_s = time.monotonic()
    verb = hosts["a"].begin("migrate", "vm1", "--qmp", source.qmp_path, "--to", hosts["b"].address,
                            "--json")
    show_progress(hosts["a"], "vm1", verb)
    answer = verb.wait()
    if answer.code:
        raise HarnessError(f"the migration failed: {answer}")
    say(f"    {answer.json['state']:10}  {answer.json['sent_bytes'] >> 20:4} MiB sent   host a's QEMU has quit")
    source.wait_exit(10)
    destination.console.wait_beats(100, 30)
    passage = Passage(source.console, destination.console, begin_s, time.monotonic())
    passage.check()
    pages = destination.verify()
    summary(answer.json, passage, pages, hosts)


def end(number, _frame):
    raise KeyboardInterrupt(signal.Signals(number).name)


def main():
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, end)
    try:
        with Sandbox() as sandbox:
            demo(sandbox)
    except (HarnessError, Skip) as error:
        sys.exit(f"contrib/demo: {error}")
    except KeyboardInterrupt:
        sys.exit("contrib/demo: interrupted, everything was cleaned up")


if __name__ == "__main__":
    main()
