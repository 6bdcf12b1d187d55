# SPDX-License-Identifier: LGPL-2.1-or-later
"""Two network namespaces joined by a veth pair, and a relay between them that misbehaves on demand."""
import ctypes
import socket
import threading
import time

from .sandbox import PREFIX, run

CLONE_NEWNET = 0x40000000
KIND_BULK = 4
KIND_OFFSET = 32  # of the connection's kind in the preamble (proto/frame.h)


def enter_namespace(name):
    """Command prefix that runs a program in a namespace. Mounts stay the host's (unlike `ip netns exec`)."""
    return ["nsenter", f"--net=/run/netns/{name}"]


class Network:
    """Hosts a (10.77.0.1) and b (10.77.0.2) on one cable."""

    addresses = {"a": "10.77.0.1", "b": "10.77.0.2"}

    def __init__(self, sandbox):
        self.names = {side: f"{PREFIX}{sandbox.id}{side}" for side in "ab"}
        sandbox.on_exit(self.remove)
        for name in self.names.values():
            run("ip", "netns", "add", name)
        run("ip", "-n", self.names["a"], "link", "add", "eth0", "type", "veth", "peer", "name", "eth0",
            "netns", self.names["b"])
        for side, name in self.names.items():
            run("ip", "-n", name, "address", "add", self.addresses[side] + "/24", "dev", "eth0")
            run("ip", "-n", name, "link", "set", "lo", "up")
            run("ip", "-n", name, "link", "set", "eth0", "up")

    def limit(self, mbit_per_s):
        """Limit what goes each way, None: as fast as it goes."""
        for name in self.names.values():
            run("tc", "-n", name, "qdisc", "del", "dev", "eth0", "root", check=False)
            if mbit_per_s:
                # Bursts as short as a timer tick allows, and room for 50 ms.
                burst = max(mbit_per_s * 1000000 // 8 // 250, 16384)
                run("tc", "-n", name, "qdisc", "add", "dev", "eth0", "root", "tbf", "rate",
                    f"{mbit_per_s}mbit", "burst", burst, "latency", "50ms")

    def cable(self, up):
        """Pull the cable, or put it back."""
        run("ip", "-n", self.names["a"], "link", "set", "eth0", "up" if up else "down")

    def remove(self):
        for name in self.names.values():
            run("ip", "netns", "delete", name, check=False)


def socket_in(namespace):
    """A TCP socket that belongs to a network namespace, usable from here."""
    libc = ctypes.CDLL(None, use_errno=True)
    made = []

    def make():
        with open(f"/run/netns/{namespace}", "rb") as handle:
            if libc.setns(handle.fileno(), CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), "setns")
        made.append(socket.socket())

    # A namespace belongs to a thread: borrow one and throw it away.
    thread = threading.Thread(target=make)
    thread.start()
    thread.join()
    return made[0]


class Relay:
    """
    A TCP relay in host a's namespace: clients connect to 127.0.0.1:port there, it connects on to the
    target. Every connection is numbered from 0 in the order of arrival. It can be told to
      stalled: pass nothing on (connections stay open); stalled_kinds: the same for connections of these
      kinds (wire.CONTROL...), after their preambles; stalled_streams: of bulk connections those of these
      numbers; delay_s: hold everything that long,
      corrupt_after: {connection: byte offset} flip one bit of what the client sends,
      cut_after: {connection: byte offset} close there; cut_kinds_after: {kind: byte offset} likewise.
    """

    def __init__(self, sandbox, namespace, target, port=7466):
        self.stalled = False
        self.stalled_kinds = set()
        self.stalled_streams = set()
        self.delay_s = 0.0
        self.corrupt_after = {}
        self.cut_after = {}
        self.cut_kinds_after = {}
        self.accepted = 0
        self._namespace = namespace
        self._target = target
        self._pairs = []
        self._silent = set()
        self._kinds = {}
        self._streams = {}
        self._closed = False
        self._listener = socket_in(namespace)
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._listener.bind(("127.0.0.1", port))
        self._listener.listen(64)
        self.address = f"127.0.0.1:{port}"
        sandbox.on_exit(self.close)
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            server = socket_in(self._namespace)
            try:
                server.connect(self._target)
            except OSError:
                client.close()
                server.close()
                continue
            number = self.accepted
            self.accepted += 1
            self._pairs.append((client, server))
            for source, sink, forward in ((client, server, True), (server, client, False)):
                source.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                threading.Thread(target=self._pump, args=(source, sink, number, forward),
                                 daemon=True).start()

    def _pump(self, source, sink, number, forward):
        passed = 0
        try:
            while data := source.recv(262144):
                if forward and not passed:
                    self._kinds[number] = int.from_bytes(data[KIND_OFFSET:KIND_OFFSET + 2], "little")
                    if self._kinds[number] == KIND_BULK:
                        self._streams[number] = int.from_bytes(data[KIND_OFFSET + 2:KIND_OFFSET + 4], "little")
                while (self.stalled or passed and (self._kinds.get(number) in self.stalled_kinds or
                                                   self._streams.get(number) in self.stalled_streams)) \
                        and not self._closed:
                    time.sleep(0.005)
                if self.delay_s:
                    time.sleep(self.delay_s)
                if forward:
                    data = self._spoil(data, number, passed)
                passed += len(data)
                sink.sendall(data)
            if source not in self._silent:
                sink.shutdown(socket.SHUT_WR)
        except OSError:
            if not {source, sink} & self._silent:
                self._shut(source, sink)

    @staticmethod
    def _shut(*ends):
        for end in ends:
            try:
                end.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass

    def _spoil(self, data, number, passed):
        cut = self.cut_after.get(number, self.cut_kinds_after.get(self._kinds.get(number)))
        if cut is not None and passed + len(data) > cut:
            raise ConnectionAbortedError
        corrupt = self.corrupt_after.get(number)
        if corrupt is not None and passed <= corrupt < passed + len(data):
            data = bytearray(data)
            data[corrupt - passed] ^= 0x10
        return data

    def cut(self):
        """Close all present connections; new ones are accepted."""
        for pair in self._pairs:
            self._shut(*pair)
        self._pairs.clear()

    def cut_clients(self):
        """Close all present connections towards the clients; the target is not told."""
        for client, _ in self._pairs:
            self._silent.add(client)
            self._shut(client)

    def close(self):
        if self._closed:
            return
        self._closed = True
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut()
