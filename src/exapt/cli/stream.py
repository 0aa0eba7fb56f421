"""The commands about shifts and streams: what each takes, and who does it."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

Words = Annotated[str, Parameter(show=False, allow_leading_hyphen=True)]


@contextlib.contextmanager
def _talk_to_stderr() -> Iterator[None]:
    with contextlib.redirect_stdout(sys.stderr):
        yield


def components(*, kind: str | None = None, json: bool = False) -> None:
    """Lists the catalogue: methods, statistics, objectives, test-time methods, each with its paper.

    Args:
        kind: Only those of one kind: detector, objective, test-time, method ...
        json: Print JSON.
    """
    from exapt.cli.components import list_components

    list_components(kind, json)


def watch(
    model: str,
    source: Annotated[str, Parameter(allow_leading_hyphen=True)],
    /,
    *words: Words,
    reference: Path | None = None,
    store: Path = Path("exapt.db"),
    out: Path | None = None,
    once: bool = False,
    poll: float = 2.0,
    batch: int = 64,
    label: str = "label",
    adapter: Path | None = None,
    base: bool = False,
    seed: int = 0,
    json: bool = False,
) -> None:
    """Answers a stream of batches, watches it for shifts, and adapts where that is verified to help; one line a batch.

    Each file of the folder is one batch, taken once, new ones in order of name. A restart on the same store goes on where it stopped.
    `NAME.labels.jsonl` brings the truth of `NAME.jsonl` later. `--policy.NAME VALUE` sets a field of `exapt.loop.Policy`.

    Args:
        model: A configuration (.yaml), as `exapt fit` takes it, or a model: a folder, package:NAME or python:module:function.
        source: The folder; or - for JSON lines on standard input.
        words: Settings of the policy, and over the configuration.
        reference: Labelled rows of the source that the model was not trained on; by default the configuration's validation data.
        store: The SQLite file that keeps every decision.
        out: File of predictions, JSON lines.
        once: End when nothing is left.
        poll: Seconds between two looks at the folder; a file is taken when it has not changed for so long.
        batch: Rows of a batch on standard input.
        label: Column of the labels, where no configuration says it.
        adapter: An adapter file; by default the configuration's output, where it exists.
        base: The base model alone.
        seed: Of everything random.
        json: Print the decisions as JSON lines.
    """
    from exapt.cli.watch import Answers, setup, watch_stream

    with _talk_to_stderr():
        made = setup(model, words, reference, adapter, base, label)
    answers = Answers(out, made.names)
    watch_stream(made, source, store, answers, once=once, poll=poll, batch=batch, seed=seed, as_json=json)


def adapt(
    model: str,
    source: Path,
    /,
    *words: Words,
    output: Annotated[Path, Parameter(name=["--output", "-o"])],
    reference: Path | None = None,
    label: str = "label",
    adapter: Path | None = None,
    base: bool = False,
    seed: int = 0,
    json: bool = False,
) -> None:
    """Adapts once to rows without labels: names the shift, tries the remedies, verifies them, and writes the adapter file if one helps.

    Args:
        model: A configuration (.yaml) or a model, as `exapt watch` takes it.
        source: A file, or a folder of files.
        words: Settings of the policy (--policy.NAME VALUE), and over the configuration.
        output: The adapter file to write.
        reference: Labelled rows of the source; by default the configuration's validation data.
        label: Column of the labels, where no configuration says it.
        adapter: An adapter file to start from; by default the configuration's output, where it exists.
        base: The base model alone.
        seed: Of everything random.
        json: Print the decision as JSON.
    """
    from exapt.cli.show import print_json, print_table
    from exapt.cli.watch import adapt_once, setup

    with _talk_to_stderr():
        found = adapt_once(setup(model, words, reference, adapter, base, label), source, output, seed)
    if json:
        print_json(found)
        return
    rows = [(k, found[k]) for k in ("kind", "action", "reason", "rows", "output")]
    print_table(("", ""), [*rows, *((f"p-value: {k}", v) for k, v in found["p_values"].items())])
    tried = [(c["name"], c.get("error") or "; ".join(c["failed"]) or "passed", (c.get("estimate") or {}).get("value")) for c in found["candidates"]]
    if tried:
        print_table(("candidate", "tests", "estimated accuracy"), tried)


def report(store: Path, /, *, output: Annotated[Path, Parameter(name=["--output", "-o"])] = Path("report.html"), title: str = "") -> None:
    """Writes the page of a stream: one HTML file that needs no network.

    Args:
        store: What exapt watch made.
        output: The page.
        title: Its heading.
    """
    from exapt.report.stream import write_stream_page

    print(write_stream_page(store, output, title))


def rollback(store: Path, decision: int, /, *, json: bool = False) -> None:
    """Undoes a decision: what served before it serves again, bit for bit, when `exapt watch` goes on. Stop `exapt watch` first.

    Args:
        store: What exapt watch made.
        decision: Its number, as the lines and the page say it.
        json: Print the new decision as JSON.
    """
    from dataclasses import asdict

    from exapt.cli.show import print_json
    from exapt.cli.watch import line_of
    from exapt.loop import rollback as undone

    found = asdict(undone(store, decision))
    if json:
        print_json(found)
    else:
        print(line_of(found))
