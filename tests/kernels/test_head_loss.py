"""The kernel of the head's loss beside its reference."""

import pytest
import torch

from kernels import reference
from tests.kernels.agreement import DEVICE, DTYPES, assert_agrees, random

pytestmark = pytest.mark.kernel


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("is_frozen", [True, False], ids=["frozen", "trained"])
@pytest.mark.parametrize("shape", [(1, 3, 1), (5, 7, 13), (3, 17, 4099)], ids=str)
def test_agrees_with_the_reference(
    shape: tuple[int, int, int], is_frozen: bool, dtype: torch.dtype
) -> None:
    from kernels.head_loss import linear_cross_entropy

    rows, width, vocabulary = shape
    x = random(rows, width, dtype=dtype, seed=0).requires_grad_()
    w = random(vocabulary, width, dtype=dtype, seed=1, scale=0.5).requires_grad_(not is_frozen)
    targets = torch.randint(vocabulary, (rows,), generator=torch.Generator().manual_seed(2))
    dloss = torch.full((), 0.7, device=DEVICE)
    assert_agrees(
        linear_cross_entropy,
        reference.linear_cross_entropy,
        (x, w, targets.to(DEVICE)),
        [dloss],
    )


def test_targets_in_the_last_block_of_the_vocabulary() -> None:
    from kernels.head_loss import linear_cross_entropy

    x = random(3, 5, dtype=torch.float32, seed=5).requires_grad_()
    w = random(4099, 5, dtype=torch.float32, seed=6)
    targets = torch.tensor([4095, 4096, 4098], device=DEVICE)
    arguments, dloss = (x, w, targets), torch.ones((), device=DEVICE)
    assert_agrees(linear_cross_entropy, reference.linear_cross_entropy, arguments, [dloss])


def test_chunks_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    from kernels import head_loss

    x = random(7, 8, dtype=torch.float32, seed=3).requires_grad_()
    w = random(11, 8, dtype=torch.float32, seed=4).requires_grad_()
    targets = torch.arange(7, device=DEVICE)

    def result() -> list[torch.Tensor]:
        loss = head_loss.linear_cross_entropy(x, w, targets)
        return [loss.detach(), *torch.autograd.grad(loss, (x, w))]

    whole = result()
    monkeypatch.setattr(head_loss, "CHUNK_ELEMENTS", 33)  # three rows at a time
    for a, b in zip(whole, result(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_large_logits_and_infinities() -> None:
    from kernels.head_loss import linear_cross_entropy

    x = torch.tensor([[1.0]], device=DEVICE)
    w = torch.tensor([[3e4], [-3e4]], device=DEVICE)
    zero, one = (torch.tensor([i], device=DEVICE) for i in range(2))
    assert linear_cross_entropy(x, w, zero).item() == 0.0
    assert linear_cross_entropy(x, w, one).item() == pytest.approx(6e4)
    w[0] = float("nan")
    assert not torch.isfinite(linear_cross_entropy(x, w, one))
