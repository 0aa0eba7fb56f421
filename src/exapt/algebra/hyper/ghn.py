"""GHN-2: a graph hypernetwork that predicts all parameters of an architecture it never saw (Knyazev et al., NeurIPS 2021).

The paper's text and code could not be read here: the formulas are from the abstract and from memory.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from exapt.core.components import component
from exapt.core.errors import InputError

PRIMITIVES = (
    "input", "output", "linear", "conv", "depthwise conv", "norm", "relu", "gelu", "silu", "tanh", "sigmoid", "add", "mul", "cat", "pool", "mean",
    "flatten", "attention", "softmax", "other",
)  # fmt: skip
_KINDS: tuple[tuple[str, str], ...] = (
    ("norm", "norm"), ("linear", "linear"), ("leakyrelu", "relu"), ("relu", "relu"), ("gelu", "gelu"), ("silu", "silu"), ("tanh", "tanh"),
    ("sigmoid", "sigmoid"), ("pool", "pool"), ("mean", "mean"), ("flatten", "flatten"), ("add", "add"), ("mul", "mul"), ("cat", "cat"),
    ("attention", "attention"), ("softmax", "softmax"),
)  # fmt: skip


@dataclass(frozen=True)
class Architecture:
    """A network as a graph of operations in the order in which they run.

    Attributes:
        kinds: What each node is, of :data:`PRIMITIVES`.
        edges: (nodes, nodes), true from a node to those that take its output.
        shapes: For each node the tensors it owns: their names in the network and shapes.
    """

    kinds: tuple[str, ...]
    edges: NDArray[np.bool_]
    shapes: tuple[Mapping[str, tuple[int, ...]], ...]


def architecture(network: nn.Module) -> Architecture:
    """Reads the graph of a network that ``torch.fx`` can trace; the values of its parameters play no part.

    Raises:
        InputError: for a parameter outside its layers, which no node would own.

    >>> architecture(nn.Sequential(nn.Linear(2, 3), nn.ReLU())).kinds
    ('input', 'linear', 'relu', 'output')
    """
    from torch.fx import symbolic_trace

    traced = symbolic_trace(network)
    modules, nodes = dict(network.named_modules()), list(traced.graph.nodes)
    kinds, shapes, places = [], [], {node: i for i, node in enumerate(nodes)}
    edges = np.zeros((len(nodes), len(nodes)), dtype=bool)
    for node in nodes:
        module = modules.get(str(node.target)) if node.op == "call_module" else None
        kinds.append(_kind(node, module))
        own = {} if module is None else {f"{node.target}.{k}": tuple(p.shape) for k, p in module.named_parameters()}
        shapes.append(own)
        for source in node.all_input_nodes:
            edges[places[source], places[node]] = True
    odd = {n for n, _ in network.named_parameters()} - {n for own in shapes for n in own}
    if odd:
        raise InputError(f"{min(odd)}: this parameter belongs to no layer that is called once; a graph hypernetwork predicts those of layers")
    return Architecture(tuple(kinds), edges, tuple(shapes))


def _kind(node: object, module: nn.Module | None) -> str:
    op, target = getattr(node, "op", ""), getattr(node, "target", "")
    if op in ("placeholder", "output"):
        return "input" if op == "placeholder" else "output"
    if isinstance(module, (nn.Conv1d, nn.Conv2d)):
        return "depthwise conv" if module.groups > 1 else "conv"
    name = (type(module).__name__ if module is not None else getattr(target, "__name__", str(target))).lower()
    return next((kind for part, kind in _KINDS if part in name), "other")


@component("ghn2", kind="hypernetwork", paper="Parameter Prediction for Unseen Deep Architectures")
class GraphHyperNetwork(nn.Module):
    r"""Predicts every parameter of an architecture in one pass over its graph, so that the prediction can be trained over many architectures and
    asked of new ones.

    Nodes start as embeddings of their kind and their tensors' shapes. They are visited in the order in which the network runs, then in reverse, each
    one updated by a gated recurrent unit from what comes along its edges, and along virtual edges of shortest paths :math:`s_{vu}`:

    .. math:: m_v = \sum_{u \in N_v} \mathrm{MLP}(h_u) + \sum_{1 < s_{vu} \le s_{max}} \frac{1}{s_{vu}} \mathrm{MLP}_{sp}(h_u), \quad
        h_v \leftarrow \mathrm{GRU}(h_v, m_v)

    A decoder turns a node's state into a tensor of the largest size, which is tiled along channels and cut at the kernel's middle to the size asked
    for, and normalised by what it is: weights :math:`\sqrt{\beta / \text{fan-in}}\, w` with :math:`\beta = 2` (1 for depthwise), factors of norms
    :math:`2\sigma(w / 2)`, shifts and biases :math:`\tanh(0.2\, w)`. Train on the mean loss of several architectures a step (meta-batches), their
    networks called by ``torch.func.functional_call(network, ghn(architecture(network)), x)``.

    The official code gives a bias a node of its own and embeds shapes by a table; here it shares its layer's node, and shapes enter by their logarithms.

    Args:
        width: Features of a node.
        channels: Outputs and inputs of the largest tensor, before tiling.
        kernel: Its height and width.
        max_path: The largest :math:`s_{vu}`; 1: no virtual edges (GHN-1).
        rounds: How often the graph is visited forth and back.

    References:
        Knyazev, Drozdzal, Taylor and Romero-Soriano, "Parameter Prediction for Unseen Deep Architectures", NeurIPS 2021.

    >>> network = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
    >>> {n: tuple(t.shape) for n, t in GraphHyperNetwork(width=8, channels=4)(architecture(network)).items()}
    {'0.weight': (3, 2), '0.bias': (3,), '2.weight': (1, 3), '2.bias': (1,)}
    """

    def __init__(self, width: int = 32, channels: int = 64, kernel: int = 1, *, max_path: int = 50, rounds: int = 1) -> None:
        super().__init__()
        if min(width, channels, kernel, max_path, rounds) < 1:
            raise InputError("ghn2: width, channels, kernel, max_path and rounds are at least 1")
        self.channels, self.kernel, self.max_path, self.rounds = channels, kernel, max_path, rounds
        self.kind = nn.Embedding(len(PRIMITIVES), width)
        self.shape = nn.Linear(4, width)
        self.message, self.virtual = (nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width)) for _ in range(2))
        self.gru, self.norm = nn.GRUCell(width, width), nn.LayerNorm(width)
        self.spread = nn.Sequential(nn.Linear(width, 4 * width * kernel * kernel), nn.ReLU())
        self.matrix = nn.Sequential(nn.Conv2d(4 * width, 8 * width, 1), nn.ReLU(), nn.Conv2d(8 * width, channels * channels, 1))
        self.vectors = nn.Sequential(nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, 2 * channels))

    def states(self, graph: Architecture) -> Tensor:
        """What the graph network knows of each node (nodes, width)."""
        from scipy.sparse.csgraph import shortest_path

        device = self.kind.weight.device
        kinds = torch.tensor([PRIMITIVES.index(k) for k in graph.kinds], device=device)
        sizes = torch.zeros(len(kinds), 4, device=device)
        for i, own in enumerate(graph.shapes):
            largest = max(own.values(), key=math.prod, default=())
            sizes[i, : len(largest[:4])] = torch.tensor(largest[:4], device=device, dtype=sizes.dtype).add(1).log()
        h = list((self.kind(kinds) + self.shape(sizes)).unbind())
        paths = shortest_path(graph.edges.astype(float), unweighted=True)
        for _ in range(self.rounds):
            for order, distance in ((range(len(h)), paths), (range(len(h) - 1, -1, -1), paths.T)):
                for v in order:
                    m = torch.zeros_like(h[v])
                    for u in np.flatnonzero(np.isfinite(distance[:, v]) & (distance[:, v] > 0) & (distance[:, v] <= self.max_path)).tolist():
                        s = float(distance[u, v])
                        m = m + (self.message(h[u]) if s == 1 else self.virtual(h[u]) / s)
                    h[v] = self.gru(m[None], h[v][None])[0]
        return torch.stack(h)

    def forward(self, graph: Architecture) -> dict[str, Tensor]:
        """Predicts the parameters of an architecture, by their names in the network."""
        h = self.norm(self.states(graph))
        predicted = {}
        for i, own in enumerate(graph.shapes):
            vectors = self.vectors(h[i]).unflatten(0, (2, -1)) if any(len(s) < 2 for s in own.values()) else None
            for name, shape in own.items():
                if len(shape) > 1:
                    beta = 1.0 if graph.kinds[i] == "depthwise conv" else 2.0
                    predicted[name] = self._matrix(h[i], shape) * (beta / math.prod(shape[1:])) ** 0.5
                else:
                    assert vectors is not None
                    factor = graph.kinds[i] == "norm" and name.endswith("weight")
                    w = vectors[0 if factor else 1].repeat(-(-shape[0] // self.channels))[: shape[0]]
                    predicted[name] = 2 * torch.sigmoid(w / 2) if factor else torch.tanh(0.2 * w)
        return predicted

    def _matrix(self, h: Tensor, shape: tuple[int, ...]) -> Tensor:
        size = [*shape, 1, 1][:4]
        if max(size[2:]) > self.kernel:
            raise InputError(f"ghn2: a kernel of {size[2]}x{size[3]} is larger than kernel={self.kernel}")
        whole = self.matrix(self.spread(h).view(1, -1, self.kernel, self.kernel))[0].unflatten(0, (self.channels, self.channels))
        top, left = ((self.kernel - n) // 2 for n in size[2:])
        cut = whole[..., top : top + size[2], left : left + size[3]]
        tiled = cut.repeat(-(-size[0] // self.channels), -(-size[1] // self.channels), 1, 1)[: size[0], : size[1]]
        return tiled.reshape(shape)
