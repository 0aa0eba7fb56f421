"""
Several adapters in one batch
=============================

One model carries an adapter for each of several users. A batch mixes their rows; :func:`exapt.routed <exapt.core.routing.routed>` gives every row its own
adapter, and the result equals a loop over the rows.
"""

import time

import matplotlib.pyplot as plt
import torch
from torch import nn

import exapt

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 8)).eval()
users = [f"user{i}" for i in range(8)]
for i, user in enumerate(users):
    exapt.attach(model, exapt.LoRA(rank=4), where="all", name=user, seed=i, trainable=False)
    with torch.no_grad():  # stands for training: gives every adapter an effect of its own
        for name, p in model.named_parameters():
            if f".{user}." in name and name.endswith(".B"):
                p.normal_(std=0.05)

# %%
# A batch of 64 rows: eight users in turn, and every ninth row by the base model alone.
x = torch.randn(64, 64)
names = [None if row % 9 == 8 else users[row % 8] for row in range(64)]


def one_by_one() -> torch.Tensor:
    rows = []
    for row, name in enumerate(names):
        with exapt.using(model, *([name] if name else [])):
            rows.append(model(x[row : row + 1]))
    return torch.cat(rows)


def mixed() -> torch.Tensor:
    with exapt.routed(model, names):
        return model(x)


def seconds(run) -> float:
    times = []
    for _ in range(5):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


with torch.no_grad():
    print(f"largest difference: {(mixed() - one_by_one()).abs().max():.1e}")
    taken = {"row by row": seconds(one_by_one), "routed": seconds(mixed)}
print(", ".join(f"{k}: {1e3 * v:.1f} ms" for k, v in taken.items()))

# %%
# The same input gives another answer under each adapter; the base model's is unchanged by all of them.
with torch.no_grad(), exapt.routed(model, [*users, None]):
    answers = model(x[:1].expand(9, -1))

fig, axes = plt.subplots(1, 2, figsize=(8, 3), width_ratios=[2, 1])
image = axes[0].imshow(answers, cmap="RdBu", aspect="auto")
axes[0].set(yticks=range(9), yticklabels=[*users, "base"], xlabel="output", title="one input, nine rows")
fig.colorbar(image, ax=axes[0])
axes[1].barh(list(taken), [1e3 * v for v in taken.values()])
axes[1].set(xlabel="ms for 64 rows")
fig.tight_layout()
plt.show()
