# SPDX-License-Identifier: LGPL-2.1-or-later
"""Refusals before anything is touched, each with the cause and the remedy; the command line's promises."""
import json
import os
import re
import socket
import threading

from common import Pair, need
from harness import wire
from harness.artifacts import qemu_of_release
from harness.host import Host, LeakCheck
from harness.net import Network
from harness.sandbox import Skip, run, wait_until
from harness.testing import e2e
from harness.vm import Vm

# VMs that need not boot: preflight looks at QEMU, not at its guest.
UNBOOTED = {"used_mib": 0, "guest": "bare", "ram_mib": 64}


def check_refusal(answer, pattern):
    """Exit 1 and a sentence that says what the pattern wants; `migrate` adds where the guest is."""
    need(answer.code == 1, f"should be refused with exit 1: {answer}")
    said = [line for line in answer.err.splitlines() if line.startswith("memferry: ")]
    need(said and len(said) <= 2, f"a refusal is one sentence: {answer}")
    need(len(said) == 1 or "safe" in said[1], f"the second sentence says where the guest is: {answer}")
    need(re.search(pattern, said[0], re.I), f"the refusal should match {pattern!r}: {said[0]!r}")


def refused_receive(pair, pattern):
    status = pair.destination.qmp.status()
    check_refusal(pair.b.memferry("receive", pair.name, "--qmp", pair.destination.qmp_path), pattern)
    need(pair.destination.qmp.status() == status, "a refused QEMU changed its state")
    pair.forget()


def refused_migrate(pair, pattern, to=None):
    """The source (or, through it, the destination) refuses; the guest goes on as it was."""
    status = pair.source.qmp.status()
    answer = pair.a.memferry("migrate", pair.name, "--qmp", pair.source.qmp_path, "--to",
                             to or pair.b.address)
    check_refusal(answer, pattern)
    need(pair.source.qmp.status() == status, "a refused migration changed the source's state")
    for host in (pair.a, pair.b):
        if host.process:
            wait_until(lambda h=host: h.state(pair.name) in ("failed", "cancelled", "waiting", None), 10,
                       f"host {host.side}'s session ends")
            if host.state(pair.name) == "waiting":
                host.expect(0, "cancel", pair.name)
    pair.forget()


@e2e()
def refuse_private_source(sandbox):
    pair = Pair(sandbox, **UNBOOTED, backends=("tmpfs-private",), destination={"backends": ("tmpfs",)})
    pair.receive()
    refused_migrate(pair, r"share=on")


@e2e()
def refuse_private_destination(sandbox):
    refused_receive(Pair(sandbox, **UNBOOTED, destination={"backends": ("tmpfs-private",)}), r"share=on")


@e2e()
def refuse_ordinary_memory(sandbox):
    """Guest RAM that no backend was given for."""
    pair = Pair(sandbox, **UNBOOTED, destination={"backends": ()})
    refused_receive(pair, r"memory-backend-file")


@e2e()
def refuse_sizes_differ(sandbox):
    pair = Pair(sandbox, **UNBOOTED, destination={"ram_mib": 128})
    pair.receive()
    refused_migrate(pair, r"ram0.*(64|128) ?MiB|size")


@e2e()
def refuse_names_differ(sandbox):
    pair = Pair(sandbox, **UNBOOTED, destination={"ram_id": "other"})
    pair.receive()
    refused_migrate(pair, r"ram0|other0")


@e2e()
def refuse_counts_differ(sandbox):
    pair = Pair(sandbox, **UNBOOTED, destination={"backends": ("tmpfs", "tmpfs"), "ram_mib": 32})
    pair.receive()
    refused_migrate(pair, r"ram1|backend|region|memory")


@e2e()
def refuse_receive_by_running(sandbox):
    """A QEMU that runs a guest is not one that waits for it."""
    refused_receive(Pair(sandbox, **UNBOOTED, destination={"incoming": False}), r"-incoming defer")


@e2e()
def refuse_migrate_of_waiting(sandbox):
    """A QEMU that waits for a guest has none to give."""
    pair = Pair(sandbox, **UNBOOTED)
    answer = pair.b.memferry("migrate", pair.name, "--qmp", pair.destination.qmp_path, "--to",
                             pair.a.address)
    check_refusal(answer, r"incoming|inmigrate|waits")
    pair.forget()


@e2e()
def refuse_vhost_user(sandbox):
    """A vhost-user back end writes guest RAM unseen."""
    path = os.path.join(sandbox.path, "vhost-user")
    VhostUserNet(path)
    pair = Pair(sandbox, **UNBOOTED, extra=(
        "-chardev", f"socket,id=vhost,path={path}", "-netdev", "vhost-user,id=net,chardev=vhost",
        "-device", "virtio-net-pci,netdev=net,romfile="), destination={"extra": ()})
    pair.receive()
    refused_migrate(pair, r"vhost")


@e2e()
def refuse_vfio(_sandbox):
    if not os.path.isdir("/sys/kernel/iommu_groups") or not os.listdir("/sys/kernel/iommu_groups"):
        raise Skip("no IOMMU group, hence no VFIO device")
    raise Skip("no PCI device that may be taken from the host for VFIO")


@e2e()
def refuse_too_little_memory(sandbox):
    """The destination's tmpfs can't take what the source holds."""
    mount = os.path.join(sandbox.path, "small")
    os.mkdir(mount)
    run("mount", "-t", "tmpfs", "-o", "size=48m", "none", mount)
    pair = Pair(sandbox, used_mib=96, destination={"backends": (mount,)})
    pair.receive()
    refused_migrate(pair, r"memory|space|room")
    pair.check_stayed()


@e2e()
def refuse_unknown_name(sandbox):
    pair = Pair(sandbox, **UNBOOTED)
    refused_migrate(pair, pair.name)


@e2e()
def refuse_name_taken(sandbox):
    pair = Pair(sandbox, **UNBOOTED)
    pair.receive()
    check_refusal(pair.b.memferry("receive", pair.name, "--qmp", pair.destination.qmp_path), pair.name)
    need(pair.b.state(pair.name) == "waiting", "a refused receive disturbed the one before")
    pair.b.expect(0, "cancel", pair.name)
    # The name of a session that has ended is free.
    pair.receive()
    pair.b.expect(0, "cancel", pair.name)
    pair.forget()


@e2e()
def refuse_future_peer(sandbox):
    """A destination of another protocol version: the refusal names both sides' versions."""
    network = Network(sandbox)
    host = Host(sandbox, network, "a")
    wire.FuturePeer(sandbox, network.names["b"], network.addresses["b"], 99)
    vm = Vm(sandbox, host, "vm1", guest="bare", ram_mib=64)
    leaks = LeakCheck((host,), (vm,))
    answer = host.memferry("migrate", "vm1", "--qmp", vm.qmp_path, "--to", network.addresses["b"])
    check_refusal(answer, rf"\b99\b.*\b{wire.VERSION}\b|\b{wire.VERSION}\b.*\b99\b")
    need(vm.qmp.status() == "running", "the guest should go on")
    if host.status("vm1"):
        host.expect(0, "forget", "vm1")
    leaks.check()


@e2e()
def refuse_future_source(sandbox):
    """A source of another protocol version gets an answer with our version."""
    network = Network(sandbox)
    a = Host(sandbox, network, "a", start=False)
    b = Host(sandbox, network, "b")
    vm = Vm(sandbox, b, "vm1", guest="bare", ram_mib=64, incoming=True)
    b.expect(0, "receive", "vm1", "--qmp", vm.qmp_path)
    end = wire.connect(a, b)
    end.sendall(wire.preamble("vm1", version=99, oldest=98))
    reply = wire.read_all(end)
    need(len(reply) == wire.PREAMBLE_REPLY.size, f"the answer has {len(reply)} bytes")
    magic, version, oldest, status = wire.PREAMBLE_REPLY.unpack(reply)
    need((magic, version, status) == (b"MFANSWER", wire.VERSION, 1) and oldest <= version,
         f"the answer should name our version: {reply.hex()}")
    need(b.state("vm1") == "waiting", "a stranger changed the state")


@e2e()
def refuse_unreachable(sandbox):
    """Nobody listens there."""
    network = Network(sandbox)
    host = Host(sandbox, network, "a")
    vm = Vm(sandbox, host, "vm1", guest="bare", ram_mib=64)
    answer = host.memferry("migrate", "vm1", "--qmp", vm.qmp_path, "--to", network.addresses["b"])
    check_refusal(answer, re.escape(network.addresses["b"]))
    need(vm.qmp.status() == "running", "the guest should go on")


@e2e()
def refuse_bad_qmp(sandbox):
    """No socket there, a socket that nobody listens on, and one that speaks something else."""
    network = Network(sandbox)
    host = Host(sandbox, network, "a")
    missing = os.path.join(sandbox.path, "missing")
    check_refusal(host.memferry("receive", "vm1", "--qmp", missing), re.escape(missing))
    dead = os.path.join(sandbox.path, "dead")
    end = socket.socket(socket.AF_UNIX)
    end.bind(dead)
    end.close()
    check_refusal(host.memferry("receive", "vm1", "--qmp", dead), re.escape(dead))
    check_refusal(host.memferry("receive", "vm1", "--qmp", os.path.join(host.runtime, "control.sock"),
                                seconds=40), "QMP|QEMU")


@e2e()
def command_line_exit_codes(sandbox):
    """2: usage, 3: no memferryd, 1: no such session."""
    network = Network(sandbox)
    a = Host(sandbox, network, "a", start=False)
    b = Host(sandbox, network, "b")
    for wrong in ((), ("dance",), ("migrate", "vm1"), ("receive", "vm1"), ("status", "--purple"),
                  ("migrate", "vm1", "--qmp", "x", "--to", "host:99999"),
                  ("migrate", "vm1", "--qmp", "x", "--to", "host", "--streams", "0"),
                  ("cancel",), ("forget",)):
        answer = b.memferry(*wrong)
        need(answer.code == 2 and answer.err.strip() and not answer.out,
             f"`memferry {' '.join(wrong)}` is a usage error: {answer}")
    for verb in (("status",), ("cancel", "vm1"), ("receive", "vm1", "--qmp", "x")):
        answer = a.memferry(*verb)
        need(answer.code == 3 and "memferryd" in answer.err, f"no memferryd: {answer}")
    for verb in ("status", "cancel", "forget"):
        answer = b.memferry(verb, "vm1")
        need(answer.code == 1 and "vm1" in answer.err, f"{verb} of an unknown name: {answer}")
    need(b.expect(0, "status", "--json").json is not None, "status without sessions")


@e2e()
def command_line_check(sandbox):
    """This host is able, feature by feature."""
    network = Network(sandbox)
    host = Host(sandbox, network, "a")
    need(host.expect(0, "check").out.strip(), "check says nothing")
    report = host.expect(0, "check", "--json").json
    need("minor" in json.dumps(report).lower(), f"check does not mention minor faults: {report}")


@e2e()
def daemon_stops_and_starts(sandbox):
    """SIGTERM is a clean stop, a second memferryd is refused, a stale socket is no hindrance."""
    network = Network(sandbox)
    host = Host(sandbox, network, "a")
    second = Host(sandbox, network, "a", start=False)
    try:
        second.start()
        second.process.wait(5)
    except Exception as error:  # start() reports the daemon that ended
        need("memferryd" in str(error), f"unexpected: {error}")
    need(second.process.poll() not in (None, 0), "a second memferryd on one runtime directory runs")
    host.expect(0, "status")
    need(host.stop() == 0, f"SIGTERM should be a clean stop: {host.said()}")
    host.start()
    host.process.kill()
    host.process.wait()
    host.start()
    host.expect(0, "status")


@e2e(limit_s=600)
def refuse_memfd(sandbox):
    """QEMU since 8.1 sends memfd memory along although told to leave shared memory alone."""
    pair = Pair(sandbox, **UNBOOTED, qemu=qemu_of_release("sid"), destination={"backends": ("memfd",)})
    refused_receive(pair, r"memory-backend-file")


class VhostUserNet:
    """The least of a vhost-user network back end: enough for QEMU to start with it, it never touches RAM."""

    GET_FEATURES, GET_PROTOCOL_FEATURES, GET_QUEUE_NUM = 1, 15, 17
    VERSION_1 = 1 << 32

    def __init__(self, path):
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(path)
        self._listener.listen(1)
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self):
        client, _ = self._listener.accept()
        replies = {self.GET_FEATURES: self.VERSION_1, self.GET_PROTOCOL_FEATURES: 0, self.GET_QUEUE_NUM: 1}
        while len(header := client.recv(12, socket.MSG_WAITALL)) == 12:
            request, _, size = (int.from_bytes(header[at:at + 4], "little") for at in (0, 4, 8))
            if size:
                client.recv(size, socket.MSG_WAITALL)
            if request in replies:
                client.sendall(b"".join(value.to_bytes(4, "little") for value in (request, 5, 8))
                               + replies[request].to_bytes(8, "little"))
