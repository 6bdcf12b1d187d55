# SPDX-License-Identifier: LGPL-2.1-or-later
"""The adapter for any process: a program of the tests' own (program.c) changes hosts while it works."""
import os
import random
import re
import shlex
import signal
import time

from common import FIELDS, MIGRATE_S, need
from harness.artifacts import test_program
from harness.host import Host, LeakCheck
from harness.net import Network, enter_namespace
from harness.sandbox import HarnessError, alive, run, wait_until
from harness.testing import e2e

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

    def begin(self, *options, **commands):
        """migrate in the background, to a destination that waits already."""
        return self.a.begin("migrate", self.name, *self.source_commands(**commands), "--to", self.b.address,
                            "--json", *options)

    def finish(self, verb, seconds=MIGRATE_S, code=0):
        answer = verb.wait(seconds)
        need(answer.code == code, f"migrate should exit {code}: {answer}")
        return answer

    def migrate(self, *options):
        self.receive()
        result = self.finish(self.begin(*options)).json
        need(set(result) == FIELDS, f"fields differ: {set(result) ^ FIELDS}")
        need(result["state"] == "done" and result["adapter"] == "process", f"should be done: {result}")
        need(self.b.status(self.name)["state"] == "done", "the destination should be done")
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
        need("beats=0 " in self.destination.ask("status") or not alive(self.destination.pid),
             "it worked at the destination")

    def fresh_destination(self):
        self.destination.kill()
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


@e2e()
def process_precopy(sandbox):
    _, result = whole_way(sandbox, "--mode", "precopy", "--max-blackout", "60000")
    need(result["mode"] == "precopy" and result["unconfirmed_at_release"] == 0, f"{result}")


@e2e()
def process_stopped_by_signal(sandbox):
    """No pause and no resume command: SIGSTOP at any point, SIGCONT; the state is in shared memory."""
    pair = Pair(sandbox, "--shared-model", "--ops", "wwwvvvdmup", destination=("--shared-model",
                                                                                "--ops", "wwwvvvdmup"))
    pair.source.works()
    beats = pair.source.beats()
    pair.receive(load="cat", resume=pair.destination.command("resume"))
    pair.finish(pair.begin(pause=None, save="true", resume=None))
    pair.check_arrived()
    need(beats, "it had worked")
    pair.forget()
