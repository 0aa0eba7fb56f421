"""Trans-LoRA: an adapter moved to another base through data that is made up, filtered and labelled (Wang et al., NeurIPS 2024)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from exapt.core.components import component
from exapt.core.contract import seeded
from exapt.core.errors import InputError

Rows = Tensor | Sequence[Any]
PAPER = "Trans-LoRA: towards data-free Transferable Parameter Efficient Finetuning"


@dataclass(frozen=True)
class TransferSet:
    """What an adapter is distilled from into another base.

    Attributes:
        inputs: The accepted inputs: a tensor (n, ...), or a list where the synthesiser gives no tensors.
        answers: What the source model answers to them (n, ...).
        drawn: How many inputs were synthesised.
    """

    inputs: Rows
    answers: Tensor
    drawn: int

    @property
    def accepted(self) -> float:
        """Share of the synthesised inputs that passed the filter."""
        return len(self.inputs) / self.drawn


@component("trans_lora_filter", kind="transfer", paper=PAPER, oracle="SciPy: the same likelihood minimised")
def trained_filter(
    real: Rows, synthetic: Rows, *, encode: Callable[[Rows], Tensor] | None = None, classifier: Any = None, seed: int = 0
) -> Callable[[Rows], Tensor]:
    r"""Learns to tell an adapter's training inputs from synthesised ones; it accepts what it takes for real.

    .. math:: \max_\phi\; \mathbb{E}_{x \sim D} \log p_\phi(\text{real} \mid x) + \mathbb{E}_{x \sim M_s} \log p_\phi(\text{synthetic} \mid x),
        \qquad x \text{ is accepted if } p_\phi(\text{real} \mid x) > p_\phi(\text{synthetic} \mid x)

    It is trained once, where the source adapter is and the data still at hand, and goes with it; the synthesiser may be another later.
    The paper's is the source model with a LoRA of its own; here it is a classifier on ``encode``'s features, such as the source model's last hidden
    state.

    Args:
        real: The adapter's training inputs, a tensor (n, ...) or any sequence.
        synthetic: Synthesised inputs (m).
        encode: From rows to features (n, d); None: the rows themselves, flattened.
        classifier: An unfitted classifier of the scikit-learn contract; None: standardised logistic regression. Both kinds of input should weigh
            the same (``class_weight="balanced"``), however many there are.
        seed: Of the default classifier.

    Returns:
        A function from rows to booleans (n,).

    Raises:
        InputError: for no rows of one kind, or features that are not finite.

    References:
        Wang, Ghosh, Cox, Antognini, Oliva, Feris and Karlinsky, "Trans-LoRA: towards data-free Transferable Parameter Efficient Finetuning",
        NeurIPS 2024 (equation 1).

    >>> x = torch.linspace(0, 1, 10)[:, None]
    >>> trained_filter(x, x + 2)(torch.tensor([[0.5], [2.5]]))
    tensor([ True, False])
    """
    from sklearn.base import clone
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    if not len(real) or not len(synthetic):
        raise InputError(f"trained_filter: {len(real)} real and {len(synthetic)} synthetic rows; it needs some of both to tell them apart")

    def features(rows: Rows) -> Any:
        found = torch.as_tensor(rows) if encode is None else encode(rows)
        if len(found) != len(rows) or not bool(torch.isfinite(found).all()):
            raise InputError(f"trained_filter: {len(rows)} rows have features of shape {tuple(found.shape)}, or such that are not finite")
        return found.detach().cpu().flatten(1).double().numpy()

    default = make_pipeline(StandardScaler(), LogisticRegression(class_weight="balanced", max_iter=2000, random_state=seed))
    fitted = clone(classifier) if classifier is not None else default
    both = [features(real), features(synthetic)]
    fitted.fit(torch.cat([torch.from_numpy(x) for x in both]).numpy(), [1] * len(both[0]) + [0] * len(both[1]))
    return lambda rows: torch.from_numpy(fitted.predict(features(rows)) == 1)


@component("trans_lora", kind="transfer", paper=PAPER, oracle="NumPy: the accepted rows of the same draws")
def transfer_set(
    seeds: Rows, synthesise: Callable[[Rows, int, torch.Generator], Rows], source: Callable[[Rows], Tensor], accept: Callable[[Rows], Tensor], size: int, *,
    batch: int = 64, most: int | None = None, seed: int = 0,
) -> TransferSet:  # fmt: skip
    r"""Makes up the data that moves an adapter to a new base: inputs are synthesised from a few seeds until ``size`` of them pass the filter, and the
    source base with its adapter answers them.

    Distil the answers into the new base's adapter, which may be of another kind, with cross-entropy: ``train.fit`` on rows of them, or any loop.

    Args:
        seeds: A few examples of the task's inputs (the paper's are five).
        synthesise: ``synthesise(seeds, n, generator)``: n inputs like the seeds, from a language model prompted with them or any sampler (the paper
            uses the new base itself).
        source: From inputs to the answers of the source base with its adapter: logits, or labels (n, ...).
        accept: From inputs to booleans (n,): :func:`trained_filter`.
        size: How many inputs (the paper: as many as the adapter was trained on).
        batch: How many are synthesised at a time.
        most: How many are synthesised in all at most; None: 100 times ``size``.
        seed: Of the generator.

    Returns:
        :class:`TransferSet`.

    Raises:
        InputError: for no seeds, no size, answers that do not fit the inputs, or a filter that lets too few pass.

    References:
        Wang, Ghosh, Cox, Antognini, Oliva, Feris and Karlinsky, "Trans-LoRA: towards data-free Transferable Parameter Efficient Finetuning",
        NeurIPS 2024 (algorithm 1).

    >>> noisy = lambda seeds, n, g: seeds[torch.randint(len(seeds), (n,), generator=g)] + torch.randn(n, 1, generator=g)
    >>> found = transfer_set(torch.zeros(5, 1), noisy, source=lambda x: (x > 0).long()[:, 0], accept=lambda x: x[:, 0].abs() < 1, size=8)
    >>> len(found.inputs), float(found.inputs.abs().max()) < 1, found.answers.shape
    (8, True, torch.Size([8]))
    """
    if not len(seeds) or size < 1 or batch < 1:
        raise InputError(f"transfer_set: {len(seeds)} seeds, size {size} and batch {batch}; each is at least 1")
    limit = most if most is not None else 100 * size
    generator, drawn, kept, parts = seeded(seed, "trans_lora"), 0, 0, []
    while kept < size and drawn < limit:
        rows = synthesise(seeds, min(batch, limit - drawn), generator)
        passed = torch.as_tensor(accept(rows)).cpu()
        if not len(rows) or passed.dtype != torch.bool or passed.shape != (len(rows),):
            raise InputError(f"transfer_set: of {len(rows)} synthesised rows the filter says {passed.dtype} {tuple(passed.shape)}; give one boolean for each")
        drawn += len(rows)
        kept += int(passed.sum())
        parts.append(rows[passed.to(rows.device)] if isinstance(rows, Tensor) else [r for r, ok in zip(rows, passed.tolist(), strict=True) if ok])
    if kept < size:
        raise InputError(
            f"transfer_set: {kept} of {drawn} synthesised inputs pass the filter, {size} are asked for; synthesise nearer the seeds, or raise most"
        )
    together: Rows = torch.cat([p for p in parts if isinstance(p, Tensor)]) if isinstance(parts[0], Tensor) else [r for p in parts for r in p]
    inputs = together[:size]
    with torch.no_grad():
        answers = source(inputs)
    if len(answers) != size or (answers.is_floating_point() and not bool(torch.isfinite(answers).all())):
        raise InputError(f"transfer_set: the source answers {size} inputs with shape {tuple(answers.shape)}, or with numbers that are not finite")
    return TransferSet(inputs, answers, drawn)
