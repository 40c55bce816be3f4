"""What a run says while it works: a bar on a terminal, plain lines elsewhere, and metric files.

`metrics.jsonl` has one JSON object per optimiser step and one per validation. It is written line by
line, and the count of lines is part of every checkpoint, so a resumed run cuts off what the
interrupted one wrote after its last checkpoint. Invariant: nothing here has ever seen a note, only
numbers.
"""

import io
import itertools
import json
import os
import sys
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, TextIO

from tqdm import tqdm

from training.estimate import TimeLeft, duration

_SECONDS_BETWEEN_LINES = 10.0
_STEPS_FOR_SPEED = 50  # window of the shown tokens/s


class Progress:
    """The voice of the first rank; the other ranks get a silent one (`folder=None`)."""

    def __init__(
        self,
        folder: Path | None,
        *,
        total_steps: int,
        first_step: int,
        metrics_lines: int,
        time_left: TimeLeft | None = None,
    ) -> None:
        self._silent = folder is None
        self._total_steps = total_steps
        self._first_step = first_step
        self._time_left = time_left or TimeLeft(total_steps=total_steps)
        self._last_end = time.perf_counter()  # of a step or a validation
        self._recent: deque[tuple[float, int]] = deque(maxlen=_STEPS_FOR_SPEED)  # seconds, tokens
        self._last_line = 0.0
        self._metrics: TextIO | None = None
        self._lines = metrics_lines
        self._board: Any = None
        self._bar: Any = None
        if folder is None:
            return
        self._metrics = _open_at(folder / "metrics.jsonl", metrics_lines)
        summary_writer = _tensorboard()
        if summary_writer is not None:
            self._board = summary_writer.SummaryWriter(
                str(folder / "tensorboard"), purge_step=first_step + 1 if first_step else None
            )
        if sys.stderr.isatty():
            self._bar = tqdm(total=total_steps, initial=first_step, unit="step", dynamic_ncols=True)

    def step(self, step: int, *, seconds: float, tokens: int, metrics: Mapping[str, float]) -> None:
        """Record one optimiser step that ended just now and took `seconds`."""
        if self._silent:
            return
        now = time.perf_counter()
        self._time_left.step(seconds, between=now - seconds - self._last_end)
        self._last_end = now
        self._recent.append((seconds, tokens))
        speed = sum(t for _, t in self._recent) / max(1e-9, sum(s for s, _ in self._recent))
        self._write({"step": step, **metrics, "tokens_per_second": round(tokens / seconds, 1)})
        shown = (
            f"loss {metrics['loss']:.4f}  lr {metrics['lr']:.2e}  "
            f"norm {metrics['gradient_norm']:.3f}  {speed:,.0f} tokens/s"
        )
        if self._bar is not None:
            self._bar.set_postfix_str(shown, refresh=False)
            self._bar.update(step - self._bar.n)
        elif now - self._last_line >= _SECONDS_BETWEEN_LINES or step in (
            self._first_step + 1,
            self._total_steps,
        ):
            self._last_line = now
            left = duration(self._time_left.seconds(step))
            self.say(f"step {step}/{self._total_steps}  {shown}  left {left}")

    def validation(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record the result of a validation that ended just now."""
        if self._silent:
            return
        now = time.perf_counter()
        self._time_left.validation(now - self._last_end)
        self._last_end = now
        self._write({"step": step, **{f"validation_{k}": v for k, v in metrics.items()}})
        shown = "  ".join(f"{name} {value:.4f}" for name, value in metrics.items())
        self.say(f"step {step}/{self._total_steps}  validation: {shown}")

    def say(self, line: str) -> None:
        """Print one line, above the bar where there is one."""
        if self._silent:
            return
        if self._bar is not None:
            self._bar.write(line, file=sys.stderr)
        else:
            print(line, file=sys.stderr, flush=True)

    def sync(self) -> int:
        """Force the metrics to the disk; returns the count of lines, which a checkpoint keeps."""
        if self._metrics is not None:
            self._metrics.flush()
            os.fsync(self._metrics.fileno())
        return self._lines

    def close(self) -> None:
        for each in (self._bar, self._board, self._metrics):
            if each is not None:
                each.close()

    def _write(self, record: Mapping[str, float]) -> None:
        assert self._metrics is not None
        self._metrics.write(json.dumps(dict(record)) + "\n")
        self._metrics.flush()
        self._lines += 1
        if self._board is not None:
            for name, value in record.items():
                if name != "step":
                    self._board.add_scalar(name, value, int(record["step"]))


def _open_at(path: Path, lines: int) -> TextIO:
    """Open for appending after the first `lines` lines; what stood behind them is cut off."""
    # Lines, not bytes: the digits of a speed differ from run to run, a checkpoint's bytes may not.
    file = open(os.open(path, os.O_RDWR | os.O_CREAT, 0o600), "r+b")  # noqa: SIM115
    if sum(line.endswith(b"\n") for line in itertools.islice(file, lines)) < lines:
        file.close()
        raise ValueError(f"{path} is shorter than when the checkpoint was written; it was changed")
    file.truncate(file.tell())
    return io.TextIOWrapper(file, encoding="ascii")


def _tensorboard() -> ModuleType | None:
    """TensorBoard's writer where the extra is installed."""
    try:
        import torch.utils.tensorboard as tensorboard
    except ImportError:
        return None
    return tensorboard
