"""The TensorBoard page of a real run, read back from a real TensorBoard through its HTTP interface.

The run is cut off between two checkpoints and resumed, so that whatever is asserted here holds for such a run too.
"""

import csv
import html
import io
import json
import re
import subprocess
import sys
import time
from urllib.error import URLError
from urllib.parse import urlencode
from urllib.request import ProxyHandler, Request, build_opener

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

from simmim.pretrain import DataSettings, PretrainSettings, SimMIMSettings, pretrain
from simmim.pretrain.reconstruction_grid import COLUMNS
from simmim.training.loggers import LossNames, Names
from simmim.training.loggers.base import flatten

LOCAL = build_opener(ProxyHandler({}))  # whatever proxy the machine has, it is not for this
START_WITHIN_S, LOADED_WITHIN_S = 60.0, 60.0
NAMES = Names(LossNames("masked_l1"))


@pytest.fixture(scope="module")
def run(digits, tmp_path_factory, power_cut):
    """15 steps, saved every 5, cut off after 13."""
    model = SimMIMSettings(mask_unit=8, encoder={"embed_dim": 16, "depths": [1, 1], "num_heads": [1, 2]})
    common = {"preset": "nano", "epochs": 2.0, "batch_size": 32, "model": model, "save_every_steps": 5}
    often = {"log_every_steps": 1, "reconstruct_every_epochs": 2 / 7.5}
    data, out = DataSettings(str(digits.unlabeled)), str(tmp_path_factory.mktemp("tensorboard") / "run")
    with power_cut(after_step=13):
        pretrain(PretrainSettings(data=data, out=out, **common, **often))
    return pretrain(PretrainSettings(data=data, out=out, resume=True, **common, **often))


class Page:
    """A TensorBoard on a folder: started, asked, stopped."""

    def __init__(self, logdir, log, *flags):
        self.log = log
        command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(logdir), "--host", "127.0.0.1", "--port", "0"]
        with log.open("w") as file:
            self.process = subprocess.Popen([*command, *flags], stdout=file, stderr=subprocess.STDOUT)
        try:
            self.address = self.wait(START_WITHIN_S, lambda: re.search(r"http://127\.0\.0\.1:\d+", log.read_text()))[0]
        except BaseException:
            self.stop()
            raise

    def wait(self, seconds, ask):
        """The first answer of `ask` that holds something."""
        end = time.monotonic() + seconds
        while True:
            try:
                answer = ask()
            except (URLError, OSError):
                answer = None
            if answer:
                return answer
            assert self.process.poll() is None, f"TensorBoard ended: {self.log.read_text()}"
            assert time.monotonic() < end, f"no answer in {seconds} s: {self.log.read_text()}"
            time.sleep(0.2)

    def raw(self, path, post=None, **query):
        data = json.dumps(post).encode() if post is not None else None
        where = f"{self.address}/data/plugin/{path}" + (f"?{urlencode(query)}" if query else "")
        with LOCAL.open(Request(where, data, {"Content-Type": "application/json"}), timeout=30) as answer:
            return answer.read()

    def get(self, path, post=None, **query):
        return json.loads(self.raw(path, post, **query))

    def stop(self):
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


@pytest.fixture(scope="module", params=["true", "false"], ids=["fast reader", "Python reader"])
def page(run, request, tmp_path_factory):
    """Both ways that TensorBoard has of reading: the fast one is the default where it is installed."""
    if request.param == "true":
        pytest.importorskip("tensorboard_data_server")
    log = tmp_path_factory.mktemp("page") / "log"
    flags = ("--load_fast", request.param, "--samples_per_plugin", "images=100", "--reload_interval", "1")
    page = Page(run / "tensorboard", log, *flags)
    try:
        # Read to the end: the last thing in the files is that the run is through.
        page.wait(LOADED_WITHIN_S, lambda: session(page)["sessions"][0]["status"] == "STATUS_SUCCESS")
        yield page
    finally:
        page.stop()


def session(page):
    """The one line of HParams."""
    statuses = ["STATUS_UNKNOWN", "STATUS_SUCCESS", "STATUS_FAILURE", "STATUS_RUNNING"]
    asked = {"experimentName": "", "allowedStatuses": statuses, "colParams": [], "startIndex": 0, "sliceSize": 10}
    groups = page.get("hparams/session_groups", asked)["sessionGroups"]
    return groups[0] if len(groups) == 1 else {"sessions": [{"status": f"{len(groups)} lines"}]}


def rows(run):
    with (run / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_scalars_stand_in_groups_and_say_what_they_are(run, page):
    tags = page.get("scalars/tags")["."]
    tags = {tag: about for tag, about in tags.items() if not tag.startswith("per_block/")}  # many, and here alone
    assert {
        "loss/masked_l1",
        "optimizer/learning_rate",
        "optimizer/gradient_norm",
        "speed/images_per_s",
        "speed/data_wait_share",
    } <= tags.keys()
    assert all("/" in tag and not tag.startswith("other/") for tag in tags), "none without a group that the table knows"
    assert tags.keys() == {NAMES(column) for column in rows(run)[0] if column not in ("step", "epoch")}
    assert "standard deviation of the normalized images" in tags["loss/masked_l1"]["description"]
    assert all(tags[tag]["description"] for tag in tags)


def test_a_run_that_was_cut_off_and_resumed_shows_one_curve(run, page):
    """As metrics.csv has it, each step once; though the files hold what was logged beyond the checkpoint."""
    table = rows(run)
    assert [int(row["step"]) for row in table] == list(range(15))
    for column in ("loss", "lr", "grad_norm", "images_per_s", "data_wait_share"):
        points = page.get("scalars/scalars", run=".", tag=NAMES(column))
        assert [step for _, step, _ in points] == list(range(15)), column
        assert [value for *_, value in points] == pytest.approx([float(row[column]) for row in table], rel=1e-6), column
    files = sorted((run / "tensorboard").iterdir())
    written = [
        event.step
        for file in files
        for event in EventFileLoader(str(file)).Load()
        for value in event.summary.value
        if value.tag == "speed/images_per_s"
    ]
    assert len(files) == 2 and len(written) > 15


def test_pictures_are_those_of_the_run_folder(run, page):
    """Under a tag that names the columns, at the step of the scalars they go with."""
    (tag,) = page.get("images/tags")["."]
    assert tag == "images/reconstructions: " + ", ".join(COLUMNS)
    shown = page.get("images/images", run=".", tag=tag, sample=0)
    kept = sorted((run / "reconstructions").iterdir())
    steps = [int(path.stem.removeprefix("step-")) - 1 for path in kept]
    assert [picture["step"] for picture in shown] == steps == [1, 3, 5, 7, 9, 11, 13, 14]
    for picture, path in zip(shown[::3], kept[::3]):
        sent = page.raw("images/individualImage?" + picture["query"])
        assert sent.startswith(b"\x89PNG")
        with Image.open(io.BytesIO(sent)) as first, Image.open(path) as second:
            assert first.size == second.size and first.width > 2 * 4 * 32
            assert np.array_equal(np.asarray(first.convert("RGB")), np.asarray(second.convert("RGB")))


def text_of(page, tag):
    """Steps and texts of a panel, without the markup that TensorBoard adds."""
    texts = page.get("text/text", run=".", tag=tag)
    return [(text["step"], html.unescape(re.sub(r"<[^>]+>", "", text["text"]))) for text in texts]


def test_texts_hold_configuration_and_environment(run, page):
    """The configuration once, as the run folder has it; the environment of each sitting."""
    assert set(page.get("text/tags")["."]) == {"run/config.yaml", "run/environment"}
    ((step, text),) = text_of(page, "run/config.yaml")
    assert step == 0 and text.strip() == (run / "config.yaml").read_text(encoding="utf-8").strip()
    (first, before), (second, after) = text_of(page, "run/environment")
    assert first == 0 and 5 <= second <= 13
    for text in (before, after):
        assert torch.__version__ in text and "1 × cpu" in text and "32-true" in text
    assert "0 of 15" in before and f"{second} of 15" in after


def test_hyperparameters_stand_beside_the_final_metrics(run, page):
    settings = flatten(yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8")))
    line = session(page)
    assert line["name"] == str(run)
    assert line["hparams"] == settings and settings["model.mask_ratio"] == 0.6
    final = {value["name"]["tag"]: value["value"] for value in line["metricValues"]}
    last = rows(run)[-1]
    assert final["loss/masked_l1"] == pytest.approx(float(last["loss"]), rel=1e-6)
    assert final["speed/images_per_s"] == pytest.approx(float(last["images_per_s"]), rel=1e-6)
    columns = page.get("hparams/experiment", {"experimentName": ""})["hparamInfos"]
    kinds = {column["name"]: column["type"] for column in columns}
    assert kinds.keys() == settings.keys()
    assert [kinds[name] for name in ("data.strict", "epochs", "preset")] == [
        "DATA_TYPE_BOOL",
        "DATA_TYPE_FLOAT64",
        "DATA_TYPE_STRING",
    ]
    shown_first = {column["name"] for column in columns[:5]}
    assert shown_first == {"batch_size", "epochs", "model.mask_ratio", "optim.lr", "preset"}
