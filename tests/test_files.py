"""Files are written atomically: they appear whole or not at all."""

import json
import os
import stat

import pytest

from simmim.files import atomic_write, read_json, write_json


def test_files_appear_whole(tmp_path):
    path = tmp_path / "deep" / "er" / "file.txt"
    with atomic_write(path) as temporary:
        temporary.write_text("half")
        assert not path.exists() and temporary.parent == path.parent
    assert path.read_text() == "half" and os.listdir(path.parent) == ["file.txt"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    with atomic_write(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "half"
    assert path.read_text() == "new"


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, OSError])
def test_nothing_is_left_of_a_file_that_failed(tmp_path, error):
    """The old file stays as it was, the temporary one vanishes, and the error goes on."""
    path = tmp_path / "file.txt"
    for old in (None, "old"):
        if old:
            path.write_text(old)
        with pytest.raises(error, match="stop"), atomic_write(path) as temporary:
            temporary.write_text("half")
            raise error("stop")
        assert os.listdir(tmp_path) == (["file.txt"] if old else [])
    assert path.read_text() == "old"


def test_json_that_cannot_be_written_leaves_the_old(tmp_path):
    write_json(tmp_path / "x.json", {"a": [1, 2], "ä": None})
    assert json.loads((tmp_path / "x.json").read_text(encoding="utf-8")) == {"a": [1, 2], "ä": None}
    with pytest.raises(TypeError):
        write_json(tmp_path / "x.json", {"a": object()})
    assert json.loads((tmp_path / "x.json").read_text(encoding="utf-8"))["a"] == [1, 2]
    assert os.listdir(tmp_path) == ["x.json"]


def test_json_is_read_as_an_object(tmp_path):
    (tmp_path / "list.json").write_text("[1, 2]")
    assert read_json(tmp_path / "list.json") == {}
    (tmp_path / "torn.json").write_text('{"a": ')
    with pytest.raises(ValueError, match=r"torn\.json is not valid JSON: "):
        read_json(tmp_path / "torn.json")
