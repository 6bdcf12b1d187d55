# SPDX-License-Identifier: LGPL-2.1-or-later
"""Killed, cancelled and cut off: the guest lives where it should, and nothing is left behind."""
import os
import signal
import threading
import time

from common import POSTCOPY, SLOW_MBIT, Pair, need
from harness import wire
from harness.net import Relay
from harness.sandbox import HarnessError, wait_until
from harness.testing import e2e

AFTER_RELEASE = ("postcopy", "drained", "recovering")


def settle(pair, verb):
    """
    Wait for migrate to end after a fault before RELEASE: either it failed and the guest is at the source,
    or it was made good and the guest is at the destination. Both must be true to what is said.
    """
    answer = verb.wait(60)
    pair.end_s = time.monotonic()
    if answer.code == 0:
        pair.check_done(answer.json)
        pair.check_arrived()
    else:
        need(answer.code == 1, f"before RELEASE migrate fails with 1: {answer}")
        need(answer.json["state"] in ("failed", "cancelled") and answer.json["reason"],
             f"a failed session says why: {answer}")
        need(pair.source.qmp.status() == "running", f"the guest should run at the source: {answer}")
        pair.check_stayed()
        destination_over(pair)
    return answer


def destination_over(pair):
    """
    The destination's session ended with the source's; or it waits again, if its QEMU was not touched yet:
    then it is as good as before.
    """
    session = wait_until(lambda: (now := pair.b.status(pair.name)) and now["state"] in
                         ("failed", "cancelled", "waiting") and now, 20,
                         "the destination's session ends or waits again")
    if session["state"] != "waiting":
        need(session["reason"], f"the destination's session says why it ended: {session}")
        return
    pair.a.expect(0, "forget", pair.name)
    pair.begin_s = time.monotonic()
    pair.check_done(pair.finish(pair.begin_again()).json)
    pair.check_arrived()


def hold_connecting(pair, sandbox):
    """A relay that passes nothing on: the session stays in connecting. Returns (verb, release)."""
    relay = Relay(sandbox, pair.network.names["a"], (pair.b.address, 7466))
    relay.stalled = True
    verb = pair.begin(to=relay.address)
    pair.a.wait_state(pair.name, "connecting")

    def release():
        relay.stalled = False

    return verb, release


def hold_switchover(pair, sandbox):
    """A relay that holds the device state back: the session stays before RELEASE, its guest paused."""
    relay = Relay(sandbox, pair.network.names["a"], (pair.b.address, 7466))
    relay.stalled_kinds = {wire.DEVICE}
    verb = pair.begin(to=relay.address)
    pair.a.wait_state(pair.name, "switchover")
    # The destination calls it so once the device state is loaded.
    pair.b.wait_state(pair.name, ("precopy", "switchover"))
    time.sleep(0.2)
    return verb, relay.stalled_kinds.clear


def kill_before_release(sandbox, side, hold):
    pair = Pair(sandbox)
    verb, release = hold(pair, sandbox)
    host = pair.a if side == "source" else pair.b
    try:
        host.kill_mover()
    except HarnessError:
        # In this phase this side has not started its mover yet; then there is nothing to kill.
        need(not host.movers(), "the mover could not be killed")
    time.sleep(0.3)
    release()
    settle(pair, verb)
    pair.forget()


@e2e()
def kill_source_mover_connecting(sandbox):
    kill_before_release(sandbox, "source", hold_connecting)


@e2e()
def kill_source_mover_switchover(sandbox):
    kill_before_release(sandbox, "source", hold_switchover)


@e2e()
def kill_destination_mover_switchover(sandbox):
    kill_before_release(sandbox, "destination", hold_switchover)


@e2e()
def kill_destination_mover_waiting(sandbox):
    """Nobody has connected yet: the VM stays armed, or says that it does not."""
    pair = Pair(sandbox)
    pair.receive()
    if pair.b.movers():
        pair.b.kill_mover()
        time.sleep(1.2)
    need(pair.b.state(pair.name) == "waiting", "the destination should still wait")
    settle(pair, pair.begin_again())
    pair.forget()


def wait_replaced(host, old):
    """The promise is a second; twice that is allowed on a busy machine."""
    wait_until(lambda: set(host.movers()) - {old}, 2, f"host {host.side}'s killed mover is replaced")


def kill_in_postcopy(sandbox, sides, times=1):
    pair = Pair(sandbox, mbit=SLOW_MBIT, used_mib=160)
    verb = pair.begin(*POSTCOPY)
    for host in (pair.a, pair.b):
        host.wait_state(pair.name, AFTER_RELEASE)
    for _ in range(times):
        time.sleep(0.4)
        for host in (pair.a, pair.b):
            if host.side in sides:
                need(host.state(pair.name) in AFTER_RELEASE, "the session was over too soon to be hurt")
                wait_replaced(host, host.kill_mover())
    result = pair.finish(verb).json
    pair.check_done(result)
    restarts = pair.a.status(pair.name)["mover_restarts"] + pair.b.status(pair.name)["mover_restarts"]
    need(restarts >= times * len(sides), f"{times * len(sides)} movers were killed, {restarts} restarts")
    pair.check_source_quit()
    pair.check_arrived()
    pair.forget()


@e2e()
def kill_source_mover_postcopy(sandbox):
    kill_in_postcopy(sandbox, "a")


@e2e()
def kill_destination_mover_postcopy(sandbox):
    kill_in_postcopy(sandbox, "b")


@e2e()
def kill_both_movers_postcopy(sandbox):
    kill_in_postcopy(sandbox, "ab")


@e2e(limit_s=120)
def kill_movers_repeatedly(sandbox):
    kill_in_postcopy(sandbox, "ab", times=3)


@e2e(limit_s=240)
def kill_mover_at_random(sandbox):
    """kill -9 of either mover at moments spread over a fast session, whatever phase that hits."""
    for turn in range(8):
        pair = _random_kill_once(sandbox, turn)
        for vm in (pair.source, pair.destination):
            vm.kill()
            for path in vm.ram_files:
                os.unlink(path)
        pair.a.stop()
        pair.b.stop()
        pair.network.remove()


def _random_kill_once(sandbox, turn):
    pair = Pair(sandbox, ram_mib=128, used_mib=64)
    host = pair.a if turn % 2 else pair.b
    verb = pair.begin()
    deadline = time.monotonic() + 10
    while not host.movers() and time.monotonic() < deadline and verb.process.poll() is None:
        time.sleep(0.001)
    time.sleep(turn * 0.02)
    for pid in host.movers():
        os.kill(pid, signal.SIGKILL)
    settle(pair, verb)
    pair.forget()
    return pair


@e2e()
def kill_source_qemu_before_release(sandbox):
    """The guest is lost with its QEMU, but the destination must not run half of it."""
    pair = Pair(sandbox)
    verb, release = hold_switchover(pair, sandbox)
    pair.source.kill()
    time.sleep(0.3)
    release()
    answer = verb.wait(60)
    need(answer.code == 1 and answer.json["state"] == "failed" and answer.json["reason"],
         f"migrate should fail and say why: {answer}")
    need("QEMU" in answer.json["reason"] or pair.name in answer.json["reason"],
         f"the reason should name what ended: {answer.json['reason']}")
    destination_over(pair)
    need(not pair.destination.console.beats, "the destination ran a guest that was never released")
    pair.forget()


@e2e()
def kill_destination_qemu_before_release(sandbox):
    pair = Pair(sandbox)
    verb, _ = hold_switchover(pair, sandbox)
    pair.destination.kill()
    answer = verb.wait(60)
    need(answer.code == 1 and answer.json["state"] == "failed" and answer.json["reason"],
         f"migrate should fail and say why: {answer}")
    need(pair.source.qmp.status() == "running", "the guest should run at the source")
    pair.check_stayed()
    pair.forget()


def cancel_before_release(sandbox, hold):
    pair = Pair(sandbox)
    verb, release = hold(pair, sandbox)
    canceller = pair.a.begin("cancel", pair.name)
    time.sleep(0.5)
    release()
    answer = canceller.wait(30)
    need(answer.code == 0, f"cancel before RELEASE should succeed: {answer}")
    answer = verb.wait(30)
    need(answer.code == 1 and answer.json["state"] == "cancelled", f"migrate should say so: {answer}")
    need(pair.source.qmp.status() == "running", "the guest should run at the source")
    pair.check_stayed()
    destination_over(pair)
    pair.forget()


@e2e()
def cancel_connecting(sandbox):
    cancel_before_release(sandbox, hold_connecting)


@e2e()
def cancel_switchover(sandbox):
    cancel_before_release(sandbox, hold_switchover)


@e2e()
def cancel_waiting(sandbox):
    """A destination that nobody came to; its QEMU stays usable for the next try."""
    pair = Pair(sandbox)
    pair.receive()
    pair.b.expect(0, "cancel", pair.name)
    need(pair.b.state(pair.name) == "cancelled", "should be cancelled")
    pair.forget()
    pair.migrate()
    pair.check_arrived()
    pair.forget()


@e2e()
def cancel_interrupted(sandbox):
    """Ctrl-C on migrate before RELEASE cancels."""
    pair = Pair(sandbox)
    verb, release = hold_switchover(pair, sandbox)
    verb.interrupt()
    time.sleep(0.5)
    release()
    answer = verb.wait(30)
    need(answer.code == 1, f"Ctrl-C before RELEASE cancels, exit 1: {answer}")
    need("cancel" in (answer.err + answer.out).lower(), f"it should say that it cancels: {answer}")
    pair.check_stayed()
    pair.forget()


@e2e()
def stall_returns_guest(sandbox):
    """A device stream that goes nowhere: the guest is not kept paused for it."""
    pair = Pair(sandbox)
    verb, _ = hold_switchover(pair, sandbox)
    answer = verb.wait(30)
    need(answer.code == 1 and "within" in answer.json["reason"], f"it should give up and say so: {answer}")
    pair.check_stayed()
    pair.forget()


@e2e()
def cancel_then_migrate(sandbox):
    """After a cancelled attempt the same guest migrates, to a fresh QEMU."""
    pair = Pair(sandbox)
    verb, release = hold_switchover(pair, sandbox)
    canceller = pair.a.begin("cancel", pair.name)
    time.sleep(0.5)
    release()
    need(canceller.wait(30).code == 0, "cancel before RELEASE should succeed")
    verb.wait(30)
    pair.check_stayed()
    pair.forget()
    pair.fresh_destination()
    pair.migrate()
    pair.check_arrived()
    pair.forget()


@e2e()
def cancel_refused_in_postcopy(sandbox):
    pair = Pair(sandbox, mbit=SLOW_MBIT)
    verb = pair.begin(*POSTCOPY)
    for host in (pair.a, pair.b):
        host.wait_state(pair.name, AFTER_RELEASE)
        answer = host.expect(4, "cancel", pair.name)
        need(len(answer.err.split()) > 5, f"a refused cancel gives the reason: {answer}")
    pair.check_done(pair.finish(verb).json)
    answer = pair.a.memferry("cancel", pair.name)
    need(answer.code and answer.err.strip(), f"cancel after the end should be refused: {answer}")
    pair.check_arrived()
    pair.forget()


def garbage(name):
    """Bytes that no peer sends, each to be thrown out with no effect on anything else."""
    good = wire.preamble(name, kind=wire.CONTROL, session=os.urandom(16))
    return {
        "nothing": b"",
        "one byte": b"M",
        "HTTP": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" + b" " * 200,
        "random": os.urandom(4096),
        "zeros": bytes(4096),
        "half a preamble": good[:50],
        "wrong kind": wire.preamble(name, kind=9),
        "wrong stream": wire.preamble(name, kind=wire.BULK, stream=500, streams=2),
        "unknown name": wire.preamble("nobody"),
        "unterminated name": wire.preamble("x" * 64),
        "name with a slash": wire.preamble("../../etc"),
        "future version": wire.preamble(name, version=99, oldest=98),
        "stranger's bulk": wire.preamble(name, kind=wire.BULK, session=os.urandom(16)) +
                           wire.frame(wire.DATA, length=4096) + os.urandom(4096),
        "long message": good + b"\xff\xff\xff\xff" + os.urandom(1024),
        "no protobuf": good + b"\x40\x00\x00\x00" + os.urandom(64),
        "huge frame": wire.preamble(name, kind=wire.URGENT, session=os.urandom(16)) +
                      wire.frame(wire.DATA, region=65535, first_page=1 << 63, pages=1 << 63,
                                 length=1 << 63),
    }


def throw(pair, data):
    """Send bytes to b's port, hang up at our end, and see it closed at the other."""
    end = wire.connect(pair.a, pair.b, seconds=15)
    try:
        end.sendall(data)
        end.shutdown(2 if len(data) % 2 else 1)
    except OSError:
        pass
    if len(data) % 2 == 0:
        wire.read_all(end)
    end.close()


@e2e()
def garbage_before_session(sandbox):
    """Garbage on the listening port with nothing waiting, and with a VM waiting: both as good as none."""
    pair = Pair(sandbox)
    for data in garbage(pair.name).values():
        throw(pair, data)
    pair.receive()
    stranger = {key: data for key, data in garbage(pair.name).items()
                if key not in ("long message", "no protobuf")}
    for what, data in stranger.items():
        throw(pair, data)
        pair.b.check_alive()
        need(pair.b.state(pair.name) == "waiting", f"{what} changed the state of a VM that waits")
    pair.check_done(pair.finish(pair.begin_again()).json)
    pair.check_arrived()
    pair.forget()


@e2e()
def garbage_claims_session(sandbox):
    """A stranger claims the waiting VM by its name and then talks nonsense: a later source still gets it,
    or is told clearly why not."""
    pair = Pair(sandbox)
    pair.receive()
    for what in ("long message", "no protobuf"):
        throw(pair, garbage(pair.name)[what])
        pair.b.check_alive()
    time.sleep(0.5)
    if pair.b.state(pair.name) != "waiting":
        need(pair.b.status(pair.name)["reason"], "a session ended by nonsense says why")
        pair.b.expect(0, "forget", pair.name)
        pair.fresh_destination()
        pair.receive()
    pair.check_done(pair.finish(pair.begin_again()).json)
    pair.check_arrived()
    pair.forget()


@e2e()
def garbage_during_session(sandbox):
    """Strangers keep sending garbage while pages move."""
    pair = Pair(sandbox, mbit=SLOW_MBIT)
    verb = pair.begin(*POSTCOPY)
    pair.a.wait_state(pair.name, AFTER_RELEASE)
    senders = [threading.Thread(target=throw, args=(pair, data))
               for data in garbage(pair.name).values()]
    for sender in senders:
        sender.start()
    pair.check_done(pair.finish(verb).json)
    for sender in senders:
        sender.join(20)
    pair.check_source_quit()
    pair.check_arrived()
    pair.forget()


@e2e()
def garbage_many_connections(sandbox):
    """Two hundred silent connections don't keep the right one out."""
    pair = Pair(sandbox)
    idle = [wire.connect(pair.a, pair.b) for _ in range(200)]
    pair.migrate()
    pair.check_arrived()
    for end in idle:
        end.close()
    pair.forget()


def corrupted(sandbox, connection, offset):
    """One bit of one connection flips. Headers are checked; payload is not ours to check on a LAN without
    TLS, so the offset is chosen to hit a header."""
    pair = Pair(sandbox, mbit=SLOW_MBIT)
    relay = Relay(sandbox, pair.network.names["a"], (pair.b.address, 7466))
    relay.corrupt_after[connection] = offset
    settle(pair, pair.begin(to=relay.address))
    pair.forget()


@e2e()
def corrupt_preamble_magic(sandbox):
    corrupted(sandbox, 0, 3)


@e2e()
def corrupt_session_id(sandbox):
    corrupted(sandbox, 1, 20)


@e2e()
def corrupt_control_length(sandbox):
    corrupted(sandbox, 0, wire.PREAMBLE.size + 3)


@e2e()
def relay_delay(sandbox):
    """Every byte 10 ms late, both ways."""
    pair = Pair(sandbox)
    relay = Relay(sandbox, pair.network.names["a"], (pair.b.address, 7466))
    relay.delay_s = 0.01
    pair.check_done(pair.finish(pair.begin(to=relay.address)).json)
    pair.check_arrived()
    pair.forget()


@e2e()
def relay_stall_in_postcopy(sandbox):
    """A stall of two seconds after RELEASE, then it goes on."""
    pair = Pair(sandbox, mbit=SLOW_MBIT)
    relay = Relay(sandbox, pair.network.names["a"], (pair.b.address, 7466))
    verb = pair.begin(*POSTCOPY, to=relay.address)
    pair.a.wait_state(pair.name, AFTER_RELEASE)
    relay.stalled = True
    time.sleep(2)
    relay.stalled = False
    pair.check_done(pair.finish(verb).json)
    pair.check_arrived()
    pair.forget()
