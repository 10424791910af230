"""Where the kernels run: on the GPU if there is one, else in Triton's interpreter."""

import warnings

import pytest
import torch

from tokenprune.ops import kernels

pytest.importorskip("triton", reason="triton is not installed")


@pytest.fixture(autouse=True)
def device(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    if torch.cuda.is_available():
        return torch.device("cuda")
    # the interpreter of triton 3.4, which belongs to torch 2.8
    warnings.filterwarnings("ignore", "Conversion of an array with ndim > 0", DeprecationWarning)
    monkeypatch.setattr(kernels, "INTERPRETED", True)
    return torch.device("cpu")
