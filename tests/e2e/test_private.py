# SPDX-License-Identifier: LGPL-2.1-or-later
"""Private anonymous memory: no file holds it, so it is read, copied and discarded page by page."""
import os
import re
import signal
import time

from common import need
from harness.sandbox import Skip, wait_until
from harness.testing import e2e
from test_memory import page_out_ranges, smaps_kib, swap
from test_process import Pair as ProcessPair

PRIVATE_ADDR = 0x500000000000
MIB = 16
# Everything that can become of private memory; moves only once it has been loaded.
OPS = "wwwwwwvvvvvvddnmmuuggpfFFl"


class Pair(ProcessPair):
    """program.c with private regions."""

    def __init__(self, sandbox, *options, regions=2, mib=MIB, ops=OPS, **more):
        self.regions, self.mib = regions, mib
        super().__init__(sandbox, "--private", "--regions", regions, "--mib", mib, "--ops", ops, *options,
                         **more)

    def region_options(self):
        options = []
        for index in range(self.regions):
            start = PRIVATE_ADDR + (index << 36)
            options += ["--region", f"heap{index}=anon:{start:x}-{start + (self.mib << 20):x}"]
        return options

    def receive(self, *options, **commands):
        super().receive(*self.region_options(), *options, **commands)

    def begin(self, *options, **commands):
        return super().begin(*self.region_options(), *options, **commands)


    def kill_mover(self, host):
        old = host.kill_mover()
        wait_until(lambda: set(host.movers()) - {old}, 5, f"host {host.side}'s killed mover is replaced")


def whole_way(sandbox, *options, **more):
    pair = Pair(sandbox, **more)
    pair.source.works()
    beats = pair.source.beats()
    result = pair.migrate(*options)
    need(result["ram_bytes"] == pair.regions * pair.mib << 20 and result["data_pages"] and
         result["hole_pages"], f"its memory should have moved, and its holes should be holes: {result}")
    pair.check_arrived(beats)
    pair.forget()
    return result


@e2e()
def private_postcopy(sandbox):
    """Every page is asked for or swept; moved, discarded, locked, forked and grown while it is missing."""
    result = whole_way(sandbox, "--mode", "postcopy", "--bandwidth", "200M")
    need(result["mode"] == "postcopy" and result["faults"]["count"], f"{result}")


@e2e()
def private_hybrid(sandbox):
    """What rounds bring waits until it is known to be current."""
    result = whole_way(sandbox, "--mode", "hybrid")
    need(result["mode"] == "hybrid" and result["rounds"], f"{result}")


@e2e()
def private_precopy(sandbox):
    result = whole_way(sandbox, "--mode", "precopy", "--max-blackout", "60000")
    need(result["mode"] == "precopy" and result["unconfirmed_at_release"] == 0, f"{result}")


@e2e(limit_s=150)
def private_slowly(sandbox):
    """A slow link: most of what the program does meets a page that is not there yet."""
    whole_way(sandbox, "--mode", "postcopy", "--bandwidth", "60M", mib=32)


@e2e(limit_s=150)
def private_forks(sandbox):
    """Children and theirs diverge from their parent while pages are missing in both."""
    whole_way(sandbox, "--mode", "postcopy", "--bandwidth", "60M", ops="wwvvddFFFF")


@e2e(limit_s=150)
def private_not_inherited(sandbox):
    """Children move memory to where they have none and their parent has some."""
    whole_way(sandbox, "--mode", "postcopy", "--bandwidth", "60M", ops="wwvvddoooo")


@e2e(limit_s=150)
def private_and_shared(sandbox):
    """Private regions beside one that is a file: the model itself lies in shared memory."""
    # A child would share the model, though not the memory that it is of.
    pair = Pair(sandbox, "--shared-model", mib=8, ops="wwwvvvddmmuuggpfl")
    pair.source.works()
    model = ("--region", "model=memfd:model")
    ProcessPair.receive(pair, *pair.region_options(), *model, load="cat")
    pair.finish(pair.begin(*model, save="true"))
    pair.check_arrived()
    pair.forget()


def hurt(sandbox, hurter, *options, ops=OPS.replace("F", "").replace("f", "")):
    """In rounds and after RELEASE; `hurter` is called with the pair."""
    pair = Pair(sandbox, ops=ops, mib=96)
    pair.source.works()
    pair.receive()
    verb = pair.begin("--bandwidth", "20M", *options)
    hurter(pair)
    pair.a.memferry("set", pair.name, "bandwidth=none")  # unless it is over
    result = pair.finish(verb).json
    need(result["state"] == "done", f"should be done: {result}")
    pair.b.wait_state(pair.name, "done")
    pair.check_arrived()
    pair.forget()


def wait_sent(pair, states, mib=2):
    def sends():
        now = pair.a.status(pair.name)
        return now and now["state"] in states and now["sent_bytes"] > mib << 20
    wait_until(sends, 40, f"{' or '.join(states)} sends")


@e2e(limit_s=150)
def private_kill_movers(sandbox):
    """Either mover dies after RELEASE, several times, while pages are moved, discarded and copied."""
    def hurter(pair):
        over = ("done", "drained")
        for round_number in range(3):
            wait_until(lambda: pair.b.state(pair.name) in (*over, "postcopy") and
                       pair.a.state(pair.name) in (*over, "postcopy"), 30, "pages flow")
            if round_number and pair.b.state(pair.name) in over:
                break
            need(pair.b.state(pair.name) == "postcopy", "it was over too soon to be hurt")
            pair.kill_mover((pair.b, pair.a)[round_number % 2])
    hurt(sandbox, hurter, "--mode", "postcopy")


@e2e(limit_s=150)
def private_kill_after_rounds(sandbox):
    """What waits in the mover's file outlives it, and is answered for without being sent again."""
    def hurter(pair):
        wait_sent(pair, ("precopy",), 3)
        pair.a.expect(0, "switch", pair.name)
        pair.b.wait_state(pair.name, ("postcopy", "recovering"), 60)
        pair.kill_mover(pair.b)
        time.sleep(0.2)
        pair.kill_mover(pair.a)
    hurt(sandbox, hurter, "--mode", "hybrid")


@e2e(limit_s=150)
def private_cancel(sandbox):
    """Given up in a round: the program goes on where it is, and another attempt succeeds."""
    pair = Pair(sandbox, ops=OPS)
    pair.source.works()
    pair.receive()
    verb = pair.begin("--mode", "hybrid", "--bandwidth", "40M")
    wait_sent(pair, ("precopy",), 1)
    pair.a.expect(0, "cancel", pair.name)
    need(verb.wait(20).code == 1, "a cancelled migration exits 1")
    pair.check_stayed()
    pair.b.wait_state(pair.name, "cancelled")
    for host in (pair.a, pair.b):
        host.expect(0, "forget", pair.name)
    # What had come is not what will: the same process is armed again, and must be empty.
    pair.receive()
    result = pair.finish(pair.begin()).json
    need(result["state"] == "done", f"{result}")
    pair.check_arrived()
    pair.forget()


@e2e(limit_s=150)
def private_source_killed_after_release(sandbox):
    """Memory that was nowhere else is lost with its process. Nobody is given zeros instead."""
    pair = Pair(sandbox, ops="v", mib=32)
    pair.source.works()
    pair.receive()
    verb = pair.begin("--mode", "postcopy", "--bandwidth", "20M")
    wait_sent(pair, ("postcopy",), 1)
    os.kill(pair.source.pid, signal.SIGKILL)
    why = wait_until(lambda: re.search("has ended|ended on", pair.a.status(pair.name)["reason"]), 30,
                     "the source says that the memory is gone")
    need(why, "no reason")
    time.sleep(1)
    need(pair.a.state(pair.name) in ("recovering", "failed") and pair.b.state(pair.name) != "done",
         f"{pair.a.status(pair.name)}")
    need("WRONG" not in pair.destination.said(), f"zeros were given out: {pair.destination.said()}")
    verb.interrupt()
    verb.wait(10)


def huge_pages_kib(pair):
    return smaps_kib(pair.source.pid, "AnonHugePages")


@e2e()
def private_thp(sandbox):
    """Transparent huge pages at the source, and asked for at the destination: a page is a small one."""
    # Nothing that would split them soon.
    pair = Pair(sandbox, "--thp", regions=1, mib=64, ops="wwwvvvvm")
    if not huge_pages_kib(pair):
        with open("/sys/kernel/mm/transparent_hugepage/enabled", encoding="ascii") as enabled:
            raise Skip(f"no transparent huge pages here: {enabled.read().strip()}")
    pair.source.works()
    pair.migrate()
    pair.check_arrived()
    pair.forget()


def private_swapped(sandbox, mode):
    swap(sandbox)
    pair = Pair(sandbox, regions=1, mib=64, ops="wvvvvv")
    ranges = [(PRIVATE_ADDR, PRIVATE_ADDR + (64 << 20))]
    pair.source.works()
    need(page_out_ranges(pair.source.pid, ranges) >= 4 << 10, "the source's memory should be in swap")
    pair.receive()
    verb = pair.begin("--mode", mode, "--bandwidth", "200M")
    wait_until(lambda: (now := pair.a.status(pair.name)) and now["sent_bytes"] > 1 << 20, 30, "something is sent")
    page_out_ranges(pair.source.pid, ranges)
    page_out_ranges(pair.destination.pid, ranges)
    result = pair.finish(verb).json
    need(result["state"] == "done", f"{result}")
    page_out_ranges(pair.destination.pid, ranges)
    pair.check_arrived()
    pair.forget()


@e2e(limit_s=150)
def private_swapped_hybrid(sandbox):
    """In swap it is neither a hole nor missing, and at the destination no fault of ours."""
    private_swapped(sandbox, "hybrid")


@e2e(limit_s=150)
def private_swapped_postcopy(sandbox):
    private_swapped(sandbox, "postcopy")


# ---- refusals ----

def refused(answer, pattern):
    need(answer.code == 1, f"should be refused with exit 1: {answer}")
    need(re.search(pattern, answer.err), f"should say {pattern!r}: {answer}")


def region(start, end, name="heap0"):
    return ("--region", f"{name}=anon:{start:x}-{end:x}")


@e2e()
def private_refusals(sandbox):
    """Each by name: what is not mapped, is a file, differs in size, or has no such name."""
    pair = Pair(sandbox, regions=1)
    start, end = PRIVATE_ADDR, PRIVATE_ADDR + (MIB << 20)
    commands = pair.destination_commands()

    def receive(*options):
        return pair.b.memferry("receive", pair.name, *commands, *options)
    refused(receive(*region(start, end + 4096)), "not mapped at")
    refused(receive(*region(start - 4096, end)), "not mapped at")
    refused(receive(*region(start + 1, end)), "whole pages")
    refused(receive("--region", "heap0=anon:nobody"), "PR_SET_VMA")
    with open(f"/proc/{pair.destination.pid}/maps", encoding="ascii") as maps:
        private_file = re.search(r"^(\w+)-(\w+) r-xp \w+ \S+ [1-9]\d* .*$", maps.read(), re.M)
    refused(receive(*region(int(private_file[1], 16), int(private_file[2], 16))), "MAP_PRIVATE")
    code = pair.b.memferry("receive", pair.name, *commands, "--region", "heap0=nonsense").code
    need(code == 2, "no kind of memory is a mistake on the command line")
    # Half of it: the two hosts disagree.
    need(receive(*region(start, end - (1 << 20))).code == 0, "a part of it is memory as well")
    answer = pair.a.memferry("migrate", pair.name, *pair.source_commands(), *pair.region_options(), "--to",
                             pair.b.address)
    refused(answer, "differs")
    pair.b.expect(0, "cancel", pair.name)
    pair.check_stayed()
    pair.forget()


@e2e()
def private_owned_by_another(sandbox):
    """A range that another userfaultfd watches (here another memferryd's) is refused, and left to it."""
    pair = Pair(sandbox, regions=1)
    pair.receive()
    answer = pair.a.memferry("receive", "second", *pair.destination_commands(), *pair.region_options())
    refused(answer, "another program")
    result = pair.finish(pair.begin()).json
    need(result["state"] == "done", f"{result}")
    pair.check_arrived()
    pair.forget()

