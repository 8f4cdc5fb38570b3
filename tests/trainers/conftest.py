"""One recorded dot world for the whole folder, a cache that is not the user's, and a tokenizer."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.trainers.toy import write_dots
from worldline.trainers import tokenizer


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    root = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WORLDLINE_CACHE", str(root))
        yield root


@pytest.fixture(scope="session")
def dots(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dots(tmp_path_factory.mktemp("data") / "dots")


@pytest.fixture(scope="session")
def patches(dots: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tokenizer") / "patches"
    config = tokenizer.TrainTokenizer(data=(dots,), out=out, kind="patches", patch=4)
    return tokenizer.run(config, progress=False)
