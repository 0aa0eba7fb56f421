"""The closed loop: watch, diagnose, adapt a shadow, verify, promote or roll back; every decision in the store."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import binomtest
from torch import Tensor, nn

from exapt.core.errors import InputError
from exapt.core.state import adapters
from exapt.loop.decide import Held, Lab, Verdict, decide, line_of
from exapt.loop.decision import Decision, Now, Outcome, held_from, policy_text, row_bytes, shapes_text, twin_key
from exapt.loop.policy import Policy
from exapt.loop.recheck import KEPT, due
from exapt.loop.remedies import from_bytes
from exapt.loop.rows import batch_of, finite, packed, unpacked, widths
from exapt.loop.runner import Names, Runner, reference_of
from exapt.loop.store import Degraded, Store
from exapt.loop.verify import Estimator, clean, estimate_json
from exapt.loop.watch import Watch
from exapt.online.method import Batch

log = logging.getLogger("exapt.loop")
_OWN = re.compile(r"loop\d+c\d+s\d+(_probe)?")


class Loop:
    """Answers a stream of batches, watches it for shifts, and adapts where that is verified to help.

    Args:
        model: Any module that makes one prediction a row. Its base weights never change; adapters that are active on it stay.
        reference: Held-out rows of the source with labels, on which the model was not trained: ``(inputs, labels)`` or a list of such pairs.
        policy: What it may do.
        store: The SQLite file. A loop on the same file goes on where the last one stopped.
        head: Name of the module that makes the logits, where the model's structure does not tell.
        seed: Of everything random.

    Attributes:
        degraded: Why the loop adapts no more, if so; it keeps answering.
        notes: Declared fallbacks (a reference too small to diagnose against, say).

    Raises:
        InputError: for a reference that cannot be used, or a store of another model, policy or reference.
    """

    def __init__(
        self, model: nn.Module, reference: Any, policy: Policy | None = None, store: str | Path = "exapt.db", head: str | None = None, seed: int = 0,
    ) -> None:  # fmt: skip
        self.policy, self.seed, self.degraded, self.notes = policy or Policy(), seed, "", []
        stale = [n for n in adapters(model) if _OWN.fullmatch(n)]
        self.runner = Runner(model, head, self.policy.chunk)
        self.runner.remove(tuple(stale))
        self.runner.user = tuple(n for n in self.runner.user if n not in stale)
        self.runner.activate(())
        ref = reference_of(self.runner, reference)
        self.lab = Lab(self.runner, ref, self.policy, seed)
        self.watch = Watch(ref.answer, ref.labels, self.policy.alpha, self.policy.bins, seed)
        self.notes += [self.lab.why_not] if self.lab.why_not else []
        self.now, self.store = Now(), None
        self._estimators: dict[Any, Estimator | None] = {}
        meta = {
            "model": f"{type(model).__name__} {self.runner.identity()}", "policy": policy_text(self.policy), "reference": ref.digest, "seed": str(seed),
        }  # fmt: skip
        try:
            self.store = Store(store, meta)
            self._resume(self.store)
            if self.store.broken:
                self._degrade(self.store.broken)
        except Degraded as e:
            self._degrade(str(e))

    # -- the verbs ---------------------------------------------------------------------------------------------------

    def step(self, inputs: Any, key: str | None = None) -> Outcome:
        """Answers one batch and decides what to do; a key that was processed before gets the same answer again, and nothing else happens.

        Args:
            inputs: A tensor or an array, a tuple of them, or a dict of them by the names of the model's arguments.
            key: The batch's name, by which a restarted stream is told from a new one; by default its number.

        Raises:
            InputError: for a batch that the model cannot answer. It is in the store, as refused.
        """
        outcome = self._step(inputs, key)
        if outcome.logits is None:
            raise InputError(outcome.decision.reason)
        return outcome

    def run(self, batches: Iterable[tuple[str, Any]]) -> Iterator[Outcome]:
        """As :meth:`step` over ``(key, inputs)``; a batch that cannot be answered has no logits, and the stream goes on."""
        for key, inputs in batches:
            yield self._step(inputs, key)

    def label(self, key: str, labels: Any) -> Decision | None:
        """Takes the truth of a batch that was answered: labels of all its rows, or ``{row: label}``; -1 is unknown.

        If the labels show that what serves is worse than the frozen model (exact sign test over the rows answered since it was promoted),
        the loop goes back to the frozen model, and the decision is returned.

        Raises:
            InputError: for a key that was not processed, or labels that are none.
        """
        if self.store is None or self.degraded:
            raise InputError(f"labels cannot be kept: {self.degraded}")
        stored = self.store.decision(key)
        if stored is None:
            raise InputError(f'label: no batch "{key}" was processed')
        given = labels if isinstance(labels, Mapping) else dict(enumerate(np.asarray(labels).reshape(-1).tolist()))
        own = {int(r): int(v) for r, v in given.items() if int(v) >= 0}
        rows, classes = stored[0]["rows"], self.lab.reference.classes
        if not all(0 <= r < rows and v < classes for r, v in own.items()) or (not isinstance(labels, Mapping) and len(given) != rows):
            raise InputError(
                f'label: batch "{key}" has {rows} rows and the model {classes} classes; got {len(given)} labels, the largest {max(own.values(), default=-1)}'
            )
        known = {**self.store.labels().get(key, {}), **own}
        self._commit(labels={key: known})
        return self._check_promotion()

    def rollback(self, number: int) -> Decision:
        """Undoes a decision: what served before it serves again, bit for bit.

        Raises:
            InputError: if there is no such decision, or the store cannot be written.
        """
        if self.store is None or self.degraded:
            raise InputError(f"rollback: {self.degraded}")
        found = self.store.serving(number)
        if found is None:
            raise InputError(f"rollback: there is no decision {number}; there are {self.now.count}")
        return self._went_back(tuple(found[0]), f"decision {number} was undone at request")

    def close(self) -> nn.Module:
        """Takes the loop's adapters off, closes the store and returns the model as it was given."""
        self.runner.remove(tuple(n for n in adapters(self.runner.model) if _OWN.fullmatch(n)))
        self.runner.activate(())
        if self.store is not None:
            self.store.close()
        return self.runner.model

    # -- one batch -----------------------------------------------------------------------------------------------------

    def _step(self, inputs: Any, key: str | None) -> Outcome:
        started = time.perf_counter()
        key = f"batch-{self.now.count + 1}" if key is None else str(key)
        before = self._found(key)
        if before is not None:
            return before
        decision = Decision(self.now.count + 1, key, serving=list(self.now.serving))
        saved, alarm, verdict = replace(self.now), self.watch.state(), None
        logits: Tensor | None = None
        new: list[Held] = []
        try:
            batch = batch_of(inputs, self.runner.device)
            decision.rows = len(batch)
            logits, frozen = self._answers(batch, decision)
            if not self.degraded and decision.action != "refused":
                try:
                    verdict = self._watched(batch, frozen, decision, new)
                except Exception as e:  # whatever goes wrong in watching, the model keeps answering
                    log.exception("batch %s", key)
                    self._put_back(replace(saved), alarm)
                    new.clear()
                    decision.action, decision.reason = "none", f"the batch was answered and not watched: {line_of(e)}"
        except InputError as e:
            decision.action, decision.reason = "refused", f"batch {key}: {e}"
        if verdict is not None and verdict.names != saved.serving and logits is not None:
            logits = self._answers(batch, decision)[0]  # verified on rows of this batch too, so it is the better answer
        decision.serving, decision.predictions = list(self.now.serving), [] if logits is None else logits.argmax(-1).tolist()
        decision.seconds = time.perf_counter() - started
        if self.degraded:
            decision.action, decision.reason = ("degraded", self.degraded) if decision.action != "refused" else (decision.action, decision.reason)
            return Outcome(logits, decision)
        try:
            self._keep(decision, saved, logits, new, verdict)
        except Degraded as e:
            return self._fallen(e, saved, alarm, batch if logits is not None else None, decision)
        except BaseException:
            self._put_back(saved, alarm)
            raise
        self.runner.remove(tuple(n for n in saved.serving if n not in self.now.serving))
        return Outcome(logits, decision)

    def _answers(self, batch: Batch, decision: Decision) -> tuple[Tensor, Tensor]:
        """Logits of what serves, and of the frozen model; rows that are not finite are answered by the latter."""
        known, own = self.lab.reference.widths, widths(batch)
        try:
            serving = self.runner([batch], self.now.serving)
            frozen = self.runner([batch]) if self.now.serving else serving
        except (RuntimeError, ValueError, TypeError, IndexError) as e:
            text = f"rows are {shapes_text(own)}, the reference's {shapes_text(known)}" if own != known else "the model cannot run on it"
            raise InputError(f"{text} ({str(e).splitlines()[0] if str(e) else type(e).__name__})") from e
        if own != known:
            decision.action, decision.reason = "refused", f"rows are {shapes_text(own)}, the reference's {shapes_text(known)}; answered, and not learned from"
        if serving.logits.shape[1] != self.lab.reference.classes:
            raise InputError(f"the model answers {serving.logits.shape[1]} classes, on the reference {self.lab.reference.classes}")
        good = finite(batch).cpu()
        logits = serving.logits if bool(good.all()) else torch.where(good[:, None], serving.logits, frozen.logits)
        self._seen = frozen
        return logits, frozen.logits

    def _watched(self, batch: Batch, frozen_logits: Tensor, decision: Decision, new: list[Held]) -> Verdict | None:
        """Feeds the alarm, keeps the rows, and decides where it is time to."""
        now, frozen = self.now, self._seen
        good = (finite(batch).cpu() & torch.isfinite(frozen_logits).all(1)).numpy() & np.isfinite(frozen.features).all(1)
        if not good.all():
            decision.notes.append(f"{int((~good).sum())} rows are not finite: answered by the frozen model, and not learned from")
        if not good.any():
            decision.action, decision.reason = "none", "no row that is finite"
            return None
        answer, number = frozen.rows(good), decision.id
        rang = self.watch.update(answer, number)
        decision.alarm = {**self.watch.shown(), "rang": rang}
        index = torch.from_numpy(np.flatnonzero(good)).to(self.runner.device)
        new.append(Held(number, decision.key or "", tuple(np.flatnonzero(good).tolist()), batch.rows(index)))
        now.held = (*now.held, new[0])
        if rang and now.phase == "watch":
            now.phase = "collect"
            now.held = tuple(h for h in now.held if h.number > self.watch.since) or (new[0],)
        decision.estimate = self._estimated(batch, good)
        if now.phase == "collect":
            return self._collected(decision)
        while sum(len(h.ids) for h in now.held[1:]) >= KEPT * self.policy.rows:
            now.held = now.held[1:]
        rows = due(now, self.lab) if now.kind != "none" and self.policy.recheck else None
        if rows is None:
            return None
        now.held = rows
        return self._collected(decision)

    def _collected(self, decision: Decision) -> Verdict | None:
        now, count = self.now, sum(len(h.ids) for h in self.now.held)
        if count < self.policy.rows:
            decision.action, decision.reason = "collect", f"the alarm rang; {count} of {self.policy.rows} rows gathered since the stream began to differ"
            return None
        truth = {} if self.store is None else self.store.labels()
        try:
            verdict = decide(self.lab, now.held, now.serving, now.twin, decision.id, self.watch.scores, truth)
        except Exception as e:  # whatever goes wrong in adapting, the model keeps answering
            log.exception("decision %d", decision.id)
            verdict = Verdict("keep", f"the decision failed, and what serves stays: {line_of(e)}", now.serving, twin=now.twin, prior=now.prior)
        decision.action, decision.reason, decision.kind = verdict.action, verdict.reason, verdict.kind
        decision.p_values, decision.evidence = dict(verdict.p_values), dict(verdict.evidence)
        decision.candidates, decision.ask = verdict.candidates, verdict.ask
        if verdict.names != now.serving:
            now.promoted = decision.id
        now.serving, now.twin, now.phase = verdict.names, verdict.twin, "watch"
        now.prior = None if verdict.kind == "none" else verdict.prior
        now.kind, now.used, now.found = verdict.kind, count, verdict.kind
        self.runner.activate(now.serving)
        # what the stream is like now is the normal that the next shift is told from, a return to the source included
        self.watch.start(None if verdict.kind == "none" else self.runner([h.batch for h in now.held]))
        self.watch.since = decision.id
        now.held = ()
        return verdict

    def _estimated(self, batch: Batch, good: Any) -> dict[str, Any] | None:
        """The accuracy of what serves on the batch, estimated."""
        key = (self.now.serving, None if self.now.prior is None else tuple(self.now.prior))
        if key not in self._estimators:
            self._estimators = {}
            try:
                self._estimators[key] = self.lab.estimator(self.now.twin, self.now.prior)
            except InputError as e:
                self._estimators[key] = None
                self.notes.append(f"no accuracy is estimated: {e}")
        found = self._estimators[key]
        if found is None:
            return None
        answer = self._seen if not self.now.serving else self.runner([batch], self.now.serving)
        kept = good & torch.isfinite(answer.logits).all(1).numpy()
        return clean(estimate_json(found(answer.rows(kept).proba))) if kept.any() else None

    # -- the store -----------------------------------------------------------------------------------------------------

    def _keep(self, decision: Decision, saved: Now, logits: Tensor | None, new: list[Held], verdict: Verdict | None) -> None:
        self.now.count = decision.id
        first = min((h.number for h in self.now.held), default=decision.id + 1)
        rows = [(h.number, h.key, row_bytes(h)) for h in new if h.number >= first]
        answers = None if logits is None else packed({"logits": logits, "frozen": self._seen.logits.argmax(-1)})
        served = ([*saved.serving], [*self.now.serving])
        files = {} if verdict is None else verdict.files
        if files and verdict is not None and verdict.twin is not None:
            files = {**files, twin_key(verdict.names): packed({"logits": verdict.twin})}
        self._commit(asdict(decision), served, answers, (first, rows), files)

    def _commit(self, decision: Any = None, serving: Any = None, answers: Any = None, buffer: Any = None, files: Any = None, labels: Any = None) -> None:
        assert self.store is not None
        state = {**self.now.as_dict(), "watch": self.watch.state()}
        self.store.commit(self.now.version, clean(state), None if decision is None else clean(decision), serving, answers, buffer, files, labels)
        self.now.version += 1

    def _resume(self, store: Store) -> None:
        """Takes up what the store holds."""
        version, state = store.state()
        self.now.version = version
        if not state:
            return
        serving: Names = tuple(state["serving"])
        self.now = Now(
            version,
            state["count"],
            state["phase"],
            serving,
            self._twin_of(store, serving),
            state["prior"],
            state["promoted"],
            state["kind"],
            state["used"],
            state["found"],
        )
        self.now.held = tuple(held_from(number, key, data, self.runner.device) for number, key, data in store.buffer())
        for name in self.now.serving:
            from_bytes(self.runner, name, store.adapter(name))
        self.runner.activate(self.now.serving)
        self.watch.restore(state["watch"])

    @staticmethod
    def _twin_of(store: Store, names: Names) -> Tensor | None:
        return unpacked(store.adapter(twin_key(names)))["logits"] if names else None

    def _found(self, key: str) -> Outcome | None:
        stored = None if self.store is None else self.store.decision(key)
        if stored is None:
            return None
        logits = None if stored[1] is None else unpacked(stored[1])["logits"]
        return Outcome(logits, Decision(**stored[0]), repeated=True)

    def _degrade(self, why: str) -> None:
        self.degraded = why
        log.error("%s", why)

    def _put_back(self, saved: Now, alarm: dict[str, Any]) -> None:
        """Everything as it was before the batch that could not be kept."""
        fresh = self.now.serving
        self.now = saved
        self.watch.restore(alarm)
        self.runner.activate(saved.serving)
        self.runner.remove(tuple(n for n in fresh if n not in saved.serving))

    def _fallen(self, error: Degraded, saved: Now, alarm: dict[str, Any], batch: Batch | None, decision: Decision) -> Outcome:
        """The answer to the batch at which the store failed, by what served before it."""
        self._put_back(saved, alarm)
        self._degrade(str(error))
        fallen = Decision(decision.id, decision.key, "degraded", self.degraded, serving=list(saved.serving), rows=decision.rows)
        logits = None if batch is None else self._answers(batch, decision)[0]
        fallen.predictions = [] if logits is None else logits.argmax(-1).tolist()
        return Outcome(logits, fallen)

    # -- going back ----------------------------------------------------------------------------------------------------

    def _went_back(self, names: Names, reason: str) -> Decision:
        assert self.store is not None
        saved, alarm = replace(self.now), self.watch.state()
        for name in names:
            if name not in adapters(self.runner.model):
                from_bytes(self.runner, name, self.store.adapter(name))
        decision = Decision(self.now.count + 1, None, "rollback", reason, serving=list(names))
        self.now.count, self.now.serving, self.now.promoted, self.now.prior = decision.id, names, decision.id, None
        self.now.twin = self._twin_of(self.store, names)
        self.runner.activate(names)
        try:
            self._commit(asdict(decision), ([*saved.serving], [*names]))
        except BaseException as e:
            self._put_back(saved, alarm)
            if isinstance(e, Degraded):
                self._degrade(str(e))
                raise InputError(f"rollback: {e}") from e
            raise
        self.runner.remove(tuple(n for n in saved.serving if n not in names))
        return decision

    def _check_promotion(self) -> Decision | None:
        """Goes back to the frozen model where labels show that what serves is worse."""
        assert self.store is not None
        if not self.now.serving:
            return None
        won = lost = 0
        for key, truth in self.store.labels().items():
            stored = self.store.decision(key)
            if stored is None or stored[1] is None or stored[0]["id"] < self.now.promoted or tuple(stored[0]["serving"]) != self.now.serving:
                continue
            said = unpacked(stored[1])
            for row, label in truth.items():
                ours, frozen = int(said["logits"][row].argmax()) == label, int(said["frozen"][row]) == label
                won, lost = won + (ours and not frozen), lost + (frozen and not ours)
        if not won + lost or binomtest(lost, won + lost, alternative="greater").pvalue > self.policy.level:
            return None
        return self._went_back((), f"labels show that the frozen model is better: of {won + lost} rows on which they differ it answers {lost} right")
