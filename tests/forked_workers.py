"""Workers of benchmarks/processes.py as forks of the script that starts them, which has imported already what they import.

Imported in the process of a script, before it runs: `run_script(file, ..., forked_workers=True)` of fork_server.py.
"""

import os
import runpy
import signal
import subprocess
import sys
import traceback
from pathlib import Path
from types import SimpleNamespace

import processes


class ForkedScript:
    """Of `subprocess.Popen` what `Worker` uses, for `[python, script, *words]` with pipes of text."""

    def __init__(self, arguments, env=None, **_):
        self.args = arguments
        requests, to_child = os.pipe()
        from_child, answers = os.pipe()
        sys.stdout.flush()
        self.pid = os.fork()
        if not self.pid:
            run_script(arguments[1:], requests, answers, env)
        os.close(requests)
        os.close(answers)
        self.stdin, self.stdout = os.fdopen(to_child, "w"), os.fdopen(from_child)

    def kill(self):
        os.kill(self.pid, signal.SIGKILL)

    def wait(self):
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def run_script(words, requests, answers, env):
    """In the child: run a Python file as a script, and end without what the parent's frames would do."""
    code = 1
    try:
        os.dup2(requests, 0)
        os.dup2(answers, 1)
        sys.stdin, sys.stdout = os.fdopen(0), os.fdopen(1, "w")
        os.environ.update(env or {})
        sys.argv, sys.path[0] = words, str(Path(words[0]).parent)
        runpy.run_path(words[0], run_name="__main__")
        code = 0
    except SystemExit as ended:
        code = ended.code or 0
        if not isinstance(code, int):
            print(code, file=sys.stderr)
            code = 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


processes.subprocess = SimpleNamespace(Popen=ForkedScript, PIPE=subprocess.PIPE)
