# SPDX-License-Identifier: LGPL-2.1-or-later
"""The adapter for any process: a program of the tests' own (program.c) changes hosts while it works."""
import mmap
import os
import random
import re
import shlex
import signal
import time

from common import FIELDS, MIGRATE_S, need
from harness.artifacts import test_program
from harness.host import Host, LeakCheck
from harness.net import Network, Relay, enter_namespace
from harness.sandbox import HarnessError, alive, children_of, run, wait_until
from harness.testing import e2e
from harness.wire import DEVICE
from test_migrate import huge_pages

AFTER_RELEASE = ("postcopy", "drained", "recovering", "done")


class Program:
    """program.c on a host."""

    def __init__(self, sandbox, host, name, *options, waits=False):
        self.name = f"{host.side}-{name}"
        self.socket = os.path.join(sandbox.path, f"{self.name}-{time.monotonic_ns()}.sock")
        self.log = os.path.join(sandbox.path, f"{self.name}.log")
        self.process = sandbox.spawn(
            enter_namespace(host.namespace) + [test_program("program"), "serve", self.socket]
            + ["--wait"] * waits + [str(option) for option in options], self.log)
        wait_until(lambda: os.path.exists(self.socket) or self.process.poll() is not None, 20,
                   f"{self.name} listens")
        need(self.process.poll() is None, f"{self.name} did not start: {self.said()}")

    @property
    def pid(self):
        return self.process.pid

    def command(self, verb):
        """For --pause and the others."""
        return shlex.join([test_program("program"), "ask", self.socket, verb])

    def ask(self, verb, seconds=60):
        return run(test_program("program"), "ask", self.socket, verb, timeout=seconds).stdout.strip()

    def beats(self):
        return int(re.search(r"beats=(\d+)", self.ask("status"))[1])

    def works(self, seconds=20):
        """It does something, and has found nothing wrong."""
        before = self.beats()
        wait_until(lambda: self.beats() > before + 200, seconds, f"{self.name} works")
        self.right()

    def right(self):
        status = self.ask("status")
        need(" wrong=0 " in status, f"{self.name}: {status}: {self.said()}")

    def verify(self):
        answer = self.ask("verify", 120)
        match = re.fullmatch(r"OK pages=(\d+) wrong=0", answer)
        need(match, f"{self.name}: {answer}: {self.said()}")
        return int(match[1])

    def said(self):
        with open(self.log, encoding="utf-8", errors="replace") as log:
            return log.read().strip()[-1500:]

    def state(self):
        """The letter of /proc/PID/stat."""
        with open(f"/proc/{self.pid}/stat", encoding="ascii", errors="replace") as stat:
            return stat.read().rsplit(")", 1)[1].split()[0]

    def kill(self):
        self.process.kill()
        self.process.wait()


class Pair:
    """The program at work on a, and another one that waits on b."""

    name = "prog"

    def __init__(self, sandbox, *options, mbit=None, destination=None):
        self.sandbox = sandbox
        self.options = options
        self.network = Network(sandbox)
        self.a = Host(sandbox, self.network, "a")
        self.b = Host(sandbox, self.network, "b")
        self.source = Program(sandbox, self.a, self.name, *options)
        self.destination = Program(sandbox, self.b, self.name,
                                   *(options if destination is None else destination), waits=True)
        self.network.limit(mbit)
        self.leaks = LeakCheck((self.a, self.b), (self.source, self.destination))

    def source_commands(self, **other):
        program = self.source
        commands = {"pause": program.command("pause"), "save": program.command("save"),
                    "resume": program.command("resume"), **other}
        return self._arguments(program, commands)

    def destination_commands(self, **other):
        program = self.destination
        commands = {"load": program.command("load"), "resume": program.command("resume"), **other}
        return self._arguments(program, commands)

    @staticmethod
    def _arguments(program, commands):
        arguments = ["--pid", program.pid]
        for word, command in commands.items():
            if command:
                arguments += [f"--{word}", command]
        return arguments

    def receive(self, *options, **commands):
        self.b.expect(0, "receive", self.name, *self.destination_commands(**commands), *options)
        need(self.b.state(self.name) == "waiting", "a received session should be waiting")

    def begin(self, *options, to=None, **commands):
        """migrate in the background, to a destination that waits already."""
        return self.a.begin("migrate", self.name, *self.source_commands(**commands), "--to",
                            to or self.b.address, "--json", *options)

    def finish(self, verb, seconds=MIGRATE_S, code=0):
        answer = verb.wait(seconds)
        need(answer.code == code, f"migrate should exit {code}: {answer}")
        return answer

    def migrate(self, *options):
        self.receive()
        result = self.finish(self.begin(*options)).json
        need(set(result) == FIELDS, f"fields differ: {set(result) ^ FIELDS}")
        need(result["state"] == "done" and result["adapter"] == "process", f"should be done: {result}")
        self.b.wait_state(self.name, "done", 10)  # it may hear of it a moment later
        return result

    def check_arrived(self, at_least=0):
        """It works at b with every page right, and not at a."""
        self.destination.works()
        self.destination.verify()
        self.destination.right()
        need(self.destination.beats() >= at_least, "it began anew")
        self.source.process.wait(10)
        need(self.source.process.returncode == -signal.SIGKILL,
             f"the source's process should have been killed, not {self.source.process.returncode}")
        need("WRONG" not in self.source.said(), self.source.said())

    def check_stayed(self):
        """It works at a with every page right, and never did at b."""
        self.source.works()
        self.source.verify()
        if alive(self.destination.pid) and self.destination.state() != "T":
            need("parked=1" in self.destination.ask("status"), "it works at the destination too")

    def fresh_destination(self):
        self.destination.kill()
        self.destination = Program(self.sandbox, self.b, self.name, *self.options, waits=True)
        self.leaks = LeakCheck((self.a, self.b), (self.source, self.destination))

    def turn(self):
        """The other way round from now on: b is the source, and a program waits on a."""
        self.a, self.b = self.b, self.a
        self.source = self.destination
        self.destination = Program(self.sandbox, self.b, self.name, *self.options, waits=True)
        self.leaks = LeakCheck((self.a, self.b), (self.source, self.destination))

    def forget(self):
        for host in (self.a, self.b):
            if host.status(self.name):
                host.expect(0, "forget", self.name)
        self.leaks.check()


def whole_way(sandbox, *options, program=(), **more):
    pair = Pair(sandbox, *program, **more)
    pair.source.works()
    beats = pair.source.beats()
    result = pair.migrate(*options)
    pair.check_arrived(beats)
    pair.forget()
    return pair, result


@e2e()
def process_postcopy(sandbox):
    """All memory follows; the program changes its layout all the time on both hosts."""
    _, result = whole_way(sandbox, "--mode", "postcopy")
    need(result["mode"] == "postcopy", f"mode: {result}")


@e2e()
def process_hybrid(sandbox):
    _, result = whole_way(sandbox, "--mode", "hybrid")
    need(result["mode"] == "hybrid" and result["rounds"], f"rounds should have been sent: {result}")


NO_FORKS = ("--ops", "wwvdnmup")
FORKS = ("--ops", "wvFFdnmup")


@e2e()
def process_precopy(sandbox):
    """Mappings are moved, made twice, unmapped and mapped again all the time, and followed."""
    _, result = whole_way(sandbox, "--mode", "precopy", "--max-blackout", "60000", program=NO_FORKS)
    need(result["mode"] == "precopy" and result["unconfirmed_at_release"] == 0, f"{result}")


def in_doubt(sandbox, *mode):
    """Children write unseen: nothing is taken for current, and it is said why."""
    _, result = whole_way(sandbox, "--mode", *mode, program=FORKS)
    need(result["mode"] == "hybrid", f"{result}")
    need("forked" in result["reason"] and "--mode postcopy" in result["reason"], f"{result}")


@e2e()
def process_hybrid_children_write(sandbox):
    in_doubt(sandbox, "hybrid")


@e2e()
def process_precopy_children_write(sandbox):
    """And the program is not stopped for as long as it takes to send everything again."""
    in_doubt(sandbox, "precopy", "--max-blackout", "60000")


@e2e()
def process_precopy_mapped_again(sandbox):
    """What is mapped anew while it is being paused counts as written: nobody stands still for that."""
    pair = Pair(sandbox, "--ops", "v", "--mib", "64")
    pair.source.works()
    beats = pair.source.beats()
    pair.receive()
    pause = f"{pair.source.command('again')} && {pair.source.command('pause')}"
    result = pair.finish(pair.begin("--mode", "precopy", "--max-blackout", "20", pause=pause)).json
    need(result["mode"] == "hybrid" and "mapped anew" in result["reason"], f"{result}")
    pair.check_arrived(beats)
    pair.forget()


@e2e()
def process_children_write(sandbox):
    """What a child writes before the program is paused is seen by postcopy, which is the default here."""
    _, result = whole_way(sandbox, program=("--ops", "wvFFdnmup"))
    need(result["mode"] == "postcopy", f"mode: {result}")


@e2e()
def process_stopped_by_signal(sandbox):
    """No pause and no resume command: SIGSTOP at any point, SIGCONT; the state is in shared memory."""
    pair = Pair(sandbox, "--shared-model", "--ops", "wwwvvvdnmup", destination=("--shared-model",
                                                                                "--ops", "wwwvvvdnmup"))
    pair.source.works()
    beats = pair.source.beats()
    pair.receive(load="cat", resume=pair.destination.command("resume"))
    pair.finish(pair.begin(pause=None, save="true", resume=None))
    pair.check_arrived()
    need(beats, "it had worked")
    pair.forget()


@e2e(limit_s=120)
def process_many_threads(sandbox):
    """A hundred threads empty mappings at once: what they drop still comes."""
    whole_way(sandbox, "--mode", "postcopy", program=("--ops", "wwvdr", "--droppers", "100"), mbit=200)


@e2e(limit_s=120)
def process_few_descriptors(sandbox):
    """More children than there are descriptors for: a fork waits until one has ended, and with it pages."""
    pair = Pair(sandbox, "--ops", "wwvdFFFf", "--threads", "8", mbit=60)
    pair.b.stop()
    pair.b.wrapper = ["prlimit", "--nofile=36:36"]
    pair.b.start()
    pair.leaks = LeakCheck((pair.a, pair.b), (pair.source, pair.destination))
    pair.receive()
    pair.finish(pair.begin("--mode", "postcopy"))
    pair.check_arrived()
    need("has to wait until one of its" in pair.b.said(), pair.b.said())
    pair.forget()


# ---- commands that fail, before RELEASE ----

def returns(sandbox, expected, options=(), source=None, destination=None, program=()):
    """A migration that fails: the program goes on at a, and the reason says `expected`. Then one that works."""
    pair = Pair(sandbox, *program)
    pair.receive(*(options if destination else ()), **(destination(pair) if destination else {}))
    verb = pair.begin(*(options if source else ()), **(source(pair) if source else {}))
    answer = pair.finish(verb, code=1)
    need(re.search(expected, answer.json["reason"]), f"the reason should say {expected!r}: {answer}")
    pair.check_stayed()
    pair.b.wait_state(pair.name, ("failed", "cancelled", "waiting"), 40)
    if pair.b.state(pair.name) == "waiting":
        pair.b.expect(0, "cancel", pair.name)
    pair.fresh_destination()
    pair.migrate()
    pair.check_arrived()
    pair.forget()


SHORT = ("--timeout", "2")


@e2e()
def process_pause_fails(sandbox):
    """With what the command said last; it may have got half-way, so resume is run."""
    returns(sandbox, r"pause command of prog failed with exit status 3; it said: no way",
            source=lambda pair: {"pause": f"{pair.source.command('pause')}; echo no way >&2; exit 3"})


@e2e()
def process_pause_hangs(sandbox):
    returns(sandbox, r"pause command of prog did not end within 2 s", SHORT,
            source=lambda pair: {"pause": f"{pair.source.command('pause')}; sleep 1000 & sleep 1000"})


@e2e()
def process_pause_is_killed(sandbox):
    returns(sandbox, r"pause command of prog was killed by signal 9", source=lambda pair: {"pause": "kill -9 $$"})


@e2e()
def process_save_fails(sandbox):
    """After a part of the state: the load command must not see its end."""
    returns(sandbox, r"save command of prog failed with exit status 1",
            source=lambda pair: {"save": f"{pair.source.command('save')} | head -c 1000; exit 1"})


@e2e()
def process_save_hangs(sandbox):
    returns(sandbox, r"save command of prog did not end within 2 s", SHORT,
            source=lambda pair: {"save": f"{pair.source.command('save')}; sleep 1000"})


@e2e()
def process_save_is_cut(sandbox):
    """A state that is short by its own mistake: the program's load command notices, as it must."""
    returns(sandbox, r"load command of prog failed with exit status 1; it said: ERROR",
            source=lambda pair: {"save": f"{pair.source.command('save')} | head -c 1000"})


@e2e()
def process_load_fails(sandbox):
    returns(sandbox, r"load command of prog failed with exit status 9; it said: cannot",
            destination=lambda pair: {"load": "echo cannot; exit 9"})


@e2e()
def process_load_hangs(sandbox):
    returns(sandbox, r"load command of prog did not end within 2 s", SHORT,
            destination=lambda pair: {"load": "head -c 300 /dev/urandom; cat >/dev/null; sleep 1000"})


@e2e()
def process_load_reads_nothing(sandbox):
    """It ends before its input does: what it did not want is dropped."""
    pair = Pair(sandbox, "--shared-model", "--ops", "wvdmup")
    pair.receive(load="true")
    pair.finish(pair.begin(save="head -c 20000000 /dev/zero"))
    pair.check_arrived()
    pair.forget()


@e2e()
def process_resume_fails_at_source(sandbox):
    """The way back is tried again: nobody else brings the program back."""
    def source(pair):
        tries = os.path.join(sandbox.path, "tries")
        return {"save": "exit 1", "resume": f"echo >> {tries}; [ $(wc -l < {tries}) -ge 3 ] && "
                                            f"{pair.source.command('resume')}"}
    returns(sandbox, "save command of prog failed", source=source)


@e2e()
def process_resume_fails_at_destination(sandbox):
    """After RELEASE there is no way back: it is tried until it works."""
    pair = Pair(sandbox)
    tries = os.path.join(sandbox.path, "tries")
    pair.receive(resume=f"echo >> {tries}; [ $(wc -l < {tries}) -ge 3 ] && {pair.destination.command('resume')}")
    pair.finish(pair.begin())
    pair.check_arrived()
    pair.forget()


@e2e()
def process_environment(sandbox):
    """What commands are told, and what they are not: nothing of memferryd's own environment."""
    pair = Pair(sandbox)
    report = os.path.join(sandbox.path, "report")
    note = f"(env | grep -v -e ^PWD= -e ^_= -e ^SHLVL= | sort; pwd; umask; ls /proc/self/fd) > {report}."
    pair.receive(load=f"{note}load; {pair.destination.command('load')}",
                 resume=f"{note}resume-b; {pair.destination.command('resume')}")
    pair.finish(pair.begin(pause=f"{note}pause; {pair.source.command('pause')}",
                           save=f"{note}save; {pair.source.command('save')}"))
    for suffix, word, role, program in (("pause", "pause", "source", pair.source),
                                        ("save", "save", "source", pair.source),
                                        ("load", "load", "destination", pair.destination),
                                        ("resume-b", "resume", "destination", pair.destination)):
        with open(f"{report}.{suffix}", encoding="utf-8") as file:
            said = file.read().split()
        # ls has its own descriptor beside the standard ones.
        need(said == ["LC_ALL=C.UTF-8", f"MEMFERRY_COMMAND={word}", f"MEMFERRY_PID={program.pid}",
                      f"MEMFERRY_ROLE={role}", f"MEMFERRY_SESSION={pair.name}",
                      "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
                      "/", "0077", "0", "1", "2", "3"], f"{word} was told: {said}")
    pair.check_arrived()
    pair.forget()


@e2e()
def process_stopped_meanwhile(sandbox):
    """Let go on, or stopped, while memory is sent: the destination was told otherwise, and the program stays as it is."""
    pair = Pair(sandbox, "--shared-model", "--ops", "wvdmup")
    for first, then, word in ((signal.SIGSTOP, signal.SIGCONT, "let go on"), (signal.SIGCONT, signal.SIGSTOP, "stopped")):
        os.kill(pair.source.pid, first)
        pair.receive(load="cat")
        verb = pair.begin("--mode", "hybrid", "--bandwidth", "2M", pause=None, save="true")
        pair.a.wait_state(pair.name, "precopy")
        os.kill(pair.source.pid, then)
        time.sleep(0.1)
        pair.a.expect(0, "switch", pair.name)
        answer = pair.finish(verb, code=1)
        need(f"was {word}" in answer.json["reason"], f"the reason: {answer}")
        need((pair.source.state() == "T") == (then == signal.SIGSTOP), f"it is in state {pair.source.state()}")
        pair.b.wait_state(pair.name, ("failed", "cancelled"), 40)
        pair.a.expect(0, "forget", pair.name)
        pair.fresh_destination()
    os.kill(pair.source.pid, signal.SIGCONT)
    pair.check_stayed()


@e2e()
def process_orphan_shares(sandbox):
    """A process that left its parent has the memory too, and is nobody's child: found when the program is paused."""
    pair = Pair(sandbox)
    pair.receive()
    verb = pair.begin("--mode", "hybrid", "--bandwidth", "2M")
    pair.a.wait_state(pair.name, "precopy")
    orphan = int(pair.source.ask("orphan").split()[1])
    pair.a.expect(0, "switch", pair.name)
    answer = pair.finish(verb, code=1)
    os.kill(orphan, signal.SIGKILL)
    need(f"(pid {orphan})" in answer.json["reason"] and "started since" in answer.json["reason"], f"the reason: {answer}")
    pair.b.wait_state(pair.name, ("failed", "cancelled"), 40)
    pair.fresh_destination()
    pair.migrate()
    pair.check_arrived()
    pair.forget()


@e2e()
def process_keep_source(sandbox):
    """It stays, stopped."""
    pair = Pair(sandbox)
    pair.receive()
    pair.finish(pair.begin("--keep-source"))
    pair.destination.works()
    pair.destination.verify()
    need(pair.source.state() == "T", f"the source should be stopped, not {pair.source.state()}")
    pair.forget()


@e2e()
def process_stopped_before(sandbox):
    """A program that does not run arrives so."""
    pair = Pair(sandbox, "--shared-model", "--ops", "wvdmup")
    pair.source.ask("pause")
    os.kill(pair.source.pid, signal.SIGSTOP)
    pair.receive(load="cat")
    refused = pair.a.memferry("migrate", pair.name, *pair.source_commands(), "--to", pair.b.address)
    need(refused.code == 1 and "is stopped" in refused.err, f"a stopped process can't be paused: {refused}")
    pair.finish(pair.begin(pause=None, save="true"))
    need(pair.destination.state() == "T", "it should have arrived stopped")
    os.kill(pair.destination.pid, signal.SIGCONT)
    pair.destination.ask("resume")
    pair.check_arrived()
    pair.forget()


@e2e()
def process_waits_stopped(sandbox):
    """The destination's process may wait by SIGSTOP: it is attached to all the same."""
    pair = Pair(sandbox, "--shared-model", "--ops", "wvdmup")
    os.kill(pair.destination.pid, signal.SIGSTOP)
    wait_until(lambda: pair.destination.state() == "T", 5, "it stops")
    pair.receive(load="cat")
    need(pair.destination.state() == "T", "attaching should leave it stopped")
    pair.finish(pair.begin(save="true"))
    pair.check_arrived()
    pair.forget()


@e2e()
def process_large_state(sandbox):
    """More than any buffer on the way holds."""
    pair = Pair(sandbox)
    state = os.path.join(sandbox.path, "state")
    run("sh", "-c", f"head -c 100000000 /dev/urandom > {state}")
    pair.receive(load=f"tee {state}.arrived | tail -c +100000001 | {pair.destination.command('load')}")
    pair.finish(pair.begin(save=f"cat {state}; {pair.source.command('save')}"))
    run("cmp", "-n", "100000000", state, f"{state}.arrived")
    pair.check_arrived()
    pair.forget()


@e2e()
def process_hugetlbfs(sandbox):
    huge_pages(sandbox, 64)
    whole_way(sandbox, program=("--hugetlb", "--mib", "48", "--regions", "1", "--threads", "2", "--ops",
                                "wwvvdm"))


# ---- processes that die, links that break, orders to stop ----

def children_named(host, name):
    """Of host's memferryd, living."""
    found = []
    for pid in children_of(host.process.pid):
        try:
            with open(f"/proc/{pid}/comm", encoding="ascii") as comm:
                if comm.read().strip() == name:
                    found.append(pid)
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


def daemon_killed(sandbox, *, pause=None, save=None, stops=False):
    """
    kill -9 of the source's memferryd while a command runs: the guard lets the program go on, and leaves.
    Another memferryd then migrates it.
    """
    pair = Pair(sandbox, "--shared-model", "--ops", "wvdmup") if stops else Pair(sandbox)
    mark = os.path.join(sandbox.path, "mark")
    commands = {}
    if pause:
        commands["pause"] = f"{pair.source.command('pause')}; touch {mark}; sleep 1000"
    if save:
        commands["save"] = f"touch {mark}; sleep 1000"
    if stops:
        commands["pause"] = None
    pair.receive()
    verb = pair.begin(**commands)
    wait_until(lambda: os.path.exists(mark), 20, "the command runs")
    if stops:
        need(pair.source.state() == "T", "it should be stopped")
    guards = wait_until(lambda: children_named(pair.a, "memferry-guard"), 5, "there is a guard")
    os.kill(pair.a.process.pid, signal.SIGKILL)
    pair.a.process.wait()
    need(verb.wait().code == 3, "the command line should say that memferryd is gone")
    pair.check_stayed()
    wait_until(lambda: not any(map(alive, guards)), 10, "the guard leaves")
    need(run("pgrep", "-f", "sleep 1000", check=False).stdout == "", "a command was left behind")
    pair.b.wait_state(pair.name, ("failed", "cancelled", "waiting"), 40)
    pair.a.start()
    pair.fresh_destination()
    pair.migrate()
    pair.check_arrived()
    pair.forget()


@e2e()
def process_kill_daemon_in_pause(sandbox):
    daemon_killed(sandbox, pause=True)


@e2e()
def process_kill_daemon_in_save(sandbox):
    daemon_killed(sandbox, save=True)


@e2e()
def process_kill_daemon_when_stopped(sandbox):
    """Without a pause command: stopped by SIGSTOP, which nobody else would lift."""
    daemon_killed(sandbox, save=True, stops=True)


@e2e()
def process_kill_daemon_in_round(sandbox):
    """While memory is copied and watched: the program goes on, with all that it does to its layout."""
    pair = Pair(sandbox)
    pair.receive()
    verb = pair.begin("--mode", "hybrid", "--bandwidth", "2M")
    pair.a.wait_state(pair.name, "precopy")
    time.sleep(0.3)
    os.kill(pair.a.process.pid, signal.SIGKILL)
    pair.a.process.wait()
    need(verb.wait().code == 3, "the command line should say that memferryd is gone")
    pair.check_stayed()
    pair.b.wait_state(pair.name, ("failed", "cancelled", "waiting"), 40)
    pair.a.start()
    pair.fresh_destination()
    pair.migrate()
    pair.check_arrived()
    pair.forget()


@e2e()
def process_kill_destination_daemon(sandbox):
    """While the state is loaded: the program goes on at the source, and the load command is no more."""
    pair = Pair(sandbox)
    mark = os.path.join(sandbox.path, "mark")
    pair.receive(load=f"touch {mark}; sleep 1000")
    verb = pair.begin()
    wait_until(lambda: os.path.exists(mark), 20, "the load command runs")
    os.kill(pair.b.process.pid, signal.SIGKILL)
    pair.b.process.wait()
    pair.finish(verb, code=1)
    pair.check_stayed()
    wait_until(lambda: run("pgrep", "-f", "sleep 1000", check=False).stdout == "", 10, "the load command ends")
    pair.b.start()
    pair.fresh_destination()
    pair.migrate()
    pair.check_arrived()
    pair.forget()


def mover_killed_before_release(sandbox, side):
    """Its sockets close; that must not look like the end of the state."""
    pair = Pair(sandbox)
    mark = os.path.join(sandbox.path, "mark")
    eof = os.path.join(sandbox.path, "eof")
    load = f"touch {mark}; cat >/dev/null; touch {eof}"
    pair.receive(load=load)
    verb = pair.begin(save="head -c 100000 /dev/zero; sleep 1000")
    wait_until(lambda: os.path.exists(mark), 20, "the load command runs")
    (pair.a if side == "source" else pair.b).kill_mover()
    pair.finish(verb, code=1)
    pair.check_stayed()
    pair.b.wait_state(pair.name, ("failed", "cancelled"), 40)
    need(not os.path.exists(eof), "the load command was told that its input ended")
    need(run("pgrep", "-f", "sleep 1000", check=False).stdout == "", "a command was left behind")
    pair.fresh_destination()
    pair.migrate()
    pair.check_arrived()
    pair.forget()


@e2e()
def process_kill_source_mover_in_save(sandbox):
    mover_killed_before_release(sandbox, "source")


@e2e()
def process_kill_destination_mover_in_load(sandbox):
    mover_killed_before_release(sandbox, "destination")


@e2e()
def process_kill_movers_in_postcopy(sandbox):
    """Both, several times, while the program works and changes its layout."""
    pair = Pair(sandbox, "--mib", "64", mbit=200)
    pair.receive()
    verb = pair.begin("--mode", "postcopy")
    for _ in range(4):
        state = pair.b.wait_state(pair.name, AFTER_RELEASE)["state"]
        if state == "done":
            break
        for host in (pair.a, pair.b):
            found = host.movers()
            if found:
                os.kill(found[0], signal.SIGKILL)
        time.sleep(0.7)
    pair.network.limit(None)
    pair.finish(verb)
    pair.check_arrived()
    pair.forget()


@e2e()
def process_many_mappings(sandbox):
    """A program that has mapped its memory in many pieces by the time its mover is replaced; nothing stays registered."""
    pair = Pair(sandbox, "--mib", "64", mbit=200)
    pair.receive()
    verb = pair.begin("--mode", "postcopy")
    pair.b.wait_state(pair.name, AFTER_RELEASE)
    pair.destination.ask("scatter")
    need(pair.b.state(pair.name) != "done", "memory should still be on its way")
    pair.b.kill_mover()
    pair.network.limit(None)
    pair.finish(verb)
    pair.check_arrived()
    pair.forget()


@e2e()
def process_device_connection_cut(sandbox):
    """In the middle of the state, all other connections stand: that is no end of it."""
    pair = Pair(sandbox)
    relay = Relay(sandbox, pair.a.namespace, (pair.b.address, 7466))
    relay.cut_kinds_after = {DEVICE: 50000}
    eof = os.path.join(sandbox.path, "eof")
    pair.receive(load=f"cat >/dev/null; touch {eof}")
    pair.finish(pair.begin(to=relay.address, save="head -c 1000000 /dev/zero"), code=1)
    pair.check_stayed()
    pair.b.wait_state(pair.name, ("failed", "cancelled"), 40)
    need(not os.path.exists(eof), "the load command was told that its input ended")
    pair.fresh_destination()
    relay.cut_kinds_after = {}
    pair.receive()
    pair.finish(pair.begin(to=relay.address))
    pair.check_arrived()
    pair.forget()


@e2e()
def process_stop_daemon(sandbox):
    """SIGTERM to the source's memferryd while the state is saved: the program goes on, memferryd ends with 0."""
    pair = Pair(sandbox)
    mark = os.path.join(sandbox.path, "mark")
    pair.receive()
    verb = pair.begin(save=f"touch {mark}; sleep 1000")
    wait_until(lambda: os.path.exists(mark), 20, "the command runs")
    need(pair.a.stop(20) == 0, "memferryd should end with 0")
    need(verb.wait().code in (1, 3), "the migration should have failed")
    pair.check_stayed()
    pair.b.wait_state(pair.name, ("failed", "cancelled"), 40)
    pair.a.start()
    pair.fresh_destination()
    pair.migrate()
    pair.check_arrived()
    pair.forget()


@e2e(limit_s=300)
def process_hurt_at_random(sandbox):
    """
    To and fro, with movers killed and links cut at random moments, in every mode: the program works at one place,
    with every page right, and the next migration begins from there.
    """
    pair = Pair(sandbox, "--mib", "24", mbit=200)
    draw = random.Random(4)
    for turn in range(10):
        mode = draw.choice(("hybrid", "postcopy", "precopy"))
        relay = Relay(sandbox, pair.a.namespace, (pair.b.address, 7466), port=7500 + turn)
        pair.receive()
        verb = pair.begin("--mode", mode, to=relay.address)
        time.sleep(draw.uniform(0.0, 1.2))
        victim = draw.choice(("link", "source", "destination"))
        if victim == "link":
            relay.cut()
        else:
            for pid in (pair.a if victim == "source" else pair.b).movers():
                os.kill(pid, signal.SIGKILL)
        answer = verb.wait(60)
        relay.close()
        print(f"turn {turn}, {mode}, hurt {victim}: {answer.json['state']}: {answer.json['reason']}")
        if answer.code == 0:
            pair.check_arrived()
            pair.forget()
            pair.turn()
            continue
        need(answer.code == 1, f"before RELEASE it fails: {answer}")
        pair.check_stayed()
        pair.b.wait_state(pair.name, ("failed", "cancelled", "waiting"), 40)
        if pair.b.state(pair.name) == "waiting":
            pair.b.expect(0, "cancel", pair.name)
        pair.fresh_destination()


@e2e()
def process_target_dies(sandbox):
    """The source's process in a round, then the destination's while it waits: each ends the session, by name."""
    pair = Pair(sandbox)
    pair.receive()
    verb = pair.begin("--mode", "hybrid", "--bandwidth", "2M")
    pair.a.wait_state(pair.name, "precopy")
    time.sleep(0.3)
    pair.source.kill()
    answer = pair.finish(verb, code=1)
    need("process of prog" in answer.json["reason"], f"the reason: {answer}")
    pair.b.wait_state(pair.name, ("failed", "cancelled", "waiting"), 40)
    if pair.b.state(pair.name) == "waiting":
        pair.b.expect(0, "cancel", pair.name)
    pair.source = Program(pair.sandbox, pair.a, pair.name)
    pair.fresh_destination()
    pair.receive()
    pair.destination.kill()
    wait_until(lambda: pair.b.state(pair.name) == "failed", 10, "the session ends with its process")
    need("process of prog" in pair.b.status(pair.name)["reason"], str(pair.b.status(pair.name)))
    pair.forget()


@e2e(limit_s=120)
def process_becomes_another(sandbox):
    """execve takes the memory away from under a session, at either side; nothing tells of it."""
    pair = Pair(sandbox)
    pair.receive()
    pair.destination.ask("exec")
    wait_until(lambda: pair.b.state(pair.name) == "failed", 10, "the session ends with the memory")
    need("became another program" in pair.b.status(pair.name)["reason"], str(pair.b.status(pair.name)))
    pair.fresh_destination()
    pair.receive()
    verb = pair.begin("--mode", "hybrid", "--bandwidth", "2M")
    pair.a.wait_state(pair.name, "precopy")
    pair.source.ask("exec")
    answer = pair.finish(verb, code=1)
    need("became another program" in answer.json["reason"], f"the reason: {answer}")
    pair.destination.kill()
    pair.forget()


@e2e(limit_s=120)
def process_becomes_another_when_saved(sandbox):
    """Without a userfaultfd at the source, and in the last moment: the new program is not what is released."""
    pair = Pair(sandbox)
    pair.receive()
    verb = pair.begin("--mode", "postcopy",
                      save=f"{pair.source.command('save')}; {pair.source.command('exec')} >&2; sleep 0.2")
    answer = pair.finish(verb, code=1)
    need("became another program" in answer.json["reason"], f"the reason: {answer}")
    time.sleep(0.3)
    need(pair.source.process.poll() is None and pair.source.state() == "S", "the new program should go on")
    pair.source.kill()
    pair.source = Program(pair.sandbox, pair.a, pair.name)
    pair.b.wait_state(pair.name, ("failed", "cancelled"), 40)
    pair.fresh_destination()
    pair.receive(load=f"{pair.destination.command('load')}; {pair.destination.command('exec')}; sleep 0.2")
    answer = pair.finish(pair.begin("--mode", "postcopy"), code=1)
    need("became another program" in answer.json["reason"], f"the reason: {answer}")
    pair.source.works()
    pair.source.verify()
    pair.destination.kill()
    pair.forget()


@e2e()
def process_kill_daemon_in_round(sandbox):
    """Its layout is being followed: with nobody left to read its events the program must not wait for ever."""
    pair = Pair(sandbox, "--ops", "wwvdnmufp")
    pair.receive()
    pair.begin("--mode", "hybrid", "--bandwidth", "4M")
    pair.a.wait_state(pair.name, "precopy")
    time.sleep(0.3)
    os.kill(pair.a.process.pid, signal.SIGKILL)
    pair.a.process.wait()
    pair.check_stayed()
    pair.a.start()
    if pair.b.state(pair.name) in ("waiting", "precopy"):
        pair.b.run("cancel", pair.name)
    pair.b.wait_state(pair.name, ("failed", "cancelled"), 40)
    pair.fresh_destination()
    pair.migrate()
    pair.check_arrived()
    pair.forget()


@e2e(limit_s=240)
def process_cancel_at_random(sandbox):
    """Time and again, until it was too late once: then it has arrived."""
    pair = Pair(sandbox, mbit=800)
    draw = random.Random(77)
    for _ in range(12):
        mode = draw.choice(("hybrid", "postcopy", "precopy"))
        pair.receive()
        verb = pair.begin("--mode", mode)
        time.sleep(draw.uniform(0.0, 0.6))
        host = draw.choice((pair.a, pair.b))
        host.memferry("cancel", pair.name)
        answer = verb.wait(60)
        if answer.code == 0:
            break
        need(answer.code == 1, f"cancelled in mode {mode}: {answer}")
        pair.source.works()
        pair.b.wait_state(pair.name, ("failed", "cancelled", "waiting"), 40)
        if pair.b.state(pair.name) == "waiting":
            pair.b.expect(0, "cancel", pair.name)
        pair.fresh_destination()
    else:
        pair.source.verify()
        pair.migrate()
    pair.check_arrived()
    pair.forget()


# ---- refusals ----

@e2e()
def process_refusals(sandbox):
    """By name, before anything is touched."""
    pair = Pair(sandbox)

    def refused(expected, *arguments, program=pair.source):
        answer = pair.a.memferry("migrate", "other", "--pid", program.pid, "--save", "true", "--to",
                                 pair.b.address, *arguments)
        need(answer.code == 1 and re.search(expected, answer.err), f"should refuse with {expected!r}: {answer}")

    refused("does not map memfd:nothing", "--region", "x=memfd:nothing")
    refused("has no memory that can be migrated", program=type("P", (), {"pid": os.getpid()}))
    gone = Program(sandbox, pair.a, "gone")
    gone.kill()
    refused("no process|is gone", program=gone)
    refused("nothing waits for other .*memferry receive other --pid PID --load COMMAND")
    # The two hosts must have the same regions.
    pair.receive("--region", "heap0=memfd:heap0")
    answer = pair.a.memferry("migrate", pair.name, *pair.source_commands(), "--to", pair.b.address)
    need(answer.code == 1 and "1" in answer.err, f"one region there, two here: {answer}")
    answer = pair.a.memferry("migrate", pair.name, *pair.source_commands(), "--region", "heap0=memfd:heap1", "--region",
                             "heap1=memfd:heap0", "--to", pair.b.address)
    need(answer.code == 1, f"still two here: {answer}")
    pair.b.expect(0, "cancel", pair.name)
    pair.check_stayed()
    # One that has a session already: two would run it on two hosts.
    pair.receive()
    again = pair.b.memferry("receive", "other", *pair.destination_commands())
    need(again.code == 1 and "session prog already" in again.err, f"a process can have one session: {again}")
    mark = os.path.join(sandbox.path, "mark")
    verb = pair.begin(save=f"touch {mark}; sleep 1; {pair.source.command('save')}")
    wait_until(lambda: os.path.exists(mark), 20, "it is saved")
    refused("session prog already")
    pair.finish(verb)
    pair.check_arrived()
    pair.forget()


@e2e()
def process_serves_itself(sandbox):
    """What a userfaultfd of somebody else's has not filled yet is missing: refused, also when it comes later."""
    pair = Pair(sandbox)
    pair.receive()
    verb = pair.begin("--mode", "hybrid", "--bandwidth", "2M")
    pair.a.wait_state(pair.name, "precopy")
    pair.source.ask("serve")
    pair.a.expect(0, "switch", pair.name)
    answer = pair.finish(verb, code=1)
    need("served by a userfaultfd" in answer.json["reason"], f"the reason: {answer}")
    pair.check_stayed()
    pair.fresh_destination()
    for mode in "postcopy", "hybrid":
        pair.receive()
        answer = pair.a.memferry("migrate", pair.name, *pair.source_commands(), "--to", pair.b.address, "--mode", mode)
        need(answer.code == 1 and "served by a userfaultfd" in answer.err, f"should be refused in {mode}: {answer}")
        pair.b.expect(0, "cancel", pair.name)
    pair.check_stayed()


@e2e()
def process_chosen_region(sandbox):
    """One of two regions, named on each host; the other is none of memferry's business."""
    pair = Pair(sandbox, "--regions", "1", "--ops", "wvdnp")  # an address is told, so nothing is moved
    pair.receive("--region", "memory=memfd:heap0")
    pair.finish(pair.begin("--region", f"memory={address_of(pair.source, '/memfd:heap0')}"))
    pair.check_arrived()
    pair.forget()


def address_of(program, path):
    """An address of a mapping, as an operator finds it."""
    with open(f"/proc/{program.pid}/maps", encoding="utf-8") as maps:
        for line in maps:
            if path in line:
                return "0x" + line.split("-")[0]
    raise HarnessError(f"{program.name} does not map {path}")


@e2e()
def process_check(sandbox):
    """`memferry check --pid` says what would be done."""
    pair = Pair(sandbox, "--ops", "wv")  # no children, which share the memory
    answer = pair.a.expect(0, "check", "--pid", pair.source.pid, "--json").json
    need(answer["able"] and {row["name"] for row in answer["regions"]} == {"heap0", "heap1"}, str(answer))
    need(all(row["size_bytes"] == 16 << 20 and row["kind"] == "tmpfs" for row in answer["regions"]), str(answer))
    need(answer["private_bytes"] > 0, str(answer))
    plain = pair.a.expect(0, "check", "--pid", pair.source.pid).out
    need("heap0" in plain and "private memory" in plain, plain)
    answer = pair.a.expect(1, "check", "--pid", os.getpid(), "--json").json
    need(not answer["able"] and answer["reason"], str(answer))

    # Private memory is looked at as well,
    with open(f"/proc/{pair.source.pid}/maps", encoding="utf-8") as maps:
        lines = [line.split() for line in maps]
    heap = next(line[0] for line in lines if line[-1] == "[heap]")
    answer = pair.a.expect(0, "check", "--pid", pair.source.pid, "--region", f"mine=anon:{heap}", "--json").json
    start, end = (int(addr, 16) for addr in heap.split("-"))
    need([(row["name"], row["path"], row["kind"], row["size_bytes"]) for row in answer["regions"]] ==
         [("mine", f"anon:{heap}", "private", end - start)], str(answer))
    answer = pair.a.expect(1, "check", "--pid", pair.source.pid, "--region", "mine=anon:no-such", "--json").json
    need(not answer["able"] and "no-such" in answer["reason"], str(answer))
    # and so is who else maps the memory.
    shared = next(line for line in lines if any("heap0" in word for word in line[5:]) and line[1].endswith("s"))
    with open(f"/proc/{pair.source.pid}/map_files/{shared[0]}", "rb") as file:
        with mmap.mmap(file.fileno(), 4096, access=mmap.ACCESS_READ):
            answer = pair.a.expect(1, "check", "--pid", pair.source.pid, "--json").json
            need(not answer["able"] and f"pid {os.getpid()}" in answer["reason"], str(answer))
    pair.check_stayed()
