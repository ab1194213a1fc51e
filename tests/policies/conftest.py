"""A small checkpoint in the published layout."""

from pathlib import Path

import pytest
import torch
from tests.policies.original_janus import OriginalJanus
from tests.policies.published_folder import write_published


@pytest.fixture(scope="session")
def original() -> OriginalJanus:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return OriginalJanus().eval()


@pytest.fixture
def folder(original: OriginalJanus, tmp_path: Path) -> Path:
    return write_published(tmp_path / "published", original)
