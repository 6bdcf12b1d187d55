# SPDX-License-Identifier: LGPL-2.1-or-later
"""
What memferry relies on, on the kernels of other Debian releases: the tests of tests/kernel run in guests,
and what a kernel lacks must be skipped by name and said by `memferry check`.
"""
import glob
import json
import os
import re

from common import need
from harness.artifacts import build_root, program, test_program
from harness.kernels import ProgramGuest, kernel_of_release
from harness.testing import e2e

ON_HUGE_PAGES = ("faults", "tracked", "writes")
# Kernel in which it arrived: facts that are skipped before, as doc/kernel.md says.
SINCE = {
    "continue_overwrites_poison": (6, 6),
    "zeropage_leaves_poison_in_private_memory": (6, 6),
    "stores_to_private_memory_are_seen": (6, 7),
    "a_guard_is_not_told": (6, 15),
    "continue_on_a_guard_overwrites_it_or_is_eexist": (6, 15),
}
# Whole programs.
PROGRAMS_SINCE = {name: (6, 7) for name in
                  ("tracked", "tracked-hugetlb", "watch", "writes", "writes-hugetlb")}
# Debian's kernel lets only a tracer read protected memory from then on.
PROTECTED_UNTIL = {"protected_memory_can_be_read": (7, 0)}


def kernel_program(name):
    """Path of a program of tests/kernel."""
    return os.path.join(build_root(), "tests", "kernel", name)


def fact_programs():
    """The names of the programs of tests/kernel that are made of facts."""
    found = [os.path.basename(path)[len("test_"):] for path in glob.glob(kernel_program("test_*"))
             if os.access(path, os.X_OK) and os.path.isfile(path)]
    need("faults" in found, "tests/kernel has not been built: it takes cmocka")
    return sorted(set(found) - {"inject"})


def may_be_skipped(version, name, fact):
    """Does this kernel lack what the fact is about?"""
    return (version < SINCE.get(fact, (0, 0)) or version < PROGRAMS_SINCE.get(name, (0, 0))
            or version >= PROTECTED_UNTIL.get(fact, (1000, 0)))


def check_facts(kernel, name, code, lines):
    """Nothing failed, nothing is skipped that the kernel should have, something was done."""
    version = kernel.version()
    whole = version < PROGRAMS_SINCE.get(name, (0, 0))
    text = "\n".join(lines)
    need(code == (77 if whole else 0) and not re.search("^FAIL", text, re.M),
         f"Linux {kernel.release} does otherwise than doc/kernel.md says, {name}: {text[-3000:]}")
    for fact, lacking in re.findall(r"^SKIP (\w+): (needs .*)", text, re.M):
        need(may_be_skipped(version, name, fact),
             f"on Linux {kernel.release} {fact} should not be skipped: {lacking}")
    need(whole or re.search("^PASS", text, re.M), f"{name} has tested nothing: {text}")


def check_report(kernel, report, wanted):
    """`memferry check --json` in the guest: able, and each named row in the state named."""
    need(report["able"], f"Linux {kernel.release} should be able to run memferry: {report}")
    for row, (state, words) in wanted.items():
        found = report["checks"][row]
        need(found["state"] == state and re.search(words, found["remedy"]),
             f"`memferry check` on Linux {kernel.release}, {row}: {found}, expected {state} and {words}")


def tests_on(sandbox, codename, at_least):
    """Run everything on that release's kernel."""
    kernel = kernel_of_release(codename)
    version = kernel.version()
    need(version >= at_least, f"{codename} has Linux {kernel.release}")
    guest = ProgramGuest(sandbox, kernel)
    programs = fact_programs()
    for name in programs:
        inside = guest.add_program(kernel_program(f"test_{name}"))
        guest.run(name, inside)
        if name in ON_HUGE_PAGES:
            guest.run(f"{name}-hugetlb", inside, "hugetlb")
    guest.run("inject", guest.add_program(kernel_program("test_inject")),
              guest.add_program(kernel_program("victim")))
    memferry = guest.add_program(program("memferry"))
    guest.run("check", memferry, "check", "--json")
    if version < (6, 7):
        guest.run("monitor", memferry, "monitor", "1")
    results = guest.boot(limit_s=400)
    for name, (code, lines) in results.items():
        if name == "check":
            continue
        if name == "monitor":
            need(code == 1 and re.search(r"WP_ASYNC.*Linux 6\.7", lines[0]), f"monitor without WP_ASYNC: {lines}")
            continue
        if name == "inject":
            need(code == 0, f"attaching on Linux {kernel.release}: " + "\n".join(lines)[-3000:])
            continue
        check_facts(kernel, name, code, lines)
        print(f"Linux {kernel.release}, {name}: {lines[-1]}")
    need("check" in results and len(results) > len(programs), f"not all was run: {list(results)}")
    report = json.loads("\n".join(results["check"][1]))
    fallback = ("ok", "") if version >= (6, 7) else ("limited", "hybrid becomes postcopy here.*Linux 6.7")
    check_report(kernel, report, {"userfaultfd-wp-async": fallback, "pagemap-scan": fallback,
                                  "userfaultfd-minor-shmem": ("ok", "")})
    return report


@e2e(limit_s=600)
def kernel_bookworm(sandbox):
    """Linux 6.1: no tracking of writes, hence no rounds, and check says so."""
    tests_on(sandbox, "bookworm", (6, 1))


@e2e(limit_s=600)
def kernel_trixie(sandbox):
    """Linux 6.12."""
    tests_on(sandbox, "trixie", (6, 12))


@e2e(limit_s=600)
def kernel_sid(sandbox):
    """The newest kernel that Debian has."""
    tests_on(sandbox, "sid", (6, 12))


# A program of the tests' own (program.c) from one memferryd to another, both in the guest.
SESSION = """
for side in a b; do
    mkdir -p /tmp/$side
    memferryd --runtime-dir /tmp/$side --listen 127.0.0.1:$([ $side = a ] && echo 7001 || echo 7002) \\
        2>/tmp/$side/log &
    program serve /tmp/$side/program --mib 8 $([ $side = b ] && echo --wait) &
    eval pid_$side=$!
done
for file in /tmp/a/control.sock /tmp/b/control.sock /tmp/a/program /tmp/b/program; do
    while ! [ -S $file ]; do sleep 0.1; done
done
sleep 1
memferry --runtime-dir /tmp/b receive prog --pid $pid_b --load "program ask /tmp/b/program load" \\
    --resume "program ask /tmp/b/program resume" || exit 1
memferry --runtime-dir /tmp/a migrate prog --pid $pid_a --pause "program ask /tmp/a/program pause" \\
    --save "program ask /tmp/a/program save" --resume "program ask /tmp/a/program resume" \\
    --to 127.0.0.1:7002 --json "$@" >/tmp/answer
code=$?
cat /tmp/answer
[ $code = 0 ] || { cat /tmp/a/log /tmp/b/log; exit $code; }
sleep 1
echo "arrived: $(program ask /tmp/b/program verify); $(program ask /tmp/b/program status)"
exit 0
"""


def session_on(sandbox, codename):
    """A whole session in a guest, in mode hybrid: in rounds where writes can be tracked, else by postcopy."""
    kernel = kernel_of_release(codename)
    guest = ProgramGuest(sandbox, kernel)
    guest.add_shell()
    for name in ("memferry", "memferryd", "memferry-mover"):
        guest.add_program(program(name))
    guest.add_program(test_program("program"))
    guest.add_file("session", SESSION)
    guest.run("session", "/bin/sh", "/session", "--mode", "hybrid")
    code, lines = guest.boot(limit_s=200).get("session", (None, []))
    said = "\n".join(lines)
    need(code == 0, f"a session on Linux {kernel.release} failed: {said[-3000:]}")
    answer = json.loads(said[said.index("{"):said.rindex("}") + 1])
    need(answer["state"] == "done" and re.search(r"^arrived: OK pages=[1-9]\d* wrong=0; OK .* wrong=0 ", said, re.M),
         f"not all arrived on Linux {kernel.release}: {said}")
    if kernel.version() >= (6, 7):
        need(answer["mode"] == "hybrid" and answer["rounds"] >= 1 and "WP_ASYNC" not in answer["reason"],
             f"Linux {kernel.release} should allow rounds: {answer}")
    else:
        need(answer["mode"] == "postcopy" and answer["rounds"] == 0
             and re.search(r"postcopy.*WP_ASYNC.*Linux 6\.7", answer["reason"]),
             f"Linux {kernel.release} should lead to postcopy, and the reason be said: {answer}")


@e2e(limit_s=600)
def session_bookworm(sandbox):
    """A session on Linux 6.1: hybrid becomes postcopy, with the reason."""
    session_on(sandbox, "bookworm")


@e2e(limit_s=600)
def session_trixie(sandbox):
    """A session on Linux 6.12."""
    session_on(sandbox, "trixie")


@e2e(limit_s=600)
def session_sid(sandbox):
    """A session on the newest kernel that Debian has."""
    session_on(sandbox, "sid")


# The same is said by memferryd; "$@" is --pid and a process.
DAX_SESSION = """
mkdir /tmp/a
memferryd --runtime-dir /tmp/a --listen 127.0.0.1:7001 2>/tmp/a/log &
while ! [ -S /tmp/a/control.sock ]; do sleep 0.1; done
memferry --runtime-dir /tmp/a receive prog --load true --region ram=/pmem/ram "$@" && exit 1
memferry --runtime-dir /tmp/a receive prog --load true "$@" >&2 || exit 1
memferry --runtime-dir /tmp/a status prog --json
"""


def dax_on(sandbox, codename):
    """What is on fs-dax is told by name and left alone or refused, and whatever would pin it fails."""
    kernel = kernel_of_release(codename)
    guest = ProgramGuest(sandbox, kernel)
    guest.mount_dax("/pmem")
    pins = guest.add_program(kernel_program("test_pins"))
    memferry = guest.add_program(program("memferry"))
    guest.run("facts", pins, "--dax", "/pmem/facts")
    guest.run("check", pins, "--hold", "/pmem/ram", memferry, "check", "--json")
    guest.add_shell()
    for name in ("memferryd", "memferry-mover"):
        guest.add_program(program(name))
    guest.add_file("session", DAX_SESSION)
    guest.run("session", pins, "--hold", "/pmem/ram", "/bin/sh", "/session")
    guest.run("chosen", pins, "--hold", "/pmem/ram", memferry, "check", "--region", "ram=/pmem/ram")
    results = guest.boot(limit_s=150)
    need(list(results) == ["facts", "check", "session", "chosen"], f"not all was run: {list(results)}")
    code, lines = results["facts"]
    passed = [line for line in lines if line.startswith("PASS fs_dax_")]
    need(code == 0 and len(passed) == 3, f"fs-dax on Linux {kernel.release}: {lines}")
    code, lines = results["check"]
    need(code == 0, f"`memferry check --pid` in the guest: {lines}")
    report = json.loads("\n".join(lines))
    left = {file["path"]: file["why"] for file in report["left"]}
    need("fs-dax" in left.get("/pmem/ram", ""), f"check should say why /pmem/ram is left: {report}")
    need([region["path"] for region in report["regions"]] == ["/memfd:served"],
         f"what is not on fs-dax should be served: {report}")
    code, lines = results["chosen"]
    need(code == 1 and re.search(r"/pmem/ram.*fs-dax.*tmpfs", " ".join(lines)),
         f"what is on fs-dax should be refused by name: {lines}")
    code, lines = results["session"]
    said = "\n".join(lines)
    need(code == 0 and re.search(r"/pmem/ram, which --region ram names.*fs-dax", said),
         f"memferryd should refuse what is on fs-dax and serve the rest: {said}")
    session = json.loads(said[said.index("{"):said.rindex("}") + 1])
    need(session["state"] == "waiting" and session["ram_bytes"] == 64 * 4096
         and re.search(r"/pmem/ram is not migrated.*fs-dax", session["reason"]),
         f"status should say what is left aside, and why: {session}")


@e2e(limit_s=600)
def dax_bookworm(sandbox):
    """Memory on an ext4 mounted -o dax on an emulated NVDIMM, with Linux 6.1."""
    dax_on(sandbox, "bookworm")


@e2e(limit_s=600)
def dax_trixie(sandbox):
    """The same with Linux 6.12."""
    dax_on(sandbox, "trixie")


@e2e(limit_s=600)
def dax_sid(sandbox):
    """The same with the newest kernel that Debian has."""
    dax_on(sandbox, "sid")
