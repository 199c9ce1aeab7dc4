"""Real runs killed, stopped and starved: what is resumed ends as the uninterrupted run does, and nothing is lost."""

import csv
import logging
import os
import pickle
import random
import shutil
import signal
import threading
import time
import warnings
import zipfile

import pytest
import torch
from safetensors.torch import load_file

from simmim.data.loading import quiet_context
from simmim.training.quiet import LOGGERS, quiet_libraries
from simmim.training.run_folder import checkpoints_folder
from simmim.training.saving import damage, saved_steps, usable_checkpoint

STEPS = 45
SMALL = (
    "--preset=nano",
    "--epochs=3",
    "--batch-size=16",
    "--seed=3",
    "--save_every_steps=1",
    "--log_every_steps=1",
    "--model.mask_unit=8",
    "--model.encoder.embed_dim=16",
    "--model.encoder.depths=[1,1]",
    "--model.encoder.num_heads=[1,2]",
    "--model.encoder.drop_path_rate=0.2",
    "--reconstruct_every_epochs=2",
    "--precision=32-true",
)
# The same from an encoder that brings its size along.
BEGIN = tuple(word for word in SMALL if not word.startswith(("--preset", "--model.encoder")))
# Loading workers are processes of their own; a stream is read by them in parts.
KINDS = {
    "in-memory": ("--workers=0",),
    "workers": ("--workers=2",),
    "stream": ("--workers=2", "--data.streaming=true", "--data.count=240", "--data.shuffle_buffer=50"),
}


@pytest.fixture(scope="module")
def start(fork_server, digits):
    """start(out, kind, *more words): a run of pretrain; with --resume where the folder is there."""

    def start(out, kind="in-memory", *more, prelude="", env=None, begin=SMALL):
        resume = ("--resume",) if out.exists() else ()
        words = ("pretrain", "--data", digits.unlabeled, "--out", out, *begin, *KINDS[kind], *more, *resume)
        return fork_server.start(*words, prelude=prelude, env=env)

    return start


@pytest.fixture(scope="module")
def uninterrupted(start, tmp_path_factory):
    """Finished runs by kind."""
    folder, done = tmp_path_factory.mktemp("whole"), {}

    def run(kind):
        if kind not in done:
            code, output = start(folder / kind, kind).wait()
            assert code == 0, output
            done[kind] = folder / kind
        return done[kind]

    return run


def newest(run):
    return max(saved_steps(run), default=0)


def same(first, second):
    """Two nested values, bit for bit."""
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(same, first, second))
    return first == second


def metrics(run):
    with (run / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    return [[row[name] for name in ("step", "loss", "lr", "grad_norm")] for row in rows]


def assert_same_end(run, whole):
    """Weights, optimizer, schedule, data position, metrics and the exported encoder."""
    ends = [torch.load(usable_checkpoint(path), weights_only=True) for path in (run, whole)]
    assert ends[0]["global_step"] == ends[1]["global_step"] == STEPS
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "StreamData"):
        assert same(ends[0].get(part), ends[1].get(part)), part
    assert same(*(load_file(path / "encoder" / "encoder.safetensors") for path in (run, whole)))
    assert metrics(run) == metrics(whole) and len(metrics(run)) == STEPS


def kill_often(start, run, kind, times, number, code, seed):
    """Start `run` again and again, and send it the signal at a random moment after it has made progress. The moments are
    spread over a step: one in each of equal parts of it."""
    chance = random.Random(seed)
    for part in chance.sample(range(times), times):
        before = newest(run)
        process = start(run, kind)
        process.until(lambda before=before: newest(run) > before)
        time.sleep(0.03 * (part + chance.random()) / times)
        process.kill(number)
        assert process.wait()[0] == code, process.wait()[1]
        assert newest(run) < STEPS, "the run was over before it could be interrupted"


@pytest.mark.parametrize("kind, times", [("in-memory", 6), ("workers", 3), ("stream", 3)])
def test_killed_at_random_moments(start, uninterrupted, tmp_path, kind, times):
    """A checkpoint is being written at nearly every moment: one is begun at every step."""
    run = tmp_path / "run"
    kill_often(start, run, kind, times, signal.SIGKILL, -signal.SIGKILL, seed=times)
    code, output = start(run, kind).wait()
    assert code == 0, output
    assert "resuming from" in output
    assert_same_end(run, uninterrupted(kind))
    left = {path.name for path in checkpoints_folder(run).iterdir() if not path.name.startswith(".")}
    assert {"last.ckpt", "best.ckpt"} < left and len(left) == 4


@pytest.mark.parametrize("kind", KINDS)
def test_asked_to_stop(start, uninterrupted, tmp_path, kind):
    """SIGTERM: saved at the end of the step, exit code 143."""
    run = tmp_path / "run"
    kill_often(start, run, kind, 1, signal.SIGTERM, 143, seed=1)
    process = start(run, kind)
    before = newest(run)
    process.until(lambda: newest(run) > before)
    process.kill(signal.SIGUSR1, group=False)
    code, output = process.wait()
    assert code == 138 and output.strip().endswith("; --resume goes on") and "Traceback" not in output
    assert start(run, kind).wait()[0] == 0
    assert_same_end(run, uninterrupted(kind))


def test_everything_is_asked_to_stop(start, uninterrupted, tmp_path):
    """SIGTERM to the loading processes too, as some schedulers send it: the run may not reach the end of its step, and still
    ends with the signal's code and without a traceback."""
    run = tmp_path / "run"
    process = start(run, "workers", prelude=SLOW.replace("0.5", "0.05"))
    process.until(lambda: newest(run) >= 2)
    for number in (process.pid, *children(process.pid)):
        os.kill(number, signal.SIGTERM)
    code, output = process.wait()
    assert code == 143 and "Traceback" not in output, output
    assert "stopped by SIGTERM, saved up to step" in output.splitlines()[-1]
    assert start(run, "workers").wait()[0] == 0
    assert_same_end(run, uninterrupted("workers"))


SLOW = """
import time
from simmim.pretrain.module import PretrainingModule
step = PretrainingModule.training_step
def slow(self, *given):
    time.sleep(0.5)
    return step(self, *given)
PretrainingModule.training_step = slow
"""


def test_interrupted_from_the_keyboard(start, tmp_path):
    """Ctrl-C reaches the whole group: once saves and says so in one line; twice leaves at once."""
    run = tmp_path / "run"
    process = start(run, "workers", prelude=SLOW)
    process.until(lambda: newest(run) >= 1)
    process.kill(signal.SIGINT)
    code, output = process.wait()
    assert code == 130 and "Traceback" not in output, output
    assert output.splitlines()[-1] == f"simmim: stopped by SIGINT, saved up to step {newest(run)}; --resume goes on"
    step = newest(run)
    process = start(run, "workers", prelude=SLOW.replace("0.5", "5"))
    process.until(lambda: process.log.is_file() and "resuming from" in process.log.read_text())
    time.sleep(2.0)  # in the first step
    began = time.monotonic()
    process.kill(signal.SIGINT)
    time.sleep(0.2)
    process.kill(signal.SIGINT)
    code, output = process.wait()
    assert code == 130 and time.monotonic() - began < 2 and "left at once" in output and "Traceback" not in output
    assert newest(run) == step and damage(usable_checkpoint(run)) is None


def test_slurm_queues_the_job_again(start, tmp_path):
    """SIGUSR1 in a SLURM job: saved, and `scontrol requeue` called with the job's number; the same command goes on."""
    tools, run = tmp_path / "tools", tmp_path / "run"
    tools.mkdir()
    (tools / "scontrol").write_text(f'#!/bin/sh\necho "$@" >> {tools}/called\n')
    (tools / "scontrol").chmod(0o755)
    job = {
        "SLURM_JOB_ID": "4711",
        "SLURM_JOB_NAME": "simmim",
        "SLURM_NTASKS": "1",
        "SLURM_NTASKS_PER_NODE": "1",
        "SLURM_PROCID": "0",
        "SLURM_LOCALID": "0",
        "SLURM_NODEID": "0",
        "SLURM_NODELIST": "here",
        "PATH": f"{tools}:{os.environ['PATH']}",
    }
    process = start(run, env=job)
    process.until(lambda: newest(run) >= 1)
    process.kill(signal.SIGUSR1, group=False)
    code, output = process.wait()
    assert code == 138 and "SLURM starts it again" in output, output
    assert (tools / "called").read_text() == "requeue 4711\n"
    code, output = start(run, "in-memory", env=job).wait()
    assert code == 0 and "resuming from" in output


def test_a_continued_run_outlives_what_it_began_from(start, uninterrupted, tmp_path):
    """--init is read once: a run that is resumed has its weights in the checkpoint and its architecture in its settings."""
    words = ("--data.crop_scale=[0.6,1.0]",)
    runs = []
    for name, stop in (("whole", False), ("cut", True)):
        begun = shutil.copytree(uninterrupted("in-memory") / "encoder", tmp_path / f"{name}-encoder")
        process = start(tmp_path / name, "in-memory", *words, f"--init={begun}", begin=BEGIN)
        if stop:
            process.until(lambda run=tmp_path / name: newest(run) >= 3)
            process.kill(signal.SIGTERM)
            assert process.wait()[0] == 143
            shutil.rmtree(begun)
            process = start(tmp_path / name, "in-memory", *words, begin=BEGIN)
        code, output = process.wait()
        assert code == 0, output
        runs.append(tmp_path / name)
    assert_same_end(*runs)


def test_a_command_that_is_stopped_leaves_no_half_file(uninterrupted, fork_server, digits, tmp_path):
    """SIGTERM while vectors are written: one line, the signal's code, and nothing in the folder."""
    (tmp_path / "out").mkdir()
    prelude = """
import os, signal
from simmim.evaluate.parquet import RowGroupWriter
RowGroupWriter.add = lambda *given: os.kill(os.getpid(), signal.SIGTERM)
"""
    words = ("embed", "--run", uninterrupted("in-memory"), "--images", digits.unlabeled, "--workers=1")
    code, output = fork_server.start(*words, "--out", tmp_path / "out" / "v.parquet", prelude=prelude).wait()
    assert list((tmp_path / "out").iterdir()) == []
    assert code == 143 and output.splitlines()[-1] == "simmim: stopped by SIGTERM" and "Traceback" not in output


# --- Damage ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stopped_run(start, tmp_path_factory):
    """A run stopped half-way."""
    run = tmp_path_factory.mktemp("stopped") / "run"
    process = start(run)
    process.until(lambda: newest(run) >= 5)
    process.kill(signal.SIGTERM)
    assert process.wait()[0] == 143
    return run


@pytest.fixture
def stopped(stopped_run, tmp_path):
    """A copy of it, in which last.ckpt is a link to the newest checkpoint as in the run itself."""
    run = shutil.copytree(stopped_run, tmp_path / "run")
    last, newest_file = checkpoints_folder(run) / "last.ckpt", saved_steps(run)[newest(run)]
    last.unlink()
    last.hardlink_to(newest_file)
    return run


def flip_a_byte(path):
    """In the middle of the largest tensor."""
    with zipfile.ZipFile(path) as archive:
        largest = max(archive.infolist(), key=lambda entry: entry.file_size)
    content = bytearray(path.read_bytes())
    content[largest.header_offset + 200 + largest.file_size // 2] ^= 0x10
    path.write_bytes(bytes(content))


def tear(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("spoil", [tear, flip_a_byte, lambda path: path.write_bytes(b"")])
def test_a_torn_checkpoint_is_noticed(stopped, spoil):
    """The one before is taken, and a line says why."""
    (last, before), lines = list(saved_steps(stopped).values())[:2], []
    spoil(checkpoints_folder(stopped) / "last.ckpt")
    assert damage(last) and usable_checkpoint(stopped, lines.append) == before
    assert len(lines) == 1 and "last.ckpt is torn" in lines[0] and lines[0].endswith(f"; going on from {before.name}")


def test_a_run_goes_on_from_the_checkpoint_before_a_torn_one(start, uninterrupted, stopped):
    flip_a_byte(checkpoints_folder(stopped) / "last.ckpt")
    code, output = start(stopped).wait()
    assert code == 0 and output.count("warning: ") == 1
    assert "last.ckpt is torn" in output and f"going on from {list(saved_steps(stopped))[0]:}"[:10] in output
    assert_same_end(stopped, uninterrupted("in-memory"))


def test_nothing_whole_is_left(start, stopped):
    for path in checkpoints_folder(stopped).glob("*.ckpt"):
        tear(path)
    before = {path: path.read_bytes() for path in checkpoints_folder(stopped).iterdir()}
    code, output = start(stopped).wait()
    assert code == 2 and "has no whole checkpoint" in output and output.count("\n") == 1
    assert before == {path: path.read_bytes() for path in checkpoints_folder(stopped).iterdir()}


class Payload:
    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return (os.system, (f"touch {self.file}",))


@pytest.mark.parametrize("where", ["top", "optimizer"])
def test_a_crafted_checkpoint_is_refused(start, stopped, tmp_path, where):
    """It is whole by its checksums, and would run a command."""
    last = checkpoints_folder(stopped) / "last.ckpt"
    content = torch.load(last, weights_only=True)
    if where == "top":
        content = Payload(tmp_path / "ran")
    else:
        content["optimizer_states"][0]["state"] = Payload(tmp_path / "ran")
    last.unlink()
    torch.save(content, last, pickle_module=pickle)
    code, output = start(stopped).wait()
    assert code == 2 and "system" in output and "refused" in output and output.count("\n") == 1
    assert not (tmp_path / "ran").exists()


FULL = """
import resource, signal
resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, {size}))
"""


def test_a_full_disk(start, uninterrupted, stopped):
    """Files can grow no larger than a checkpoint needs: a clear line, the checkpoints from before intact, and when there is
    room again the run goes on."""
    before = {path.name: path.read_bytes() for path in checkpoints_folder(stopped).glob("step-*.ckpt")}
    size = min(map(len, before.values())) // 2
    code, output = start(stopped, prelude=FULL.format(size=size)).wait()
    last = output.splitlines()[-1]
    assert code == 2 and last.startswith("simmim: a checkpoint could not be written (") and "Traceback" not in output, output
    assert f"step-{newest(stopped):08d}.ckpt stands" in last
    assert before == {path.name: path.read_bytes() for path in checkpoints_folder(stopped).glob("step-*.ckpt")}
    assert not [path for path in checkpoints_folder(stopped).iterdir() if path.name.startswith(".")]
    assert start(stopped).wait()[0] == 0
    assert_same_end(stopped, uninterrupted("in-memory"))


READ_ONLY = """
import errno, simmim.files as files
from simmim.data.loading import quiet_context
from simmim.training.quiet import LOGGERS, quiet_libraries
from simmim.training.run_folder import checkpoints_folder
from pathlib import Path
make = files.tempfile.mkstemp
def refuse(*given, **named):
    if len(list(checkpoints_folder(Path({run!r})).glob("step-*.ckpt"))) >= 2:
        raise OSError(errno.EROFS, "Read-only file system")
    return make(*given, **named)
files.tempfile.mkstemp = refuse
"""


def test_a_folder_that_becomes_read_only(start, uninterrupted, tmp_path):
    run = tmp_path / "run"
    code, output = start(run, prelude=READ_ONLY.format(run=str(run))).wait()
    last = output.splitlines()[-1]
    assert code == 2 and "Read-only file system" in last and " stands; make room or mend the folder" in last, output
    assert "Traceback" not in output and damage(usable_checkpoint(run)) is None
    assert start(run).wait()[0] == 0
    assert_same_end(run, uninterrupted("in-memory"))


def test_a_run_folder_that_vanishes(start, tmp_path):
    """One line and an end, and nothing is made in its place."""
    run = tmp_path / "run"
    process = start(run, prelude=SLOW.replace("0.5", "0.05"))
    process.until(lambda: newest(run) >= 2)
    run.rename(tmp_path / "elsewhere")
    shutil.rmtree(tmp_path / "elsewhere", ignore_errors=True)
    code, output = process.wait()
    assert code == 2 and "Traceback" not in output, output
    assert "gone" in output.splitlines()[-1] or "No such file" in output.splitlines()[-1]
    assert not (run / "checkpoints").exists()


def test_a_dying_loading_process(start, uninterrupted, tmp_path):
    """Killed for lack of memory, say: the state is saved, the line says so, and the run goes on from there."""
    run = tmp_path / "run"
    process = start(run, "workers", prelude=SLOW.replace("0.5", "0.05"))
    process.until(lambda: newest(run) >= 2)
    os.kill(children(process.pid)[0], signal.SIGKILL)
    code, output = process.wait()
    assert code == 2 and "a process that loads images died" in output.splitlines()[-1] and "Traceback" not in output
    assert start(run, "workers").wait()[0] == 0
    assert_same_end(run, uninterrupted("workers"))


def children(pid):
    """Process numbers of the loading processes."""
    from pathlib import Path

    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        found += map(int, (task / "children").read_text().split())
    return found


def test_a_run_folder_is_one_process_s(start, uninterrupted, tmp_path):
    """A second one is refused while the first goes on; a killed one leaves no lock behind."""
    run = tmp_path / "run"
    first = start(run, prelude=SLOW.replace("0.5", "0.05"))
    first.until(lambda: newest(run) >= 1)
    code, output = start(run).wait()
    assert code == 2 and "is in use by another process" in output and output.count("\n") == 1
    code, output = start(run, "in-memory", "--overwrite").wait()
    assert code == 2
    assert first.wait()[0] == 0
    assert_same_end(run, uninterrupted("in-memory"))


def test_a_pipe_to_a_dead_process_prints_no_traceback(capfd):
    """The thread that feeds the process fails then. Any other failure of that thread is printed."""
    for item, is_printed in ((1, False), (lambda: None, True)):  # a lambda cannot be sent
        queue = quiet_context().Queue()
        if not is_printed:
            queue._reader.close()
        queue.put(item)
        queue.close()
        queue.join_thread()
        assert ("Error" in capfd.readouterr().err) == is_printed


def test_libraries_are_quiet_inside_a_run_alone(monkeypatch):
    """A thread that cannot write prints nothing, other failures are printed, and everything is restored after the run."""
    printed = []
    monkeypatch.setattr(threading, "excepthook", lambda arguments: printed.append(arguments.exc_type))

    def fail(error):
        raise error

    before = threading.excepthook, warnings.filters[:], [logging.getLogger(name).level for name in LOGGERS]
    with pytest.raises(KeyError), quiet_libraries():
        for error in (OSError("disk full"), RuntimeError("other")):
            thread = threading.Thread(target=fail, args=(error,))
            thread.start()
            thread.join()
        raise KeyError
    assert printed == [RuntimeError]
    assert (threading.excepthook, warnings.filters[:], [logging.getLogger(name).level for name in LOGGERS]) == before
