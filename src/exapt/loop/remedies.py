"""What can be done about a shift. Each remedy is made as adapters under names of its own, while what serves stays as it is."""

from __future__ import annotations

import contextlib
import random
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from exapt.core.attach import attach
from exapt.core.components import component_of
from exapt.core.errors import InputError
from exapt.core.file import holders, load, save
from exapt.core.layers import walk
from exapt.core.objective import objective as objective_of
from exapt.core.registry import method as method_of
from exapt.core.slots import first_tensor
from exapt.core.state import adapters
from exapt.loop.policy import Policy
from exapt.loop.rows import chunks, tensors_of
from exapt.loop.runner import Array, Names, Reference, Runner
from exapt.online.method import Batch
from exapt.online.wrapper import online
from exapt.shift.labels.em import EM

_BN = nn.modules.batchnorm._BatchNorm


@dataclass(frozen=True)
class Bench:
    """What remedies are made with: the model, the reference, the rows to adapt on, and a seed."""

    runner: Runner
    reference: Reference
    rows: list[Batch]
    policy: Policy
    seed: int


def to_bytes(runner: Runner, name: str, provenance: dict[str, Any] | None = None) -> bytes:
    """An adapter of the model as the content of its file."""
    with tempfile.TemporaryDirectory() as folder:
        return save(runner.model, Path(folder) / "a.safetensors", name, provenance=provenance).read_bytes()


def from_bytes(runner: Runner, name: str, data: bytes) -> None:
    """Puts an adapter on the model from the content of its file; what is active is for the caller to say."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.safetensors"
        path.write_bytes(data)
        load(runner.model, path, name)


def estimated_prior(bench: Bench, below: Names, rows: Sequence[Batch] | None = None) -> tuple[Array, dict[str, Any]]:
    """Class prior of the rows by EM on the probabilities under the adapters ``below``, bias-corrected on the reference; and its evidence.

    What the frozen model says of the reference stands for what a model adapted to the stream says of the stream: that adapted model is out of
    place on the reference, and a calibration fitted there would be for a shift that the stream does not have.

    The prior is drawn towards the uniform one by a row for every class (EM puts rare classes at 0 where rows are few). Classes that the
    reference lacks get the prior 0.
    """
    ref = bench.reference
    target = bench.runner(rows or bench.rows, below).proba
    em = EM(calibration="bcts", unseen="drop").fit(ref.answer.proba, ref.labels).estimate(target)
    prior = np.where(ref.prior > 0, (len(target) * em.prior_ + 1) / (len(target) + (ref.prior > 0).sum()), 0.0)
    scale = 1.0 if em.calibrator_ is None else float(em.calibrator_.scale_[0])
    return prior, {"prior": prior.tolist(), "em": em.prior_.tolist(), "prior_se": np.nan_to_num(em.prior_se_).tolist(), "ess": em.ess_, "scale": scale}


def prior_correction(bench: Bench, name: str, below: Names) -> dict[str, Any]:
    """Puts :class:`exapt.PriorCorrection` on, with the prior that EM finds; classes that the reference lacks are left as they are."""
    runner = bench.runner
    prior, evidence = estimated_prior(bench, below)
    source = bench.reference.prior
    ratio = np.where(source > 0, np.log(np.maximum(prior, 1e-12)) - np.log(np.maximum(source, 1e-12)), 0.0)
    head = runner.viewer.head_name
    attach(runner.model, method_of("prior_correction"), "head" if head is None else lambda site: site.module_name == head, name)  # its name may be a role's
    for _, holder in holders(runner.model, name):
        held = holder.tensors()["log_ratio"]
        if len(held) != len(ratio):
            raise InputError(
                f"prior_correction: the head has {len(held)} outputs, the model {len(ratio)} classes; name the module that makes the logits (head=)"
            )
        with torch.no_grad():
            held.copy_(torch.from_numpy(ratio))
    return evidence


def norm_statistics(bench: Bench, name: str, below: Names) -> dict[str, Any]:
    """Puts :class:`exapt.NormStatistics` on, with the statistics of the rows, under the adapters ``below``.

    One pass in which every batch norm normalises with the statistics of its batch (of ``policy.chunk`` rows), so that deeper layers are counted
    on what shallower ones then give out; means and variances of the batches are averaged by their sizes.
    """
    runner, model = bench.runner, bench.runner.model
    own = {n: m for n, m in walk(model) if isinstance(m, _BN) and m.running_mean is not None}
    if not own:
        raise InputError(f"norm_statistics: {type(model).__name__} has no batch norms with running statistics")
    if sum(map(len, bench.rows)) < 2:
        raise InputError("norm_statistics: one row has no variance")
    probe, sums, counted = f"{name}_probe", {n: [0.0, 0.0, 0] for n in own}, 0

    def note(n: str) -> Any:
        def hook(_module: nn.Module, args: Any, kwargs: Any) -> None:
            x = first_tensor(args, kwargs).double().transpose(0, 1).flatten(1)
            held: Any = sums[n]
            held[0], held[1], held[2] = held[0] + x.mean(1) * x.shape[1], held[1] + x.var(1, correction=0) * x.shape[1], held[2] + x.shape[1]

        return hook

    with contextlib.ExitStack() as stack:
        attach(model, method_of("norm_statistics", alpha=0.0), _is_batch_norm, probe)
        stack.callback(runner.remove, (probe,))
        for n, m in own.items():
            stack.callback(m.register_forward_pre_hook(note(n), with_kwargs=True).remove)
        counted = len(runner(bench.rows, (*below, probe)).logits)
    attach(model, method_of("norm_statistics"), _is_batch_norm, name)
    with torch.no_grad():
        for place, holder in holders(model, name):
            mean, var, count = cast(Any, sums[place.partition(":")[2]])
            if count:
                holder.tensors()["mean"].copy_(mean / count)
                holder.tensors()["var"].copy_(var / count)
    return {"rows": counted}


def _is_batch_norm(site: Any) -> bool:
    return isinstance(site.module, _BN) and site.module.running_mean is not None


def test_time(bench: Bench, name: str, key: str) -> dict[str, Any]:
    """Lets a test-time method adapt on the rows, and keeps its parameter space; batch norms get the rows' statistics by a remedy of their own."""
    runner, policy, ref = bench.runner, bench.policy, bench.reference
    method = component_of(key, "test-time")()
    if method.space() is None:
        raise InputError(f"{key} keeps nothing in parameters that could be put on as an adapter; use exapt.online for it")
    runner.activate(())
    pairs, start = [], 0
    for b in chunks(ref.batches, policy.batch):
        pairs.append((b, torch.from_numpy(ref.labels[start : start + len(b)]).to(runner.device)))
        start += len(b)
    wrapped = online(runner.model, method, reference=pairs, head=runner.viewer.head_name, seed=bench.seed)
    try:
        for _ in range(policy.passes):
            for b in chunks(bench.rows, policy.batch):
                wrapped(*b.args, **b.kwargs)
        data = to_bytes(runner, "online")
    finally:
        wrapped.close()
    from_bytes(runner, name, data)
    used = sum(d["used"] for d in wrapped.diagnostics)
    return {"method": key, "batches": len(wrapped.diagnostics), "used": int(used)}


def objective(bench: Bench, name: str, key: str) -> dict[str, Any]:
    """Trains ``policy.method`` under an objective, on the reference as the labelled source and the rows as the unlabelled target."""
    from exapt.loop.fitting import fitted  # training is imported when it is wanted

    if bench.runner.user:
        raise InputError(f"{key}: training on top of other active adapters is not done; merge them first")
    config = {"steps": bench.policy.steps, "batch_size": bench.policy.batch, "seed": bench.seed}
    with generators():
        bench.runner.activate(())
        return fitted(bench.runner, bench.reference, bench.rows, objective_of(key), method_of(bench.policy.method), name, config)


@contextlib.contextmanager
def generators() -> Iterator[None]:
    """Within the block Python's, NumPy's and torch's generators may be seeded; they are put back."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def has_batch_norm(model: nn.Module) -> bool:
    """Whether a batch norm keeps running statistics."""
    return any(isinstance(m, _BN) and m.running_mean is not None for _, m in walk(model))


@dataclass(frozen=True)
class Plan:
    """A candidate: what it is called, and the steps that make its adapters, one on the other."""

    label: str
    steps: tuple[tuple[str, str], ...]


def plans(kind: str, policy: Policy, model: nn.Module) -> list[Plan]:
    """The candidates for a kind of shift, the cheap ones first."""
    allowed = policy.remedies
    prior = (Plan("prior_correction", (("prior_correction", ""),)),) if "prior_correction" in allowed else ()
    if kind == "label":
        return list(prior)
    if "covariate" not in kind:
        return []
    normed = (("norm_statistics", ""),) if has_batch_norm(model) else ()
    found = [Plan("norm_statistics", (("norm_statistics", ""),))] if "norm_statistics" in allowed else []
    found += [Plan(k, (("test_time", k), *normed)) for k in policy.test_time if "test_time" in allowed]
    found += [Plan(k, (("objective", k),)) for k in policy.objectives if "objective" in allowed]
    if kind == "covariate" or not prior:
        return found
    both = [Plan(f"{p.label}+prior_correction", (*p.steps, ("prior_correction", ""))) for p in found]
    return [*both, *found, *prior]


def made(bench: Bench, plan: Plan, names: Names) -> dict[str, Any]:
    """Puts a candidate's adapters on, one of ``names`` a step, and returns the evidence of its making; on failure all are off again."""
    evidence: dict[str, Any] = {}
    try:
        for i, (step, key) in enumerate(plan.steps):
            if step == "prior_correction":
                evidence[step] = prior_correction(bench, names[i], names[:i])
            elif step == "norm_statistics":
                evidence[step] = norm_statistics(bench, names[i], names[:i])
            else:
                evidence[key] = (test_time if step == "test_time" else objective)(bench, names[i], key)
    except BaseException:
        bench.runner.remove(tuple(n for name in names for n in (name, f"{name}_probe") if n in adapters(bench.runner.model)))
        raise
    return evidence


def split(batches: Sequence[Batch], keep: Tensor) -> list[Batch]:
    """The rows that the booleans ``keep`` (all rows of all batches) name, batch by batch."""
    made_, start = [], 0
    for b in batches:
        part = keep[start : start + len(b)]
        start += len(b)
        if bool(part.any()):
            made_.append(b.rows(part.nonzero()[:, 0].to(next(iter(tensors_of(b).values())).device)))
    return made_


def picked(batches: Sequence[Batch], rows: Array) -> list[Batch]:
    """These rows (numbers over all batches; one may come twice) in the order of the batches, batch by batch."""
    made_, start, wanted = [], 0, np.sort(rows)
    for b in batches:
        own = wanted[(wanted >= start) & (wanted < start + len(b))] - start
        start += len(b)
        if len(own):
            made_.append(b.rows(torch.from_numpy(own).to(b.inputs.device)))
    return made_
