"""Tests that need data from outside the repository may skip on a laptop, never in CI."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import find_shared


def test_missing_data_skips_here_and_fails_in_ci(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OCTAVO_SHARED", str(tmp_path))
    monkeypatch.delenv("CI", raising=False)
    with pytest.raises(pytest.skip.Exception, match="set OCTAVO_SHARED"):
        find_shared()
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match="set OCTAVO_SHARED"):
        find_shared()
    (tmp_path / "data").mkdir()
    assert find_shared() == tmp_path
