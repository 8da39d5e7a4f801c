"""Commands of pretrain.py as forks of a process that has imported what they need.

Importing takes seconds, and a sweep has hundreds of short trials. A fork does what the command does
in a new process: it has its own environment, its own output and no threads of the other.
"""

import atexit
import ctypes
import json
import os
import select
import signal
import sys
import traceback

SET_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG
WAIT = 0.05  # seconds between looks at forks that may have ended


def die_with(parent):
    """Makes Linux kill this process when the one that started it dies; it has to be `parent`."""
    ctypes.CDLL(None).prctl(SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)
    if os.getppid() != parent:  # it died before
        os._exit(1)


class Nursery:
    """The process that forks. It is forked itself, so make it before there are threads or locks."""

    def __init__(self):
        # What all forks need.
        import matplotlib.backends.backend_agg
        import matplotlib.figure  # noqa: F401

        import pretrain  # noqa: F401

        sys.stdout.flush()
        to_server, self._requests = os.pipe()
        self._answers, from_server = os.pipe()
        driver = os.getpid()
        pid = os.fork()
        if not pid:
            os.close(self._requests)
            os.close(self._answers)
            _serve(driver, to_server, from_server)
        self.pid = pid
        os.close(to_server)
        os.close(from_server)
        os.set_blocking(self._answers, False)
        self._unread, self._codes, self._is_gone = b"", {}, False

    def start(self, arguments, log, environment):
        """Starts pretrain.py; returns the id of its process, which is that of its group too.

        Args:
            arguments: words after the script's name, the script's path with them.
            log: path of a file that gets its output, after what is there.
            environment: variables beside those of this process.
        """
        request = {"argv": arguments, "log": str(log), "env": {**os.environ, **environment}}
        os.write(self._requests, json.dumps(request).encode() + b"\n")
        while True:
            select.select([self._answers], [], [])
            for kind, pid, _ in self._read():
                if kind == "started":
                    return pid
            if self._is_gone:
                raise RuntimeError("the process that starts trials is gone")

    def poll(self, pid):
        """Exit status of a fork, -n if signal n killed it, None while it runs."""
        self._read()
        return self._codes.get(pid, -signal.SIGKILL if self._is_gone else None)

    def _read(self):
        found = []
        try:
            while content := os.read(self._answers, 65536):
                self._unread += content
            self._is_gone = True
        except BlockingIOError:
            pass
        *lines, self._unread = self._unread.split(b"\n")
        for kind, pid, code in map(json.loads, lines):
            if kind == "ended":
                self._codes[pid] = code
            found.append((kind, pid, code))
        return found

    def close(self):
        """Lets the process end; forks that still run end with it."""
        os.close(self._requests)
        os.waitpid(self.pid, 0)
        os.close(self._answers)


def _serve(driver, requests, answers):
    """The whole life of the process that forks."""
    os.setsid()  # Ctrl-C is for the driver alone
    die_with(driver)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    unread, running = b"", set()

    def say(*answer):
        os.write(answers, json.dumps(answer).encode() + b"\n")

    while True:
        ready, _, _ = select.select([requests], [], [], WAIT if running else None)
        if ready:
            content = os.read(requests, 1 << 20)
            if not content:
                os._exit(0)
            unread += content
        *lines, unread = unread.split(b"\n")
        for line in lines:
            server, pid = os.getpid(), os.fork()
            if not pid:
                os.close(requests)
                os.close(answers)
                _run(server, **json.loads(line))
            running.add(pid)
            say("started", pid, None)
        for pid in list(running):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                running.discard(pid)
                say("ended", pid, os.waitstatus_to_exitcode(status))


def _run(server, argv, log, env):
    """The whole life of a fork."""
    code = 1
    try:
        os.setsid()
        die_with(server)
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        for number in (1, 2):
            os.dup2(output, number)
        sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
        sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
        os.environ.clear()
        os.environ.update(env)
        import pretrain

        sys.argv = argv
        pretrain.main()
        code = 0
    except SystemExit as leaving:
        code = leaving.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
