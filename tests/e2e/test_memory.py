# SPDX-License-Identifier: LGPL-2.1-or-later
"""Kinds of memory: transparent huge pages, huge pages of 1 GiB, locked memory, memory in swap."""
import ctypes
import os
import re

from common import Pair, need
from harness.sandbox import Skip, run, wait_until
from harness.testing import e2e
from test_faults import AFTER_RELEASE
from test_migrate import put, whole_way
from test_precopy import unlimit
from test_process import Pair as ProcessPair

CONVERGING = ("--max-blackout", "60000")

_libc = ctypes.CDLL(None, use_errno=True)


def smaps_kib(pid, field):
    """The sum of a field of /proc/PID/smaps over all mappings."""
    with open(f"/proc/{pid}/smaps", encoding="utf-8", errors="replace") as smaps:
        return sum(int(number) for number in re.findall(rf"^{field}:\s+(\d+) kB$", smaps.read(), re.M))


# ---- transparent huge pages ----

def thp_mount(sandbox, name, option="always"):
    """A tmpfs that takes huge pages wherever it can."""
    mount = os.path.join(sandbox.path, name)
    os.mkdir(mount)
    done = run("mount", "-t", "tmpfs", "-o", f"huge={option}", "none", mount, check=False)
    if done.returncode:
        raise Skip("this kernel's tmpfs has no transparent huge pages (CONFIG_TRANSPARENT_HUGEPAGE)")
    return mount


ALIGNED = {"ram_options": ",align=2M"}


def shmem_huge_kib():
    """How much of all tmpfs lies in huge pages."""
    with open("/proc/meminfo", encoding="ascii") as meminfo:
        return int(re.search(r"^ShmemHugePages:\s+(\d+) kB$", meminfo.read(), re.M)[1])


def thp(sandbox, mode, writer, option="always"):
    """One page that lands brings 511 neighbours into the page cache: none of them may be seen."""
    before = shmem_huge_kib()
    pair = Pair(sandbox, backends=(thp_mount(sandbox, "thp", option),), mode=writer, rate=0, **ALIGNED)
    source = smaps_kib(pair.source.pid, "ShmemPmdMapped")
    need(source >= 32 << 10, f"the source's memory should lie in huge pages, {source} KiB do")
    pair.migrate("--mode", mode, *(CONVERGING if mode == "precopy" else ()))
    pair.check_source_quit()
    huge = shmem_huge_kib() - before
    # With huge=advise nobody advises where the mover writes.
    need(option == "advise" or huge >= source + (32 << 10), f"the destination's memory should lie in huge pages too: {huge} KiB "
         f"in all, the source's {source}")
    pair.check_arrived()
    pair.forget()


@e2e()
def thp_hybrid(sandbox):
    """One byte written must not make 511 pages visible that have not come; huge pages at both ends."""
    thp(sandbox, "hybrid", "random")


@e2e()
def thp_postcopy(sandbox):
    thp(sandbox, "postcopy", "random")


@e2e()
def thp_precopy(sandbox):
    thp(sandbox, "precopy", "hot")


@e2e()
def thp_zeroes(sandbox):
    """Pages that become zeros again between rounds are punched out of huge pages."""
    thp(sandbox, "hybrid", "zeroes")


@e2e()
def thp_at_destination_only(sandbox):
    mount = thp_mount(sandbox, "thp")
    whole_way(sandbox, rate=0, destination={"backends": (mount,)}, **ALIGNED)


@e2e()
def thp_at_source_only(sandbox):
    mount = thp_mount(sandbox, "thp")
    whole_way(sandbox, rate=0, backends=(mount,), destination={"backends": ("tmpfs",)}, **ALIGNED)


@e2e()
def thp_advised(sandbox):
    """huge=advise: QEMU asks for huge pages by madvise(2)."""
    thp(sandbox, "hybrid", "random", option="advise")


# ---- huge pages of 1 GiB ----

def gigantic_pages(sandbox, count):
    """A hugetlbfs of 1 GiB pages; skipped where the machine has not got them."""
    pages_file = "/sys/kernel/mm/hugepages/hugepages-1048576kB/nr_hugepages"
    if not os.path.exists(pages_file):
        raise Skip("the processor has no pages of 1 GiB")
    with open(pages_file, encoding="ascii") as pages:
        before = int(pages.read())
    sandbox.on_exit(lambda: put(pages_file, str(before)))
    put("/proc/sys/vm/compact_memory", "1")
    put(pages_file, str(before + count))
    with open(pages_file, encoding="ascii") as pages:
        if int(pages.read()) < before + count:
            raise Skip(f"no {count} GiB of memory in pieces of 1 GiB are free")
    mount = os.path.join(sandbox.path, "gigantic")
    os.mkdir(mount)
    run("mount", "-t", "hugetlbfs", "-o", "pagesize=1G", "none", mount)
    return mount


def gigantic(sandbox, mode):
    mount = gigantic_pages(sandbox, 2)
    whole_way(sandbox, "--mode", mode, backends=(mount,), ram_mib=1024,
              **({"rate": 50} if mode == "precopy" else {}))


@e2e(limit_s=180)
def gigantic_hybrid(sandbox):
    """One page of 1 GiB: what is faulted on is all there is."""
    gigantic(sandbox, "hybrid")


@e2e(limit_s=180)
def gigantic_postcopy(sandbox):
    gigantic(sandbox, "postcopy")


# ---- locked memory ----

LOCKED = ("-overcommit", "mem-lock=on")


def locked(sandbox, mode, writer):
    """QEMU locks all its memory, which fills it at once; the destination's is emptied again."""
    pair = Pair(sandbox, extra=LOCKED, mode=writer, rate=0)
    for vm in (pair.source, pair.destination):
        need(smaps_kib(vm.pid, "Locked") >= 200 << 10, "QEMU's memory should be locked")
    pair.migrate("--mode", mode, *(CONVERGING if mode == "precopy" else ()))
    pair.check_source_quit()
    pair.check_arrived()
    pair.forget()


@e2e()
def locked_hybrid(sandbox):
    locked(sandbox, "hybrid", "random")


@e2e()
def locked_postcopy(sandbox):
    locked(sandbox, "postcopy", "sequential")


@e2e()
def locked_precopy(sandbox):
    locked(sandbox, "precopy", "hot")


# ---- swap ----

def swap(sandbox, mib=512):
    """A swap file for the length of the test; skipped where none may be used."""
    path = os.path.join(sandbox.path, "swapfile")
    with open(path, "wb") as file:
        os.posix_fallocate(file.fileno(), 0, mib << 20)
    os.chmod(path, 0o600)
    run("mkswap", path)
    done = run("swapon", path, check=False)
    if done.returncode:
        raise Skip(f"no swap file can be used here: {done.stderr.strip()}")
    # Before the file goes, and after QEMU, whose memory would have to come back first.
    sandbox.on_exit(lambda: run("swapoff", path, check=False))


class _Range(ctypes.Structure):
    _fields_ = [("base", ctypes.c_void_p), ("length", ctypes.c_size_t)]


def page_out_ranges(pid, ranges):
    """Have the kernel move these to swap. Return: KiB of the process that are there."""
    pidfd = os.pidfd_open(pid)
    try:
        for start, end in ranges:
            # In pieces: a call ends early where a page can't be moved.
            for at in range(start, end, 2 << 20):
                piece = _Range(at, min(2 << 20, end - at))
                if _libc.syscall(440, pidfd, ctypes.byref(piece), 1, 21, 0) < 0 and ctypes.get_errno() == 1:
                    raise Skip("process_madvise(2) is refused here")
    finally:
        os.close(pidfd)
    return smaps_kib(pid, "Swap")


def page_out(vm):
    """Have the kernel move the VM's RAM to swap (process_madvise(2), MADV_PAGEOUT). Return: KiB there."""
    with open(f"/proc/{vm.pid}/maps", encoding="utf-8", errors="replace") as maps:
        ranges = [(int(m[1], 16), int(m[2], 16)) for m in
                  re.finditer(rf"^(\w+)-(\w+) rw-s .*{re.escape(os.path.basename(vm.ram_files[0]))}",
                              maps.read(), re.M)]
    need(ranges, "QEMU maps no RAM file")
    return page_out_ranges(vm.pid, ranges)


def swapped(sandbox, mode):
    """What lies in swap is no hole and counts as what it is: written, or not."""
    swap(sandbox)
    pair = Pair(sandbox, mode="idle")
    need(page_out(pair.source) >= 16 << 10, "the source's memory should be in swap")
    pair.migrate("--mode", mode, *(CONVERGING if mode == "precopy" else ()))
    pair.check_source_quit()
    need(page_out(pair.destination) >= 16 << 10, "the destination's memory should be in swap")
    pair.check_arrived()
    pair.forget()


@e2e(limit_s=150)
def swapped_hybrid(sandbox):
    swapped(sandbox, "hybrid")


@e2e(limit_s=150)
def swapped_postcopy(sandbox):
    swapped(sandbox, "postcopy")


@e2e(limit_s=150)
def swapped_precopy(sandbox):
    swapped(sandbox, "precopy")


@e2e(limit_s=150)
def swapped_meanwhile(sandbox):
    """Moved to swap in the rounds and after RELEASE, on both sides: no event tells."""
    swap(sandbox)
    pair = Pair(sandbox, mode="random", rate=200)
    verb = pair.begin("--bandwidth", "200M")
    wait_until(lambda: (now := pair.a.status(pair.name)) and now["sent_bytes"] > 8 << 20, 30,
               "the first round sends")
    need(page_out(pair.source) >= 4 << 10, "the source's memory should be in swap")
    pair.a.expect(0, "set", pair.name, "bandwidth=100M")
    pair.a.expect(0, "switch", pair.name)
    wait_until(lambda: pair.a.state(pair.name) in (*AFTER_RELEASE, "done"), 60, "RELEASE")
    page_out(pair.source)
    page_out(pair.destination)
    unlimit(pair)
    pair.check_done(pair.finish(verb).json)
    page_out(pair.destination)
    pair.check_arrived()
    pair.forget()


# ---- mappings of a process: locked, protected, for reading only, several of the same ----

def mappings(sandbox, mode):
    """Each page is in several mappings, of several rights, in the process and in its children."""
    pair = ProcessPair(sandbox, "--ops", "wwwvvvdmupllrrrfF")
    pair.source.works()
    beats = pair.source.beats()
    pair.migrate("--mode", mode, *(CONVERGING if mode == "precopy" else ()))
    pair.check_arrived(beats)
    pair.forget()


@e2e()
def mappings_hybrid(sandbox):
    mappings(sandbox, "hybrid")


@e2e()
def mappings_postcopy(sandbox):
    mappings(sandbox, "postcopy")


@e2e()
def mappings_precopy(sandbox):
    mappings(sandbox, "precopy")
