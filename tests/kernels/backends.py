"""Both backends behind one call: torch, and Triton's kernels, by their interpreter where there is no GPU."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import pytest
import torch

BACKENDS = ("torch", "triton")
each_backend = pytest.mark.parametrize("backend", BACKENDS)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# numpy computes both sides of a tl.where, the interpreter shows its complaints.
quiet = pytest.mark.filterwarnings("ignore:invalid value encountered", "ignore:overflow encountered", "ignore:divide")


@contextmanager
def running(backend: str) -> Iterator[None]:
    """Sends every call of the door to a backend, whatever the device."""

    def chosen(asked: str, tensor: torch.Tensor) -> bool:
        return backend == "triton" and tensor.dtype != torch.float64

    with (
        mock.patch("reasonrl.kernels.log_probs.uses_triton", chosen),
        mock.patch("reasonrl.kernels.policy.uses_triton", chosen),
    ):
        yield


@contextmanager
def poisoned() -> Iterator[None]:
    """Fills what torch.empty gives with nan: an element nobody wrote shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
