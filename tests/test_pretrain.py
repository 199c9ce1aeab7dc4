"""Stage 1 as a whole: determinism, resuming, logs, the run folder, bad images."""

import contextlib
import csv
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from simmim import load_encoder
from simmim.pretrain import DataSettings, OptimSettings, PretrainSettings, SimMIMSettings, load_pretrained, pretrain
from simmim.training.progress import SkippedImages

SMALL = SimMIMSettings(mask_unit=8, encoder={"embed_dim": 16, "depths": [1, 1], "num_heads": [1, 2], "drop_path_rate": 0.2})


def settings(digits, out, **more):
    return PretrainSettings(
        **{
            "data": DataSettings(str(digits.unlabeled)),
            "out": str(out),
            "preset": "nano",
            "epochs": 2.0,
            "batch_size": 32,
            "model": SMALL,
            "save_every_steps": 5,
            "log_every_steps": 2,
            **more,
        }
    )


def weights(run):
    return load_pretrained(run)[0].state_dict()


def identical(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture(scope="module")
def finished(digits, tmp_path_factory):
    return pretrain(settings(digits, tmp_path_factory.mktemp("pretrain") / "run"))


def test_the_run_folder_is_complete(finished):
    for name in (
        "config.yaml",
        "checkpoints/last.ckpt",
        "encoder/encoder.safetensors",
        "encoder/config.json",
        "metrics.csv",
        "reconstructions/step-0000015.png",
    ):
        assert (finished / name).is_file(), name
    assert not list(finished.rglob("*.part"))
    assert not (finished / "skipped-images.txt").exists()


def test_one_seed_one_result_and_another_seed_another(digits, finished, tmp_path):
    assert identical(weights(finished), weights(pretrain(settings(digits, tmp_path / "same"))))
    assert not identical(weights(finished), weights(pretrain(settings(digits, tmp_path / "other", seed=1))))


def test_workers_change_nothing(digits, finished, tmp_path):
    assert identical(weights(finished), weights(pretrain(settings(digits, tmp_path / "run", workers=2))))


def test_resumed_in_mid_epoch_equals_uninterrupted(digits, finished, tmp_path, power_cut):
    with power_cut(after_step=7):
        pretrain(settings(digits, tmp_path / "cut"))
    cut = pretrain(settings(digits, tmp_path / "cut", resume=True))
    assert identical(weights(finished), weights(cut))
    for name in ("step", "loss", "lr", "grad_norm"):
        assert [row[name] for row in rows(finished)] == [row[name] for row in rows(cut)], name


def test_a_finished_run_resumes_to_itself(digits, finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    before = weights(tmp_path / "run")
    pretrain(settings(digits, tmp_path / "run", resume=True))
    assert identical(before, weights(tmp_path / "run"))


def test_accumulated_batches_equal_one_batch(digits, tmp_path):
    # Per batch the loss is the mean over masked pixels, of which every image has the same number.
    plain = SimMIMSettings(mask_unit=8, encoder={**SMALL.encoder, "drop_path_rate": 0.0})
    runs = [
        pretrain(settings(digits, tmp_path / str(parts), model=plain, optim=OptimSettings(accumulate=parts), epochs=1))
        for parts in (1, 2)
    ]
    for name, value in weights(runs[0]).items():
        torch.testing.assert_close(value, weights(runs[1])[name], atol=2e-5, rtol=1e-3)


def rows(run):
    with (run / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_metrics_tell_loss_rate_gradient_and_throughput(finished):
    table = rows(finished)
    losses = [float(row["loss"]) for row in table if row["loss"]]
    assert losses[-1] < losses[0]
    assert all(0 < float(row["grad_norm"]) for row in table)
    assert all(float(row["images_per_s"]) > 0 and 0 <= float(row["data_wait_share"]) < 1 for row in table)
    # 240 images, 32 per step, 2 epochs: 15 steps, warm-up 0.2 epochs = 2 steps, peak 4e-3 · √(32 / 64), 4.5e-2 per 512.
    rates = {int(row["step"]): float(row["lr"]) for row in table}
    peak = 4.5e-2 * 32 / 512
    assert rates[3] == pytest.approx(0.5 * peak * (1 + np.cos(np.pi * 1 / 13)), rel=1e-5)
    assert rates[13] == pytest.approx(0.5 * peak * (1 + np.cos(np.pi * 11 / 13)), rel=1e-5)


def test_tensorboard_has_scalars_and_pictures(finished):
    events = EventAccumulator(str(finished / "tensorboard"))
    events.Reload()
    scalars = {"loss/masked_l1", "optimizer/learning_rate", "optimizer/gradient_norm", "speed/images_per_s"}
    assert scalars <= set(events.Tags()["scalars"])
    assert [tag.partition(":")[0] for tag in events.Tags()["images"]] == ["images/reconstructions"]


def test_the_exported_encoder_is_the_trained_one(finished):
    model, resolved = load_pretrained(finished)
    images = torch.randn(3, 1, *resolved.size)
    with torch.no_grad():
        assert torch.equal(model.encoder(images).features, load_encoder(finished)(images).features)


def test_bad_images_are_replaced_counted_and_listed(digits, tmp_path, capsys):
    folder = tmp_path / "images"
    shutil.copytree(digits.unlabeled, folder)
    (folder / "broken.png").write_bytes(b"no picture at all")
    (folder / "empty.png").write_bytes(b"")
    run = pretrain(settings(digits, tmp_path / "run", data=DataSettings(str(folder)), epochs=1.0))
    lines = sorted((run / "skipped-images.txt").read_text().splitlines())
    assert [line.split("\t")[0] for line in lines] == [str(folder / "broken.png"), str(folder / "empty.png")]
    assert lines[1].endswith("empty file")
    assert f"2 images could not be read and were replaced; see {run / 'skipped-images.txt'}" in capsys.readouterr().out


def with_bad_images(digits, folder, bad):
    shutil.copytree(digits.unlabeled, folder)
    for number in range(bad):
        (folder / f"bad {number:02d}.png").write_bytes(b"no picture")
    return str(folder)


def test_strict_stops_at_the_first_bad_image(digits, tmp_path):
    data = DataSettings(with_bad_images(digits, tmp_path / "images", 2), strict=True)
    with pytest.raises(ValueError, match=r"bad 0\d\.png cannot be read .* data\.strict stops at the first"):
        pretrain(settings(digits, tmp_path / "run", data=data))


def test_too_many_bad_images_stop_the_run_and_a_larger_share_lets_it_go_on(digits, tmp_path):
    folder = with_bad_images(digits, tmp_path / "images", 20)  # 20 of 260, 7.7 %
    with pytest.raises(ValueError, match=r"of the first 260 images cannot be read, more than .* 5%: see .*skipped-images"):
        pretrain(settings(digits, tmp_path / "run", data=DataSettings(folder)))
    run = pretrain(settings(digits, tmp_path / "more", data=DataSettings(folder, max_skipped_share=0.1)))
    assert len((run / "skipped-images.txt").read_text().splitlines()) == 20


def test_a_resumed_run_goes_on_with_its_skipped_images(tmp_path):
    """60 of 10,000 images are few, also right after the run is resumed."""
    (tmp_path / "skipped-images.txt").write_text("".join(f"{number}.png\tempty file\n" for number in range(60)))
    skipped = SkippedImages(tmp_path, count=100_000, max_share=0.05)
    data = SimpleNamespace(batch_size=100)
    for steps, stops in ((100, False), (10, True)):
        trainer = SimpleNamespace(global_step=steps, datamodule=data, progress_bar_metrics={})
        skipped.on_train_start(trainer, None)
        with pytest.raises(ValueError, match="60 of the first 1,100 images") if stops else contextlib.nullcontext():
            skipped.on_train_batch_end(trainer, None, None, {"skipped": (), "image": torch.zeros(100)})
        assert trainer.progress_bar_metrics == {"skipped images": 60}


def test_other_channel_counts_pretrain(tmp_path):
    """Ten-channel tiles as .npy: channels, mean and deviation are found, and the encoder takes ten."""
    generator = np.random.default_rng(0)
    for number in range(24):
        (tmp_path / "tiles").mkdir(exist_ok=True)
        np.save(tmp_path / "tiles" / f"{number}.npy", generator.integers(0, 4000, (10, 40, 36), dtype=np.uint16))
    encoder = {**SMALL.encoder, "drop_path_rate": 0.0}
    common = {"preset": "nano", "epochs": 1.0, "batch_size": 8, "model": SimMIMSettings(mask_unit=8, encoder=encoder)}
    run = pretrain(PretrainSettings(data=DataSettings(str(tmp_path / "tiles")), out=str(tmp_path / "run"), **common))
    model, resolved = load_pretrained(run)
    assert resolved.data.channels == model.encoder.config.in_channels == 10
    assert len(resolved.data.mean) == len(resolved.data.std) == 10
    np.save(tmp_path / "tiles" / "odd.npy", np.zeros((4, 40, 36), np.uint16))
    with pytest.raises(ValueError, match=r"odd\.npy"):
        pretrain(PretrainSettings(data=DataSettings(str(tmp_path / "tiles")), out=str(tmp_path / "odd"), **common))


def test_normalized_target_trains_and_is_drawn(digits, tmp_path):
    model = SimMIMSettings(mask_unit=8, norm_target_patch=9, encoder=SMALL.encoder)
    run = pretrain(settings(digits, tmp_path / "run", model=model, epochs=1.0))
    losses = [float(row["loss"]) for row in rows(run) if row["loss"]]
    assert losses[-1] < losses[0]
    assert list((run / "reconstructions").iterdir())


def test_nothing_is_written_for_settings_that_cannot_work(digits, tmp_path):
    for more in ({"model": SimMIMSettings(mask_unit=12)}, {"batch_size": 31, "optim": OptimSettings(accumulate=2)}):
        with pytest.raises(ValueError, match=r"mask unit of 12 px does not divide|batch of 31 images does not divide"):
            pretrain(settings(digits, tmp_path / "run", **more))
        assert not (tmp_path / "run").exists()
