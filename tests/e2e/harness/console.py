# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a guest says (tests/guest/workload.h), with the host's time of every line."""
import socket
import threading
import time
from collections import namedtuple

from .sandbox import HarnessError

# at_s: the host's monotonic clock when the line had arrived; the rest are the guest's counters.
Beat = namedtuple("Beat", "at_s beat writes checks")
Line = namedtuple("Line", "at_s text")


class Console:
    """Reads a guest's output in a thread, sends it commands. Connect while QEMU starts: nothing is lost."""

    def __init__(self, output_path, input_path):
        self.beats = []
        self.lines = []
        self.first = None  # Line, whatever it was
        self.partial = ""  # what came without an end of line
        self._changed = threading.Condition()
        self._closed = False
        self._output = _connect(output_path)
        self._input = _connect(input_path)
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self):
        rest = b""
        while True:
            try:
                data = self._output.recv(65536)
            except OSError:
                data = b""
            now = time.monotonic()
            *lines, rest = (rest + data).split(b"\n")
            with self._changed:
                for line in lines:
                    self._take(now, line.decode("ascii", "replace"))
                self.partial = rest.decode("ascii", "replace")
                self._closed = not data
                if lines or not data:
                    self._changed.notify_all()
            if not data:
                return

    def _take(self, now, text):
        self.first = self.first or Line(now, text)
        if text.startswith("h "):
            self.beats.append(_beat(now, text))
        else:
            self.lines.append(Line(now, text))

    def send(self, command):
        self._input.sendall(command.encode() + b"\n")

    def mark(self):
        """Where the lines are now, for wait()."""
        with self._changed:
            return len(self.lines)

    def wait(self, prefix, seconds, since=0):
        """The first line since mark `since` that starts with prefix."""
        deadline = time.monotonic() + seconds
        with self._changed:
            while True:
                for line in self.lines[since:]:
                    if line.text.startswith(prefix):
                        return line.text
                left = deadline - time.monotonic()
                if left <= 0 or self._closed:
                    said = "; ".join(line.text for line in self.lines[-3:])
                    why = "its console closed" if self._closed else f"not within {seconds} s"
                    raise HarnessError(f"the guest did not say {prefix} ({why}; last: {said})")
                self._changed.wait(left)

    def ask(self, command, prefix, seconds):
        mark = self.mark()
        self.send(command)
        return self.wait(prefix, seconds, mark)

    def wait_beats(self, count, seconds):
        """Wait until that many more heartbeats have come."""
        with self._changed:
            goal = len(self.beats) + count
            if not self._changed.wait_for(lambda: len(self.beats) >= goal or self._closed, seconds) \
                    or len(self.beats) < goal:
                raise HarnessError(f"the guest does not run: {len(self.beats) - goal + count} of {count} "
                                   f"heartbeats came in {seconds} s")

    def wrong(self):
        """Everything the guest complained about."""
        with self._changed:
            return [line.text for line in self.lines if line.text.startswith(("WRONG", "ERROR"))]

    def close(self):
        for end in (self._output, self._input):
            try:
                end.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass


def _beat(at_s, text):
    return Beat(at_s, *(int(field, 16) for field in text.split()[1:]))


def _connect(path):
    end = socket.socket(socket.AF_UNIX)
    deadline = time.monotonic() + 20
    while True:
        try:
            end.connect(path)
            return end
        except (FileNotFoundError, ConnectionRefusedError):
            if time.monotonic() > deadline:
                raise HarnessError(f"QEMU did not open {path} within 20 s") from None
            time.sleep(0.01)


class Passage:
    """What the host saw of a guest that went from one console to another in [begin_s, end_s]."""

    def __init__(self, source, destination, begin_s, end_s):
        self.before = list(source.beats)
        self.after = list(destination.beats)
        # The guest may be stopped in the middle of a line, which then ends at the destination.
        if source.partial.startswith("h") and destination.first:
            self.after.insert(0, _beat(destination.first.at_s, source.partial + destination.first.text))
        self.begin_s = begin_s
        self.end_s = end_s

    def check(self):
        """One runner, no step back: raises HarnessError otherwise."""
        if not self.after:
            raise HarnessError("the guest gave no sign of life at the destination")
        if self.before and self.before[-1].at_s > self.after[0].at_s:
            raise HarnessError("the guest ran at the source after it had run at the destination")
        beats = self.before + self.after
        for old, new in zip(beats, beats[1:]):
            if new.beat != old.beat + 1 or new.writes < old.writes or new.checks < old.checks:
                raise HarnessError(f"the guest lost time: heartbeat {old} was followed by {new}")

    def outage_s(self):
        """The largest gap between two heartbeats."""
        times = [beat.at_s for beat in self.before + self.after
                 if self.begin_s - 1 <= beat.at_s <= self.end_s + 1]
        return max(new - old for old, new in zip(times, times[1:]))

    def lost_work_s(self, calm_s):
        """Seconds of work lost, by the rate of rewrites in the calm_s seconds before the passage."""
        calm = [beat for beat in self.before if self.begin_s - calm_s <= beat.at_s <= self.begin_s]
        during = [beat for beat in self.before + self.after if self.begin_s <= beat.at_s <= self.end_s]
        rate = (calm[-1].writes - calm[0].writes) / (calm[-1].at_s - calm[0].at_s)
        done = during[-1].writes - during[0].writes
        return (during[-1].at_s - during[0].at_s) - done / rate if rate else 0.0
