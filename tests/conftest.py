"""Fixtures that several tests share, and caches that leave the user's alone."""
import os
import tempfile

import pytest
import torch

from simmim.digits import write_digits

# Before anything reads them; processes that tests start inherit them.
_CACHES = tempfile.TemporaryDirectory(prefix="simmim-tests-")
os.environ |= {"XDG_CACHE_HOME": _CACHES.name, "HF_HOME": os.path.join(_CACHES.name, "huggingface"), "HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    """Tests run in parallel processes; threads would only fight for cores. It also fixes the order of summation."""
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def nursery(tmp_path_factory):
    """A process that has imported everything, to start runs of the command from."""
    from nursery import Nursery

    nursery = Nursery(tmp_path_factory.mktemp("logs"))
    yield nursery
    nursery.close()


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    """300 real digits: 240 unlabeled, the same in class folders, 60 for test."""
    return write_digits(tmp_path_factory.mktemp("digits"), count=300)
