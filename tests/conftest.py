"""What every test stands on: one thread, examples that repeat, and where larger test data lie."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported, and for the processes that tests start

import hypothesis
import pytest
import torch

torch.set_num_threads(1)
hypothesis.settings.register_profile("fnlm", derandomize=True, deadline=None)
hypothesis.settings.load_profile("fnlm")


@pytest.fixture(scope="session")
def test_data() -> Path:
    """The folder with texts, vocabularies and small weights that are too large for the repository."""
    beside = Path(__file__).parents[2] / "shared" / "data"
    named = os.environ.get("FNLM_TEST_DATA")
    for folder in (Path(named) if named else beside, beside):
        if folder.is_dir():
            return folder
    pytest.skip(
        f"no test data: FNLM_TEST_DATA names {named or 'nothing'}, and there is no shared/data beside the project"
    )


@pytest.fixture(autouse=True)
def _products_as_before() -> Iterator[None]:
    """A command that trains in this process sets how it multiplies (`fnlm.tune_cpu`), and other tests compare bits."""
    before = torch.backends.mkldnn.matmul.fp32_precision
    yield
    torch.backends.mkldnn.matmul.fp32_precision = before


@pytest.fixture(autouse=True)
def _the_same_draws() -> None:
    """What a test takes from torch's own generator is the same each time."""
    torch.manual_seed(0)
