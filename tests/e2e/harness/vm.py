# SPDX-License-Identifier: LGPL-2.1-or-later
"""QEMU with a test guest."""
import json
import os
import re
import socket
import tempfile
import time

from .artifacts import QemuBuild, balloon_modules, guest_kernel, guest_program, initramfs
from .console import Console
from .net import enter_namespace
from .sandbox import HarnessError, wait_until


class Qmp:
    """A monitor of QEMU's: commands and their answers, events kept aside."""

    def __init__(self, path):
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(30)
        wait_until(lambda: self._try_connect(path), 20, f"QEMU opens {path}")
        self._file = self._socket.makefile("rw", encoding="utf-8")
        self.events = []
        json.loads(self._file.readline())
        self("qmp_capabilities")

    def _try_connect(self, path):
        try:
            self._socket.connect(path)
            return True
        except (FileNotFoundError, ConnectionRefusedError):
            return False

    def __call__(self, command, **arguments):
        self._file.write(json.dumps({"execute": command, "arguments": {
            key.replace("_", "-"): value for key, value in arguments.items()}}) + "\n")
        self._file.flush()
        while True:
            line = self._file.readline()
            if not line:
                raise HarnessError(f"QEMU went away while it was asked to {command}")
            answer = json.loads(line)
            if "event" in answer:
                self.events.append(answer)
            elif "error" in answer:
                raise HarnessError(f"QEMU refused {command}: {answer['error']['desc']}")
            else:
                return answer["return"]

    def status(self):
        return self("query-status")["status"]


class Vm:
    """
    One QEMU on one host.

    name:      of the VM; the files of the same VM on two hosts differ by the host's name.
    guest:     "linux" (TCG) or "bare" (KVM or TCG).
    ram_mib:   of each backend.
    backends:  kind of each: "tmpfs", "tmpfs-private", "memfd", "ram" (anonymous), or the path of a
               directory (hugetlbfs);
               None given: QEMU's own default.
    ram_id:    the backends are called ram0, ram1...
    ram_options: more for each memory-backend-file, such as ",align=2M".
    balloon:   a virtio balloon, and the guest loads its driver.
    incoming:  wait for a migration instead of booting, and then for `cont` unless autostart.
    """

    def __init__(self, sandbox, host, name, guest="linux", accel="tcg", ram_mib=256,
                 backends=("tmpfs",), incoming=False, autostart=False, sandboxed=False, qemu=None,
                 ram_id="ram", balloon=False, extra=(), ram_options=""):
        self.sandbox = sandbox
        self.name = name
        self.guest = guest
        self.ram_mib = ram_mib
        self.ram_files = []
        self.ram_id = ram_id
        self.ram_options = ram_options
        self.modules = balloon_modules() if balloon else ()
        directory = tempfile.mkdtemp(prefix=f"{host.side}-{name}-", dir=sandbox.path)
        self.log = os.path.join(directory, "qemu.log")
        self.kernel_log = os.path.join(directory, "kernel.log")
        self.qmp_path = os.path.join(directory, "qmp")
        paths = {part: os.path.join(directory, part) for part in ("monitor", "output", "input")}

        command = enter_namespace(host.namespace) + (qemu or QemuBuild()).command()
        command += ["-nodefaults", "-no-user-config", "-display", "none", "-name", name, "-accel", accel,
                    "-m", f"{ram_mib * (len(backends) or 1)}M", "-smp", "1",
                    "-qmp", f"unix:{self.qmp_path},server=on,wait=off",
                    "-qmp", f"unix:{paths['monitor']},server=on,wait=off",
                    "-chardev", f"socket,id=output,path={paths['output']},server=on,wait=off",
                    "-chardev", f"socket,id=input,path={paths['input']},server=on,wait=off",
                    "-chardev", f"file,id=kernel,path={self.kernel_log}",
                    "-device", "isa-debugcon,chardev=output,iobase=0xe9",
                    "-device", "isa-serial,chardev=kernel,iobase=0x3f8,irq=4",
                    "-device", "isa-serial,chardev=input,iobase=0x2f8,irq=3"]
        command += self._memory(host, backends)
        command += self._firmware()
        if sandboxed:
            command += ["-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,"
                                    "resourcecontrol=deny"]
        if balloon:
            command += ["-device", "virtio-balloon-pci,id=balloon0"]
        if incoming:
            command += ["-incoming", "defer"] + ["-S"] * (not autostart)
        command += list(extra)
        self.process = sandbox.spawn(command, self.log)
        try:
            self.qmp = Qmp(paths["monitor"])
            self.console = Console(paths["output"], paths["input"])
        except (HarnessError, OSError) as error:
            raise HarnessError(f"QEMU {name} on host {host.side} did not start: {error}; "
                               f"it said: {self.said()}") from error

    def _memory(self, host, backends):
        arguments = []
        for index, kind in enumerate(backends):
            ident = f"{self.ram_id}{index}"
            size = f"size={self.ram_mib}M"
            if kind in ("memfd", "ram"):
                share = "on" if kind == "memfd" else "off"
                arguments += ["-object", f"memory-backend-{kind},id={ident},share={share},{size}"]
                continue
            directory = kind if kind.startswith("/") else self.sandbox.ram
            path = os.path.join(directory, f"{host.side}-{self.name}-{ident}")
            share = "off" if kind == "tmpfs-private" else "on"
            arguments += ["-object",
                          f"memory-backend-file,id={ident},share={share},mem-path={path},{size}"
                          + self.ram_options]
            self.ram_files.append(path)
        if len(backends) == 1:
            return arguments + ["-machine", f"pc,memory-backend={self.ram_id}0"]
        arguments += ["-machine", "pc"]
        for index in range(len(backends)):
            cpus = "cpus=0," if index == 0 else ""
            arguments += ["-numa", f"node,nodeid={index},{cpus}memdev={self.ram_id}{index}"]
        return arguments

    def _firmware(self):
        if self.guest == "bare":
            return ["-bios", guest_program("guest-bare.bin"), "-device", "isa-debug-exit,iobase=0xf4"]
        return ["-kernel", guest_kernel(), "-initrd", initramfs(self.sandbox.path, self.modules),
                "-append", "console=ttyS0 quiet panic=-1 mitigations=off tsc=reliable"]

    def inflate(self, guest_mib, seconds=20):
        """Set the balloon so that the guest is left with guest_mib, and wait until it is."""
        self.qmp("balloon", value=guest_mib << 20)
        wait_until(lambda: self.qmp("query-balloon")["actual"] == guest_mib << 20, seconds,
                   f"the guest's balloon leaves it {guest_mib} MiB")

    @property
    def pid(self):
        return self.process.pid

    def start_work(self, used_mib, mode="random", rate=0, boot_s=60):
        """Wait for the guest to boot, have it fill its memory and work."""
        self.console.wait("READY", boot_s)
        self.console.ask(f"start {used_mib} {mode} {rate}", "FILLED", 120)

    def verify(self, seconds=120):
        """Have the guest check every page; raises HarnessError if one word is wrong. Returns the pages."""
        match = re.fullmatch(r"VERIFIED pages=(\d+) wrong=(\d+)",
                             self.console.ask("verify", "VERIFIED", seconds))
        if int(match[2]) or self.console.wrong():
            raise HarnessError(f"{match[2]} wrong pages of {match[1]}: {self.console.wrong()[:3]}")
        return int(match[1])

    def said(self):
        try:
            with open(self.log, encoding="utf-8", errors="replace") as log:
                return log.read().strip()[-500:]
        except FileNotFoundError:
            return ""

    def wait_exit(self, seconds):
        """QEMU's exit code once it has ended by itself."""
        wait_until(lambda: self.process.poll() is not None, seconds, f"QEMU {self.name} ends")
        return self.process.returncode

    def kill(self):
        self.process.kill()
        self.process.wait()


def _cpu_s(stat_path, count):
    """The first `count` of utime, stime, cutime and cstime in a stat file (proc(5)); 0 if it is gone."""
    try:
        with open(stat_path, encoding="ascii", errors="replace") as stat:
            fields = stat.read().rsplit(")", 1)[1].split()
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    return sum(map(int, fields[11:11 + count])) / os.sysconf("SC_CLK_TCK")


def thread_cpu_s(pid, tid):
    """Seconds of CPU a thread has used; 0 for one that is gone."""
    return _cpu_s(f"/proc/{pid}/task/{tid}/stat", 2)


def process_cpu_s(pid):
    """Seconds of CPU a process has used, with its threads and children that have ended; 0 if it is gone."""
    return _cpu_s(f"/proc/{pid}/stat", 4)


def kvm_works(sandbox, host):
    """Does a guest run under KVM here? Found by running one for a few seconds at most."""
    if not os.path.exists("/dev/kvm"):
        return False
    vm = None
    try:
        vm = Vm(sandbox, host, f"kvmprobe{time.monotonic_ns()}", guest="bare", accel="kvm", ram_mib=32)
        vm.console.wait("READY", 5)
        vm.console.ask("start 1 idle 0", "FILLED", 10)
        return True
    except HarnessError:
        return False
    finally:
        if vm:
            vm.kill()
            os.unlink(vm.ram_files[0])
