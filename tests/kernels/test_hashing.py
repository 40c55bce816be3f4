"""The hash inside kernels beside the reference's, bit by bit, and dropout made with it."""

import pytest
import torch

from kernels import reference
from tests.kernels.agreement import DEVICE, DTYPES, assert_agrees, random

pytestmark = pytest.mark.kernel


def make_keys(rows: int) -> torch.Tensor:
    tokens = torch.arange(rows, device=DEVICE)
    return reference.row_keys(11, tokens // 3, tokens % 3)


@pytest.mark.parametrize("p", [1e-6, 0.05, 0.3, 0.5, 0.99998])
@pytest.mark.parametrize("width", [1, 2, 7, 2047, 4098])
def test_every_bit_is_the_references(width: int, p: float) -> None:
    from kernels.hashing import dropout

    keys = make_keys(5)
    ones = torch.ones(5, width, device=DEVICE)
    for site in (0, 1, 16, 2**31 + 5, 2**40 + 3):
        expected = reference.keep_mask(keys, width, p, site)
        assert torch.equal(dropout(ones, p, keys, site) != 0, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (2, 2051)], ids=str)
def test_dropout_agrees_with_the_reference(shape: tuple[int, int], dtype: torch.dtype) -> None:
    from kernels.hashing import dropout

    x = random(*shape, dtype=dtype, seed=0).requires_grad_()
    dy = random(*shape, dtype=dtype, seed=1)
    arguments = (x, 0.3, make_keys(shape[0]), 4)
    assert_agrees(dropout, reference.dropout, arguments, [dy])
    turned = random(*shape[::-1], dtype=dtype, seed=2).T.requires_grad_()
    assert_agrees(dropout, reference.dropout, (turned, *arguments[1:]), [dy])


def test_evaluation_drops_nothing() -> None:
    from kernels.hashing import dropout

    x = random(2, 3, dtype=torch.float32, seed=0)
    assert dropout(x, 0.5, None, 1) is x
