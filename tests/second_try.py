"""A second try for runs of two processes that crash in gloo, PyTorch's library for messages between them.

Of some hundred such runs two have crashed in C, in gloo's own thread (PyTorch 2.13.0). A test marked `two_processes` is
tried again when it ends in `GlooCrash`, and for no other reason; the summary names each second try and what it was for.
"""

import re
import signal

import pytest

# A process executes this to print, when it crashes, where each of its threads stood.
PRINT_STACKS = "import torch; torch._C._set_print_stack_traces_on_fatal_signal(True)"
CRASHES = (-signal.SIGSEGV, -signal.SIGABRT)


class GlooCrash(AssertionError):
    """One of several processes crashed in gloo."""


def crashed_in_gloo(code, output):
    """Whether a segmentation fault or an abort ended the process, and reached it in a thread that ran gloo."""
    stacks = re.split(r"\n\s*\n", output)
    crashed = [stack for stack in stacks if "FatalSignalHandler::fatalSignalHandler" in stack]
    return code in CRASHES and any("gloo::" in stack or "ProcessGroupGloo" in stack for stack in crashed)


def unexpected_end(results):
    """The error for processes that ended in another way than they should have.

    Args:
        results: (exit code, output) of each process of one run.
    """
    in_gloo = len(results) > 1 and any(crashed_in_gloo(code, output) for code, output in results)
    described = "\n".join(f"exit code {code}\n{output}" for code, output in results)
    return (GlooCrash if in_gloo else AssertionError)(described)


def pytest_configure(config):
    config.addinivalue_line("markers", "two_processes: starts a run of two processes, which is tried again if gloo crashes")


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("two_processes"):
            item.add_marker(pytest.mark.flaky(reruns=1, only_rerun="GlooCrash"))


def pytest_terminal_summary(terminalreporter):
    """Name each second try: a crash that a second try hides must not pass unseen."""
    for report in terminalreporter.stats.get("rerun", []):
        error = getattr(report.longrepr, "reprcrash", None)
        reason = error.message.splitlines()[0] if error else "see above"
        terminalreporter.write_line(f"SECOND TRY of {report.nodeid}: {reason}", yellow=True)
