"""One recorded toy dataset for all tests that only read."""

import shutil
from pathlib import Path

import pytest

from tests.data.toy import toy_dataset


@pytest.fixture(scope="session")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data") / "toy"
    toy_dataset(root)
    return root


@pytest.fixture
def damaged(recorded: Path, tmp_path: Path) -> Path:
    """A private copy to break."""
    return Path(shutil.copytree(recorded, tmp_path / "copy"))
