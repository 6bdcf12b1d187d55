# SPDX-License-Identifier: LGPL-2.1-or-later
"""The fixed-size parts of the peer protocol (proto/frame.h), to speak it wrongly on purpose."""
import struct
import threading

from .net import socket_in

VERSION = 2
CONTROL, DEVICE, URGENT, BULK = 1, 2, 3, 4
PREAMBLE = struct.Struct("<8sII16sHHHHI20x64s")
PREAMBLE_REPLY = struct.Struct("<8sIII12x")
FRAME_HEADER = struct.Struct("<BBHIQQQ")
DATA = 1


def preamble(name, kind=CONTROL, version=VERSION, oldest=VERSION, session=b"\x5a" * 16, stream=0,
             streams=1, link=1):
    return PREAMBLE.pack(b"MEMFERRY", version, oldest, session, kind, stream, streams, 0, link,
                         name.encode())


def frame(kind, region=0, first_page=0, pages=1, length=0, flags=0, reserved=0):
    return FRAME_HEADER.pack(kind, flags, region, reserved, first_page, pages, length)


def connect(host_from, host_to, seconds=5):
    """A connection to memferryd's listening port, from the other host's namespace."""
    end = socket_in(host_from.namespace)
    end.settimeout(seconds)
    end.connect((host_to.address, 7466))
    return end


def read_all(end):
    """Everything until the peer closes; a reset counts as closed. TimeoutError if it never does."""
    data = b""
    try:
        while part := end.recv(65536):
            data += part
    except (ConnectionResetError, BrokenPipeError):
        pass
    return data


class FuturePeer:
    """A peer that answers every preamble as software of another protocol version does."""

    def __init__(self, sandbox, namespace, address, version):
        self.version = version
        self._listener = socket_in(namespace)
        self._listener.bind((address, 7466))
        self._listener.listen(16)
        sandbox.on_exit(self._listener.close)
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self):
        while True:
            try:
                client, _ = self._listener.accept()
                client.recv(PREAMBLE.size)
                client.sendall(PREAMBLE_REPLY.pack(b"MFANSWER", self.version, self.version, 1))
                client.close()
            except OSError:
                return
