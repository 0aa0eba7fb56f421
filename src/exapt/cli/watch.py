"""Runs the closed loop from the command line: watch, report, rollback."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from exapt.cli.feed import Folder, Reader, is_truth, lines, stem
from exapt.core.errors import InputError

if TYPE_CHECKING:
    from exapt.loop import Decision, Loop, Outcome, Policy


@dataclass(frozen=True)
class Setup:
    """What a stream needs: the model, the reference, how rows are read, what the classes are called, and the policy."""

    model: nn.Module
    reference: tuple[Any, Any]
    reader: Reader
    names: tuple[str, ...]
    policy: Policy


def setup(text: str, words: Sequence[str], reference: Path | None, adapter: Path | None, base: bool, label: str) -> Setup:
    """Makes the model as the other commands do, from a configuration (``.yaml``) or a model's name, and reads the reference.

    Args:
        text: The configuration or the model.
        words: Settings of the command line; those of ``--policy.NAME`` are the policy's, others lay over the configuration.
        reference: Labelled rows; by default the configuration's validation data.
        adapter: An adapter file; by default the configuration's output where that is there.
        base: No adapter.
        label: Column of the labels, where no configuration says it.

    Raises:
        InputError: for anything that cannot be used.
    """
    policy, rest = _policy(words)
    if base and adapter is not None:
        raise InputError("--base and --adapter were both given; the base alone has no adapter, keep one")
    if Path(text).suffix not in (".yaml", ".yml"):
        return _plain(text, rest, reference, adapter, label, policy)
    from exapt.cli.config import read_config
    from exapt.cli.feed import read_rows
    from exapt.cli.run import _adapted, _rows

    config = read_config(Path(text), rest)
    if reference is None:
        config.place("validation")
    rows = _rows(config, "validation") if reference is None else read_rows(reference)
    if not base and adapter is None and config.data.get("output") and Path(config["output"]).is_file():
        adapter = Path(config["output"])
    model, task = _adapted(config, None if base else adapter, rows)
    if not hasattr(task, "labels"):
        raise InputError(f"{text}: task.kind is {config['task']['kind']}; a stream needs one class a row, such as text_classification or image_classification")
    reader = Reader(task, drop=_not_taken(model))
    inputs, labels = reader.rows(rows, str(reference or "data.validation"))
    return Setup(model, (inputs, _labelled(labels, reference, task.label)), reader, tuple(task.labels), policy)


def _plain(text: str, words: Sequence[str], reference: Path | None, adapter: Path | None, label: str, policy: Policy) -> Setup:
    from exapt.cli.models import load_model
    from exapt.interop import load

    if words:
        raise InputError(f'no flag {words[0]}; beside --policy.NAME, settings such as this lay over a configuration, and "{text}" is a model')
    if reference is None:
        raise InputError("--reference is missing: labelled rows of the source, on which the model was not trained, as a file")
    model = load_model(text)
    if adapter is not None:
        load(model, adapter)
    reader = Reader(label=label)
    inputs, labels = reader.file(reference)
    return Setup(model, (inputs, _labelled(labels, reference, label)), reader, (), policy)


def _labelled(labels: Any, reference: Path | None, name: str) -> Any:
    if labels is None:
        raise InputError(f'{reference or "data.validation"}: the reference needs a label in every row, in a column "{name}"; --label names another')
    return labels


def _not_taken(model: nn.Module) -> tuple[str, ...]:
    """Arguments that a task makes and the model does not take."""
    from exapt.train.heads import Classifier, accepts, unwrapped

    inner = unwrapped(model)
    return () if isinstance(inner, Classifier) or accepts(inner, "token_type_ids") else ("token_type_ids",)


def _policy(words: Sequence[str]) -> tuple[Policy, list[str]]:
    """The policy that ``--policy.NAME VALUE`` changes, and the other words."""
    from exapt.cli.config import _flags, _scalar
    from exapt.loop import Policy

    own: dict[str, Any] = {}
    rest: list[str] = []
    for flag, value in _flags(words):
        section, _, name = flag.partition(".")
        if section == "policy" and name:
            own[name] = _scalar(value)
        else:
            rest.append(f"--{flag}={value}")
    tuples = ("remedies", "test_time", "objectives")
    own = {k: ([v] if isinstance(v, str) else v) if k in tuples else v for k, v in own.items()}
    return Policy.from_dict(own), rest


class Answers:
    """The file of predictions: JSON lines, those of a batch together; a restart neither repeats nor loses any.

    Args:
        path: The file, or ``None`` for none.
        names: What the classes are called.
    """

    def __init__(self, path: Path | None, names: Sequence[str]) -> None:
        self.path, self.names = path, names
        self.written: set[str] = set()
        if path is not None and path.is_dir():
            raise InputError(f"{path}: is a folder; name the file of predictions with --out")
        if path is not None and path.exists():
            self._resume(path)

    def _resume(self, path: Path) -> None:
        """Notes the batches that are there, and takes off one that was cut short."""
        start, last, left = 0, None, 0
        with path.open("rb+") as f:
            place = 0
            for line in f:
                try:
                    row = json.loads(line) if line.endswith(b"\n") else None
                    key, left = (row["batch"], row["rows"] - row["row"] - 1) if row else (None, 1)
                except (ValueError, KeyError, TypeError):
                    raise InputError(f"{path}: is not a file of predictions that exapt watch wrote; name another with --out") from None
                if key is not None and key != last:
                    start, last = place, key
                    self.written.add(key)
                place += len(line)
            if left and last is not None:
                f.truncate(start)
                self.written.discard(last)
            elif left:
                f.truncate(0)

    def write(self, outcome: Outcome) -> None:
        """Adds the rows of a batch."""
        key = outcome.decision.key
        if self.path is None or outcome.logits is None or key is None or key in self.written:
            return
        best, found = outcome.logits.softmax(-1).max(-1)
        count = len(found)
        rows = [
            {"batch": key, "row": i, "rows": count, "prediction": self.names[k] if self.names else k, "confidence": round(p, 6)}
            for i, (k, p) in enumerate(zip(found.tolist(), best.tolist(), strict=True))
        ]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as f:
            f.write("".join(json.dumps(r, ensure_ascii=False, allow_nan=True) + "\n" for r in rows))
            f.flush()
            os.fsync(f.fileno())
        self.written.add(key)


def say(text: str) -> None:
    """One line to stderr."""
    print("exapt:", " ".join(text.split()), file=sys.stderr, flush=True)


class Follower:
    """Feeds a loop, and says what it did, one line a batch.

    Args:
        loop: The loop.
        reader: Reads the rows.
        answers: Takes the predictions.
        as_json: Print decisions as JSON lines.
    """

    def __init__(self, loop: Loop, reader: Reader, answers: Answers, as_json: bool) -> None:
        self.loop, self.reader, self.answers, self.as_json = loop, reader, answers, as_json
        self.left_out: list[str] = []
        self.told = ""
        for note in loop.notes:
            say(note)

    def batch(self, key: str, inputs: Any, labels: Any) -> None:
        """One batch, and its labels where it has them."""
        (outcome,) = self.loop.run([(key, inputs)])
        self.answers.write(outcome)
        if not outcome.repeated:
            self.show(outcome.decision)
        if self.loop.degraded and self.loop.degraded != self.told:
            self.told = self.loop.degraded
            say(self.told)
        if labels is not None and outcome.logits is not None and not self.loop.degraded:
            self.labels(key, labels)

    def labels(self, key: str, labels: Any) -> None:
        """The truth of a batch that was answered."""
        try:
            decision = self.loop.label(key, labels)
        except InputError as e:
            self.drop(key, e)
            return
        if decision is not None:
            self.show(decision)

    def drop(self, name: str, error: InputError) -> None:
        """What could not be used is said and passed over; the stream goes on."""
        self.left_out.append(name)
        say(f"left out: {error}")

    def show(self, decision: Decision) -> None:
        """The line of one decision."""
        print(json.dumps(asdict(decision), ensure_ascii=False) if self.as_json else line_of(asdict(decision)), flush=True)

    def folder(self, files: Folder) -> None:
        """Feeds files; those that the store knows and whose predictions are written are not read again."""
        from exapt.loop import records

        known: dict[str, str] = {}
        if self.loop.store is not None and self.loop.store.path.is_file():
            known = {stem(Path(r["key"])): r["key"] for r in records(self.loop.store.path) if r["key"] is not None}
        answered = self.answers.written if self.answers.path is not None else set(known.values())
        again = list(known.values())[-1:]  # its labels may not have been kept
        files.done |= {k for k in known.values() if k in answered and k not in again}
        for path in files:
            try:
                if is_truth(path):
                    key = known.get(stem(path).removesuffix(".labels"))
                    if key is None:
                        raise InputError(f"{path}: labels of a batch that was not processed; there is no {stem(path).removesuffix('.labels')}.*")
                    self.labels(key, self.reader.truth(path))
                    continue
                inputs, labels = self.reader.file(path)
            except InputError as e:
                self.drop(path.name, e)
                continue
            self.batch(path.name, inputs, labels)
            known[stem(path)] = path.name


def line_of(record: dict[str, Any]) -> str:
    """A decision in one line.

    >>> line_of({"id": 3, "key": "c.npz", "rows": 8, "action": "none", "kind": None, "reason": "", "estimate": {"value": 0.9, "low": 0.8, "high": 1.0}})
    '    3  c.npz  8 rows  none  estimated accuracy 90.0 % [80.0, 100.0]'
    """
    e = record["estimate"]
    known = e is not None and e["value"] is not None
    parts = [
        f"{record['id']:5d}", record["key"] or "-", f"{record['rows']} rows", record["action"] + (f" ({record['kind']})" if record["kind"] else ""),
        f"estimated accuracy {100 * e['value']:.1f} % [{100 * e['low']:.1f}, {100 * e['high']:.1f}]" if known else "",
        " ".join(record["reason"].split()),
    ]  # fmt: skip
    return "  ".join(p for p in parts if p)


@contextlib.contextmanager
def _quiet_log() -> Iterator[None]:
    """Without the loop's own log lines, which the command says itself."""
    import logging

    log = logging.getLogger("exapt.loop")
    before, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = before


def watch_stream(made: Setup, source: str, store: Path, answers: Answers, *, once: bool, poll: float, batch: int, seed: int, as_json: bool) -> None:
    """Follows a folder, or standard input (``"-"``), until it ends or is interrupted.

    Raises:
        InputError: for what cannot be used at all; at the end, with ``once``, if something was left out.
    """
    if poll <= 0 or batch < 1:
        raise InputError(f"--poll is {poll} and --batch {batch}; the first must be positive, the second at least 1")
    from exapt.loop import Loop

    with _quiet_log():
        loop = Loop(made.model, made.reference, made.policy, store, seed=seed)
        follower = Follower(loop, made.reader, answers, as_json)
        try:
            if source == "-":
                for key, rows in lines(sys.stdin, batch):
                    try:
                        inputs, labels = made.reader.rows(rows, key)
                    except InputError as e:
                        follower.drop(key, e)
                        continue
                    follower.batch(key, inputs, labels)
            else:
                follower.folder(Folder(Path(source), once, poll))
        finally:
            loop.close()
    if follower.left_out:
        names = ", ".join(follower.left_out[:5])
        raise InputError(f"{len(follower.left_out)} of the stream's files or batches were left out ({names}); the lines above say why")


def adapt_once(made: Setup, source: Path, output: Path, seed: int) -> dict[str, Any]:
    """Adapts to the rows of a file, or of all files of a folder, and writes the adapter file if that is verified to help.

    Returns:
        The decision, with ``"output"``: the file, or ``None``.

    Raises:
        InputError: for data that cannot be used, or a file that cannot be written.
    """
    from exapt.cli.run import _refuse_place
    from exapt.loop import adapt

    _refuse_place(output)
    paths = [p for p in Folder(source, once=True, poll=1.0) if not is_truth(p)]
    if not paths:
        raise InputError(f"{source}: holds no files of rows; put .npz, .npy, .safetensors, .jsonl, .csv, .tsv or .parquet files there")
    found = adapt(made.model, made.reference, [made.reader.file(p)[0] for p in paths], made.policy, output, seed=seed)
    return {**asdict(found.decision), "output": None if found.file is None else str(found.file)}
