#!/usr/bin/env python3
# SPDX-License-Identifier: LGPL-2.1-or-later
"""memferry against control.c over scripted sessions (fake_sessions.c): what a user sees, what a script
reads, and what a client that misbehaves achieves (nothing).

usage: test_cli.py MEMFERRY FAKE-MEMFERRYD
"""
import json
import os
import pty
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
import unittest

MEMFERRY, FAKE = (os.path.abspath(p) for p in sys.argv[1:3])
FIELDS = ["name", "id", "role", "state", "reason", "ram_bytes", "blackout_us", "total_us", "sent_bytes",
          "data_pages", "zero_pages", "hole_pages", "faults", "mover_restarts", "mode", "rounds",
          "precopy_bytes", "postcopy_bytes", "dirty_pages_at_switch", "dirty_rate_pages_s",
          "unconfirmed_at_release", "adapter", "pid"]
FAULTS = ["count", "p50_us", "p99_us", "p999_us", "max_us"]
LIMIT_S = 30  # of any one command: nothing here takes a second


class Case(unittest.TestCase):
    def setUp(self):
        self.directory = tempfile.TemporaryDirectory(prefix="mf-cli-")
        self.addCleanup(self.directory.cleanup)
        self.runtime = os.path.join(self.directory.name, "run")
        self.daemon = self.start_daemon()
        self.addCleanup(self.stop_daemon)

    def start_daemon(self):
        log = open(os.path.join(self.directory.name, "log"), "a+")
        self.addCleanup(log.close)
        daemon = subprocess.Popen([FAKE, self.runtime], stdout=subprocess.PIPE, stderr=log, text=True)
        self.assertEqual(daemon.stdout.readline(), "ready\n")
        daemon.stdout.close()
        return daemon

    def stop_daemon(self):
        if self.daemon.poll() is None:
            self.daemon.terminate()
        self.assertEqual(self.daemon.wait(LIMIT_S), 0, "the daemon did not end cleanly")

    def log(self):
        with open(os.path.join(self.directory.name, "log")) as file:
            return file.read()

    def command(self, *args):
        return [MEMFERRY, "--runtime-dir", self.runtime, *args]

    def run_cli(self, *args, code=0, cwd=None):
        done = subprocess.run(self.command(*args), capture_output=True, text=True, timeout=LIMIT_S, cwd=cwd)
        self.assertEqual(done.returncode, code, (args, done.stdout, done.stderr))
        if code:
            self.assertRegex(done.stderr, "(?m)^memferry: .")
        return done

    def json(self, *args, code=0):
        done = self.run_cli(*args, "--json", code=code)
        value = json.loads(done.stdout)
        self.assertIsInstance(value, dict)
        return value

    def assert_session(self, value):
        self.assertEqual(list(value), FIELDS)
        self.assertEqual(list(value["faults"]), FAULTS)

    def migrate(self, host, *more):
        return ("migrate", "vm", "--qmp", "q", "--to", host, *more)

    def wait_state(self, name, state):
        end = time.monotonic() + LIMIT_S
        while self.json("status", name)["state"] != state:
            self.assertLess(time.monotonic(), end, f"{name} never became {state}")
            time.sleep(0.02)

    def raw(self):
        peer = socket.socket(socket.AF_UNIX)
        self.addCleanup(peer.close)
        peer.connect(os.path.join(self.runtime, "control.sock"))
        peer.settimeout(LIMIT_S)
        return peer

    def drain(self, peer):
        data = b""
        try:
            while chunk := peer.recv(65536):
                data += chunk
        except ConnectionResetError:
            pass
        return data


class Verbs(Case):
    def test_migrate_says_what_it_did(self):
        done = self.run_cli(*self.migrate("ok"))
        self.assertIn("Done: vm runs on ok:7466", done.stdout)
        self.assertIn("stood still for 43 ms", done.stdout)
        self.assertIn("105,472 pages had data", done.stdout)
        self.assertIn("told to quit", done.stdout)
        for state in ("connecting", "precopy", "switchover", "postcopy"):
            self.assertIn(f"vm: {state}:", done.stderr)

    def test_migrate_json(self):
        done = self.run_cli(*self.migrate("ok", "--json"))
        value = json.loads(done.stdout)
        self.assert_session(value)
        self.assertEqual((value["state"], value["role"], value["blackout_us"]), ("done", "source", 43210))
        self.assertEqual(value["faults"]["p50_us"], 180.5)
        self.assertEqual(done.stderr, "")

    def test_migrate_detached(self):
        done = self.run_cli(*self.migrate("ok", "--detach"))
        self.assertIn("has started", done.stdout)
        self.assertEqual(done.stderr, "")
        self.wait_state("vm", "done")

    def test_migrate_detached_json(self):
        value = self.json(*self.migrate("stay-precopy", "--detach"))
        self.assert_session(value)
        self.assertIn(value["state"], ("connecting", "precopy"))

    def test_migrate_tells_of_rounds(self):
        done = self.run_cli(*self.migrate("rounds"))
        self.assertRegex(done.stderr, "vm: precopy: .*; [0-9]+ %, round 1, 256 MiB left")
        self.assertIn("4 rounds sent 51 MiB while the guest ran here, ", done.stdout)
        self.assertIn("followed it: it had written 2,345 pages again.", done.stdout)
        value = self.json("status", "vm")
        self.assertEqual((value["mode"], value["rounds"], value["dirty_pages_at_switch"]), ("hybrid", 4, 2345))
        self.assertEqual((value["dirty_rate_pages_s"], value["unconfirmed_at_release"]), (4120, 262144))
        self.assertEqual(value["precopy_bytes"] + value["postcopy_bytes"], value["sent_bytes"])
        text = self.run_cli("status", "vm").stdout
        self.assertIn("mode            hybrid", text)
        self.assertIn("rounds          4; the guest writes 4,120 pages a second", text)
        self.assertIn("262,144 pages not confirmed, 2,345 of them written again", text)
        self.assertIn("before the guest changed hosts", text)

    def test_migrate_postcopy_has_no_rounds(self):
        done = self.run_cli(*self.migrate("ok", "--mode", "postcopy"))
        self.assertNotIn("round", done.stdout + done.stderr)
        value = self.json("status", "vm")
        self.assertEqual((value["mode"], value["rounds"]), ("postcopy", 0))

    def test_options_arrive(self):
        for name, options, mode, asked in (
                ("asked-plain", (), "hybrid", "rounds 0, after 0 s, blackout 0 ms, fallback 0"),
                ("asked-hybrid", ("--mode=hybrid", "--max-rounds", "3", "--switch-after", "60"), "hybrid",
                 "rounds 3, after 60 s, blackout 0 ms, fallback 0"),
                ("asked-precopy", ("--max-blackout", "50", "--fallback", "--mode", "precopy"), "precopy",
                 "rounds 0, after 0 s, blackout 50 ms, fallback 1")):
            self.run_cli("migrate", name, "--qmp", "q", "--to", "stay-precopy", "--detach", *options)
            self.wait_state(name, "precopy")
            value = self.json("status", name)
            self.assertEqual((value["mode"], value["reason"]), (mode, asked))

    def test_fallback_is_told(self):
        done = self.run_cli("migrate", "falls-back", "--qmp", "q", "--to", "rounds", "--mode", "precopy",
                            "--fallback")
        self.assertIn("falls-back: the migration is hybrid now instead of precopy", done.stderr)
        self.assertEqual(self.json("status", "falls-back")["mode"], "hybrid")

    def test_reason_is_told_while_the_state_stays(self):
        process = self.popen("migrate", "slow-vm", "--qmp", "q", "--to", "stay-precopy", "--mode", "precopy")
        self.wait_for_session("slow-vm", "precopy")
        lines = iter(process.stderr.readline, "")
        self.assertTrue(any(line == "slow-vm: precopy: the guest writes faster than is sent\n"
                            for line in lines))
        self.run_cli("cancel", "slow-vm")
        _, err = process.communicate(timeout=LIMIT_S)
        self.assertNotIn("writes faster", err)

    def test_set_bandwidth(self):
        self.run_cli(*self.migrate("stay-precopy", "--detach", "--bandwidth", "2.5G"))
        self.assertIn("limit           2.5 Gbit/s", self.run_cli("status", "vm").stdout)
        done = self.run_cli("set", "vm", "bandwidth=100M")
        self.assertEqual(done.stdout, "vm: memory is sent at 100 Mbit/s at most.\n")
        self.assertIn("limit           100 Mbit/s", self.run_cli("status", "vm").stdout)
        for none in ("none", "0"):
            self.assertIn("without a limit", self.run_cli("set", "vm", "bandwidth=" + none).stdout)
            self.assertNotIn("limit", self.run_cli("status", "vm").stdout)
        self.assertIn("no session nobody", self.run_cli("set", "nobody", "bandwidth=1M", code=1).stderr)
        self.run_cli("cancel", "vm")
        self.assertIn("has ended", self.run_cli("set", "vm", "bandwidth=1M", code=1).stderr)

    def test_switch(self):
        process = self.popen(*self.migrate("stay-precopy"))
        self.wait_for_session("vm", "precopy")
        self.assertIn("changes hosts now", self.run_cli("switch", "vm").stdout)
        out, err = process.communicate(timeout=LIMIT_S)
        self.assertEqual(process.returncode, 0, err)
        self.assertIn("Done:", out)
        self.assertIn("no memory ahead", self.run_cli("switch", "vm", code=1).stderr)
        self.assertIn("no session nobody", self.run_cli("switch", "nobody", code=1).stderr)

    def test_migrate_fails(self):
        done = self.run_cli(*self.migrate("fail"), code=1)
        self.assertIn("memferry: vm: the link to fail:7466 broke; try again\n", done.stderr)
        self.assertIn("the guest is safe", done.stderr)
        self.assertEqual(done.stdout, "")
        self.run_cli("forget", "vm")
        value = self.json(*self.migrate("fail"), code=1)
        self.assert_session(value)
        self.assertEqual((value["state"], value["reason"]), ("failed", "vm: the link to fail:7466 broke; try again"))

    def test_migrate_refused(self):
        value = self.json(*self.migrate("elsewhere"), code=1)
        self.assert_session(value)
        self.assertEqual((value["name"], value["state"], value["role"]), ("vm", "failed", "source"))
        self.assertIn("share=on", value["reason"])

    def test_migrate_recovers(self):
        done = self.run_cli(*self.migrate("recover"))
        self.assertIn("vm: recovering:", done.stderr)
        self.assertIn("Done:", done.stdout)

    def test_migrate_lost_after_release(self):
        done = self.run_cli(*self.migrate("lost"), code=4)
        self.assertNotIn("the guest is safe", done.stderr)

    def test_receive(self):
        done = self.run_cli("receive", "vm", "--qmp", "q.qmp")
        self.assertIn("vm is armed", done.stdout)
        value = self.json("status", "vm")
        self.assert_session(value)
        self.assertEqual((value["role"], value["state"], value["id"]), ("destination", "waiting", ""))
        done = self.run_cli("receive", "vm2", "--qmp", "refuse.qmp", code=1)
        self.assertIn("QEMU does not wait", done.stderr)

    def test_paths_are_made_absolute(self):
        # A directory that is called so is seen by the daemon only in an absolute path.
        inside = os.path.join(self.directory.name, "refuse")
        os.mkdir(inside)
        self.run_cli("receive", "vm", "--qmp", "plain.qmp", cwd=inside, code=1)
        self.run_cli("receive", "vm", "--qmp", "plain.qmp", cwd="/")

    def test_status(self):
        self.assertIn("No sessions", self.run_cli("status").stdout)
        self.assertEqual(self.json("status"), {"sessions": []})
        self.run_cli("receive", "b", "--qmp", "q")
        self.run_cli("migrate", "a", "--qmp", "q", "--to", "ok")
        table = self.run_cli("status").stdout.splitlines()
        self.assertEqual(len(table), 3)
        self.assertTrue(table[0].startswith("NAME"))
        sessions = self.json("status")["sessions"]
        self.assertEqual(sorted(s["name"] for s in sessions), ["a", "b"])
        for session in sessions:
            self.assert_session(session)
        self.assertIn("blackout        43 ms", self.run_cli("status", "a").stdout)
        self.assertIn("armed", self.run_cli("status", "b").stdout)

    def test_status_of_nothing(self):
        self.assertIn("no session nobody", self.run_cli("status", "nobody", code=1).stderr)
        value = self.json("status", "nobody", code=1)
        self.assert_session(value)
        self.assertIsNone(value["state"])
        self.assertIn("nobody", value["reason"])

    def test_reason_that_is_not_utf8(self):
        self.run_cli(*self.migrate("stay-recovering", "--detach"))
        self.wait_state("vm", "recovering")
        self.assertEqual(self.json("status", "vm")["reason"], "mover ??[2J?? died")

    def test_cancel_and_forget(self):
        self.run_cli(*self.migrate("stay-precopy", "--detach"))
        self.assertIn("not ended", self.run_cli("forget", "vm", code=1).stderr)
        self.assertIn("cancelled", self.run_cli("cancel", "vm").stdout)
        self.assertEqual(self.json("status", "vm")["state"], "cancelled")
        self.run_cli("forget", "vm")
        self.run_cli("status", "vm", code=1)
        self.assertIn("no such session", self.run_cli("cancel", "vm", code=1).stderr)

    def test_cancel_after_release(self):
        self.run_cli(*self.migrate("stay-postcopy", "--detach"))
        self.wait_state("vm", "postcopy")
        self.assertIn("changed hosts", self.run_cli("cancel", "vm", code=4).stderr)

    def test_cancelled_by_another(self):
        process = self.popen(*self.migrate("stay-precopy"))
        self.wait_for_session("vm", "precopy")
        self.run_cli("cancel", "vm")
        _, err = process.communicate(timeout=LIMIT_S)
        self.assertEqual(process.returncode, 1, err)
        self.assertIn("cancelled", err)

    def test_forgotten_while_watched(self):
        process = self.popen("migrate", "forgettable", "--qmp", "q", "--to", "stay-precopy")
        self.wait_for_session("forgettable", "precopy")
        self.run_cli("forget", "forgettable")
        _, err = process.communicate(timeout=LIMIT_S)
        self.assertEqual(process.returncode, 1)
        self.assertIn("forgotten", err)

    # ---- Ctrl-C ----

    def popen(self, *args):
        process = subprocess.Popen(self.command(*args), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                   text=True)
        self.addCleanup(lambda: process.poll() is None and process.kill())
        return process

    def wait_for_session(self, name, state):
        end = time.monotonic() + LIMIT_S
        while name not in [s["name"] for s in self.json("status")["sessions"]]:
            self.assertLess(time.monotonic(), end)
            time.sleep(0.02)
        self.wait_state(name, state)

    def interrupt(self, host, state, *more, signum=signal.SIGINT):
        process = self.popen(*self.migrate(host, *more))
        self.wait_for_session("vm", state)
        process.send_signal(signum)
        out, err = process.communicate(timeout=LIMIT_S)
        return process.returncode, out, err

    def test_ctrl_c_before_release(self):
        code, out, err = self.interrupt("stay-precopy", "precopy")
        self.assertEqual((code, out), (1, ""), err)
        self.assertIn("cancelling", err)
        self.assertIn("the guest is safe", err)
        self.assertEqual(self.json("status", "vm")["state"], "cancelled")

    def test_ctrl_c_before_release_json(self):
        code, out, err = self.interrupt("stay-precopy", "precopy", "--json", signum=signal.SIGTERM)
        self.assertEqual((code, json.loads(out)["state"]), (1, "cancelled"), err)

    def test_ctrl_c_before_it_began(self):
        for more in ((), ("--json",)):
            process = self.popen(*self.migrate("stay-starting", *more))
            seen = 1 + len(more)
            end = time.monotonic() + LIMIT_S
            while self.log().count("stays in preflight") < seen:
                self.assertLess(time.monotonic(), end)
                time.sleep(0.01)
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=LIMIT_S)
            self.assertEqual(process.returncode, 1, err)
            self.assertIn("cancelled before it began", err)
            if more:
                value = json.loads(out)
                self.assert_session(value)
                self.assertEqual(value["state"], "cancelled")

    def test_ctrl_c_twice(self):
        process = self.popen(*self.migrate("stay-starting"))
        while "stays in preflight" not in self.log():
            time.sleep(0.01)
        os.kill(self.daemon.pid, signal.SIGSTOP)
        process.send_signal(signal.SIGINT)
        self.assertIn("cancelling", process.stderr.readline())
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=LIMIT_S)
        os.kill(self.daemon.pid, signal.SIGCONT)
        self.assertEqual(process.returncode, 1, err)
        self.assertIn("detached without waiting", err)

    def test_ctrl_c_after_release(self):
        code, out, err = self.interrupt("stay-postcopy", "postcopy")
        self.assertEqual((code, out), (4, ""), err)
        self.assertIn("detached: the guest already runs on the other host", err)
        self.assertEqual(self.json("status", "vm")["state"], "postcopy")

    def test_ctrl_c_while_recovering_json(self):
        code, out, err = self.interrupt("stay-recovering", "recovering", "--json")
        self.assertEqual((code, json.loads(out)["state"]), (4, "recovering"), err)

    # ---- memferryd comes to harm ----

    def test_daemon_dies(self):
        for host, state, code in (("stay-precopy", "precopy", 3), ("stay-postcopy", "postcopy", 4)):
            process = self.popen(*self.migrate(host, "--json"))
            self.wait_for_session("vm", state)
            # Until the client has been told as well.
            time.sleep(0.3)
            self.daemon.terminate()
            out, err = process.communicate(timeout=LIMIT_S)
            self.assertEqual(process.returncode, code, err)
            value = json.loads(out)
            self.assertEqual(value["state"], state)
            self.assertIn("memferryd", value["reason"])
            self.assertEqual(self.daemon.wait(LIMIT_S), 0)
            self.daemon = self.start_daemon()

    def test_unreachable(self):
        self.stop_daemon()
        self.assertFalse(os.path.exists(os.path.join(self.runtime, "control.sock")))
        for args in (("status",), ("cancel", "vm"), ("forget", "vm"), ("receive", "vm", "--qmp", "q"),
                     ("set", "vm", "bandwidth=none"), ("switch", "vm"), self.migrate("ok")):
            self.assertIn("cannot reach memferryd", self.run_cli(*args, code=3).stderr)
        self.assertEqual(self.json("status", code=3)["sessions"], [])
        value = self.json(*self.migrate("ok"), code=3)
        self.assert_session(value)
        self.assertEqual(value["state"], "failed")

    def test_stale_and_live_socket(self):
        second = subprocess.run([FAKE, self.runtime], capture_output=True, text=True, timeout=LIMIT_S)
        self.assertEqual(second.returncode, 1)
        self.assertIn("another memferryd serves", second.stderr)
        self.run_cli("status")
        self.daemon.kill()
        self.daemon.wait()
        self.assertIn("nobody listens", self.run_cli("status", code=3).stderr)
        self.daemon = self.start_daemon()
        self.run_cli("status")
        mode = os.stat(os.path.join(self.runtime, "control.sock")).st_mode & 0o777
        self.assertEqual(mode, 0o600)


class Usage(Case):
    """Every mistake is exit code 2, a sentence and a hint, and reaches no daemon."""

    MISTAKES = [
        ([], "say what to do"),
        (["migarte"], "did you mean 'migrate'"),
        (["zzzzzzzz"], "lists the verbs"),
        (["receive", "vm"], "needs --qmp PATH"),
        (["receive", "vm"], "needs --qmp PATH (of a QEMU) or --pid PID"),
        (["receive", "vm", "--qmp", "q", "--pid", "7"], "do not go together"),
        (["receive", "vm", "--qmp", "q", "--load", "true"], "goes with --pid only"),
        (["receive", "vm", "--load", "true"], "needs --pid PID"),
        (["receive", "vm", "--pid", "7"], "needs --load COMMAND"),
        (["migrate", "vm", "--pid", "7", "--to", "h"], "needs --save COMMAND"),
        (["migrate", "vm", "--pid", "7", "--save", "", "--to", "h"], "--save is empty"),
        (["migrate", "vm", "--pid", "1", "--save", "x", "--to", "h"], "the first process of a host can't be migrated"),
        (["migrate", "vm", "--pid", "self", "--save", "x", "--to", "h"], "not the id of a process"),
        (["migrate", "vm", "--pid", "7", "--save", "x" * 8192, "--to", "h"], "put it in a script"),
        (["migrate", "vm", "--pid", "7", "--save", "x", "--timeout", "0", "--to", "h"], "from 1 to 3600"),
        (["migrate", "vm", "--pid", "7", "--save", "x", "--region", "heap", "--to", "h"], "is not NAME=FILE"),
        (["migrate", "vm", "--pid", "7", "--save", "x", "--region", "a=b", "--to", "h"], "neither an absolute path"),
        (["migrate", "vm", "--pid", "7", "--save", "x", "--region", "a=/b", "--region", "a=/c", "--to", "h"],
         "given twice"),
        (["check", "--region", "a=/b"], "goes with --pid only"),
        (["check", "--pid", "7", "--save", "x"], "takes no --save"),
        (["receive", "--qmp", "q"], "needs the name"),
        (["receive", "vm", "--qmp"], "lacks its value"),
        (["receive", "vm", "--qmp="], "--qmp is empty"),
        (["receive", "vm", "--qmp", "a", "--qmp", "b"], "given twice"),
        (["receive", "vm", "--to", "h"], "takes no --to"),
        (["receive", "vm", "--qpm", "q"], "did you mean '--qmp'"),
        (["receive", "../vm", "--qmp", "q"], "not usable as a name"),
        (["receive", "-", "--qmp", "q"], "not usable as a name"),
        (["receive", "v" * 64, "--qmp", "q"], "not usable as a name"),
        (["receive", "vm", "vm2", "--qmp", "q"], "one name too many"),
        (["check", "vm"], "takes no name"),
        (["--json", "status"], "belongs behind it"),
        (["--runtime-dir"], "lacks its value"),
        (["migrate", "vm", "--qmp", "q"], "needs --to"),
        (["migrate", "vm", "--qmp", "q", "--to", ""], "names no host"),
        (["migrate", "vm", "--qmp", "q", "--to", ":1"], "names no host"),
        (["migrate", "vm", "--qmp", "q", "--to", "::1"], "brackets"),
        (["migrate", "vm", "--qmp", "q", "--to", "[::1"], "closing bracket"),
        (["migrate", "vm", "--qmp", "q", "--to", "[host]:1"], "not an IPv6 address"),
        (["migrate", "vm", "--qmp", "q", "--to", "[::1]7466"], "after the bracket"),
        (["migrate", "vm", "--qmp", "q", "--to", "h:0"], "1 to 65535"),
        (["migrate", "vm", "--qmp", "q", "--to", "h:65536"], "1 to 65535"),
        (["migrate", "vm", "--qmp", "q", "--to", "h:+1"], "1 to 65535"),
        (["migrate", "vm", "--qmp", "q", "--to", "h:"], "1 to 65535"),
        (["migrate", "vm", "--qmp", "q", "--to", "h h"], "not a host name"),
        (["migrate", "vm", "--qmp", "q", "--to", "h" * 300], "longer than a host name"),
        (["migrate", "vm", "--qmp", "q", "--to", "h", "--streams", "0"], "from 1 to 16"),
        (["migrate", "vm", "--qmp", "q", "--to", "h", "--streams", "17"], "from 1 to 16"),
        (["migrate", "vm", "--qmp", "q", "--to", "h", "--streams", "18446744073709551617"], "from 1 to 16"),
        (["migrate", "vm", "--qmp", "q", "--to", "h", "--streams", "four"], "from 1 to 16"),
        (["migrate", "vm", "--qmp", "q", "--to", "h", "--detach=yes"], "takes no value"),
        (["migrate", "vm", "--qmp", "q", "--to", "h", "--mode", "live"], "none of hybrid, postcopy and precopy"),
        (["migrate", "vm", "--qmp", "q", "--to", "h", "--mode="], "none of hybrid"),
        (["migrate", "vm", "--qmp", "q", "--to", "h", "--bandwidth", "fast"], "not a rate"),
        (["migrate", "vm", "--qmp", "q", "--to", "h", "--bandwidth", "10"], "suffix"),
        (["migrate", "vm", "--qmp", "q", "--to", "h", "--bandwidth", "0.1"], "suffix"),
        (["migrate", "vm", "--qmp", "q", "--to", "h", "--bandwidth", "2000T"], "more than 1000T"),
        (["migrate", "vm", "--qmp", "q", "--to", "h", "--bandwidth", "99999999999999999999"], "more than"),
        (["migrate", "vm", "--qmp", "q", "--to", "h", "--max-rounds", "0"], "from 1 to 1000"),
        (["migrate", "vm", "--qmp", "q", "--to", "h", "--switch-after", "1.5"], "of seconds from 1 to 604800"),
        (["migrate", "vm", "--qmp", "q", "--to", "h", "--mode", "precopy", "--max-blackout", "-1"],
         "of milliseconds from 1 to 60000"),
        (["migrate", "vm", "--qmp", "q", "--to", "h", "--fallback"], "goes with --mode precopy only"),
        (["migrate", "vm", "--qmp", "q", "--to", "h", "--fallback", "--mode", "postcopy"], "precopy only"),
        (["migrate", "vm", "--qmp", "q", "--to", "h", "--max-blackout", "20"], "precopy only"),
        (["migrate", "vm", "--qmp", "q", "--to", "h", "--mode", "postcopy", "--max-rounds", "2"],
         "--max-rounds does not go with --mode postcopy"),
        (["migrate", "vm", "--qmp", "q", "--to", "h", "--mode", "postcopy", "--switch-after", "2"],
         "--switch-after does not go with --mode postcopy"),
        (["set"], "needs the name"),
        (["set", "vm"], "lacks what to set"),
        (["set", "vm", "bandwidth"], "lacks its value"),
        (["set", "vm", "bandwidth="], "not a rate"),
        (["set", "vm", "bandwidth=10"], "suffix"),
        (["set", "vm", "bandwidth=1M", "bandwidth=1M"], "given twice"),
        (["set", "vm", "streams=2"], "bandwidth=RATE"),
        (["set", "bandwidth=1M"], "not usable as a name"),
        (["switch"], "needs the name"),
        (["switch", "vm", "now"], "one name too many"),
    ]

    def test_mistakes(self):
        for args, expected in self.MISTAKES:
            done = self.run_cli(*args, code=2)
            self.assertIn(expected, done.stderr, args)
            self.assertEqual(done.stdout, "")
            self.assertEqual(done.stderr.count("\n"), 1, done.stderr)
        self.assertEqual(self.log(), "")

    def test_mistake_in_json(self):
        value = self.json("migrate", "vm", "--qmp", "q", code=2)
        self.assert_session(value)
        self.assertEqual((value["name"], value["state"]), ("vm", "failed"))
        self.assertIn("--to", value["reason"])

        value = self.json("status", "vm", "vm2", code=2)
        self.assert_session(value)
        self.assertIsNone(value["state"])
        self.assertEqual(list(self.json("check", "vm", code=2)), ["able", "checks", "reason"])

    def test_help(self):
        text = self.run_cli("--help").stdout
        for verb in ("receive", "migrate", "status", "set", "switch", "cancel", "check", "forget"):
            self.assertIn(verb, text)
            for word in ("--help", "-h"):
                where = "" if verb in ("check", "monitor") else "[--runtime-dir DIR] "
                self.assertIn(f"usage: memferry {where}{verb}", self.run_cli(verb, word).stdout)
        self.assertRegex(self.run_cli("--version").stdout, r"^memferry \d+\.\d+\.\d+\n$")

    def test_options_where_people_put_them(self):
        self.run_cli("receive", "--qmp=q", "--", "vm")
        self.run_cli("status", "vm", "--json", "--runtime-dir=" + self.runtime)

    def test_full_disk(self):
        with open("/dev/full", "w") as full:
            done = subprocess.run(self.command("status"), stdout=full, stderr=subprocess.PIPE, text=True,
                                  timeout=LIMIT_S)
        self.assertEqual(done.returncode, 1)
        self.assertIn("cannot write", done.stderr)


class Check(Case):
    def test_check(self):
        self.stop_daemon()
        for more in ((), ("--json",)):
            done = subprocess.run(self.command("check", *more), capture_output=True, text=True,
                                  timeout=LIMIT_S)
            self.assertIn(done.returncode, (0, 1), done.stderr)
            self.assertEqual(done.stderr, "")
        value = json.loads(done.stdout)
        self.assertEqual(value["able"], done.returncode == 0)
        self.assertTrue(value["checks"])
        for row in value["checks"].values():
            self.assertEqual(list(row), ["state", "title", "found", "remedy"])
            self.assertIn(row["state"], ("ok", "missing", "limited"))


class Terminal(Case):
    def on_terminal(self, columns, *args):
        master, slave = pty.openpty()
        import fcntl
        import termios
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        process = subprocess.Popen(self.command(*args), stdin=slave, stdout=slave, stderr=slave)
        os.close(slave)
        output = b""
        while select.select([master], [], [], LIMIT_S)[0]:
            try:
                chunk = os.read(master, 65536)
            except OSError:  # EIO: nobody has the terminal open any more
                break
            output += chunk
        os.close(master)
        return process.wait(LIMIT_S), output.decode()

    def test_bar(self):
        code, output = self.on_terminal(100, *self.migrate("ok"))
        self.assertEqual(code, 0, output)
        self.assertRegex(output, r"\rvm  postcopy    \[=*> *\]  +\d+ %  .* of 1\.0 GiB  .*/s  1,234 faults")
        self.assertIn("\r\x1b[KDone: vm runs on", output)

    def test_rounds(self):
        code, output = self.on_terminal(120, *self.migrate("rounds"))
        self.assertEqual(code, 0, output)
        self.assertRegex(output, r"\rvm  precopy     \[=*> *\] +75 %  round 1, 256 MiB left")
        self.assertRegex(output, r"\rvm  precopy     \[=*> *\] +\d+ %  round [2-4], .* pages/s written")

    def test_narrow(self):
        for columns in (20, 60):
            _, output = self.on_terminal(columns, "migrate", f"vm{columns}", "--qmp", "q", "--to", "ok")
            for line in output.split("Done:")[0].replace("\x1b[K", "").split("\r"):
                self.assertLess(len(line), columns, line)


class Clients(Case):
    """Whatever a client does, the daemon answers or closes, and the next client is served."""

    def tearDown(self):
        self.assertIsNone(self.daemon.poll(), "the daemon died: " + self.log())
        self.assertEqual(self.json("status"), {"sessions": []})

    def frame(self, body):
        return struct.pack("<I", len(body)) + body

    def test_garbage(self):
        for data in (b"GET / HTTP/1.1\r\n\r\n", b"\xff" * 64, self.frame(b""), self.frame(b"\xff" * 10),
                     self.frame(b"\x0a\x02\x0a\x00"),  # receive without a name
                     self.frame(b"\x0a\x08\x0a\x02vm\x12\x02qq"),  # receive with a relative path
                     self.frame(b"\x12\x0b\x0a\x02vm\x12\x02/q\x1a\x00"),  # migrate without a host
                     self.frame(b"\x1a\x00") * 2,  # two requests
                     self.frame(b"\x3a\x00"),  # set without a name
                     self.frame(b"\x3a\x06\x0a\x02vm\x10\x01"),  # set a bandwidth of 1 bit/s
                     self.frame(b"\x42\x00"),  # switch without a name
                     self.frame(b"\x12\x0f\x0a\x02vm\x12\x02/q\x1a\x01b\x42\x02no"),  # an unknown mode
                     struct.pack("<I", (1 << 20) + 1)):
            peer = self.raw()
            peer.sendall(data)
            reply = self.drain(peer)
            self.assertGreater(len(reply), 4, data)
            self.assertEqual(struct.unpack("<I", reply[:4])[0], len(reply) - 4)

    def test_largest(self):
        peer = self.raw()
        # An unknown field of protobuf as large as the message may be, then `status`.
        status = b"\x1a\x00"
        room = (1 << 20) - len(status) - 5
        body = b"\x7a" + bytes([room & 0x7F | 0x80, room >> 7 & 0x7F | 0x80, room >> 14 | 0x80, 0])
        body += b"x" * room + status
        self.assertEqual(len(body), 1 << 20)
        peer.sendall(self.frame(body))
        self.assertEqual(self.drain(peer)[4:], b"\x08\x01")

    def test_pieces(self):
        peer = self.raw()
        for byte in self.frame(b"\x1a\x00"):
            peer.sendall(bytes([byte]))
            time.sleep(0.005)
        self.assertEqual(self.drain(peer)[4:], b"\x08\x01")

    def test_half_closed(self):
        peer = self.raw()
        peer.sendall(self.frame(b"\x1a\x00"))
        peer.shutdown(socket.SHUT_WR)
        self.assertEqual(self.drain(peer)[4:], b"\x08\x01")

    def test_truncated_and_gone(self):
        for cut in range(6):
            peer = self.raw()
            peer.sendall(self.frame(b"\x1a\x00")[:cut])
            peer.close()

    def test_crowd(self):
        peers = []
        for _ in range(100):
            peers.append(self.raw())
        # Those who wait in line are served once others have left.
        peers[-1].sendall(self.frame(b"\x1a\x00"))
        for peer in peers[:-1]:
            peer.close()
        self.assertEqual(self.drain(peers[-1])[4:], b"\x08\x01")

    def test_leaves_while_waiting(self):
        peer = self.raw()
        peer.sendall(self.frame(b"\x0a\x0c\x0a\x02vm\x12\x06/never"))
        while "never answered" not in self.log():
            time.sleep(0.01)
        peer.close()
        while "dropped a waiter" not in self.log():
            time.sleep(0.01)


class Watchers(Case):
    def test_client_that_leaves_harms_nothing(self):
        process = subprocess.Popen(self.command(*self.migrate("ok")), stdout=subprocess.DEVNULL,
                                   stderr=subprocess.PIPE)
        process.stderr.readline()
        process.kill()
        process.wait()
        process.stderr.close()
        self.wait_state("vm", "done")

    def test_watch_a_session_by_hand(self):
        self.run_cli(*self.migrate("ok", "--detach"))
        peer = self.raw()
        body = b"\x32\x04\x0a\x02vm"
        peer.sendall(struct.pack("<I", len(body)) + body)
        data = self.drain(peer)
        states, at = [], 0
        while at < len(data):
            length = struct.unpack("<I", data[at:at + 4])[0]
            states.append(data[at + 4:at + 4 + length])
            at += 4 + length
        self.assertEqual(at, len(data))
        self.assertTrue(states[-1].startswith(b"\x08\x01"), "the last reply says so")
        self.assertIn(b"done", states[-1])
        self.assertFalse(any(s.startswith(b"\x08\x01") for s in states[:-1]))


if __name__ == "__main__":
    unittest.main(argv=sys.argv[:1] + sys.argv[3:])
