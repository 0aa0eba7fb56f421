"""
What a side network saves in memory
===================================

Training few parameters does not by itself save the memory of activations: to reach an early adapter, the gradient still runs through the whole
backbone. A side network stands beside it and only reads hidden states, so that the backbone keeps nothing for a backward pass.
This example counts the bytes that autograd really keeps.
"""

import matplotlib.pyplot as plt
import torch
from torch import nn

import exapt

LAYERS, WIDTH, BATCH, LENGTH = 6, 128, 8, 64


class Classifier(nn.Module):
    """A small transformer encoder over vectors, with a head on the mean."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, dropout=0.0, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.encoder(x).mean(1))


def kept(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> int:
    """Bytes that a forward pass keeps for its backward pass, parameters not counted."""
    parameters = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    seen: dict[int, tuple[torch.Tensor, int]] = {}

    def note(t: torch.Tensor) -> torch.Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in parameters:
            seen[storage.data_ptr()] = (t, storage.nbytes())  # held, so that no address is used twice
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        loss = nn.functional.cross_entropy(model(x), y)
    loss.backward()
    return sum(size for _, size in seen.values())


# %%
# The same backbone and batch each time; every parameter of the base trains, or only those of an adapter.
torch.manual_seed(0)
x, y = torch.randn(BATCH, LENGTH, WIDTH), torch.randint(4, (BATCH,))
kinds = {
    "full fine-tuning": None,
    "LoRA, rank 4": {"linear": exapt.LoRA(rank=4)},
    "biases": {"all": exapt.method("bitfit")},
    "ladder side network": {"block": exapt.method("lst")},
}
memory, trained = {}, {}
for kind, rules in kinds.items():
    model = Classifier()
    if rules:
        exapt.attach(model, rules, seed=0)
    trained[kind] = exapt.parameter_count(model).trainable
    memory[kind] = kept(model, x, y) / 2**20
    print(f"{kind:20} {trained[kind]:9,} parameters train, {memory[kind]:5.1f} MiB kept for backward")

# %%
# The adapters train a small part of the parameters, and keep about as much as full fine-tuning does. The side network keeps about a quarter of it.
fig, axes = plt.subplots(1, 2, figsize=(8, 2.6), sharey=True)
for ax, values, title in zip(axes, (trained, memory), ("parameters trained", "MiB kept for backward"), strict=True):
    ax.barh(list(values), list(values.values()))
    ax.set(title=title)
axes[0].set_xscale("log")
axes[0].invert_yaxis()
fig.tight_layout()
plt.show()
