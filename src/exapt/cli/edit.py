"""``exapt edit``: edits from JSON lines to an adapter file."""

from __future__ import annotations

import json as jsonlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from exapt.cli.algebra import settings_of
from exapt.core.errors import InputError

Output = Annotated[Path, Parameter(name=["--output", "-o"])]
Settings = Annotated[str, Parameter(show=False, allow_leading_hyphen=True)]
COLUMNS = ("prompt", "target", "subject", "rephrasings", "locality")


def edit(
    model: str, edits: Path, /, *settings: Settings, output: Output, method: str = "rome", where: str = "mlp.down", usual: Path | None = None,
    batch: int = 0, steps: int = 100, train: Path | None = None, json: bool = False,
) -> None:  # fmt: skip
    """Changes single answers of a model and writes what that takes as an adapter: `exapt edit MODEL edits.jsonl -o C --method memit --weight 100`.

    A line of EDITS is an object with "prompt" and "target" (texts, or lists of token ids; a whole number is a class), and may have "subject" (a part of
    the prompt, or the place of its last token), "rephrasings" (prompts) and "locality" (prompts that are to be answered as now, or pairs of a prompt and
    its answer). An editor's own settings follow by name; `exapt components --kind editor` lists the editors.

    Args:
        model: The base model.
        edits: The edits, one JSON object a line.
        settings: The editor's own settings.
        output: The adapter file to write.
        method: The editor's key.
        where: The layers to edit: a role or a glob on names; rome, grace_codebook and wise_memory take one.
        usual: Text, one passage a line, from which editors that spare what a layer does otherwise learn its keys.
        batch: Edits made at once; 0 makes all at once.
        steps: Training steps of editors that learn to edit.
        train: Edits, as EDITS, for editors that learn to edit.
        json: Print the result as JSON.
    """
    import contextlib

    with contextlib.redirect_stdout(sys.stderr):
        found = edit_file(model, edits, settings_of(settings), output, method, where, usual, batch, steps, train)
    if json:
        print(jsonlib.dumps(found))
        return
    print(f"{output}: {found['edits']} edits by {method}")
    for name, before in found["before"].items():
        if before is not None:
            print(f"{name:14} {before:.3f} -> {found['after'][name]:.3f}")


def edit_file(
    model: str, edits: Path, settings: dict[str, Any], output: Path, method: str, where: str, usual: Path | None, batch: int, steps: int, train: Path | None,
) -> dict[str, Any]:  # fmt: skip
    """Does what :func:`edit` says; returns the scores before and after."""
    from exapt.algebra.edit.editor import editor
    from exapt.algebra.edit.host import Editing, key_covariance
    from exapt.algebra.edit.reading import groups
    from exapt.algebra.edit.score import edit_score
    from exapt.cli.models import load_model
    from exapt.core.file import save

    made = editor(method, **settings)
    rows, others = _rows(edits), _rows(train) if train is not None else []
    passages = _lines(usual) if usual is not None else []
    if batch < 0 or steps < 1:
        raise InputError(f"--batch {batch} and --steps {steps}: batch is 0 (all at once) or more, steps 1 or more")
    if hasattr(made, "train") and train is None:
        raise InputError(f"{method} learns to edit from other edits; give them with --train FILE")
    base = load_model(model)
    parse = _Parser(base, model)
    found = [parse.edit(row, f"{edits}, line {n}") for n, row in rows]
    training = [parse.edit(row, f"{train}, line {n}") for n, row in others]
    texts = [parse.prompt(jsonlib.loads(text) if text.startswith("[") else text, f"{usual}, line {n}") for n, text in passages]
    import torch

    batches = [torch.stack([texts[i] for i in group]) for group in groups(texts)]
    editing = Editing(base, where, key_covariance(base, batches, where) if batches else {})
    before = edit_score(base, found)
    if hasattr(made, "train"):
        made.train(editing, training, steps=steps, batch=min(4, len(training)))
    for i in range(0, len(found), batch or len(found)):
        made.edit(editing, found[i : i + (batch or len(found))])
    after = edit_score(base, found)
    provenance = {"edits": str(edits), "editor": method, "settings": {k: str(v) for k, v in settings.items()}}
    path = save(base, output, editing.name, metrics={k: v for k, v in after.items() if v is not None}, provenance=provenance)
    return {"output": str(path), "edits": len(found), "method": method, "before": before, "after": after}


def _lines(path: Path) -> list[tuple[int, str]]:
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    found = [(n, line) for n, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1) if line.strip()]
    if not found:
        raise InputError(f"{path}: the file is empty")
    return found


def _rows(path: Path) -> list[tuple[int, dict[str, Any]]]:
    found = []
    for n, line in _lines(path):
        try:
            row = jsonlib.loads(line)
        except ValueError as e:
            raise InputError(f"{path}, line {n}: not JSON ({e})") from e
        if not isinstance(row, dict) or not {"prompt", "target"} <= row.keys() or row.keys() - set(COLUMNS):
            raise InputError(f'{path}, line {n}: an edit is an object with "prompt" and "target", and at most {", ".join(COLUMNS[2:])} besides')
        found.append((n, row))
    return found


class _Parser:
    """Rows as edits; the tokenizer is loaded when a text asks for it."""

    def __init__(self, base: Any, model: str) -> None:
        self.base, self.model, self._tokenizer = base, model, None

    @property
    def tokenizer(self) -> Any:
        if self._tokenizer is None:
            from exapt.cli.models import load_tokenizer

            self._tokenizer = load_tokenizer(self.model)
        return self._tokenizer

    def prompt(self, value: Any, place: str, continues: bool = False) -> Any:
        """A text, or a list of numbers, as a tensor."""
        import torch

        if isinstance(value, str):
            text = f" {value}" if continues and not value[:1].isspace() else value
            value = self.tokenizer(text, add_special_tokens=not continues)["input_ids"]
        if not isinstance(value, list) or not value or not all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in value):
            raise InputError(f"{place}: {jsonlib.dumps(value)[:60]} is no text and no list of numbers")
        return torch.tensor(value)

    def target(self, value: Any, place: str) -> Any:
        return value if isinstance(value, int) and not isinstance(value, bool) else self.prompt(value, place, continues=True)

    def edit(self, row: dict[str, Any], place: str) -> Any:
        from exapt.algebra.edit.request import Edit, checked

        prompt = self.prompt(row["prompt"], place)
        more = [self.prompt(r, place) for r in self._list(row, "rephrasings", place)]
        kept = [self._probe(value, place) for value in self._list(row, "locality", place)]
        made = Edit(prompt, self.target(row["target"], place), self._subject(row, place), tuple(more), tuple(kept))
        try:
            checked([made])
        except InputError as e:
            raise InputError(f"{place}: {str(e).removeprefix('edit 0').lstrip(':, ')}") from e
        return made

    def _list(self, row: dict[str, Any], name: str, place: str) -> Sequence[Any]:
        found = row.get(name, [])
        if not isinstance(found, list):
            raise InputError(f'{place}: "{name}" is a list')
        return found

    def _probe(self, value: Any, place: str) -> Any:
        from exapt.algebra.edit.request import Probe
        from exapt.algebra.edit.score import unchanged

        if isinstance(value, list) and len(value) == 2 and isinstance(value[0], (str, list)):
            return Probe(self.prompt(value[0], place), self.target(value[1], place))
        return unchanged(self.base, [self.prompt(value, place)])[0]

    def _subject(self, row: dict[str, Any], place: str) -> int | None:
        """Place of the subject's last token: of a text, told from the tokens of the prompt up to its end."""
        subject = row.get("subject")
        if subject is None or (isinstance(subject, int) and not isinstance(subject, bool)):
            return subject
        if not isinstance(subject, str) or not isinstance(row["prompt"], str) or subject not in row["prompt"]:
            raise InputError(f"{place}: the subject {subject!r} is no part of the prompt; give a part of its text, or the place of its last token")
        end = row["prompt"].index(subject) + len(subject)
        whole = self.tokenizer(row["prompt"], return_offsets_mapping=True) if getattr(self.tokenizer, "is_fast", False) else None
        if whole is None:
            raise InputError(f"{place}: this tokenizer does not tell where its tokens stand; give the place of the subject's last token as a number")
        return max(i for i, (a, b) in enumerate(whole["offset_mapping"]) if a < end and b > a)
