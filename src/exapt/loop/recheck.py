"""When a decision is due again, although no alarm rang: an alarm against the few rows that began to differ takes long to see a return."""

from __future__ import annotations

import numpy as np

from exapt.loop.decide import Held, Lab
from exapt.loop.decision import Now

KEPT = 4  # times the rows of a policy are kept, so that what serves can be made anew of more of them


def due(now: Now, lab: Lab) -> tuple[Held, ...] | None:
    """The rows to decide on: the last ones, where two batches in a row they show another kind of shift than was decided on; all that are kept,
    where there are twice as many as were decided on; else ``None``. Notes in ``now`` what the last rows show.
    """
    rows, counts = lab.policy.rows, np.cumsum([len(h.ids) for h in reversed(now.held)])
    if lab.diagnosis is None or counts[-1] < rows:
        return None
    last = now.held[-1 - int(np.searchsorted(counts, rows)) :]
    frozen = lab.runner([h.batch for h in last])
    before, now.found = now.found, lab.diagnosis.diagnose(frozen.features, frozen.proba).kind
    if now.found != now.kind and not ("covariate" in now.found and "covariate" in now.kind):
        return last if now.found == before else None  # rows of both sides of a change show a third kind; the next batch tells
    return now.held if now.used < KEPT * rows and counts[-1] >= min(2 * now.used, KEPT * rows) else None
