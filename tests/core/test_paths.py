"""Checks of folders before anything is trained: can they be written to, locked, and named?"""

import errno
import os

import filelock
import pytest

from atdiag.core import paths
from atdiag.core.errors import UserError


def test_a_missing_folder_is_accepted_for_runs_but_not_created(tmp_path):
    paths.fit_for_runs(tmp_path / "a" / "b", "runs")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "fault", [OSError(errno.ENOLCK, "No locks"), OSError(errno.EOPNOTSUPP, "no"), NotImplementedError("no flock")]
)
def test_a_file_system_without_locks_is_reported(tmp_path, monkeypatch, fault):
    def refuse(*_, **__):
        raise fault

    monkeypatch.setattr(filelock.FileLock, "acquire", refuse)
    with pytest.raises(UserError, match="without file locks") as found:
        paths.fit_for_runs(tmp_path / "runs", "runs")
    assert "nolock" in str(found.value) and len(str(found.value).splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_too_long_names_are_refused(tmp_path):
    with pytest.raises(UserError, match="`runs`"):
        paths.fit_for_runs(tmp_path / ("a" * 300), "runs")
    long = tmp_path.joinpath(*["a" * 100] * 50)
    assert len(os.fspath(long)) > 4096
    with pytest.raises(UserError, match="`runs`"):
        paths.fit_for_runs(long, "runs")
    assert not paths.is_folder(long) and not paths.is_folder(tmp_path / ("a" * 300))
    assert list(tmp_path.iterdir()) == []


def test_the_search_path_of_data_sets(monkeypatch, tmp_path):
    monkeypatch.setenv("ATDIAG_DATA", str(tmp_path))
    assert paths.data_dir() == tmp_path
    with paths.looking_in(tmp_path / "other"):
        assert paths.data_dir() == tmp_path / "other"
        with paths.looking_in(None):
            assert paths.data_dir() == tmp_path / "other"
    assert paths.data_dir() == tmp_path
