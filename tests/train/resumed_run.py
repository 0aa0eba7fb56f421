"""A short training run as a process of its own, to be killed: ``python resumed_run.py FOLDER RESUME``."""

# ruff: noqa: E402  the script finds its neighbours first
from __future__ import annotations

import random
import sys
import time
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

import numpy as np
import torch
from tiny import CLASSES, model_of
from torch import Tensor

import exapt
from exapt.train import Custom, FitConfig, fit

torch.set_num_threads(1)


def loss(model: Any, batch: Any) -> Tensor:
    """Draws from every generator, so that each must be brought back."""
    time.sleep(0.02)
    y = torch.nn.functional.cross_entropy(model(batch["x"]), batch["label"])
    return y * (1 + 0.1 * random.random() + 0.1 * float(np.random.rand()) + 0.1 * torch.rand(()))


def main(folder: str, resume: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    x = torch.randint(3, 40, (41, 6), generator=generator)
    rows = [{"x": x[i], "label": x[i, 0] % CLASSES} for i in range(41)]
    config = FitConfig(
        epochs=6, batch_size=4, accumulate=2, lr=1e-2, folder=folder, resume=resume, save_every=3, eval_every=5, patience=50, log_every=2, progress=False
    )
    fit(model_of("text"), Custom(loss), rows, exapt.LoRA(4, dropout=0.2), validation=rows[:8], config=config)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2] == "yes")
