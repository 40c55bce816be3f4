"""SwiGLU's kernel beside its reference."""

import pytest
import torch

from kernels import reference
from tests.kernels.agreement import DTYPES, assert_agrees, random

pytestmark = pytest.mark.kernel


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (5, 2049), (2, 4096)], ids=str)
def test_agrees_with_the_reference(shape: tuple[int, int], dtype: torch.dtype) -> None:
    from kernels.gated import swiglu

    gate, up = (random(*shape, dtype=dtype, seed=i).requires_grad_() for i in range(2))
    assert_agrees(swiglu, reference.swiglu, (gate, up), [random(*shape, dtype=dtype, seed=2)])


def test_rows_may_stand_apart_and_columns_too() -> None:
    from kernels.gated import swiglu

    whole = random(6, 40, dtype=torch.float32, seed=0)
    gate, up = whole[:, :20].requires_grad_(), whole[::1, 20:].requires_grad_()
    turned = random(20, 6, dtype=torch.float32, seed=1).T
    assert_agrees(swiglu, reference.swiglu, (gate, up), [turned])
    assert_agrees(swiglu, reference.swiglu, (turned.requires_grad_(), gate), [up.detach()])
