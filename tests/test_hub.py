"""Models of the hub by their ids: what is fetched, what never is, and what is said without a connection.

A folder takes the hub's place: `huggingface_hub` is asked, and answers from there.
"""

import fnmatch
import json
import re
import shutil
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
import yaml
from huggingface_hub import constants, errors
from tiny_backbones import import_timm, save

from simmim import load_encoder
from simmim.checkpoints import read_encoder
from simmim.checkpoints.own_files import save_encoder
from simmim.cli import main


class FakeHub:
    """Repositories in folders, fetched into a cache, with a list of what was asked for."""

    def __init__(self, root):
        self.remote, self.cache, self.calls, self.reachable = root / "remote", root / "cache", [], True

    def repository(self, name):
        folder = self.remote / name
        folder.mkdir(parents=True)
        return folder

    def model_info(self, api, repo, revision=None, timeout=None):
        self.calls.append(repo)
        if not self.reachable:
            raise ConnectionError("no route to host")
        if not (self.remote / repo).is_dir():
            raise errors.RepositoryNotFoundError("404", response=SimpleNamespace(headers={}, request=None, status_code=404))
        files = [
            path.relative_to(self.remote / repo).as_posix() for path in (self.remote / repo).rglob("*") if path.is_file()
        ]
        return SimpleNamespace(sha="1", siblings=[SimpleNamespace(rfilename=name) for name in files])

    def snapshot_download(self, repo, revision=None, allow_patterns=None, local_files_only=False):
        target = self.cache / repo
        if local_files_only:
            if not target.is_dir():
                raise errors.LocalEntryNotFoundError("not in the cache")
            return str(target)
        for path in (self.remote / repo).rglob("*"):
            name = path.relative_to(self.remote / repo).as_posix()
            if path.is_file() and any(fnmatch.fnmatch(name, pattern) for pattern in allow_patterns):
                (target / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, target / name)
        return str(target)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    fake = FakeHub(tmp_path)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda api, *rest, **more: fake.model_info(api, *rest, **more))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake.snapshot_download)
    return fake


def refused(words, capsys):
    """Exit code 2 and one line, which is returned."""
    assert main(words) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("simmim: "), error
    return error


def test_a_network_is_fetched_once_and_without_what_is_pickled(hub):
    folder = hub.repository("facebook/tiny")
    save("dinov2", folder)
    torch.save({}, folder / "pytorch_model.bin")
    (folder / "modeling_own.py").write_text("raise AssertionError('code of a repository')")
    saved = read_encoder("hf:facebook/tiny")
    assert {path.name for path in (hub.cache / "facebook/tiny").iterdir()} == {"config.json", "model.safetensors"}
    assert saved.provenance["hub"] == "hf:facebook/tiny" and saved.provenance["architecture"] == "dinov2"
    assert hub.calls == ["facebook/tiny"]
    hub.reachable = False
    assert read_encoder("hf:facebook/tiny").encoder.config == saved.encoder.config
    assert hub.calls == ["facebook/tiny"]


@pytest.mark.parametrize("inner", ["", "encoder"])
def test_an_encoder_of_this_toolkit_is_fetched(hub, encoder_folder, inner):
    shutil.copytree(encoder_folder, hub.repository("me/mine") / inner, dirs_exist_ok=True)
    ours, theirs = load_encoder(encoder_folder), load_encoder("hf:me/mine")
    assert all(map(torch.equal, ours.state_dict().values(), theirs.state_dict().values()))


def test_timms_names_are_looked_up_in_timm(hub):
    import_timm()
    save("timm resnet", hub.repository("timm/resnet18.a1_in1k"))
    assert read_encoder("timm:resnet18.a1_in1k").provenance["hub"] == "timm:resnet18.a1_in1k"
    assert hub.calls == ["timm/resnet18.a1_in1k"]


def test_what_cannot_be_fetched_is_one_line(hub, capsys):
    torch.save({}, hub.repository("me/pickled") / "pytorch_model.bin")
    (hub.remote / "me/pickled" / "config.json").write_text("{}")
    import_timm()
    for path, text in (
        ("hf:nobody/none", "the hub has no model 'nobody/none', or it is private"),
        ("hf:me/pickled", "holds no safetensors of a format that is read (config.json; pytorch_model.bin): nothing pickled"),
        ("hf:none", "'hf:none' is no id of the hub: expected hf:owner/name"),
        ("timm:resnet181", "has no weights 'resnet181'; did you mean 'resnet18"),
    ):
        assert text in refused(["inspect", path], capsys)
    hub.reachable = False
    assert "hf:me/other is not in the cache of this machine, and the hub cannot be reached" in refused(
        ["inspect", "hf:me/other"], capsys
    )
    assert not hub.cache.exists()


def test_without_a_connection_nothing_waits(tmp_path, monkeypatch, capsys):
    """The library itself, where no server answers: one question, no pause before another, for models and for images."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://localhost:9")
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail(f"waits {seconds} s to try again"))
    assert "the hub cannot be reached" in refused(["inspect", "hf:nobody/none"], capsys)
    assert "as a hub id it cannot be loaded" in refused(["check-data", "nobody/none"], capsys)


def test_the_page_on_comparing_runs_as_it_stands(hub, digits, encoder_folder, tmp_path, monkeypatch, capsys):
    """Every command of docs/comparing.md, with tiny networks under the names of the page, and a study of two steps."""
    save("dinov3", hub.repository("facebook/dinov3-vits16-pretrain-lvd1689m"))
    import_timm()
    resnet = hub.repository("timm/resnet50.a1_in1k")
    save("timm resnet", resnet)
    description = json.loads((resnet / "config.json").read_text())
    description["pretrained_cfg"]["input_size"] = [3, 32, 32]  # small, to be fast
    (resnet / "config.json").write_text(json.dumps(description))
    shutil.copytree(encoder_folder, tmp_path / "runs/photos")
    three = shutil.ignore_patterns(*"3456789")  # classes, to be fast
    shutil.copytree(digits.labeled, tmp_path / "labeled", ignore=three)
    shutil.copytree(digits.labeled / "test", tmp_path / "photos", ignore=three)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("simmim.finetune.label_study.trials.trial_pool", lambda processes: nullcontext())
    shorter = {
        "probe": "--workers 0 --seeds 2 --labels-per-class 2",
        "embed": "--workers 0",
        "finetune": "--steps 1 --image-size 32 --workers 0",
    }
    shorter |= {"predict": "--workers 0"}
    shorter["study"] = "--labels 1 --seeds 2 --steps 1 --batch-size 10 --lr-factors [1] --layer-decays [] --image-size 32"
    page = (Path(__file__).parents[1] / "docs/comparing.md").read_text(encoding="utf-8")
    lines = re.findall(r"^\$ simmim (.*)$", page, re.M)
    for line in lines:
        words = line.split()
        assert main([*words, *shorter.get(words[0], "").split()]) == 0, capsys.readouterr().err
    assert len(lines) == 6
    out = capsys.readouterr().out
    assert "| resnet50.a1_in1k |" in out and "| theirs.parquet |" in out


def test_an_export_is_pushed_with_its_card(hub, encoder_folder, tmp_path, monkeypatch, capsys):
    """Nothing is made without a license or a login; the card names license, data, base model and metrics."""
    calls = []
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: calls.append("token") or (None if len(calls) == 1 else "t"))
    monkeypatch.setattr(
        huggingface_hub.HfApi, "create_repo", lambda api, repo, **more: calls.append((repo, more)) or f"hub/{repo}"
    )
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", lambda api, **more: calls.append(more))
    saved = read_encoder(encoder_folder)
    origin = {"data": "photos", "accuracy": 0.5, "encoder": {"hub": "hf:facebook/tiny@main"}}
    folder = save_encoder(tmp_path / "run", saved.encoder, saved.preprocessing, origin)
    words = ["export", "--run", str(folder), "--out", str(tmp_path / "out"), "--push-to-hub"]
    assert "needs a license in its card, which is not guessed" in refused([*words, "me/mine"], capsys)
    assert "is no id of the hub" in refused([*words, "mine", "--license", "mit"], capsys)
    assert "cannot be written without a login" in refused([*words, "me/mine", "--license", "mit"], capsys)
    assert not (tmp_path / "out").exists()
    assert main([*words, "me/mine", "--license", "mit"]) == 0
    assert "pushed to hub/me/mine" in capsys.readouterr().out
    assert calls[-2] == ("me/mine", {"private": True, "exist_ok": True})
    assert calls[-1]["repo_id"] == "me/mine" and calls[-1]["folder_path"] == str(tmp_path / "out")
    front = yaml.safe_load((tmp_path / "out/README.md").read_text().split("---")[1])
    expected = {"license": "mit", "datasets": ["photos"], "base_model": "facebook/tiny", "metrics": ["accuracy"]}
    assert expected.items() <= front.items() and front["pipeline_tag"] == "image-feature-extraction"
