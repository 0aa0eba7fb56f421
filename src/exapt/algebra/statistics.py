"""Statistics of models that merge rules weigh by: diagonal Fisher information, Gram matrices of layer inputs, sensitivities.

Each function runs one model over batches and returns a mapping by parameter name, so that
``merge_tensors(rule, models, statistics=[one mapping for each model])`` uses it. The model is left as it was.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from exapt.core.calibrate import _rows, run
from exapt.core.components import component
from exapt.core.contract import seeded
from exapt.core.errors import InputError
from exapt.core.layers import Linear, TransposedLinear, layers_of
from exapt.core.slots import first_tensor

Loss = Callable[[nn.Module, Any], Tensor]


@component("diagonal_fisher", kind="merge statistic", paper="Merging Models with Fisher-Weighted Averaging")
def diagonal_fisher(
    model: nn.Module, batches: Iterable[Any], loss: Loss | None = None, *, logits: Loss | None = None, samples: int | None = None, seed: int = 0
) -> dict[str, Tensor]:
    r"""Diagonal of the Fisher information: :math:`F = E_x E_{y \sim p_\theta(y|x)} (\nabla_\theta \log p_\theta(y|x))^2`, one gradient for each example.

    Without ``loss`` the expectation is over the model's own predictions, exact over all classes as in the official code, or from ``samples``
    draws; with ``loss``, the negative log-likelihood of labels, it is the empirical Fisher.

    Args:
        model: A classifier, or a model with its own loss.
        batches: As for :func:`exapt.calibrate`: mappings of keyword arguments, tuples of positional ones, or tensors.
        loss: ``loss(model, batch)``, a scalar; makes it the empirical Fisher.
        logits: ``logits(model, batch)``, (1, classes) for a batch of one row; by default what the model returns, or its ``logits``.
        samples: Draws of y for each example in place of the sum over classes; needed where there is more than one prediction for a row (tokens).
        seed: Of the draws.

    Returns:
        Tensors of the parameters' shapes, at least in single precision; zeros for a parameter without influence.

    Raises:
        InputError: for no batches; without ``samples`` for logits that are not (1, classes).

    References:
        Matena, Raffel, "Merging Models with Fisher-Weighted Averaging", NeurIPS 2022.

    >>> model = nn.Linear(1, 2, bias=False)
    >>> _ = nn.init.zeros_(model.weight)
    >>> diagonal_fisher(model, [torch.full((1, 1), 2.0)])["weight"].flatten().tolist()  # p (1 - p) x^2
    [1.0, 1.0]
    """
    generator = seeded(seed, "diagonal_fisher")

    def outcomes(row: Any) -> Iterator[tuple[float, Tensor]]:
        if loss is not None:
            yield 1.0, loss(model, row)
            return
        z = logits(model, row) if logits is not None else _logits(run(model, row))
        chances = z.detach().float().softmax(-1)
        known = z.log_softmax(-1)
        if samples is None:
            if z.dim() != 2 or z.shape[0] != 1:
                raise InputError(f"diagonal_fisher: logits of one row are {tuple(z.shape)}, not (1, classes); give samples= to draw predictions")
            yield from zip(chances[0].tolist(), known[0], strict=True)
            return
        for _ in range(samples):
            drawn = torch.multinomial(chances.flatten(0, -2).cpu(), 1, generator=generator).to(z.device)
            yield 1 / samples, known.flatten(0, -2).gather(1, drawn).sum()

    return _over_gradients(model, batches, outcomes, lambda p, g: g.square(), "diagonal_fisher")


@component("sensitivity", kind="merge statistic", paper="Sens-Merging: Sensitivity-Guided Parameter Balancing for Merging Large Language Models")
def sensitivities(model: nn.Module, batches: Iterable[Any], loss: Loss | None = None) -> dict[str, Tensor]:
    r"""Sensitivity of every entry, :math:`E_x |\theta \odot \nabla_\theta \ell(x)|`: the loss's change, to first order, were it set to zero.

    Args:
        model: The model.
        batches: As for :func:`exapt.calibrate`.
        loss: ``loss(model, batch)``, a scalar; by default ``model(**batch).loss``.

    Returns:
        Tensors of the parameters' shapes.

    Raises:
        InputError: for no batches, or no loss.

    >>> model = nn.Linear(2, 1, bias=False)
    >>> model.weight.data = torch.tensor([[3.0, -1.0]])
    >>> sensitivities(model, [torch.ones(4, 2)], lambda m, x: m(x).sum())["weight"]
    tensor([[3., 1.]])
    """

    def outcomes(row: Any) -> Iterator[tuple[float, Tensor]]:
        value = loss(model, row) if loss is not None else getattr(run(model, row), "loss", None)
        if value is None:
            raise InputError("sensitivities: the model returns no loss; pass loss=lambda model, batch: ..., or labels in the batch")
        yield 1.0, value

    return _over_gradients(model, batches, outcomes, lambda p, g: (p * g).abs(), "sensitivities")


@component("gram_matrices", kind="merge statistic", paper="Dataless Knowledge Fusion by Merging Weights of Language Models")
def gram_matrices(model: nn.Module, batches: Iterable[Any], *, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    r"""Gram matrices :math:`E[x x^\top]` of every linear layer's input over all rows and positions, summed up batch by batch.

    Args:
        model: The model; its nn.Linear, nn.Conv2d (over patches; one group, zeros as padding) and transformers' Conv1D layers are seen.
        batches: As for :func:`exapt.calibrate`.
        dtype: Of the sums.

    Returns:
        ``{"layer.weight": (d_in, d_in)}``; for a weight that is stored transposed ``{"layer.weight": {"transposed": (d_in, d_in)}}``. Layers
        that no batch reaches, and names that another parameter is tied to, are absent.

    Raises:
        InputError: for no batches.

    References:
        Jin et al., "Dataless Knowledge Fusion by Merging Weights of Language Models", ICLR 2023.

    >>> gram_matrices(nn.Linear(2, 1), [torch.tensor([[1.0, 2.0], [1.0, 0.0]])])["weight"]
    tensor([[1., 1.],
            [1., 2.]])
    """
    with at_rest(model), torch.no_grad(), Grams(model, dtype) as grams:
        given = [run(model, batch) is None for batch in batches]
    if not given:
        raise InputError("gram_matrices was given no batches")
    return grams.means()


class Grams:
    """Hooks that add up Gram matrices of layer inputs while a module runs, as :func:`gram_matrices` describes."""

    def __init__(self, module: nn.Module, dtype: torch.dtype = torch.float32) -> None:
        self.module, self.dtype = module, dtype
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}
        self.transposed: set[str] = set()

    def __enter__(self) -> Grams:
        own = dict(self.module.named_parameters())  # a tied weight only under its first name
        self._hooks = []
        for path, m in self.module.named_modules():
            name = f"{path}.weight" if path else "weight"
            kinds = [type(layer) for layer in layers_of(m) if layer.parameter == "weight"]
            if name in own and ((kinds and kinds[0] in (Linear, TransposedLinear)) or _plain_conv(m)):
                self.transposed |= {name} if kinds[0] is TransposedLinear else set()
                self._hooks.append(m.register_forward_pre_hook(self._adder(name), with_kwargs=True))
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _adder(self, name: str) -> Any:
        def add(module: nn.Module, args: Any, kwargs: Any) -> None:
            x = first_tensor(args, kwargs).detach()
            if isinstance(module, nn.Conv2d):
                x = x if x.dim() == 4 else x[None]
                x = F.unfold(x, module.kernel_size, module.dilation, module.padding, module.stride).movedim(1, -1)  # type: ignore[arg-type]
            flat = x.flatten(0, -2).to(self.dtype)
            gram = flat.T @ flat
            self.sums[name] = self.sums[name] + gram if name in self.sums else gram
            self.counts[name] = self.counts.get(name, 0) + flat.shape[0]

        return add

    def means(self) -> dict[str, Any]:
        """The means so far."""
        found = {name: s / self.counts[name] for name, s in self.sums.items()}
        return {name: {"transposed": g} if name in self.transposed else g for name, g in found.items()}


def _plain_conv(m: nn.Module) -> bool:
    return isinstance(m, nn.Conv2d) and m.groups == 1 and m.padding_mode == "zeros" and not isinstance(m.padding, str)


def unit_norm(statistics: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A mapping divided by its norm over all tensors, so that models whose Fisher is larger throughout do not outweigh others.

    Raises:
        InputError: where all is zero.

    >>> unit_norm({"a": torch.tensor([3.0]), "b": torch.tensor([4.0])})["b"]
    tensor([0.8000])
    """
    norm = torch.stack([t.double().square().sum().cpu() for t in statistics.values()]).sum().sqrt() if statistics else torch.zeros(())
    if not float(norm) > 0:
        raise InputError("unit_norm: the statistics are zero in every entry; the batches say nothing of this model")
    return {name: t / float(norm) for name, t in statistics.items()}


def layer_scores(sensitivity: Mapping[str, Tensor], layer: Callable[[str], str] | None = None) -> dict[str, Tensor]:
    r"""Sens-Merging's task-specific scores: sums of :func:`sensitivities` over each layer :math:`l`, divided by their norm over all layers.

    Args:
        sensitivity: By parameter name.
        layer: The layer of a parameter's name; by default its path up to the first number (``encoder.layer.3``), or else its module's.

    Returns:
        :math:`\alpha^l` (), under the names of all the layer's parameters.

    >>> layer_scores({"0.weight": torch.tensor([1.0, 1.0]), "0.bias": torch.tensor([1.0]), "1.weight": torch.tensor([4.0])})
    {'0.weight': tensor(0.6000), '0.bias': tensor(0.6000), '1.weight': tensor(0.8000)}
    """
    layer = layer or _layer
    sums: dict[str, Tensor] = {}
    for name, t in sensitivity.items():
        sums[layer(name)] = sums.get(layer(name), t.new_zeros(())) + t.sum()
    norm = torch.stack(list(sums.values())).norm().clamp(min=torch.finfo(torch.float32).tiny)
    return {name: sums[layer(name)] / norm for name in sensitivity}


def _layer(name: str) -> str:
    numbered = re.match(r"(?:.*?\.)?\d+(?=\.)", name)
    return numbered.group() if numbered else name.rpartition(".")[0]


def logit_distances(models: Sequence[nn.Module], batches: Sequence[Iterable[Any]]) -> Tensor:
    r"""Sens-Merging's cross-task scores: :math:`\tau_i \propto \sum_{j \ne i} E_{x \in D_j} \|f_i(x) - f_j(x)\|_2`, divided by their sum.

    Args:
        models: One for each task, (m).
        batches: Inputs of each task.

    Returns:
        :math:`\tau` (m,), for ``weights``; equal where no two models differ.

    Raises:
        InputError: for another number of tasks than models, or a task without batches.
    """
    if len(models) != len(batches):
        raise InputError(f"logit_distances: {len(models)} models, {len(batches)} lists of batches; give one for each")
    raw = torch.zeros(len(models), dtype=torch.float64)
    for j, task in enumerate(batches):
        sums, rows = torch.zeros(len(models), dtype=torch.float64), 0
        for batch in task:
            found = []
            for model in models:
                with at_rest(model), torch.no_grad():
                    found.append(_logits(run(model, batch)).double().flatten(0, -2))
            rows += len(found[j])
            sums += torch.stack([(f - found[j]).norm(dim=-1).sum() for f in found]).cpu()
        if not rows:
            raise InputError(f"logit_distances: task {j} has no batches")
        raw += sums / rows
    return raw / raw.sum() if float(raw.sum()) > 0 else torch.full_like(raw, 1 / len(models))


def _logits(output: Any) -> Tensor:
    found = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(found, Tensor):
        raise InputError(f"the model returns {type(output).__name__}, which has no logits; use a model that returns logits")
    return found


@contextmanager
def at_rest(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode and without dropout, for as long as the block lasts."""
    modes = {m: m.training for m in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for m, mode in modes.items():
            m.training = mode


def _over_gradients(
    model: nn.Module,
    batches: Iterable[Any],
    outcomes: Callable[[Any], Iterator[tuple[float, Tensor]]],
    statistic: Callable[[Tensor, Tensor], Tensor],
    said: str,
) -> dict[str, Tensor]:
    """The mean over rows of the weighted statistic of (parameter, gradient)."""
    parameters = {n: p for n, p in model.named_parameters() if p.is_floating_point()}
    wanted = {n: p.requires_grad for n, p in parameters.items()}
    sums = {n: torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for n, p in parameters.items()}
    rows = 0
    try:
        with at_rest(model), torch.enable_grad():
            for p in parameters.values():
                p.requires_grad_(True)
            for row in (row for batch in batches for row in _rows(batch)):
                rows += 1
                for weight, value in outcomes(row):
                    found = torch.autograd.grad(value, list(parameters.values()), retain_graph=True, allow_unused=True)
                    for (n, p), g in zip(parameters.items(), found, strict=True):
                        if g is not None:
                            sums[n] += weight * statistic(p.detach().to(sums[n].dtype), g.to(sums[n].dtype))
    finally:
        for n, p in parameters.items():
            p.requires_grad_(wanted[n])
    if not rows:
        raise InputError(f"{said} was given no batches")
    return {n: s / rows for n, s in sums.items()}
