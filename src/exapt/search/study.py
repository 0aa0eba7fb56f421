"""The verb ``search``: cells are proposed by Optuna's samplers, measured once each, and kept in a folder that a killed process can go on from."""

from __future__ import annotations

import contextlib
import multiprocessing
import random
import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exapt.core.errors import InputError, did_you_mean
from exapt.search import cells as at
from exapt.search.cells import Cell, SearchResult, held, read_json, write_json
from exapt.search.space import Invalid, Walk, described, digest, resolve, rules_of

SAMPLERS = ("tpe", "gp", "nsga2", "random", "grid")
_OWN, _TRIES, _GRID, _WAIT = 8, 24, 100_000, 0.5


def search(
    build: Callable[[Any], Any] | None,
    space: Any,
    measure: Callable[[Any, Path], Mapping[str, float] | float],
    folder: str | Path,
    *,
    objectives: str | Mapping[str, str] = "accuracy",
    trials: int | None = None,
    sampler: str | Callable[[int], Any] = "tpe",
    seed: int = 0,
    processes: int = 1,
    context: Any = None,
    show: Callable[[str], None] | None = None,
) -> SearchResult:
    """Tries configurations and keeps what each gave.

    A configuration is a *cell*: its values, their digest, and the folder ``cells/DIGEST`` with what was measured. The study is
    ``study.db``, an Optuna study in SQLite. Calling again with the same folder goes on: a cell that was measured is never measured
    again (a sampler that proposes it again is told what it gave, and does not use up a trial), one whose process was killed is. Several
    processes, of this call or of others, may work on one folder of one machine. With one process the cells are the same whether
    or not the search was interrupted.

    Args:
        build: From a cell's values to what is measured; by default the adapter's rules (:func:`exapt.search.space.rules_of`). It may raise
            :class:`exapt.search.Invalid` for values that are no configuration, which then do not count.
        space: A template with distributions as leaves (:mod:`exapt.search.space`).
        measure: ``measure(built, folder)`` returns numbers by name; what it wants to keep it writes into the cell's folder. An ``InputError``
            makes the cell a failed one; every other exception ends the search, and the cell is tried again when it goes on.
        folder: Where everything is kept.
        objectives: ``{metric: "max" or "min"}``; a name alone is to be as large as possible.
        trials: How many cells there are to be in the end, those of earlier calls included; ``None``: all of a finite space.
        sampler: ``"tpe"``, ``"gp"`` (a Gaussian process; for several objectives its expected hypervolume improvement), ``"nsga2"``, ``"random"``,
            ``"grid"`` (every cell once, in order), or a function from a seed to an Optuna sampler. Parameters that only some options
            have are drawn independently by ``"gp"`` and ``"nsga2"``.
        seed: Seed of the proposals.
        processes: Processes; with more than one, ``build`` and ``measure`` must be importable (functions and classes of a module).
        context: Plain data on which results depend besides the values (data, settings): a folder serves one context only.
        show: Called with a line for each finished cell.

    Returns:
        All cells, those of earlier calls included.

    Raises:
        InputError: for a space, sampler or objective that cannot be used, or a folder of another search.

    >>> import tempfile
    >>> from exapt.search.space import Whole
    >>> folder = tempfile.mkdtemp()
    >>> found = search(lambda v: v["x"], {"x": Whole(0, 4)}, lambda x, _: {"loss": (x - 3) ** 2}, folder, objectives={"loss": "min"}, sampler="grid")
    >>> len(found.cells), found.best.values
    (5, {'x': 3})
    """
    place = Path(folder)
    names = at.checked_objectives(objectives)
    if isinstance(sampler, str) and sampler not in SAMPLERS:
        raise InputError(f'no sampler "{sampler}"{did_you_mean(sampler, SAMPLERS)} (there are {", ".join(SAMPLERS)})')
    if trials is None and next(_grid(space), None) is None:
        raise InputError("the space has no cell")
    if trials is not None and trials < 1:
        raise InputError(f"trials is {trials}; it must be at least 1")
    own = _Search(build, space, measure, place, names, trials, sampler, seed, show)
    _claim_folder(place, {"space": described(space), "objectives": names, "context": context})
    if processes > 1:
        _spawned(own, processes)
    own.run()
    return collected(place, names)


def _claim_folder(folder: Path, description: dict[str, Any]) -> None:
    """Notes what the folder is for, or compares with what it is for already."""
    with held(folder / at.LOCK):
        known, new = read_json(folder / "search.json"), {"digest": digest(description), **description}
        if known is None:
            write_json(folder / "search.json", new)
        elif known["digest"] != new["digest"]:
            odd = next((k for k in description if digest(known.get(k)) != digest(description[k])), "space")
            raise InputError(f"{folder}: holds a search with another {odd}; name another folder, or go on with the {odd} in its search.json")


def _spawned(own: _Search, processes: int) -> None:
    """Works in new processes; what one that dies leaves behind the caller does."""
    start = multiprocessing.get_context("spawn")
    workers = [start.Process(target=own.run, name=f"search-{i}") for i in range(processes)]
    try:
        for w in workers:
            w.start()
    except Exception as e:  # what cannot be sent to another process fails in many ways
        raise InputError(f"processes={processes}: build and measure must be importable from a module ({e})") from e
    finally:
        for w in workers:
            if w.pid is not None:
                w.join()


@dataclass
class _Search:
    """One process's part of a search."""

    build: Callable[[Any], Any] | None
    space: Any
    measure: Callable[[Any, Path], Any]
    folder: Path
    objectives: dict[str, str]
    trials: int | None
    sampler: str | Callable[[int], Any]
    seed: int
    show: Callable[[str], None] | None

    def run(self) -> None:
        """Measures cells until there are as many as were asked for."""
        with opened(self.folder, self.objectives) as study:
            while True:
                with contextlib.ExitStack() as holding:
                    claimed = self.claim(study, holding)
                    if not isinstance(claimed, bool):
                        self.one(study, *claimed)
                        continue
                if not claimed:
                    return
                time.sleep(_WAIT)  # another process is at work; if it dies, its cell is done here

    def claim(self, study: Any, holding: contextlib.ExitStack) -> tuple[Any, Cell, Any] | bool:
        """The next cell, held by ``holding``, with its trial and what was built; when there is none left, whether other processes are at work."""
        with held(self.folder / at.LOCK):
            known, waiting = self.recovered(study)
            others = "running" in known.values()
            if not waiting and self.trials is not None and len(known) >= self.trials:
                return others
            for trial in self.proposals(study, known, waiting):
                try:
                    values = resolve(self.space, trial)
                    built = self.built(values)
                except Invalid:
                    _tell(study, trial.number, None)
                    continue
                name = digest(values)
                if name in known and known[name] != "waiting":
                    metrics = (read_json(self.folder / "cells" / name / at.METRICS) or {}).get("metrics")
                    trial.set_user_attr("same_as", name)
                    _tell(study, trial.number, metrics and [metrics[k] for k in self.objectives])
                    continue
                cell = Cell(name, values, self.folder / "cells" / name)
                holding.enter_context(held(cell.folder / at.LOCK))
                trial.set_user_attr("cell", name)
                return trial, cell, built
        return others

    def built(self, values: Any) -> Any:
        """What is measured; an ``InputError`` is returned, for the cell to fail with."""
        try:
            return (self.build or rules_of)(values)
        except InputError as e:
            return e

    def recovered(self, study: Any) -> tuple[dict[str, str], bool]:
        """The state of every cell by its name; cells whose process has died wait to be measured again."""
        from optuna.trial import TrialState

        known: dict[str, str] = {}
        params: dict[str, Any] = {}
        for t in study.get_trials(deepcopy=False):
            name = t.user_attrs.get("cell")
            state = None if name is None else self.state(name)
            if t.state == TrialState.RUNNING and state != "running":  # its process is gone
                found = read_json(self.folder / "cells" / name / at.METRICS) if state == "done" else None
                _tell(study, t.number, found and [found["metrics"][k] for k in self.objectives])
            if name is not None and state is not None:
                known[name] = "waiting" if t.state == TrialState.WAITING else known[name] if known.get(name) == "waiting" else state
                params[name] = t.params or params.get(name, {})
        for name in [k for k, v in known.items() if v == "lost"]:
            study.enqueue_trial(params[name], user_attrs={"cell": name})
            known[name] = "waiting"
        return known, "waiting" in known.values()

    def state(self, name: str) -> str:
        """What a cell's folder says of it."""
        folder = self.folder / "cells" / name
        if (folder / at.METRICS).is_file():
            return "done"
        return "failed" if (folder / at.FAILURE).is_file() else "running" if at.alive(folder) else "lost"

    def proposals(self, study: Any, known: Mapping[str, str], waiting: bool) -> Iterator[Any]:
        """Trials, each of which the caller takes or tells."""
        if waiting:
            yield study.ask()  # Optuna hands out what waits first
            return
        if self.sampler != "grid" and self.trials is not None:
            for attempt in range(_TRIES):
                study.sampler = self.made(len(known), attempt)
                yield study.ask()
        if self.sampler == "grid" or self.trials is None:
            unseen: Iterator[Any] = (params for params, name in _grid(self.space) if name not in known)
        else:  # what a sampler does not come upon by itself is drawn from all that is left
            unseen = iter(())
            with contextlib.suppress(InputError):
                left = [params for params, name in _grid(self.space) if name not in known]
                unseen = iter(random.Random(self.seed + len(known)).sample(left, len(left)))
        for params in unseen:
            study.enqueue_trial(params)
            yield study.ask()

    def made(self, done: int, attempt: int) -> Any:
        """The sampler of one proposal: its seed depends on how far the search is and not on who goes on with it."""
        import optuna.samplers as samplers

        seed = int(digest([self.seed, done, attempt])[:8], 16)
        if not isinstance(self.sampler, str):
            return samplers.RandomSampler(seed=seed) if attempt >= _OWN else self.sampler(seed)
        if self.sampler == "tpe" and attempt < _OWN:
            return samplers.TPESampler(seed=seed)
        if self.sampler == "gp" and attempt < _OWN:
            return samplers.GPSampler(seed=seed, warn_independent_sampling=False)
        if self.sampler == "nsga2" and attempt < _OWN:
            return samplers.NSGAIISampler(seed=seed, population_size=min(50, max(4, (self.trials or 50) // 5)))
        return samplers.RandomSampler(seed=seed)

    def one(self, study: Any, trial: Any, cell: Cell, built: Any) -> None:
        """Measures a cell and writes down what it gave."""
        write_json(cell.folder / "cell.json", {"values": cell.values, "params": trial.params})
        started = time.perf_counter()
        try:
            if isinstance(built, InputError):
                raise built
            metrics = at.checked_metrics(self.measure(built, cell.folder), self.objectives)
        except InputError as e:
            self.noted(study, trial, cell.folder / at.FAILURE, {"values": cell.values, "error": str(e)}, None)
            line = f"failed: {e}"
        else:
            found = {"values": cell.values, "metrics": metrics, "seconds": time.perf_counter() - started}
            self.noted(study, trial, cell.folder / at.METRICS, found, [metrics[k] for k in self.objectives])
            line = ", ".join(f"{k} {metrics[k]:.6g}" for k in self.objectives)
        if self.show is not None:
            self.show(f"cell {cell.name}: {line}")

    def noted(self, study: Any, trial: Any, path: Path, found: dict[str, Any], values: list[float] | None) -> None:
        """Writes a cell's file and tells the study, as one step: a file whose trial still runs is taken for a dead process's."""
        with held(self.folder / at.LOCK):
            write_json(path, found)
            _tell(study, trial.number, values)


def _tell(study: Any, number: int, values: list[float] | None) -> None:
    from optuna.trial import TrialState

    study.tell(number, values, state=TrialState.COMPLETE if values else TrialState.FAIL)


def _grid(space: Any) -> Iterator[tuple[dict[str, Any], str]]:
    """Parameters and name of every cell of a finite space."""
    walk = Walk()
    for _ in range(_GRID):
        with contextlib.suppress(Invalid):
            name = digest(resolve(space, walk))
            yield walk.params, name
        walk.next()
        if not walk.more:
            return
    raise InputError(f"the space has more than {_GRID:,} cells; give trials= and another sampler than a grid")


def _unsynced(connection: Any, _: Any) -> None:
    """Lets commits not wait for the disk: what a killed process wrote is in the journal all the same."""
    connection.execute("PRAGMA synchronous=NORMAL")


@contextlib.contextmanager
def opened(folder: Path, objectives: Mapping[str, str]) -> Iterator[Any]:
    """The study in a folder, made if need be."""
    try:
        import optuna
        import sqlalchemy
    except ModuleNotFoundError as e:
        raise InputError('a search needs Optuna; pip install "exapt[search]"') from e
    loud = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    storage = None
    try:
        with held(folder / at.LOCK):
            with contextlib.closing(sqlite3.connect(folder / "study.db")) as file:
                file.execute("PRAGMA journal_mode=WAL")
            storage = optuna.storages.RDBStorage(f"sqlite:///{(folder / 'study.db').resolve()}", engine_kwargs={"connect_args": {"timeout": 60}})
            sqlalchemy.event.listen(storage.engine, "connect", _unsynced)
            storage.engine.dispose()
            ways: list[Any] = ["maximize" if way == "max" else "minimize" for way in objectives.values()]
            study = optuna.create_study(study_name="search", storage=storage, directions=ways, load_if_exists=True)
        yield study
    finally:
        optuna.logging.set_verbosity(loud)
        if storage is not None:
            storage.remove_session()
            storage.engine.dispose()


def collected(folder: str | Path, objectives: Mapping[str, str] | None = None) -> SearchResult:
    """Reads what a search has found so far, finished or not.

    Args:
        folder: Its folder.
        objectives: By default those of the search.

    Raises:
        InputError: if there is no search in it.
    """
    place = Path(folder)
    noted = read_json(place / "search.json")
    if noted is None:
        raise InputError(f"{place}: there is no search in this folder")
    names = dict(objectives or noted["objectives"])
    order: dict[str, None] = {}
    with opened(place, noted["objectives"]) as study:
        order = {t.user_attrs["cell"]: None for t in study.get_trials(deepcopy=False) if "cell" in t.user_attrs}
    cells, failed = [], []
    for name in order:
        home = place / "cells" / name
        if (found := read_json(home / at.METRICS)) is not None:
            cells.append(Cell(name, found["values"], home, found["metrics"]))
        elif (found := read_json(home / at.FAILURE)) is not None:
            failed.append(Cell(name, found["values"], home, error=found["error"]))
    return SearchResult(tuple(cells), tuple(failed), names, place)
