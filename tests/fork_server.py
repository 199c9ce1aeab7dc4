"""Runs the command in separate processes that need not import anything: a server process imports once and forks.

    fork_server = ForkServer(log_folder)
    run = fork_server.start("pretrain", "--data", ...)   # in its own process group: run.kill(signal.SIGKILL)
    code, output = run.wait()
    finish(fork_server.start_pair("pretrain", ...))  # one run of two processes, as torchrun starts them

Executed as a script, this file is the server.
"""

import contextlib
import ctypes
import gc
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from second_try import PRINT_STACKS, unexpected_end

ROOT = Path(__file__).resolve().parent.parent
# Lightning reads its rank when it is imported, which the server did before the fork.
SET_RANK = f"""
{PRINT_STACKS}
import os
from pytorch_lightning.utilities import rank_zero_only
rank_zero_only.rank = int(os.environ["RANK"])
"""

# What commands import when they need it: two of the three seconds that the processor spends on a short run.
PRELOADED = (
    "datasets",
    "sklearn.linear_model",
    "sklearn.model_selection",
    "torch.utils.tensorboard",
    "simmim.encoders.registry",
    "simmim.evaluate.report",
    "simmim.finetune.run",
    "simmim.finetune.classification.preparation",
    "simmim.finetune.segmentation.preparation",
    "simmim.finetune.detection.preparation",
    "simmim.methods.registry",
    "simmim.pretrain.run",
)


class Run:
    """A process that runs the command.

    Attributes:
        pid: of the process, and the id of its process group.
        log: file with its stdout and stderr.
        code: exit code once it has been waited for.
        others: the other processes of the same run.
    """

    def __init__(self, fork_server, pid, log):
        self.fork_server, self.pid, self.log, self.code, self.others = fork_server, pid, log, None, []

    def kill(self, number=signal.SIGKILL, group=True):
        """Send a signal to the whole process group, as a terminal does, or to the process alone."""
        with contextlib.suppress(ProcessLookupError):  # already exited
            (os.killpg if group else os.kill)(self.pid, number)

    def wait(self):
        """Wait for the exit; returns the exit code, negative for a signal, and the output."""
        if self.code is None:
            self.code = self.fork_server.ask({"wait": self.pid})
        return self.code, self.log.read_text(encoding="utf-8", errors="replace")

    def until(self, condition, timeout_s=60.0):
        """Poll until `condition()` is true; fails if the process exits or the timeout expires before."""
        end = time.monotonic() + timeout_s
        while not condition():
            if not self.fork_server.ask({"alive": self.pid}):
                raise unexpected_end([run.wait() for run in (self, *self.others)])
            assert time.monotonic() < end, f"the condition did not hold within {timeout_s} s: {self.log.read_text()}"
            time.sleep(0.01)


def finish(runs, code=0):
    """Wait for all runs and check that each exits with `code`; returns the output of the first.

    On a failure the outputs of all are shown, as any of the processes may have caused it.
    """
    results = [run.wait() for run in runs]
    if any(found != code for found, _ in results):
        raise unexpected_end(results)
    return results[0][1]


class ForkServer:
    """A process that has imported everything, from which runs are forked."""

    def __init__(self, logs):
        self.logs, self.count = Path(logs), 0
        # The fault handler prints the stacks of all threads when a process crashes in native code.
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"}
        self.process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=ROOT
        )

    def start(self, *words, prelude="", env=None, cwd=ROOT):
        """Run `simmim WORDS` in the folder `cwd`; `prelude` is Python that the process executes first."""
        self.count += 1
        log = self.logs / f"{self.count}.log"
        words = [str(word) for word in words]
        pid = self.ask({"words": words, "prelude": prelude, "log": str(log), "env": env or {}, "cwd": str(cwd)})
        return Run(self, pid, log)

    def start_pair(self, *words, prelude=""):
        """Run `simmim WORDS` in two processes connected by gloo, with the environment variables that torchrun sets.

        The test that calls this is marked `two_processes`.
        """
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))  # a free port
            port = listener.getsockname()[1]
        shared = {
            "WORLD_SIZE": "2",
            "LOCAL_WORLD_SIZE": "2",
            "GROUP_RANK": "0",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "TORCHELASTIC_RUN_ID": "test",
            "GLOO_SOCKET_IFNAME": "lo",
        }
        first, second = (
            self.start(*words, prelude=SET_RANK + prelude, env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)})
            for rank in range(2)
        )
        first.others, second.others = [second], [first]
        return [first, second]

    def run_script(self, file, *words, code=0, forked_workers=False):
        """Run a Python file as a script, check its exit code, and return what it printed.

        Args:
            forked_workers: the processes that a benchmark starts import nothing anew: forked_workers.py.
        """
        file, words = Path(file), [str(word) for word in (file, *words)]
        prelude = (
            f"import runpy, sys\nsys.argv = {words!r}\nsys.path.insert(0, {str(file.parent)!r})\n"
            f"{'import forked_workers' if forked_workers else ''}\nrunpy.run_path({str(file)!r}, run_name='__main__')"
        )
        return finish([self.start(prelude=prelude)], code)

    def ask(self, request):
        """Send one request to the server and return its answer."""
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        assert answer, "the fork server has died"
        return json.loads(answer)

    def close(self):
        """Shut the server down."""
        self.process.stdin.close()
        self.process.wait(timeout=30)


def serve():
    """Answer requests, one JSON object per line, until stdin is closed."""
    gc.disable()  # imports leave no garbage
    from simmim.cli import main

    for module in PRELOADED:
        importlib.import_module(module)
    # What is imported is never garbage: a collection would copy its pages in each process, for seconds at its exit. Nor is
    # it taken apart there, which took a third of the exit's time.
    for module in list(sys.modules.values()):
        for value in (module, *getattr(module, "__dict__", {}).values()):
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(value))
    gc.freeze()
    gc.enable()
    exit_codes = {}
    for line in sys.stdin:
        request = json.loads(line)
        if "words" in request:
            pid = os.fork()
            if not pid:
                run_command(request, main)
            set_process_group(pid)
            answer = pid
        elif "wait" in request:
            pid = request["wait"]
            if pid not in exit_codes:
                exit_codes[pid] = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            answer = exit_codes[pid]
        else:
            pid = request["alive"]
            if pid not in exit_codes:
                found, status = os.waitpid(pid, os.WNOHANG)
                if found:
                    exit_codes[pid] = os.waitstatus_to_exitcode(status)
            answer = pid not in exit_codes
        print(json.dumps(answer), flush=True)
    os._exit(0)  # the interpreter's own exit takes a second


def set_process_group(pid):
    """Put a process into its own process group. Parent and child both do this, so that it holds before a signal is sent."""
    with contextlib.suppress(OSError):  # already done, or already exited
        os.setpgid(pid, pid)


def run_command(request, main):
    """In the child: run the command with its output redirected to a file, and exit."""
    set_process_group(0)
    log = os.open(request["log"], os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    code = 1
    try:
        exec(request["prelude"], {"__name__": "__main__"})
        code = main(request["words"])
    except SystemExit as error:
        code = error.code or 0
    except BaseException:
        import traceback

        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    # Not os._exit, which would skip the shutdown of threads and of data loader workers.
    raise SystemExit(code)


if __name__ == "__main__":
    serve()
