"""Runs of the command in processes of their own, without seconds of importing for each: a server imports once and forks.

    fork_server = ForkServer(log_folder)
    run = fork_server.start("pretrain", "--data", ...)   # a process group of its own: run.kill(signal.SIGKILL)
    code, output = run.wait()
    finish(fork_server.start_pair("pretrain", ...))      # one run of two processes, as torchrun starts them

Run as a program, this file is the fork_server itself.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Lightning noted its rank when the fork_server imported it.
RANK = """
import os
from pytorch_lightning.utilities import rank_zero_only
rank_zero_only.rank = int(os.environ["RANK"])
"""


class Run:
    """One process that runs the command; `output` is what it wrote to stdout and stderr."""

    def __init__(self, fork_server, pid, log):
        self.fork_server, self.pid, self.log, self.code = fork_server, pid, log, None

    def kill(self, number=signal.SIGKILL, group=True):
        """Send a signal to the process and, as a terminal or a dying machine does, to its children."""
        with contextlib.suppress(ProcessLookupError):  # it has ended by itself
            (os.killpg if group else os.kill)(self.pid, number)

    def wait(self):
        """(exit code, output); the code is negative for a process that a signal ended."""
        if self.code is None:
            self.code = self.fork_server.ask({"wait": self.pid})
        return self.code, self.log.read_text(encoding="utf-8", errors="replace")

    def until(self, condition, timeout_s=60.0):
        """Wait for `condition()`; fails when the process ends or time runs out first."""
        end = time.monotonic() + timeout_s
        while not condition():
            if not self.fork_server.ask({"alive": self.pid}):
                code, output = self.wait()
                raise AssertionError(f"ended before its time, exit code {code}: {output}")
            assert time.monotonic() < end, f"nothing happened in {timeout_s} s: {self.log.read_text()}"
            time.sleep(0.01)


def finish(runs, code=0):
    """Wait for all, which must end with `code`; what the first wrote. Of several any may be the one that failed first."""
    ended = [run.wait() for run in runs]
    assert all(found == code for found, _ in ended), "\n".join(f"exit code {found}\n{output}" for found, output in ended)
    return ended[0][1]


class ForkServer:
    """A process that has imported everything, from which runs are forked."""

    def __init__(self, logs):
        self.logs, self.count = Path(logs), 0
        # A process that crashes in C writes where its threads were.
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"}
        self.process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=ROOT
        )

    def start(self, *words, prelude="", env=None):
        """Run `simmim WORDS`; `prelude` is Python that the process executes first."""
        self.count += 1
        log = self.logs / f"{self.count}.log"
        pid = self.ask({"words": [str(word) for word in words], "prelude": prelude, "log": str(log), "env": env or {}})
        return Run(self, pid, log)

    def start_pair(self, *words, prelude=""):
        """Two processes over gloo that run `simmim WORDS` together, with the environment that torchrun gives."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        shared = {
            "WORLD_SIZE": "2",
            "LOCAL_WORLD_SIZE": "2",
            "GROUP_RANK": "0",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "TORCHELASTIC_RUN_ID": "test",
            "GLOO_SOCKET_IFNAME": "lo",
        }
        return [
            self.start(*words, prelude=RANK + prelude, env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)})
            for rank in range(2)
        ]

    def ask(self, request):
        """One request and its answer."""
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        assert answer, "the fork_server has died"
        return json.loads(answer)

    def close(self):
        """End the fork_server."""
        self.process.stdin.close()
        self.process.wait(timeout=30)


def serve():
    """Answer requests until stdin ends."""
    import simmim.pretrain.run  # noqa: F401
    from simmim.cli import main

    ended = {}
    for line in sys.stdin:
        request = json.loads(line)
        if "words" in request:
            pid = os.fork()
            if not pid:
                become(request, main)
            os_setpgid(pid)
            answer = pid
        elif "wait" in request:
            pid = request["wait"]
            if pid not in ended:
                ended[pid] = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            answer = ended[pid]
        else:
            pid = request["alive"]
            if pid not in ended:
                found, status = os.waitpid(pid, os.WNOHANG)
                if found:
                    ended[pid] = os.waitstatus_to_exitcode(status)
            answer = pid not in ended
        print(json.dumps(answer), flush=True)


def os_setpgid(pid):
    """Give the child a group of its own before anyone sends signals to it; it may have done so, or ended, already."""
    with contextlib.suppress(OSError):
        os.setpgid(pid, pid)


def become(request, main):
    """In the child: the command, with its output in a file."""
    os_setpgid(0)
    log = os.open(request["log"], os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.environ.update(request["env"])
    code = 1
    try:
        exec(request["prelude"], {})
        code = main(request["words"])
    except SystemExit as ended:
        code = ended.code or 0
    except BaseException:
        import traceback

        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    # Not os._exit, where threads and loading processes would not be ended as they are at the end of a program.
    raise SystemExit(code)


if __name__ == "__main__":
    serve()
