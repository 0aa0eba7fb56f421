"""Conformal test martingale."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right, insort
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.special import gammainc, gammaln, hyp1f1
from sklearn.utils import check_random_state

from exapt.core.components import component
from exapt.core.errors import InputError
from exapt.shift.detect.alarm import WealthAlarm
from exapt.shift.detect.two_sample import check_choice


@component(
    "conformal_martingale", kind="alarm", paper="Testing Randomness Online",
    variants={
        "Retrain or not retrain: Conformal test martingales for change-point detection": 'betting="composite"',
        "Testing Exchangeability On-Line": 'betting="mixture"',
    },
    oracle="p-values by counting, the jumper's recursion, SciPy quadrature; simulated false alarms",
)  # fmt: skip
class ConformalMartingale(WealthAlarm):
    r"""Alarm that bets against the uniformity of conformal p-values of a stream of scores; valid at any stopping time.

    .. math:: p_t = \frac{\#\{i: s_i > s_t\} + \tau_t \#\{i: s_i = s_t\}}{n + t}, \qquad M_t = \prod_{u \le t} f_u(p_u), \quad \int_0^1 f_u = 1

    over the n reference scores *and* all t scores of the stream so far, :math:`\tau_t` uniform on (0, 1]. Against a fixed reference the
    p-values would depend on each other through it and no product of bets would be fair; with every score joining the comparison they are
    independent and uniform under the null. The price: a lasting shift becomes normal after a while, so that the wealth stops growing
    (:class:`EProcess` keeps comparing with the reference). Memory grows by one number per score, the state by two per new value of the scores:
    round them where a stream is long.

    Condition of :math:`P(\sup_t M_t \ge 1/\alpha) \le \alpha`: reference and stream scores together are exchangeable (independent draws of one
    distribution, for instance), given whatever the score function was trained on. So train it on other data than the reference.
    The promise covers stopping times of this stream's own p-values; alarms over several streams: see :class:`CombinedAlarm`.

    Bets: ``"jumper"`` (Simple Jumper): :math:`f = 1 + \epsilon (p - 1/2)`, capital on each :math:`\epsilon`, a share J of which is spread evenly
    before every bet. ``"composite"``: the mean of Simple Jumpers with several J. ``"mixture"``: :math:`\int_0^1 \prod_u \epsilon p_u^{\epsilon-1}
    d\epsilon`, which sees only p-values that are too small.

    Args:
        betting: ``"composite"``, ``"jumper"`` or ``"mixture"``.
        jump: J of the jumper.
        jumps: The J of the composite.
        epsilons: The :math:`\epsilon`, each in [-2, 2].
        alpha: Probability of ever raising a false alarm, at most.
        random_state: Seed of the :math:`\tau_t`.

    Raises:
        InputError: if the reference is empty or a parameter is out of its range.

    >>> rng = np.random.default_rng(0)
    >>> alarm = ConformalMartingale(alpha=0.01, random_state=0).fit(rng.normal(size=300))
    >>> alarm.update(rng.normal(size=200)), alarm.update(rng.normal(2.0, size=50))
    (False, True)

    References:
        Vovk, "Testing Randomness Online", Statistical Science 2021.
    """

    def __init__(
        self, betting: str = "composite", jump: float = 0.01, jumps: Sequence[float] = (1e-4, 1e-3, 1e-2, 1e-1, 1.0),
        epsilons: Sequence[float] = (-1.0, 0.0, 1.0), alpha: float = 0.05, random_state: Any = None,
    ) -> None:  # fmt: skip
        self.betting, self.jump, self.jumps, self.epsilons, self.alpha, self.random_state = betting, jump, jumps, epsilons, alpha, random_state

    def _check_parameters(self) -> None:
        super()._check_parameters()
        check_choice(self, "betting", ("composite", "jumper", "mixture"))
        if not all(0 <= j <= 1 for j in (self.jump, *self.jumps)) or not all(-2 <= e <= 2 for e in self.epsilons):
            raise InputError("ConformalMartingale: jumps must lie in [0, 1] and epsilons in [-2, 2]")

    def _learn(self, scores: np.ndarray) -> None:
        if not len(scores):
            raise InputError("ConformalMartingale: the reference has no scores; give at least one, better hundreds")
        self.reference_, self.slack_ = sorted(scores.tolist()), 0.0
        self.seed_ = int(check_random_state(self.random_state).randint(2**31))

    def _begin(self) -> None:
        self.sorted_, self.log_p_ = list(self.reference_), 0.0
        self.stream_: list[float] = []
        rows = len(self.jumps) if self.betting == "composite" else 1
        self.capital_ = np.full((rows, len(self.epsilons)), 1 / (rows * len(self.epsilons)))

    def _step(self, score: float) -> float:
        p = self._p_value(float(score))
        return self._mixture(p) if self.betting == "mixture" else self._jumper(p)

    def _p_value(self, score: float) -> float:
        insort(self.sorted_, score)
        self.stream_.append(score)
        first, last = bisect_left(self.sorted_, score), bisect_right(self.sorted_, score)
        tau = 1.0 - np.random.default_rng([self.seed_, self.t_]).random()  # from the count: the state needs no generator
        return float((len(self.sorted_) - last + tau * (last - first)) / len(self.sorted_))

    def _jumper(self, p: float) -> float:
        jump = np.array(self.jumps if self.betting == "composite" else [self.jump])[:, None]
        capital = (1 - jump) * self.capital_ + jump * self.capital_.mean(1, keepdims=True)
        capital = capital * (1 + np.array(self.epsilons) * (p - 0.5))
        total = float(capital.sum())
        self.capital_ = capital / total  # shares of the wealth: no overflow
        return self.value_ + math.log(total)

    def _mixture(self, p: float) -> float:
        self.log_p_ -= math.log(p)
        n, x = self.t_, self.log_p_  # e^x gamma(n + 1, x) / x^(n + 1), with the series where the first factor would underflow
        if x <= n + 1:
            return float(np.log(hyp1f1(1, n + 2, x)) - math.log(n + 1))
        return float(x + np.log(gammainc(n + 1, x)) + gammaln(n + 1) - (n + 1) * math.log(x))

    def _state(self) -> dict[str, Any]:
        own = {"seed": self.seed_, "log_p": self.log_p_, "capital": self.capital_.tolist()}
        return {"reference": counted(self.reference_), "stream": counted(self.stream_), **own}

    def _restore(self, state: dict[str, Any]) -> None:
        self.slack_, self.reference_ = 0.0, [v for v, n in state["reference"] for _ in range(n)]
        self.stream_ = [v for v, n in state["stream"] for _ in range(n)]
        self.sorted_ = sorted(self.reference_ + self.stream_)
        self.seed_, self.log_p_, self.capital_ = int(state["seed"]), float(state["log_p"]), np.array(state["capital"])


def counted(scores: Sequence[float]) -> list[list[Any]]:
    """Returns every value and how often it occurs, in rising order.

    >>> counted([0.5, 0.25, 0.5])
    [[0.25, 1], [0.5, 2]]
    """
    return [[v, n] for v, n in sorted(Counter(scores).items())]
