"""Without a GPU the Triton kernels run in Triton's interpreter, which must be chosen before Triton
is imported (and parts of PyTorch import it)."""

import os
from collections.abc import Iterator

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="module")
def short_prose() -> Iterator[None]:
    """Generated prose of a tenth of its length, which a tokenizer of bytes reads in no time."""
    from tools.evaluation.recall import fillers

    def forget() -> None:
        fillers._tales.cache_clear()
        fillers._notices.cache_clear()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fillers, "_SENTENCES", 300)
        forget()
        yield
    forget()
