"""How the words of a command become settings: flags, YAML files, earlier runs, renamed settings, messages about mistakes."""

from dataclasses import dataclass, replace

import pytest
import yaml

from simmim.cli import main
from simmim.cli.arguments import Word, split_words
from simmim.cli.main import with_flags
from simmim.cli.train import finetune_settings, pretrain_settings
from simmim.finetune.classification.settings import ClassificationSettings
from simmim.methods.base import MethodSettings
from simmim.methods.registry import METHODS
from simmim.pretrain.settings import PretrainSettings
from simmim.renamed_settings import RENAMED_SETTINGS, with_current_names
from simmim.training.run_folder import as_yaml, locked_run_folder

PRETRAIN = "pretrain --data images --out new"
FINETUNE = "finetune classification --data labeled --out new"


def parsed(*words):
    return pretrain_settings(["--data", "images", "--out", "new", *words])


def test_short_and_long_words():
    assert parsed() == PretrainSettings(data="images", out="new")
    assert parsed() == pretrain_settings(["--data.path=images", "--out=new"])
    for words in (["--image-size", "64"], ["--image_size", "64"], ["--image-size=64"], ["--image_size=64"]):
        assert parsed(*words).image_size == 64
    assert parsed("--image-size", "[64, 96]").size == (64, 96)
    assert parsed("--model.mask-ratio", "0.5") == parsed("--model.mask_ratio=0.5")
    assert parsed("--model.encoder.window-size", "5").model.encoder == {"window_size": 5}
    assert parsed("--devices", "2").devices in (2, "2") and parsed("--devices", "auto").devices == "auto"


def test_hyphens_in_values_stay():
    settings = pretrain_settings(["--data", "my-images", "--out=runs/a-b", "--preset", "giant-1b"])
    assert (settings.data.path, settings.out, settings.preset) == ("my-images", "runs/a-b", "giant-1b")


def test_switches():
    """Bare, with a value, at the end or in the middle."""
    assert parsed().resume is False
    for words in (["--resume"], ["--resume", "--seed", "3"], ["--resume=true"], ["--resume", "true"]):
        assert parsed(*words).resume is True
    assert parsed("--resume", "false").resume is False and parsed("--overwrite", "--resume=false").overwrite is True
    words = ["--data", "x", "--init", "enc", "--freeze", "--out", "new"]
    assert finetune_settings("classification", words).freeze is True


def test_values_keep_their_types():
    words = ["--epochs", "3", "--optim.lr", "1e-3", "--seed", "7", "--trainer.benchmark", "true", "--out", "007"]
    settings = parsed(*words)
    assert (settings.epochs, settings.optim.lr, settings.seed, settings.trainer) == (3.0, 1e-3, 7, {"benchmark": True})
    assert settings.out == "007" and isinstance(settings.epochs, float)
    assert parsed("--preset", "null").preset is None
    assert parsed("--data.mean", "[0.5]", "--data.std", "[0.25]").data.mean == (0.5,)


def test_resuming_takes_the_runs_own_settings(tmp_path):
    """`--out RUN --resume` is enough; further words come after the run's settings and win."""
    run = tmp_path / "run"
    run.mkdir()
    settings = PretrainSettings(data="images", out=str(run), epochs=3.0, preset="nano")
    (run / "config.yaml").write_text(as_yaml(settings))
    for words in (["--out", str(run), "--resume"], ["--resume", f"--out={run}"], ["--resume=true", "--out", str(run)]):
        again = pretrain_settings(words)
        assert again == PretrainSettings(data="images", out=str(run), epochs=3.0, preset="nano", resume=True)
    again = pretrain_settings(["--out", str(run), "--resume", "--workers", "7"])
    assert (again.workers, again.epochs) == (7, 3.0)
    for words in ([f"--out={run}"], [f"--out={run}", "--resume=false"], ["--resume"]):
        with pytest.raises(ValueError, match="missing: give --data"):
            pretrain_settings(words)
    started = pretrain_settings(["--resume", "--out", "absent", "--data", "images"])
    assert started == PretrainSettings(data="images", out="absent", resume=True)


@pytest.mark.parametrize(
    "words, settings",
    [
        (f"{PRETRAIN} --epochs 3 --model.mask-ratio 0.5", PretrainSettings(data="images", out="new", epochs=3.0)),
        (f"{FINETUNE} --epochs 3", ClassificationSettings(data="labeled", out="new", epochs=3.0)),
    ],
)
def test_printed_config_reads_back(words, settings, capsys, tmp_path, monkeypatch):
    """--print_config prints all settings as YAML and runs nothing; what it prints is a --config."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main([*words.split(), "--print_config"])
    out, err = capsys.readouterr()
    assert ended.value.code == 0 and err == "" and list(tmp_path.iterdir()) == []
    values = yaml.safe_load(out)
    assert values["epochs"] == 3.0 and values["data"]["path"] == settings.data.path
    (tmp_path / "printed.yaml").write_text(out)
    config = ["--config", str(tmp_path / "printed.yaml")]
    if isinstance(settings, ClassificationSettings):
        again = finetune_settings("classification", config)
    else:
        again = pretrain_settings(config)
        settings = replace(settings, model=replace(settings.model, mask_ratio=0.5))
    assert again == settings


# --- words -----------------------------------------------------------------------------------------------------------


def test_words_are_paired_with_their_values():
    words = ["images", "--out", "a-b", "--batch-size=8", "--seed", "-1", "--resume", "--no-such", "x", "-h", "--json"]
    expected = [
        *(("", "images"), ("out", "a-b"), ("batch_size", "8"), ("seed", "-1"), ("resume", None), ("no_such", "x")),
        *(("help", None), ("json", None)),
    ]
    assert split_words(words) == [Word(key, value) for key, value in expected]


def test_negative_numbers_are_values():
    assert parsed("--data.mean", "[0.5]", "--data.std", "[1]", "--optim.min_lr", "-1e-3").optim.min_lr == -1e-3


def test_groups_are_given_as_mappings_or_files(tmp_path):
    (tmp_path / "optim.yaml").write_text("lr: 1e-3\nclip: 2\n")
    for value in ("{lr: 1e-3, clip: 2}", str(tmp_path / "optim.yaml")):
        assert parsed("--optim", value) == parsed("--optim.lr", "1e-3", "--optim.clip", "2")


def test_long_configurations(tmp_path):
    """Of more characters than a file name may have."""
    paths = [f"folder-{number:06}" for number in range(1000)]
    (tmp_path / "long.yaml").write_text(yaml.safe_dump({"data": {"path": paths}, "out": "new"}))
    assert pretrain_settings(["--config", str(tmp_path / "long.yaml")]).data.path == paths


@pytest.mark.parametrize(
    "words, message",
    [
        (["--epochs"], "epochs has no value: give --epochs VALUE"),
        (["--epochs", "--seed", "3"], "epochs has no value"),
        (["--no-such"], "unknown setting 'no_such'"),
        (["--optim", "3"], "optim is a group of settings: give its keys, optim.lr for instance"),
        (["--optim", "{lrr: 3}"], r"unknown setting 'optim.lrr'; did you mean 'optim.lr'\?"),
        (["--image-size", "large"], "image_size is 'large': give a whole number or a list, .a whole number, a whole number"),
        (["--data.crop_scale", "0.5"], "data.crop_scale is '0.5': give a list, .a number, a number"),
        (["--data.mean", "x"], "data.mean is 'x': give a list, each a number"),
        (["--trainer", "3"], "trainer is '3': give keys and values"),
        (["--method", "simmin"], r"unknown method 'simmin'; did you mean 'simmim'\?"),
    ],
)
def test_mistakes_are_explained(words, message):
    with pytest.raises(ValueError, match=message):
        parsed(*words)


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "holds no settings: --config takes a YAML file of keys and values"),
        ("- 3", "holds no settings"),
        ("epochs: [", "is not valid YAML: while parsing a flow node, .* in line [12]"),
        ("data: images", "data is a group of settings: give its keys, data.path for instance"),
        ("model: {mask_ratio: most}", "model.mask_ratio is 'most': give a number"),
        ("model: {mask_ratio: [0.5]}", r"model.mask_ratio is \[0.5\]: give a number"),
        ("optim: {lrr: 3}", r"unknown setting 'optim.lrr'; did you mean 'optim.lr'\?"),
    ],
)
def test_mistakes_in_files_are_explained(tmp_path, text, message):
    (tmp_path / "settings.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        parsed("--config", str(tmp_path / "settings.yaml"))


# --- methods ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ToySettings(MethodSettings):
    """Of a method that the library does not know."""

    sharpness: float = 1.0


class Toy:
    settings_class = ToySettings


def test_the_method_says_which_settings_there_are(tmp_path, monkeypatch, capsys):
    """The last method that is named, by a flag or in a file; its settings are flags and keys under `model`."""
    monkeypatch.setitem(METHODS, "toy", (__name__, "Toy"))
    assert parsed("--method", "toy", "--model.sharpness", "2").model == ToySettings(sharpness=2.0)
    (tmp_path / "toy.yaml").write_text("method: toy\nmodel: {sharpness: 3.0}\n")
    (tmp_path / "other.yaml").write_text("method: simmim\n")
    files = [["--config", str(tmp_path / name)] for name in ("toy.yaml", "other.yaml")]
    settings = parsed(*files[0])
    assert (settings.method, settings.model) == ("toy", ToySettings(sharpness=3.0))
    assert type(settings) is PretrainSettings
    assert parsed(*files[1], *files[0]).method == "toy"
    assert parsed(*files[1]).model == parsed().model
    with pytest.raises(ValueError, match=r"unknown setting 'model.sharpness'"):
        parsed("--model.sharpness", "2")
    with pytest.raises(ValueError, match=r"unknown setting 'model.mask_ratio'"):
        parsed("--method", "toy", "--model.mask_ratio", "0.5")
    with pytest.raises(SystemExit):
        main(["pretrain", "--method", "toy", "--help"])
    assert "--model.sharpness" in capsys.readouterr().out


# --- renamed settings ------------------------------------------------------------------------------------------------


OLD_NAME, NEW_NAME = "data.colour_jitter", "data.color_jitter"
NOTE = f"note: {OLD_NAME} is now {NEW_NAME}\n"


@pytest.mark.parametrize("task", ["classification", "segmentation"])
def test_settings_are_understood_under_their_old_names(task, tmp_path, capsys):
    """As a flag, hyphens or not, and in YAML, with a note."""
    words = ["--data", "labeled", "--out", "new"]
    (tmp_path / "old.yaml").write_text("data: {path: labeled, colour_jitter: 0.25}\nout: new\n")
    for old in (["--data.colour_jitter", "0.25"], ["--data.colour-jitter=0.25"], ["--config", str(tmp_path / "old.yaml")]):
        assert finetune_settings(task, [*words, *old]).data.color_jitter == 0.25
        assert capsys.readouterr() == ("", NOTE)
    assert finetune_settings(task, [*words, "--data.color_jitter", "0.25"]).data.color_jitter == 0.25
    assert capsys.readouterr() == ("", "")


def test_old_names_mean_nothing_where_the_setting_is_not(capsys):
    with pytest.raises(ValueError, match=r"unknown setting 'data.colour_jitter'"):
        parsed("--data.colour_jitter", "0.25")
    assert capsys.readouterr().err == ""


def test_an_old_and_a_new_name_exclude_each_other():
    values = {"data": {"path": "x", "colour_jitter": 0.1, "color_jitter": 0.2}}
    with pytest.raises(ValueError, match=r"data.colour_jitter is the old name of data.color_jitter, and both are given"):
        with_current_names(values)


def test_renaming_changes_nothing_else():
    values = {"out": "new", "data": {"path": "x", "colour_jitter": 0.1, "flip": 0.5}, "seed": 3}
    renamed, old_names = with_current_names(values)
    assert renamed == {"out": "new", "data": {"path": "x", "color_jitter": 0.1, "flip": 0.5}, "seed": 3}
    assert list(renamed) == list(values) and list(renamed["data"]) == ["path", "color_jitter", "flip"]
    assert old_names == list(RENAMED_SETTINGS) == [OLD_NAME] and values["data"]["colour_jitter"] == 0.1


def test_a_run_with_an_old_name_in_its_configuration_is_resumed(tmp_path, capsys):
    """Its config.yaml stays as it is; another value is refused as usual."""
    run = tmp_path / "run"
    run.mkdir()
    settings = finetune_settings("classification", ["--data", "labeled", "--out", str(run), "--data.color_jitter", "0.25"])
    old = as_yaml(settings).replace("color_jitter", "colour_jitter")
    (run / "config.yaml").write_text(old)
    resumed = finetune_settings("classification", ["--out", str(run), "--resume"])
    assert resumed == replace(settings, resume=True) and capsys.readouterr().err == NOTE
    with locked_run_folder(resumed):
        assert (run / "config.yaml").read_text() == old
    changed = finetune_settings("classification", ["--out", str(run), "--resume", "--data.color_jitter", "0.5"])
    with pytest.raises(ValueError, match=r"data.color_jitter was 0.25, is 0.5"), locked_run_folder(changed):
        pass


# --- messages of the library -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "message, shown",
    [
        ("resume: true goes on, overwrite: true starts it again", "--resume goes on, --overwrite starts it again"),
        ("freeze: true with init: none", "--freeze with --init none"),
        ("give data.streaming: false (or data.count)", "give --data.streaming false (or data.count)"),
        ("set dynamic_size: true.", "set --dynamic-size."),
        ("epochs is -1: give a positive number", "epochs is -1: give a positive number"),
        ("images/a: true colors, 'resume: true'", "images/a: true colors, 'resume: true'"),
    ],
)
def test_the_command_shows_flags_for_settings_with_a_value(message, shown):
    """What the library writes as in YAML."""
    assert with_flags(message) == shown
