"""Several processes as one run: what a rank is, and the few sums that ranks exchange.

Launched by torchrun, each rank holds the whole base and takes a share of every step's notes.
There is no wrapper around the model: after the backward passes the gradients are summed in one flat
buffer, which already is the gradient of the global mean because every local loss was divided by the
global denominator. `shard` spreads what is frozen over the ranks (FSDP2, Zhao et al., arXiv
2304.11277): each block is put together for its forward pass, dropped, and again for its backward
pass. What trains stays whole on every rank, so sums, checkpoints and files are those of a whole
base. Putting together takes all ranks, so they pass through the model equally often (`in_step`).

Invariant: all ranks make the same calls in the same order, and every decision
that ends or branches a run is taken from a summed value, so it is the same on all of them.
"""

import datetime
import os
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

_BUCKET_ELEMENTS = 2**26  # of a flat gradient buffer: 256 MiB of float32
_TIMEOUT = datetime.timedelta(minutes=30)  # covers tokenising on rank 0 while the others wait

Batch = TypeVar("Batch")


@dataclass(frozen=True)
class Ranks:
    """This process among those of the run."""

    rank: int
    count: int
    device: torch.device
    is_sharded: bool = False  # a pass through the model needs all ranks

    @property
    def is_first(self) -> bool:
        """Whether this rank writes the files and speaks."""
        return self.rank == 0

    def sum_floats(self, values: Sequence[float]) -> list[float]:
        """Sum host numbers over the ranks, in float64 and without touching the device."""
        if self.count == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total)
        return list(total.tolist())

    def sum_array(self, values: np.ndarray) -> np.ndarray:
        """Sum a host array over the ranks; rows that other ranks fill are zero here."""
        if self.count > 1:
            dist.all_reduce(torch.from_numpy(values))
        return values

    def sum_tensors(self, tensors: Sequence[Tensor]) -> None:
        """Sum device tensors over the ranks in place, many of them in one exchange."""
        if self.count == 1:
            return
        bucket: list[Tensor] = []
        for i, tensor in enumerate(tensors):
            bucket.append(tensor)
            filled = sum(t.numel() for t in bucket)
            if filled >= _BUCKET_ELEMENTS or i + 1 == len(tensors):
                flat = torch.cat([t.reshape(-1) for t in bucket])
                dist.all_reduce(flat)
                pieces = flat.split([t.numel() for t in bucket])
                for target, piece in zip(bucket, pieces, strict=True):
                    target.copy_(piece.view_as(target))
                bucket = []

    def in_step(
        self, batches: Iterable[Batch], filler: Callable[[], Batch]
    ) -> Iterator[tuple[Batch, bool]]:
        """This rank's batches, and whether each is its own: as many on all ranks of a shared base.

        A rank with fewer batches than another gets `filler()` in their place, whose results are
        to be dropped.
        """
        if not self.is_sharded:
            yield from ((batch, True) for batch in batches)
            return
        own = list(batches)
        counts = np.zeros(self.count, np.int64)
        counts[self.rank] = len(own)
        for i in range(int(self.sum_array(counts).max())):
            yield (own[i], True) if i < len(own) else (filler(), False)

    def wait(self) -> None:
        """Return when every rank has arrived here."""
        if self.count > 1:
            self.sum_floats([0.0])


def start(device: str | None, *, shard: bool = False) -> Ranks:
    """Join the other ranks if torchrun started this process, and choose the device.

    torchrun tells each process its place through RANK, WORLD_SIZE and LOCAL_RANK. Host values
    travel by gloo and device tensors by nccl, so a sum of numbers never waits for the GPU.

    Raises ValueError where one rank alone is to shard.
    """
    flush_denormals()
    rank = int(os.environ.get("RANK", "0"))
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if shard and count == 1:
        raise ValueError(
            "--shard spreads the base over several ranks, but there is one: start them with "
            "torchrun --nproc-per-node N train.py ..., or leave it out"
        )
    chosen = choose_device(device, local_rank=int(os.environ.get("LOCAL_RANK", "0")))
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if count > 1:
        backend = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo"
        dist.init_process_group(backend, rank=rank, world_size=count, timeout=_TIMEOUT)
    return Ranks(rank=rank, count=count, device=chosen, is_sharded=shard)


def shard(
    model: nn.Module, blocks: Iterable[nn.Module], whole: Set[nn.Parameter], ranks: Ranks
) -> None:
    """Spread the parameters of a model over the ranks, but for those that stay `whole`.

    The model may lie on the CPU: each block goes to the device when it is its turn.
    """
    # Much of torch that no other run needs.
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    for parameter in whole:
        parameter.data = parameter.data.to(ranks.device)
    mesh = init_device_mesh(ranks.device.type, (ranks.count,))
    for module in (*blocks, model):
        fully_shard(module, mesh=mesh, ignored_params=set(whole))
    if hasattr(model, "scores"):  # of classifiers, called without `forward`
        register_fsdp_forward_method(model, "scores")


def held_parameters(model: nn.Module) -> int:
    """Parameters that lie on this rank, of a model that was given to `shard`."""
    from torch.distributed.tensor import DTensor

    return sum((p.to_local() if isinstance(p, DTensor) else p).numel() for p in model.parameters())


def flush_denormals() -> None:
    """Let a CPU take numbers below 1.2e-38 for 0; to be called before torch starts its threads.

    Attention is full of such numbers (the probability of a far key), and each one costs a CPU a
    hundred ordinary operations. Threads inherit the setting from the thread that starts them.
    """
    torch.set_flush_denormal(True)


def stop(ranks: Ranks) -> None:
    if ranks.count > 1:
        dist.destroy_process_group()


def choose_device(device: str | None, *, local_rank: int = 0) -> torch.device:
    """The device that was asked for, or this rank's GPU, or the CPU."""
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise ValueError(f"--device must be cpu, cuda or cuda:N, got {device}") from None
    if chosen.type not in ("cpu", "cuda"):
        raise ValueError(f"--device must be cpu, cuda or cuda:N, got {device}")
    if chosen.type == "cuda":
        present = torch.cuda.device_count()
        index = local_rank if chosen.index is None else chosen.index
        if index >= present:
            raise ValueError(
                f"--device {device} asks for GPU {index}, but this machine has {present}; "
                "use --device cpu, or start no more ranks than GPUs"
            )
        chosen = torch.device("cuda", index)
    return chosen
