# SPDX-License-Identifier: LGPL-2.1-or-later
"""Nothing of a guest's memory is pinned or locked by memferry, at any moment of a session."""
import os
import re
import time

from common import Pair, need
from harness.sandbox import alive
from harness.testing import e2e


def _read(path):
    try:
        with open(path, encoding="ascii", errors="replace") as file:
            return file.read()
    except (FileNotFoundError, ProcessLookupError):
        return ""  # it has ended


def pinned(pid):
    """What a process has pinned or locked: rows of its status and of its rings' fdinfo that are not 0."""
    status = _read(f"/proc/{pid}/status")
    found = re.findall(r"^(Vm(?:Pin|Lck):\s+[1-9]\d* kB)", status, re.M)
    try:
        descriptors = os.listdir(f"/proc/{pid}/fdinfo")
    except (FileNotFoundError, ProcessLookupError):
        descriptors = []
    rings = 0
    for descriptor in descriptors:
        info = _read(f"/proc/{pid}/fdinfo/{descriptor}")
        if "SqMask" not in info:
            continue
        rings += 1
        found += re.findall(r"^(User(?:Bufs|Files):\s+[1-9]\d*)", info, re.M)
    return found, rings


def watch(pair, verb):
    """Until `migrate` has ended; returns how many rings were looked at."""
    seen = 0
    while alive(verb.process.pid):
        for host in (pair.a, pair.b):
            for pid in host.movers():
                found, rings = pinned(pid)
                need(not found, f"memferry-mover on host {host.side} has {found}")
                seen += rings
        time.sleep(0.005)
    return seen


@e2e()
def nothing_is_pinned(sandbox):
    """A session in rounds with some urgent answers: neither mover ever pins or locks a page."""
    pair = Pair(sandbox, mode="random", rate=4000, mbit=800)
    verb = pair.begin("--mode", "hybrid")
    rings = watch(pair, verb)
    pair.check_done(pair.finish(verb).json)
    need(rings, "no ring of a mover was seen")
    pair.check_arrived()
    pair.forget()
