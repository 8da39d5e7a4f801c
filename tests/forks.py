"""Processes that are forked from one which has imported what they need: seconds less for each.

python tests/forks.py MODULE...    the one they are forked from; `Forks` starts it and talks to it
"""

import atexit
import gc
import importlib
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import weakref
from pathlib import Path


class Forks:
    """Runs Python files as `python FILE ...` does, in forks.

    Args:
        modules: what a fork has imported already, with what that imports. A fork of a process with
            threads may hang, so none of them may start one.
        path: folders to find them in.
        env: environment of the imports.
        options: of Python.
    """

    def __init__(self, modules, path=(), env=(), options=()):
        environment = {**os.environ, **dict(env), "PYTHONPATH": os.pathsep.join(map(str, path))}
        self._server = subprocess.Popen(
            [sys.executable, *options, __file__, *modules],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,  # select does not see what waits in a buffer
        )
        self._codes, self._folder = {}, Path(tempfile.mkdtemp(prefix="forks"))
        assert self._answer() == "ready"

    def start(self, file, *arguments, cwd, env=()):
        """A `Fork` that runs a file; `env` is all of its environment beside this process' own."""
        outputs = [str(self._folder / f"{time.monotonic_ns()}.{kind}") for kind in ("out", "err")]
        request = {
            "argv": [str(file), *map(str, arguments)],
            "cwd": str(cwd),
            "env": {**os.environ, **dict(env)},
            "outputs": outputs,
        }
        self._server.stdin.write(json.dumps(request).encode() + b"\n")
        while isinstance(answer := self._answer(), list):
            self._codes[answer[0]] = answer[1]
        return Fork(self, answer, outputs)

    def _answer(self):
        line = self._server.stdout.readline()
        assert line, "the process that is forked has ended"
        return json.loads(line)

    def code_of(self, pid):
        """How a fork ended, as `Popen.returncode`; None while it runs."""
        while select.select([self._server.stdout], [], [], 0)[0]:
            ended, code = self._answer()
            self._codes[ended] = code
        return self._codes.get(pid)

    def close(self):
        """Ends the process that is forked, and what its forks wrote; they have ended before."""
        self._server.communicate()
        shutil.rmtree(self._folder)


class Fork:
    """What `subprocess.Popen` is, as far as tests need it."""

    def __init__(self, forks, pid, outputs):
        self._forks, self.pid, self._outputs = forks, pid, outputs

    def poll(self):
        return self._forks.code_of(self.pid)

    returncode = property(poll)

    def send_signal(self, number):
        os.kill(self.pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout=240):
        """Waits for the end. Returns what was written to stdout and to stderr."""
        deadline = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > deadline:
                self.kill()
                raise subprocess.TimeoutExpired(self.pid, timeout)
            time.sleep(0.002)
        return self.written()

    def written(self):
        """What it has written to stdout and to stderr so far."""
        paths = map(Path, self._outputs)
        return tuple(path.read_text() if path.exists() else "" for path in paths)


def _serve():
    for module in sys.argv[1:]:
        importlib.import_module(module)
    gc.freeze()  # a fork's collector would write to all of it, and so copy it
    # Nor does a fork take apart, as it ends, what it has not made: torch's hundreds of operators.
    for finalizer in list(weakref.finalize._registry):
        finalizer.atexit = False
    ended, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    print(json.dumps("ready"), flush=True)
    while True:
        if ended in select.select([0, ended], [], [])[0]:
            os.read(ended, 1024)
            _report()
            continue
        line = sys.stdin.readline()
        if not line:
            return
        pid = os.fork()
        if not pid:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            # As from a terminal: shells let their background jobs ignore SIGINT, nohup SIGHUP.
            signal.signal(signal.SIGINT, signal.default_int_handler)
            signal.signal(signal.SIGHUP, signal.SIG_DFL)
            _run(**json.loads(line))
        print(json.dumps(pid), flush=True)


def _report():
    """Says which forks have ended, and how."""
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if not pid:
            return
        print(json.dumps([pid, os.waitstatus_to_exitcode(status)]), flush=True)


def _run(argv, cwd, env, outputs):
    """A fork's whole life."""
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, path in enumerate(outputs, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    sys.argv[:] = argv
    sys.path[0] = str(Path(argv[0]).parent)
    code = 1
    try:
        names = {"__name__": "__main__", "__file__": argv[0], "__builtins__": __builtins__}
        exec(compile(Path(argv[0]).read_text(), argv[0], "exec"), names)
        code = 0
    except SystemExit as leaving:
        code = leaving.code or 0
        if not isinstance(code, int):
            print(code, file=sys.stderr)
            code = 1
    except BaseException:
        traceback.print_exc()
    finally:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    _serve()
