from pathlib import Path

import pytest

from speechalign.artifacts import (
    committed_folder,
    is_committed,
    manifest_facts,
    verify_folder,
    write_json_atomically,
)
from speechalign.errors import ConfigError, CorruptArtifact, DataError


def a_folder(path: Path) -> Path:
    with committed_folder(path, {"rows": 3}) as partial:
        (partial / "deep").mkdir()
        (partial / "deep" / "weights").write_bytes(b"\x01\x02\x03")
    return path


def test_a_committed_folder_has_its_files_and_its_facts(tmp_path: Path):
    folder = a_folder(tmp_path / "policy")
    assert (folder / "deep" / "weights").read_bytes() == b"\x01\x02\x03"
    assert verify_folder(folder) == manifest_facts(folder) == {"rows": 3}


def test_facts_may_be_added_while_the_folder_is_filled(tmp_path: Path):
    facts = {"rows": 0}
    with committed_folder(tmp_path / "pairs", facts):
        facts["rows"] = 5
    assert manifest_facts(tmp_path / "pairs") == {"rows": 5}


def test_a_failure_commits_nothing_and_keeps_the_former_artifact(tmp_path: Path):
    folder = a_folder(tmp_path / "policy")
    with pytest.raises(RuntimeError), committed_folder(folder, {"rows": 9}):
        raise RuntimeError("disk full")
    assert verify_folder(folder) == {"rows": 3}


def test_a_new_commit_replaces_the_former_one_whole(tmp_path: Path):
    folder = a_folder(tmp_path / "policy")
    with committed_folder(folder, {}) as partial:
        (partial / "other").write_text("x")
    assert not (folder / "deep").exists()


def test_what_is_no_artifact_is_never_replaced(tmp_path: Path):
    (tmp_path / "empty").mkdir()
    a_folder(tmp_path / "empty")
    notes = tmp_path / "run" / "notes.txt"
    notes.parent.mkdir()
    notes.write_text("mine")
    with pytest.raises(ConfigError, match="it is no artifact"):
        a_folder(notes.parent)
    assert notes.read_text() == "mine"


@pytest.mark.parametrize("content", [b"\x01\x02\x07", b"\x01\x02", b"\x01\x02\x03\x00", None])
def test_a_changed_file_is_found(tmp_path: Path, content: bytes | None):
    folder = a_folder(tmp_path / "policy")
    weights = folder / "deep" / "weights"
    weights.unlink()
    if content is not None:
        weights.write_bytes(content)
    with pytest.raises(CorruptArtifact, match="weights"):
        verify_folder(folder)


def test_a_folder_without_a_manifest_was_never_finished(tmp_path: Path):
    assert not is_committed(tmp_path)
    with pytest.raises(DataError, match="never finished"):
        verify_folder(tmp_path)


def test_json_is_replaced_in_one_step(tmp_path: Path):
    path = tmp_path / "state.json"
    write_json_atomically(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json_atomically(path, {"a": object()})
    assert path.read_text() == '{\n  "a": 1\n}'
