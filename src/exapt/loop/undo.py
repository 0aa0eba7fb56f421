"""Undoing a decision in the store alone, without the model."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from exapt.core.errors import InputError
from exapt.loop.decision import Decision
from exapt.loop.store import Degraded, Store


def rollback(store: str | Path, number: int) -> Decision:
    """Undoes a decision: the next loop on this store serves what served before it, bit for bit.

    A loop that runs on the store meanwhile stops with an error at its next batch; :meth:`exapt.Loop.rollback` is for that one.

    Args:
        store: The loop's SQLite file.
        number: The decision's id.

    Raises:
        InputError: if there is no such store or decision, or the store cannot be written.
    """
    path = Path(store)
    if not path.is_file():
        raise InputError(f"{path}: no such store; exapt watch makes one")
    try:
        held = Store(path, {})
    except Degraded as e:
        raise InputError(f"rollback: {e}") from e
    try:
        version, state = held.state()
        found = held.serving(number)
        if found is None:
            raise InputError(f"rollback: there is no decision {number}; there are {state.get('count', 0)}")
        decision = Decision(state["count"] + 1, None, "rollback", f"decision {number} was undone at request", serving=list(found[0]))
        new = {**state, "count": decision.id, "serving": list(found[0]), "promoted": decision.id, "prior": None}
        held.commit(version, new, asdict(decision), (state["serving"], list(found[0])))
    except Degraded as e:
        raise InputError(f"rollback: {e}") from e
    finally:
        held.close()
    return decision
