"""RoPE's kernel beside its reference: grouped heads, views of a fused projection, odd widths."""

import pytest
import torch
from torch import Tensor

from kernels import reference
from tests.kernels.agreement import DTYPES, assert_agrees, random, run

pytestmark = pytest.mark.kernel


def angles(rows: int, half: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    turns = random(rows, half, dtype=torch.float64, seed=9, scale=10.0)
    return turns.cos().to(dtype), turns.sin().to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("heads", "width"),
    [((1, 1), 2), ((3, 3), 14), ((4, 2), 64), ((32, 8), 128), ((33, 1), 80), ((5, 0), 8)],
    ids=str,
)
def test_agrees_with_the_reference(heads: tuple[int, int], width: int, dtype: torch.dtype) -> None:
    from kernels.rotary import rope

    q, k = (random(3, n, width, dtype=dtype, seed=n).requires_grad_() for n in heads)
    douts = [random(3, n, width, dtype=dtype, seed=n + 50) for n in heads]
    assert_agrees(rope, reference.rope, (q, k, *angles(3, width // 2, dtype)), douts)


def test_heads_may_be_views_of_a_fused_projection_and_gradients_too() -> None:
    from kernels.rotary import rope

    fused, dfused = (random(5, 8, 16, dtype=torch.float32, seed=i) for i in range(2))
    q, k = fused[:, :4].requires_grad_(), fused[:, 4:6].requires_grad_()
    cos, sin = angles(5, 8, torch.float32)
    assert_agrees(rope, reference.rope, (q, k, cos, sin), [dfused[:, :4], dfused[:, 4:6]])
    # Transposed memory: neither heads nor columns are adjacent, nor are the angles' rows.
    turned = random(16, 4, 5, dtype=torch.float32, seed=2).permute(2, 1, 0).requires_grad_()
    apart = cos.T.contiguous().T, sin.T.contiguous().T
    assert_agrees(rope, reference.rope, (turned, k, *apart), [dfused[:, :4], dfused[:, 4:6]])


def test_the_backward_pass_is_the_opposite_turn() -> None:
    from kernels.rotary import rope

    q, k = (random(3, n, 8, dtype=torch.float32, seed=n) for n in (4, 2))
    cos, sin = angles(3, 4, torch.float32)
    turned = rope(q, k, cos, sin)
    _, _, *grads = run(rope, (q.requires_grad_(), k.requires_grad_(), cos, sin), turned)
    for grad, x in zip(grads, (q, k), strict=True):
        torch.testing.assert_close(grad, x.detach())


def test_the_same_bits_every_time() -> None:
    from kernels.rotary import rope

    q, k = (random(3, n, 12, dtype=torch.float32, seed=n).requires_grad_() for n in (4, 2))
    arguments, douts = (q, k, *angles(3, 6, torch.float32)), [q.detach(), k.detach()]
    first, *others = (run(rope, arguments, douts) for _ in range(3))
    assert all(torch.equal(a, b) for o in others for a, b in zip(first, o, strict=True))
