# SPDX-License-Identifier: LGPL-2.1-or-later
"""The modes of a migration, and everything that can happen while memory is copied in rounds."""
import os
import random
import re
import signal
import time

from common import POSTCOPY, Pair, need
from harness.net import Relay, enter_namespace
from harness.sandbox import HarnessError, Skip, children_of, run, wait_until
from harness.testing import e2e
from test_faults import AFTER_RELEASE, wait_replaced
from test_migrate import huge_pages, paused, whole_way

HYBRID = ("--mode", "hybrid")
PRECOPY = ("--mode", "precopy")
# A round of some 130 MiB takes some 3 s.
PACED = ("--bandwidth", "400M")
CRAWL = ("--bandwidth", "20M")


def mode_with(sandbox, mode, writer, *options, **more):
    """A guest that writes as fast as it can, an unlimited link, every page verified."""
    _, result = whole_way(sandbox, "--mode", mode, *options, mode=writer, rate=0, **more)
    need(result["mode"] == mode, f"the mode should be {mode}: {result}")
    need((result["rounds"] > 0) == (mode != "postcopy"), f"rounds of {mode}: {result}")
    if mode == "precopy":
        need(result["unconfirmed_at_release"] == 0, f"precopy confirms everything: {result}")
    return result


def _each_mode_and_writer():
    for mode in ("hybrid", "postcopy", "precopy"):
        for writer in ("hot", "random", "sequential", "zeroes"):
            def test(sandbox, mode=mode, writer=writer):
                # How long the guest may stand still is not what is tested: that it converges depends on the machine.
                mode_with(sandbox, mode, writer, *(("--max-blackout", "60000") if mode == "precopy" else ()))

            test.__name__ = f"{mode}_{writer}"
            test.__doc__ = f"Mode {mode}, a guest that writes all the time: {writer}."
            e2e()(test)


_each_mode_and_writer()


@e2e()
def congestion_control(sandbox):
    """All that the source sends is controlled as the configuration says: it is in the kernel's hands."""
    pair = Pair(sandbox)
    pair.a.stop()
    config = os.path.join(sandbox.path, "memferryd.conf")
    with open(config, "w", encoding="ascii") as file:
        file.write("[memferryd]\ncongestion-control = reno\n")
    pair.a.options = ["--config", config]
    pair.a.start()
    verb = pair.begin(*PACED)
    pair.a.wait_state(pair.name, "precopy")
    said = run(*enter_namespace(pair.a.namespace), "ss", "-tinH", "dport", "=", ":7466").stdout
    # A line for a connection, and an indented one that begins with its algorithm.
    details = [line.split() for line in said.splitlines() if line[:1].isspace()]
    need(len(details) >= 4 and all("reno" in words for words in details),
         f"control, urgent, device and bulk connections should use reno: {said}")
    pair.a.expect(0, "set", pair.name, "bandwidth=none")
    pair.check_done(pair.finish(verb).json)
    pair.check_arrived()


def bulk_nice(host):
    """The nice values of the bulk threads of a host's movers."""
    values = set()
    for pid in children_of(host.process.pid):
        for task in os.listdir(f"/proc/{pid}/task"):
            with open(f"/proc/{pid}/task/{task}/comm", encoding="ascii") as comm:
                if comm.read().startswith("bulk-"):
                    values.add(os.getpriority(os.PRIO_PROCESS, int(task)))
    return values


@e2e()
def bulk_steps_behind(sandbox):
    """The threads that copy go behind the guest while it does not wait for them, and only then."""
    pair = Pair(sandbox)
    verb = pair.begin(*CRAWL)
    for host in (pair.a, pair.b):
        host.wait_state(pair.name, "precopy")
        wait_until(lambda of=host: bulk_nice(of) == {5}, 10, f"{host.side}'s bulk threads are behind")
    pair.a.expect(0, "switch", pair.name)
    for host in (pair.a, pair.b):
        host.wait_state(pair.name, "postcopy")
        wait_until(lambda of=host: bulk_nice(of) == {0}, 10, f"{host.side}'s bulk threads are back")
    pair.a.expect(0, "set", pair.name, "bandwidth=none")
    pair.check_done(pair.finish(verb).json)
    pair.check_arrived()


@e2e()
def hybrid_idle(sandbox):
    """A guest that writes next to nothing: so little is left to send after RELEASE."""
    _, result = whole_way(sandbox, mode="idle")
    need(result["mode"] == "hybrid", f"hybrid is the default: {result}")
    need(result["postcopy_bytes"] * 20 < result["precopy_bytes"],
         f"an idle guest's memory should go before RELEASE: {result}")


@e2e()
def precopy_converges(sandbox):
    """A guest that writes little: all is confirmed before RELEASE."""
    _, result = whole_way(sandbox, *PRECOPY, rate=200)
    need(result["mode"] == "precopy" and result["unconfirmed_at_release"] == 0 and not result["reason"],
         f"should be precopy to the end: {result}")


def never_converging(sandbox):
    return Pair(sandbox, mode="hot", rate=0, used_mib=128)


STUBBORN = (*PRECOPY, "--bandwidth", "300M", "--max-blackout", "10")


@e2e()
def precopy_never_converges(sandbox):
    """It says so, with both rates, and goes on; `switch` then makes it hybrid."""
    pair = never_converging(sandbox)
    verb = pair.begin(*STUBBORN)
    both_rates = r"writes [1-9]\d* pages a second and the link carries [1-9]\d*"

    def says_so():
        now = pair.a.status(pair.name)
        need(not now or now["state"] in ("connecting", "precopy"), f"it should not have switched: {now}")
        return now and re.search(both_rates, now["reason"]) and now

    session = wait_until(says_so, 60, "it says that precopy does not converge, with both rates")
    need(session["state"] == "precopy" and session["mode"] == "precopy" and session["dirty_rate_pages_s"],
         f"it should go on: {session}")
    time.sleep(0.5)
    need(pair.a.state(pair.name) == "precopy", "it should go on until it is told otherwise")
    pair.a.expect(0, "switch", pair.name)
    result = pair.finish(verb).json
    pair.check_done(result)
    need(result["mode"] == "hybrid" and "hybrid" in result["reason"], f"it became hybrid: {result}")
    pair.check_arrived()
    pair.forget()


@e2e()
def precopy_falls_back(sandbox):
    """--fallback: by itself."""
    pair = never_converging(sandbox)
    result = pair.migrate(*STUBBORN, "--fallback")
    need(result["mode"] == "hybrid" and "hybrid" in result["reason"], f"it became hybrid: {result}")
    pair.check_arrived()
    pair.forget()


@e2e()
def hybrid_max_rounds(sandbox):
    pair = Pair(sandbox, rate=0)
    result = pair.migrate("--max-rounds", "1")
    need(result["rounds"] == 1 and result["mode"] == "hybrid", f"one round was allowed: {result}")
    need(result["dirty_pages_at_switch"] and result["unconfirmed_at_release"],
         f"what was written during the round follows: {result}")
    pair.check_arrived()
    pair.forget()


def wait_round(pair, number=1):
    """Until that round has begun and sends."""
    def sends():
        now = pair.a.status(pair.name)
        need(not now or now["state"] in ("connecting", "precopy"), f"it should be in round {number}: {now}")
        return now and now["state"] == "precopy" and now["rounds"] >= number and now["sent_bytes"] > 0
    wait_until(sends, 60, f"round {number} begins")
    time.sleep(0.2)
    need(pair.a.state(pair.name) == "precopy", "the rounds were over too soon")


def unlimit(pair):
    pair.a.expect(0, "set", pair.name, "bandwidth=none")


def limited(sandbox, *mode):
    """At 8 Mbit/s nothing gets far, but for what the guest waits for; lifted, it ends."""
    pair = Pair(sandbox, mode="idle")
    verb = pair.begin("--bandwidth", "8M", *mode)
    wait_until(lambda: (now := pair.a.status(pair.name)) and now["sent_bytes"], 20, "something is sent")
    time.sleep(1.5)
    session = pair.a.status(pair.name)
    need(session["state"] in ("precopy", *AFTER_RELEASE), f"it should still be sending: {session}")
    need(session["sent_bytes"] < 16 << 20, f"8 Mbit/s was the limit: {session}")
    refused = pair.a.memferry("set", pair.name, "bandwidth=purple")
    need(refused.code == 2, f"no rate: {refused}")
    refused = pair.b.memferry("set", pair.name, "bandwidth=1G")
    need(refused.code == 1 and refused.err.strip(), f"the destination sends nothing: {refused}")
    unlimit(pair)
    pair.check_done(pair.finish(verb).json)
    pair.check_arrived()
    pair.forget()


@e2e()
def bandwidth_hybrid(sandbox):
    limited(sandbox)


@e2e()
def bandwidth_postcopy(sandbox):
    limited(sandbox, *POSTCOPY)


@e2e()
def bandwidth_spares_urgent(sandbox):
    """At 8 Mbit/s the guest still reaches every page it wants, long before the sweep comes to it."""
    pair = Pair(sandbox)
    verb = pair.begin("--bandwidth", "8M", *POSTCOPY)
    pair.b.wait_state(pair.name, AFTER_RELEASE)
    pair.destination.verify(30)
    need(pair.a.state(pair.name) in AFTER_RELEASE, "the sweep was not held back")
    unlimit(pair)
    pair.check_done(pair.finish(verb).json)
    pair.check_arrived()
    pair.forget()


@e2e()
def switch_in_first_round(sandbox):
    """`memferry switch` does not wait for the round's end."""
    pair = Pair(sandbox, rate=0)
    verb = pair.begin(*CRAWL)
    wait_round(pair)
    pair.a.expect(0, "switch", pair.name)
    pair.a.wait_state(pair.name, AFTER_RELEASE, 20)
    pair.a.expect(0, "switch", pair.name)
    unlimit(pair)
    result = pair.finish(verb).json
    pair.check_done(result)
    need(result["mode"] == "hybrid" and result["rounds"] == 1, f"it was switched in its first round: {result}")
    pair.check_arrived()
    refused = pair.a.memferry("switch", pair.name)
    need(refused.code == 1 and refused.err.strip(), f"switch after the end is refused: {refused}")
    pair.forget()


@e2e()
def switch_after(sandbox):
    pair = Pair(sandbox, rate=0)
    verb = pair.begin(*CRAWL, "--switch-after", "1")
    pair.a.wait_state(pair.name, AFTER_RELEASE, 20)
    unlimit(pair)
    result = pair.finish(verb).json
    pair.check_done(result)
    need(result["rounds"] == 1, f"the time was up in the first round: {result}")
    pair.check_arrived()
    pair.forget()


@e2e(limit_s=180)
def switch_at_random(sandbox):
    """`memferry switch` whenever, four times in a row under one name."""
    pair = Pair(sandbox, mode="zeroes", rate=0)
    for delay_s in random_delays(4):
        verb = pair.begin("--bandwidth", "800M")
        time.sleep(delay_s)
        pair.a.memferry("switch", pair.name)
        pair.check_done(pair.finish(verb).json)
        pair.check_source_quit()
        pair.check_arrived()
        pair.forget()
        pair.turn()


def random_delays(count, most_s=2.5):
    seed = time.time_ns()
    print(f"seed {seed}")
    source = random.Random(seed)
    return [source.uniform(0, most_s) for _ in range(count)]


@e2e(limit_s=180)
def cancel_at_random(sandbox):
    """`memferry cancel` whenever: the guest is at one place, whole, and the next attempt works."""
    pair = Pair(sandbox, mode="zeroes", rate=0)
    for delay_s in random_delays(5):
        verb = pair.begin("--bandwidth", "800M")
        time.sleep(delay_s)
        pair.a.memferry("cancel", pair.name)
        answer = pair_over(pair, verb)
        need(answer.code == 0 or answer.json["state"] == "cancelled", f"should be cancelled: {answer}")
    pair.migrate()
    pair.check_arrived()
    pair.forget()


def stayed(pair):
    """The guest is at the source, whole, nothing of the attempt is left; another destination awaits it."""
    pair.check_stayed()
    session = wait_until(lambda: (now := pair.b.status(pair.name)) and now["state"] in
                         ("failed", "cancelled", "waiting") and now, 20,
                         "the destination's session ends or waits again")
    if session["state"] == "waiting":
        pair.b.expect(0, "cancel", pair.name)
    pair.forget()
    pair.fresh_destination()


def failed(pair, verb):
    """The attempt failed and said why; the guest is as before, and the next attempt succeeds."""
    answer = verb.wait(60)
    need(answer.code == 1 and answer.json["state"] == "failed" and answer.json["reason"],
         f"migrate should fail and say why: {answer}")
    need(pair.source.qmp.status() == "running", f"the guest should run at the source: {answer}")
    stayed(pair)
    pair.migrate()
    pair.check_source_quit()
    pair.check_arrived()
    pair.forget()


def kill_mover_in_round(sandbox, side, number):
    pair = Pair(sandbox, rate=0)
    # Hybrid sees after one round that a guest like this dirties as fast as is copied, and switches.
    verb = pair.begin(*PACED, *(("--mode", "precopy") if number > 1 else ()))
    wait_round(pair, number)
    (pair.a if side == "source" else pair.b).kill_mover()
    failed(pair, verb)


def _each_side_and_round():
    for side in ("source", "destination"):
        for number in (1, 2):
            def test(sandbox, side=side, number=number):
                kill_mover_in_round(sandbox, side, number)

            test.__name__ = f"kill_{side}_mover_round_{number}"
            test.__doc__ = f"kill -9 of the {side}'s mover in round {number}."
            e2e()(test)


_each_side_and_round()


@e2e()
def kill_source_qemu_in_round(sandbox):
    """The guest is lost with its QEMU; the destination must not run half of it."""
    pair = Pair(sandbox)
    verb = pair.begin(*PACED)
    wait_round(pair)
    pair.source.kill()
    answer = verb.wait(60)
    need(answer.code == 1 and answer.json["state"] == "failed" and answer.json["reason"],
         f"migrate should fail and say why: {answer}")
    wait_until(lambda: pair.b.state(pair.name) in ("failed", "cancelled", "waiting"), 20,
               "the destination's session ends or waits again")
    if pair.b.state(pair.name) == "waiting":
        pair.b.expect(0, "cancel", pair.name)
    need(not pair.destination.console.beats, "the destination ran a guest that was never released")
    pair.forget()


@e2e()
def kill_destination_qemu_in_round(sandbox):
    pair = Pair(sandbox, rate=0)
    verb = pair.begin(*PACED)
    wait_round(pair)
    pair.destination.kill()
    failed(pair, verb)


def relay_to(pair):
    return Relay(pair.sandbox, pair.a.namespace, (pair.b.address, 7466))


@e2e()
def link_cut_in_round(sandbox):
    pair = Pair(sandbox, rate=0)
    relay = relay_to(pair)
    verb = pair.begin(*PACED, to=relay.address)
    wait_round(pair)
    relay.cut()
    failed(pair, verb)


@e2e()
def drive_plugged_in_round(sandbox):
    """A drive past the page cache that comes while memory is copied: what it read was not seen as written."""
    pair = Pair(sandbox, rate=0)
    path = os.path.join(sandbox.path, "drive")
    with open(path, "wb") as drive:
        drive.truncate(1 << 20)
    verb = pair.begin(*PACED)
    wait_round(pair)
    try:
        pair.source.qmp("blockdev-add", **{"driver": "file", "node-name": "late", "filename": path,
                                           "cache": {"direct": True}})
    except HarnessError as error:
        raise Skip(f"the file system of {sandbox.path} has no O_DIRECT: {error}") from error
    answer = verb.wait(60)
    need(answer.code == 1 and "late" in answer.json["reason"] and "cache.direct" in answer.json["reason"],
         f"it should fail and name the drive: {answer}")
    need(pair.source.qmp.status() == "running", f"the guest should run at the source: {answer}")
    stayed(pair)
    result = pair.migrate()
    need(result["mode"] == "postcopy", f"the next attempt should go by postcopy: {result}")
    pair.check_arrived()
    pair.forget()


def cancel_in(sandbox, number, mode):
    """
    Cancelled in a round. The source's QEMU is left without userfaultfd and write protection (forget() looks),
    and the next attempt works.
    """
    pair = Pair(sandbox, rate=0)
    verb = pair.begin("--mode", mode, *PACED)
    wait_round(pair, number)
    pair.a.expect(0, "cancel", pair.name)
    answer = verb.wait(30)
    need(answer.code == 1 and answer.json["state"] == "cancelled", f"should be cancelled: {answer}")
    stayed(pair)
    pair.migrate()
    pair.check_arrived()
    pair.forget()


@e2e()
def cancel_round_1(sandbox):
    cancel_in(sandbox, 1, "hybrid")


@e2e()
def cancel_round_2(sandbox):
    cancel_in(sandbox, 2, "precopy")


def switch_and_hold(pair, writer="random"):
    """
    Switch, and stay after RELEASE: the limit holds the sweep back; a guest that works hard would ask for all
    of its memory itself, so it does not any more.
    """
    pair.source.console.ask(f"mode {writer} 50", "MODE", 10)
    pair.a.expect(0, "set", pair.name, "bandwidth=10M")
    pair.a.expect(0, "switch", pair.name)
    for host in (pair.a, pair.b):
        host.wait_state(pair.name, AFTER_RELEASE)


class Postcopy:
    """A hybrid migration held after RELEASE, with much of the memory written since it was copied."""

    def __init__(self, sandbox, relay=False, **options):
        self.pair = pair = Pair(sandbox, rate=0, **options)
        self.relay = relay_to(pair) if relay else None
        self.verb = pair.begin("--max-rounds", "1", *PACED, to=relay and self.relay.address or None)
        wait_round(pair)
        switch_and_hold(pair)

    def check_held(self):
        need(self.pair.a.state(self.pair.name) in AFTER_RELEASE, "the session was over too soon to be hurt")

    def finish(self):
        pair = self.pair
        unlimit(pair)
        result = pair.finish(self.verb).json
        pair.check_done(result)
        need(result["mode"] == "hybrid", f"it was hybrid: {result}")
        pair.check_arrived()
        pair.forget()
        return result


def kill_movers_after(sandbox, sides, times=1, **options):
    held = Postcopy(sandbox, **options)
    for _ in range(times):
        time.sleep(0.3)
        for host in (held.pair.a, held.pair.b):
            if host.side in sides:
                held.check_held()
                wait_replaced(host, host.kill_mover())
    held.finish()


@e2e()
def hybrid_kill_source_mover(sandbox):
    """After RELEASE: what was copied and not written since is still known."""
    kill_movers_after(sandbox, "a")


@e2e()
def hybrid_kill_destination_mover(sandbox):
    kill_movers_after(sandbox, "b")


@e2e()
def hybrid_kill_both_movers(sandbox):
    kill_movers_after(sandbox, "ab", times=2, mode="zeroes")


@e2e()
def hybrid_link_cut(sandbox):
    """The relay cuts every connection, three times, after RELEASE."""
    held = Postcopy(sandbox, relay=True, mode="zeroes")
    for _ in range(3):
        time.sleep(0.3)
        held.check_held()
        held.relay.cut()
    held.finish()


@e2e(limit_s=240)
def hybrid_hurt_at_random(sandbox):
    """
    Movers killed and links cut at random moments of a hybrid migration, whatever round or phase that hits:
    the guest is at one place, whole, and nothing is left of an attempt that failed.
    """
    pair = Pair(sandbox, mode="zeroes", rate=0, used_mib=64)
    for turn, delay_s in enumerate(random_delays(6, 4)):
        relay = relay_to(pair)
        verb = pair.begin("--bandwidth", "600M", to=relay.address)
        time.sleep(delay_s)
        if turn % 3 == 2:
            relay.cut()
        else:
            for pid in (pair.b if turn % 3 else pair.a).movers():
                os.kill(pid, signal.SIGKILL)
        answer = pair_over(pair, verb)
        relay.close()
        session = answer.json
        print(f"after {delay_s:.2f} s: {session['state']}, rounds {session['rounds']}; {session['reason']}")
        need("cannot connect" not in session["reason"], f"it failed before it was hurt: {session}")


def pair_over(pair, verb):
    """The migration ended, well or not: the guest is whole at the source of the next one."""
    answer = verb.wait(60)
    pair.end_s = time.monotonic()
    if answer.code == 0:
        pair.check_done(answer.json)
        pair.check_arrived()
        pair.forget()
        pair.turn()
    else:
        need(answer.code == 1 and answer.json["state"] in ("failed", "cancelled") and answer.json["reason"],
             f"before RELEASE it fails and says why: {answer}")
        stayed(pair)
    return answer


@e2e()
def hybrid_kill_source_qemu(sandbox):
    """Right after RELEASE: nothing is lost, its RAM is a file."""
    held = Postcopy(sandbox)
    held.pair.source.kill()
    time.sleep(0.3)
    held.check_held()
    held.finish()


@e2e()
def hybrid_slow_stream(sandbox):
    """
    A relay holds one bulk connection: neither the next round nor the switch comes before it has landed
    (the order of a page's copies, I7).
    """
    pair = Pair(sandbox, mode="zeroes", rate=0)
    relay = relay_to(pair)
    verb = pair.begin("--bandwidth", "800M", "--streams", "3", to=relay.address)
    wait_round(pair)
    relay.stalled_streams = {1}
    unlimit(pair)
    time.sleep(2)
    before = pair.a.status(pair.name)
    pair.a.expect(0, "switch", pair.name)
    time.sleep(1)
    session = pair.a.status(pair.name)
    need(session["state"] == "precopy" and session["rounds"] == before["rounds"],
         f"a round has not landed, and yet: {session}; before: {before}")
    relay.stalled_streams = set()
    pair.check_done(pair.finish(verb).json)
    pair.check_arrived()
    pair.forget()


@e2e()
def hybrid_uneven_streams(sandbox):
    """A relay holds one bulk connection or another all the time, for a moment each."""
    pair = Pair(sandbox, mode="zeroes", rate=0)
    relay = relay_to(pair)
    verb = pair.begin("--bandwidth", "1G", "--streams", "3", to=relay.address)
    turn = 0
    while verb.process.poll() is None:
        relay.stalled_streams = {turn % 3}
        turn += 1
        time.sleep(0.15)
    pair.check_done(pair.finish(verb).json)
    pair.check_arrived()
    pair.forget()


@e2e()
def hybrid_hugetlbfs(sandbox):
    """Pages of 2 MiB, written all the time."""
    for_mode = mode_with(sandbox, "hybrid", "random", backends=(huge_pages(sandbox, 256),), ram_mib=256)
    need(for_mode["precopy_bytes"], f"nothing was copied before RELEASE: {for_mode}")


@e2e()
def precopy_hugetlbfs(sandbox):
    mode_with(sandbox, "precopy", "sequential", "--max-blackout", "60000",
              backends=(huge_pages(sandbox, 256),), ram_mib=256)


@e2e()
def hybrid_two_backends_sandboxed(sandbox):
    mode_with(sandbox, "hybrid", "sequential", ram_mib=160, backends=("tmpfs", "tmpfs"), used_mib=200,
              sandboxed=True)


@e2e()
def hybrid_kvm(sandbox):
    """KVM's own writes are seen too."""
    mode_with(sandbox, "hybrid", "random", guest="bare", accel="kvm", ram_mib=64, used_mib=8)


@e2e()
def hybrid_kvm_zeroes(sandbox):
    mode_with(sandbox, "hybrid", "zeroes", guest="bare", accel="kvm", ram_mib=64, used_mib=8)


@e2e()
def precopy_kvm(sandbox):
    mode_with(sandbox, "precopy", "hot", "--max-blackout", "60000", guest="bare", accel="kvm", ram_mib=64,
              used_mib=8)


@e2e()
def postcopy_kvm(sandbox):
    mode_with(sandbox, "postcopy", "random", guest="bare", accel="kvm", ram_mib=64, used_mib=8)


@e2e()
def precopy_paused(sandbox):
    """Byte for byte."""
    paused(sandbox, *PRECOPY)


@e2e()
def postcopy_paused(sandbox):
    paused(sandbox, *POSTCOPY)


@e2e(limit_s=150)
def hybrid_balloon(sandbox):
    """A balloon that fills and empties in every phase, while the guest gives pages back and takes others."""
    pair = Pair(sandbox, mode="zeroes", rate=0, balloon=True)
    pair.source.inflate(190)
    # Hybrid would switch after one round, since so much gets dirty; so will this when it is told.
    verb = pair.begin("--bandwidth", "200M", "--mode", "precopy")
    wait_round(pair)
    pair.source.inflate(256)
    pair.source.inflate(180)
    wait_round(pair, 2)
    pair.source.inflate(230)
    pair.source.inflate(200)
    switch_and_hold(pair, "zeroes")
    for left_mib in (180, 256, 190):
        pair.destination.inflate(left_mib)
    need(pair.a.state(pair.name) in AFTER_RELEASE, "it was over too soon")
    unlimit(pair)
    pair.check_done(pair.finish(verb).json)
    pair.check_arrived()
    pair.forget()
    pair.destination.inflate(256)
    pair.destination.console.wait_beats(100, 30)
    pair.destination.verify()
