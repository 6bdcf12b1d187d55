# SPDX-License-Identifier: LGPL-2.1-or-later
"""memferryd itself: stopped, killed and restarted while sessions run; how it finds its peer."""
import os
import signal
import time

from common import POSTCOPY, SLOW_MBIT, Pair, need
from harness import wire
from harness.artifacts import program
from harness.host import LeakCheck, open_files, registered_mappings
from harness.net import Relay, enter_namespace
from harness.sandbox import run, wait_until
from harness.testing import e2e
from harness.vm import Vm
from test_faults import AFTER_RELEASE, hold_switchover


def start_with_hosts(pair, hosts):
    """Restart a's memferryd so that it listens on loopback only and sees the file `hosts` as /etc/hosts."""
    pair.a.stop()
    pair.a.process = pair.sandbox.spawn(
        [*enter_namespace(pair.a.namespace), "unshare", "--mount", "sh", "-c",
         'mount --bind "$1" /etc/hosts && shift && exec "$@"', "sh", hosts, program("memferryd"),
         "--runtime-dir", pair.a.runtime], pair.a.log)
    wait_until(lambda: pair.a.memferry("status").code == 0, 10, "memferryd is up again")
    pair.leaks = LeakCheck((pair.a, pair.b), (pair.source, pair.destination))


@e2e()
def peer_by_name(sandbox):
    """A name that came into /etc/hosts after memferryd had started, and whose first addresses are dead."""
    pair = Pair(sandbox)
    hosts = os.path.join(sandbox.path, "hosts")
    with open(hosts, "w", encoding="ascii") as file:
        file.write("127.0.0.1 localhost\n")
    start_with_hosts(pair, hosts)
    pair.receive()
    with open(hosts, "a", encoding="ascii") as file:
        file.write(f"fd00::77 hostb\n{pair.a.address} hostb\n{pair.b.address} hostb\n")
    pair.check_done(pair.finish(pair.begin_again(to="hostb")).json)
    pair.check_arrived()
    need("hostb" in pair.a.memferry("status").out, "status should name the peer as it was given")


@e2e()
def peer_ipv6(sandbox):
    """Both hosts speak IPv6 only."""
    pair = Pair(sandbox)
    for host, address in ((pair.a, "fd00::1"), (pair.b, "fd00::2")):
        host.stop()
        run("ip", "-n", host.namespace, "address", "flush", "dev", "eth0")
        run("ip", "-n", host.namespace, "address", "add", f"{address}/64", "dev", "eth0", "nodad")
        host.address = f"[{address}]"
        host.start()
    pair.leaks = LeakCheck((pair.a, pair.b), (pair.source, pair.destination))
    pair.migrate()
    pair.check_arrived()
    pair.forget()


@e2e()
def stop_waiting(sandbox):
    """SIGTERM with a VM that waits: disarmed, untouched, good for another memferryd."""
    pair = Pair(sandbox)
    pair.receive()
    need(pair.b.stop() == 0, f"SIGTERM should be a clean stop: {pair.b.said()}")
    need(not registered_mappings(pair.destination.pid), "the VM's memory is still registered")
    need(not [name for name in open_files(pair.destination.pid) if "userfaultfd" in name],
         "the VM keeps a userfaultfd")
    pair.b.start()
    pair.leaks = LeakCheck((pair.a, pair.b), (pair.source, pair.destination))
    pair.migrate()
    pair.check_arrived()
    pair.forget()


def stop_before_release(sandbox, side):
    """SIGTERM before RELEASE: the guest goes on at the source, and both sides tell of the stop."""
    pair = Pair(sandbox)
    verb, _ = hold_switchover(pair, sandbox)
    host = pair.a if side == "a" else pair.b
    host.process.terminate()
    answer = verb.wait(30)
    need(answer.code == 1 and answer.json["state"] == "cancelled", f"migrate should say so: {answer}")
    need("memferryd was stopped" in answer.json["reason"], f"the reason should name it: {answer}")
    need(host.process.wait(30) == 0, f"SIGTERM should be a clean stop: {host.said()}")
    pair.check_stayed()


@e2e()
def stop_source_before_release(sandbox):
    stop_before_release(sandbox, "a")


@e2e()
def stop_destination_before_release(sandbox):
    stop_before_release(sandbox, "b")


@e2e()
def stop_after_release(sandbox):
    """SIGTERM to both after RELEASE: they stop once all memory has arrived, not before."""
    pair = Pair(sandbox, mbit=SLOW_MBIT)
    verb = pair.begin(*POSTCOPY)
    for host in (pair.a, pair.b):
        host.wait_state(pair.name, AFTER_RELEASE)
        host.process.terminate()
    need(pair.finish(verb).json["state"] == "done", "should be done")
    for host in (pair.a, pair.b):
        need(host.process.wait(30) == 0, f"host {host.side}'s memferryd should stop: {host.said()}")
    pair.check_source_quit()
    pair.check_arrived()
    need(not registered_mappings(pair.destination.pid), "the VM's memory is still registered")


@e2e()
def killed_destination_daemon_keeps_guest(sandbox):
    """
    kill -9 of the destination's memferryd after RELEASE: the guest waits and reads nothing wrong. Another
    memferryd does not put it into a VM that waits for something else, whatever that is called.
    """
    pair = Pair(sandbox, mbit=SLOW_MBIT, used_mib=160)
    pair.begin(*POSTCOPY)
    for host in (pair.a, pair.b):
        host.wait_state(pair.name, AFTER_RELEASE)
    pair.b.process.kill()
    pair.b.process.wait()
    pair.b.start()
    other = Vm(sandbox, pair.b, "other", incoming=True)
    pair.b.expect(0, "receive", pair.name, "--qmp", other.qmp_path)
    pair.a.wait_state(pair.name, "recovering")
    wait_until(lambda: "restarted" in pair.a.status(pair.name)["reason"], 10,
               "the source says that the destination's memferryd knows nothing of the session")
    time.sleep(1.5)
    need(pair.a.state(pair.name) == "recovering", "the source gave its session up")
    need(pair.b.state(pair.name) == "waiting", "a VM that waits was disturbed by a stranger's session")
    need(pair.source.qmp.status() == "postmigrate", "the guest may not run at the source again")
    need(pair.destination.process.poll() is None, "the guest was lost")
    need(not pair.destination.console.wrong(), f"the guest read {pair.destination.console.wrong()}")
    need([name for name in open_files(pair.destination.pid) if "userfaultfd" in name],
         "nothing holds the guest's faults any more")


@e2e()
def destination_out_of_memory(sandbox):
    """The destination's tmpfs fills up while pages follow: the reason says so, and room is all it takes."""
    mount = os.path.join(sandbox.path, "small")
    os.mkdir(mount)
    run("mount", "-t", "tmpfs", "-o", "size=256m", "none", mount)
    pair = Pair(sandbox, mbit=SLOW_MBIT, used_mib=160, destination={"backends": (mount,)})
    verb = pair.begin(*POSTCOPY)
    pair.b.wait_state(pair.name, "postcopy")
    hog = os.path.join(mount, "hog")
    with open(hog, "wb", buffering=0) as file:
        try:
            while True:
                file.write(b"x" * 65536)
        except OSError:
            pass
    wait_until(lambda: "No space left" in pair.b.status(pair.name)["reason"], 20,
               "the destination says that its memory is full")
    need("free memory" in pair.b.status(pair.name)["reason"], "the reason should say what to do")
    os.unlink(hog)
    pair.check_done(pair.finish(verb).json)
    pair.check_arrived()
    pair.forget()


@e2e()
def forgotten_while_link_is_lost(sandbox):
    """The last word to the source is lost, and the destination forgets: the source hears of it later."""
    pair = Pair(sandbox, mbit=SLOW_MBIT, used_mib=32)
    relay = Relay(sandbox, pair.network.names["a"], (pair.b.address, 7466))
    verb = pair.begin(*POSTCOPY, to=relay.address)
    pair.b.wait_state(pair.name, "postcopy")
    relay.stalled_kinds = {wire.CONTROL}
    pair.b.wait_state(pair.name, ("drained", "done"))
    relay.stalled = True
    relay.cut()
    pair.b.wait_state(pair.name, "done")
    pair.b.expect(0, "forget", pair.name)
    relay.stalled_kinds = set()
    relay.stalled = False
    need(pair.finish(verb).json["state"] == "done", "the source should be done")
    pair.check_source_quit()
    pair.check_arrived()
    pair.forget()


@e2e()
def source_comes_back_to_the_finished(sandbox):
    """The source alone notices that the link was lost, when all memory is there: it hears so, and not of a failure."""
    pair = Pair(sandbox, mbit=SLOW_MBIT, used_mib=32)
    relay = Relay(sandbox, pair.network.names["a"], (pair.b.address, 7466))
    verb = pair.begin(*POSTCOPY, to=relay.address)
    pair.b.wait_state(pair.name, "postcopy")
    relay.stalled_kinds = {wire.CONTROL}
    pair.b.wait_state(pair.name, "drained")
    relay.cut_clients()
    relay.stalled_kinds = set()
    need(pair.finish(verb).json["state"] == "done", "the source should be done")
    pair.check_source_quit()
    pair.check_arrived()
    pair.forget()


def zombies_of(parent):
    """Children that nobody has reaped."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as stat:
                state, ppid = stat.read().rsplit(")", 1)[1].split()[:2]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if state == "Z" and int(ppid) == parent:
            found.append(int(pid))
    return found


@e2e()
def mover_killed_as_it_starts(sandbox):
    """Time and again, before memferryd has heard of its companion: each is reaped, and the last pair serves."""
    pair = Pair(sandbox)
    pair.receive()
    before = pair.b.wait_movers(1)
    for _ in range(10):
        os.kill(before[0], signal.SIGKILL)
        now = before
        while now == before or not now:
            now = pair.b.movers()
        before = now
    wait_until(lambda: not zombies_of(pair.b.process.pid), 5, "all children are reaped")
    pair.check_done(pair.finish(pair.begin_again()).json)
    pair.check_arrived()
    pair.forget()
