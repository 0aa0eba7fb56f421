"""Generative Adapter: a context becomes a LoRA in one forward pass (Chen et al., ICLR 2025)."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from exapt.algebra.hyper.emitted import call_with, watched
from exapt.core.components import component
from exapt.core.errors import InputError

State = dict[str, Tensor]


class _Site(nn.Module):
    """The generator of one linear layer: what it makes of its block's inputs."""

    def __init__(self, d_in: int, d_out: int, width: int, rank: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width, eps=1e-6)
        self.A1, self.A2, self.A3 = (nn.Parameter(nn.init.kaiming_normal_(torch.empty(rank, n), a=5**0.5)) for n in (d_in, width, width))
        self.B = nn.Parameter(torch.zeros(d_out, rank))


@component("generative_adapter", kind="hypernetwork", paper="Generative Adapter: Contextualizing Language Models in Parameters with A Single Forward Pass")
class GenerativeAdapter(nn.Module):
    r"""Emits a LoRA for every chosen linear layer from the hidden states :math:`c_t` that its block gets while the model reads a context:

    .. math:: \Delta W = s\, B\, \mathrm{norm}(S)^\top A_1, \qquad S = \sum_t (A_2 \tilde c_t) (A_3 \tilde c_t)^\top, \quad \tilde c = \mathrm{RMSNorm}(c)

    The context streams: :math:`S` is a sum over tokens, so that chunks are added as they come (``state``), and the adapter's size does not
    depend on how many there were. Attach a LoRA of rank ``rank`` to the model first (``LoRA(rank, alpha=rank)``); emitted tensors have its names, for
    :func:`~exapt.algebra.hyper.emitted.call_with` and :func:`~exapt.algebra.hyper.emitted.install`.

    This follows the official code, but for the singular vectors, which are exact here and from a randomised decomposition there.

    Args:
        model: The model with the LoRA attached.
        blocks: For each adapted layer the name of the block whose input it reads.
        width: Features of those inputs.
        scale: The factor :math:`s`, which is put into the emitted ``B``.
        norm: ``"svd"``: all singular values of :math:`S` become one, of the largest ``most`` of them, the others zero; ``"frobenius"``,
            ``"spectral"``: :math:`S` over its norm.
        most: How many singular values are kept; 0: all.

    Raises:
        InputError: for a layer without a LoRA.

    References:
        Chen, Fang, Xia, Liu, Van Durme, Zettlemoyer, Gao and Cheng, "Generative Adapter: Contextualizing Language Models in Parameters with A Single
        Forward Pass", ICLR 2025.

    >>> import exapt
    >>> model = exapt.attach(nn.Sequential(nn.Linear(4, 4)), exapt.LoRA(rank=2, alpha=2), where="0")
    >>> generator = GenerativeAdapter(model, {"0": "0"}, width=4)
    >>> state = generator.read(model, torch.randn(1, 5, 4))
    >>> {name: tuple(t.shape) for name, t in generator(state).items()}
    {'0.exapt.default.A': (2, 4), '0.exapt.default.B': (4, 2)}
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Mapping[str, str],
        width: int,
        *,
        scale: float = 1.0,
        norm: Literal["svd", "frobenius", "spectral"] = "svd",
        most: int = 0,
    ) -> None:
        super().__init__()
        if norm not in ("svd", "frobenius", "spectral"):
            raise InputError(f'generative_adapter: norm is "{norm}"; choose "svd", "frobenius" or "spectral"')
        self.blocks, self.scale, self.norm, self.most = dict(blocks), scale, norm, most
        self.names: dict[str, tuple[str, str]] = {}
        self.sites = nn.ModuleList()
        parameters = dict(model.named_parameters())
        for site in self.blocks:
            pair = [next((n for n in parameters if n.startswith(f"{site}.exapt.") and n.endswith(f".{k}")), None) for k in ("A", "B")]
            if pair[0] is None or pair[1] is None:
                raise InputError(f"{site}: generative_adapter emits LoRAs; attach one to this layer first")
            a, b = parameters[pair[0]], parameters[pair[1]]
            self.names[site] = (pair[0], pair[1])
            self.sites.append(_Site(a.shape[1], b.shape[0], width, len(a)))

    def read(self, model: nn.Module, *chunk: Tensor, state: State | None = None, mask: Tensor | None = None) -> State:
        """Adds a chunk of context to what was read before.

        Args:
            model: The model; it runs as the base alone, without gradient.
            chunk: Inputs of its call, rows being parts of one context.
            state: What was read before.
            mask: (rows, length), zero where there is padding.

        Returns:
            Sums of outer products (rank, rank) by layer.
        """
        from exapt.core.state import disabled

        with torch.no_grad(), disabled(model), watched(model, list(self.blocks.values())) as seen:
            model(*chunk)
        new: State = {}
        for (site, block), own in zip(self.blocks.items(), cast(Sequence[_Site], self.sites), strict=True):
            c = own.norm(seen[block].flatten(0, -2))
            value = c @ own.A3.T
            if mask is not None:
                value = value * mask.reshape(-1, 1)
            s = (c @ own.A2.T).T @ value
            new[site] = s if state is None else state[site] + s
        return new

    def forward(self, state: State) -> dict[str, Tensor]:
        """The adapter of a context: tensors by their names in the model."""
        emitted = {}
        for (site, (a, b)), own in zip(self.names.items(), cast(Sequence[_Site], self.sites), strict=True):
            emitted[a], emitted[b] = self._normed(state[site]).T @ own.A1, self.scale * own.B
        return emitted

    def _normed(self, s: Tensor) -> Tensor:
        if self.norm == "frobenius":
            return s * (s.square().sum() + 1e-6).rsqrt()
        u, values, v = torch.linalg.svd(s.float(), full_matrices=False)
        if self.norm == "spectral":
            return s / (values[0] + 1e-6)
        kept = self.most or len(values)
        return (u[:, :kept] @ v[:kept]).to(s.dtype)


def contextual_loss(model: nn.Module, generator: GenerativeAdapter, chunks: Sequence[Tensor], logits: Callable[[object], Tensor] | None = None) -> Tensor:
    r"""What a generator is pretrained on: from the adapter of the chunks so far, to complete and to reconstruct,
    :math:`-\operatorname{mean}_t \big[ \log p(C_{t+1} \mid \Delta_t) + \log p(C_t \mid \Delta_t) \big]`, each without its context in the prompt.

    Args:
        model: A language model with the LoRA attached.
        generator: The generator.
        chunks: Token ids of consecutive chunks (1, length), two or more.
        logits: Takes the logits (1, length, vocabulary) from the model's output; by default the output's ``logits``, or itself.

    Returns:
        The mean negative log-likelihood of a token, completion and reconstruction added.

    Raises:
        InputError: for fewer than two chunks.
    """
    if len(chunks) < 2:
        raise InputError(f"contextual_loss: {len(chunks)} chunks; completion needs two or more")
    state: State | None = None
    terms = []
    for chunk, following in itertools.pairwise(chunks):
        state = generator.read(model, chunk, state=state)
        emitted = generator(state)
        for ids in (following, chunk):
            y = call_with(model, emitted, ids)
            scores: Tensor = logits(y) if logits else getattr(y, "logits", y)
            terms.append(F.cross_entropy(scores[:, :-1].flatten(0, 1), ids[:, 1:].flatten()))
    return 2 * torch.stack(terms).mean()
