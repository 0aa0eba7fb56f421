"""The guard: lets adapted predictions out only where adapting can be seen, without labels, to help."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from exapt.core.components import component
from exapt.core.errors import InputError
from exapt.online.gain import LEAST_ROWS, Adapted, averaging, halves, learned, log_variance, predicted, signals
from exapt.online.method import Batch, Host, Pass, entropy

_LEAST = 20


@dataclass(frozen=True)
class Verdict:
    """What the guard decided: the ``logits`` to answer with, what happens to the state (``"none"``, ``"rollback"``, ``"reset"``), and why."""

    logits: Tensor
    action: str = "none"
    reason: str = ""


@component("guard", kind="guard", oracle="NumPy; the streams themselves")
@dataclass(frozen=True)
class Guard:
    r"""Predicts on every batch what adapting gains, and answers by the model that can be trusted.

    1. **Gain.** On a labelled reference, shifts are simulated (noise on the inputs, batches of few classes) and a kernel ridge regression learns the
       gain in accuracy over the frozen model from what can be seen without labels: both models' confidence and the entropy of their mean
       predictions, their agreement, the distance :math:`\min_c \|\Sigma^{-1/2}(h - \mu_c)\|` of the frozen model's features to the classes of the
       reference, and the variance of the features that batch statistics make. On the stream, the frozen model answers, and nothing is learned from
       the batch, unless the predicted gain exceeds ``margin`` times the regression's own error. Where batch norms use the batch's statistics and
       parameters train too, it is the gain of the statistics alone that is predicted: training on entropy raises confidence by itself.
    2. **Collapse.** What is trained must still agree with the model before training, and its mean prediction must keep its entropy. Otherwise
       everything goes back to the start.

    All signals are averages over about ``rows`` recent rows. Without a labelled reference the confidence must not have fallen by more than
    ``drop`` below the frozen model's, which is a weaker promise.

    Args:
        rows: Rows over which signals are averaged.
        margin: Least predicted gain, in root mean squares of the regression's leave-one-out residuals.
        least: Least agreement with the model before training.
        collapse: Largest loss of entropy of the mean prediction, in nats.
        drop: Largest loss of confidence, without a labelled reference.

    >>> Guard().rows
    100
    """

    rows: int = 100
    margin: float = 0.5
    least: float = 0.5
    collapse: float = 0.5
    drop: float = 0.05

    def start(self, host: Host) -> None:
        """Fits the classes' Gaussians of the frozen model's features.

        Raises:
            InputError: for a reference of fewer than 20 rows, or settings that cannot be used.
        """
        if self.rows < 1 or self.drop < 0 or not 0 <= self.least <= 1:
            raise InputError(f"Guard: rows is {self.rows}, drop {self.drop}, least {self.least}; rows is at least 1, drop at least 0, least from 0 to 1")
        if not host.reference or any(y is None for _, y in host.reference):
            return
        seen = [host.run_frozen(b) for b, _ in host.reference]
        y = torch.cat([y.flatten() for _, y in host.reference if y is not None])
        if len(y) < _LEAST:
            raise InputError(f"Guard: the reference has {len(y)} rows; give at least {_LEAST}, or none")
        if any(s.features is None for s in seen) or len(y) != sum(len(s.logits) for s in seen):
            return
        h = torch.cat([s.h for s in seen]).double()
        half = halves(len(h)).to(h.device)  # the other half stands for new rows in the simulation
        h, y = h[half], y.to(h.device)[half]
        classes, place = y.unique(return_inverse=True)
        means = torch.stack([h[place == c].mean(0) for c in range(len(classes))])
        centred = h - means[place]
        spread = centred.T @ centred / len(h)
        spread += 0.05 * spread.diagonal().mean().clamp_min(1e-12) * torch.eye(len(spread), dtype=h.dtype, device=h.device)
        root = torch.linalg.inv(torch.linalg.cholesky(spread))
        host.memory |= {"guard/root": root, "guard/means": means @ root.T}

    def distance(self, host: Host, h: Tensor) -> Tensor:
        """Median distance of features (n, d) to the nearest class of the reference."""
        return torch.cdist(h.double() @ host.memory["guard/root"].T, host.memory["guard/means"]).min(-1).values.median()

    def judge(self, host: Host, batch: Batch, still: Pass, logits: Tensor, adapted: Adapted) -> Verdict:
        """Returns the verdict on one batch.

        Args:
            host: The host, after the method's step.
            batch: The batch.
            still: What the frozen model says.
            logits: What the adapted model says.
            adapted: Gives the method's own logits on a batch from its first state.
        """
        if len(logits) == 0:
            return Verdict(logits)
        n, statistics = len(logits), bool(host.statistics)
        plain, features = logits, None
        if statistics or host.parameters:
            with host.values(host.source):
                seen = host.run(batch)
            plain, features = seen.logits, seen.features if statistics else None
        subject = plain if statistics else logits
        host.notes |= {"confidence": float(still.p.max(-1).values.mean()), "confidence_adapted": float(logits.softmax(-1).max(-1).values.mean())}
        gain, least = self._gain(host, batch, still, subject, features, adapted)
        host.notes |= {"predicted_gain": gain}
        if gain <= least:
            return Verdict(still.logits, "rollback", f"predicted gain {gain:+.3f} is not above {least:.3f}: the frozen model answers")
        if not host.parameters:
            return Verdict(logits)
        agreement = self._average(host, "agreement", (plain.argmax(-1) == logits.argmax(-1)).double().mean(), n)
        means = [self._average(host, k, z.softmax(-1).double().mean(0), n) for k, z in (("mean_plain", plain), ("mean_adapted", logits))]
        lost = float(entropy(means[0].clamp_min(1e-12).log()[None]) - entropy(means[1].clamp_min(1e-12).log()[None]))
        if lost <= self.collapse and float(agreement) >= self.least:
            return Verdict(logits)
        for name in ("agreement", "mean_adapted", "mean_plain"):
            for key in (f"guard/average_{name}", f"guard/weight_{name}"):
                host.memory.pop(key, None)
        said = f"the mean prediction has lost {lost:.2f} nats of entropy" if lost > self.collapse else f"agreement has fallen to {float(agreement):.2f}"
        return Verdict(subject if statistics else still.logits, "reset", said)

    def _gain(self, host: Host, batch: Batch, still: Pass, subject: Tensor, features: Tensor | None, adapted: Adapted) -> tuple[float, float]:
        """The predicted gain of the subject over the frozen model, and what it must exceed."""
        n = len(subject)
        model = self._model(host, batch, adapted) if "guard/root" in host.memory and still.features is not None else None
        if model is None:
            sure = [self._average(host, k, z.softmax(-1).max(-1).values.double().mean(), n) for k, z in (("frozen", still.logits), ("subject", subject))]
            return float(sure[1] - sure[0]), -self.drop
        now = signals(still.p, subject.softmax(-1), self.distance(host, still.h), features)
        if n < LEAST_ROWS:  # mean predictions and variances of a few rows tell nothing: those of as many as in the simulation
            means = [self._average(host, k, p.double().mean(0), n, LEAST_ROWS) for k, p in (("p_frozen", still.p), ("p_subject", subject.softmax(-1)))]
            now[4:6] = torch.stack([-(m * m.clamp_min(1e-12).log()).sum() for m in means])
            if features is not None:
                now[6] = log_variance(*(self._average(host, f"h{k}", features.double().pow(k).mean(0), n, LEAST_ROWS) for k in (1, 2)))
        x = self._average(host, "signals", now, n)
        return predicted(model, x), self.margin * float(model["error"])

    def _model(self, host: Host, batch: Batch, adapted: Adapted) -> dict[str, Tensor] | None:
        """The regression for batches of this size, learned when the first of them comes."""
        key = f"guard/gain_{min(len(batch), 64)}"
        if f"{key}/error" not in host.memory:
            found = learned(host, len(batch), adapted, lambda h: self.distance(host, h))
            host.memory.update({f"{key}/{k}": v for k, v in (found or {"error": torch.tensor(float("nan"))}).items()})
        kept = host.kept(key)
        return None if bool(kept["error"].isnan()) else kept

    def _average(self, host: Host, name: str, value: Tensor, n: int, rows: int | None = None) -> Tensor:
        """The running average of a signal, in which the first batches stand for themselves."""
        key, weight, share = f"guard/average_{name}", f"guard/weight_{name}", averaging(n, rows or self.rows)
        seen = host.memory.get(weight, torch.zeros((), dtype=torch.float64)) * (1 - share)
        old = host.memory.get(key, torch.zeros_like(value))
        host.memory |= {key: (old * seen + value.detach() * share) / (seen + share), weight: seen + share}
        return host.memory[key]
