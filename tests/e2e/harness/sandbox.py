# SPDX-License-Identifier: LGPL-2.1-or-later
"""
Everything that a run makes, so that everything goes away with it: processes, network namespaces,
mounts and files. Names carry the run's process id; what a killed run left behind is removed by the next.
"""
import ctypes
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time

PREFIX = "mfe2e"
SHM = "/dev/shm"
PR_SET_CHILD_SUBREAPER = 36

_libc = ctypes.CDLL(None, use_errno=True)


class HarnessError(Exception):
    """The test could not be carried out, or found a fault: one sentence for the person who reads it."""


class Skip(Exception):
    """The machine lacks what the test needs; says what."""


def run(*command, check=True, timeout=60, **options):
    """Run a short command; raise HarnessError with what it printed if it fails."""
    options.setdefault("stdin", subprocess.DEVNULL)
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True,
                          timeout=timeout, check=False, **options)
    if check and done.returncode:
        raise HarnessError(f"`{' '.join(map(str, command))}` failed with {done.returncode}: "
                           f"{(done.stderr or done.stdout).strip()}")
    return done


def alive(pid):
    """Is there such a process, and not merely its zombie?"""
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as stat:
            return stat.read().rsplit(")", 1)[1].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def children_of(pid):
    """Process ids of the living children of a process."""
    found = []
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        try:
            with open(f"/proc/{entry}/stat", encoding="ascii", errors="replace") as stat:
                fields = stat.read().rsplit(")", 1)[1].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(fields[1]) == pid and fields[0] not in "ZX":
            found.append(int(entry))
    return found


def wait_until(condition, seconds, what, interval=0.01):
    """Poll until condition() is true and return what it returned; HarnessError names what did not happen."""
    deadline = time.monotonic() + seconds
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() >= deadline:
            raise HarnessError(f"waited {seconds} s in vain: {what}")
        time.sleep(interval)


def remove_stale():
    """Remove what runs that were killed outright left behind."""
    for directory in (SHM, tempfile.gettempdir()):
        for name in os.listdir(directory):
            match = re.fullmatch(PREFIX + r"-(\d+)", name)
            if match and not alive(int(match[1])):
                _remove_tree(os.path.join(directory, name))
    names = run("ip", "netns", "list", check=False).stdout
    for match in re.finditer(PREFIX + r"(\d+)\w*", names):
        if not alive(int(match[1])):
            for pid in run("ip", "netns", "pids", match[0], check=False).stdout.split():
                os.kill(int(pid), signal.SIGKILL)
            run("ip", "netns", "delete", match[0], check=False)


def _remove_tree(path):
    with open("/proc/self/mounts", encoding="utf-8") as mounts:
        points = [line.split()[1] for line in mounts]
    for point in reversed(points):
        if point == path or point.startswith(path + "/"):
            run("umount", "-l", point, check=False)
    shutil.rmtree(path, ignore_errors=True)


class Sandbox:
    """
    Context manager: the files, processes and namespaces of one run.

    path: a private directory for sockets and logs; ram: one on tmpfs for RAM files.
    """

    def __init__(self):
        self.id = os.getpid()
        self.path = os.path.join(tempfile.gettempdir(), f"{PREFIX}-{self.id}")
        self.ram = os.path.join(SHM, f"{PREFIX}-{self.id}")
        self.processes = []
        self._undo = []

    def __enter__(self):
        if os.geteuid():
            raise HarnessError("these tests make network namespaces and trace QEMU: run them as root")
        remove_stale()
        # memferry-mover outlives a killed memferryd: as its new parent we can still end it.
        _libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        for path in (self.path, self.ram):
            _remove_tree(path)
            os.mkdir(path, 0o755)
        return self

    def __exit__(self, *_):
        for undo in reversed(self._undo):
            undo()
        self._undo.clear()
        for process in self.processes:
            if process.poll() is None:
                process.kill()
        for process in self.processes:
            process.wait()
        for pid in self.strays():
            os.kill(pid, signal.SIGKILL)
        deadline = time.monotonic() + 5
        while children_of(os.getpid()) and time.monotonic() < deadline:
            self._reap()
            time.sleep(0.01)
        self._reap()
        _remove_tree(self.ram)
        _remove_tree(self.path)

    def _reap(self):
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            pass

    def strays(self):
        """Living children that spawn() did not start: processes that lost their parent."""
        known = {process.pid for process in self.processes}
        return [pid for pid in children_of(os.getpid()) if pid not in known]

    def on_exit(self, undo):
        """Call undo() at the end, last registered first, while processes still run."""
        self._undo.append(undo)

    def spawn(self, command, log, **options):
        """Start a long-running process that dies with us; its output goes to the file `log`."""
        command = ["setpriv", "--pdeathsig", "KILL", *map(str, command)]
        with open(log, "ab") as output:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
                                       **options)
        self.processes.append(process)
        return process
