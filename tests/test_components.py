"""Every component of the catalogue: described, sourced, found by its name, made without arguments where it is a class of settings."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re

import pytest

import exapt
from exapt.core.components import Component, component_of
from exapt.core.objective import Objective, objective
from exapt.online.method import TestTime

ALL = {k: c for k, c in exapt.components().items() if c.module.startswith("exapt.")}
SETTINGS = ("adaptation", "source-free", "generalisation", "source")
each = pytest.mark.parametrize("found", list(ALL.values()), ids=list(ALL))


@each
def test_described(found: Component) -> None:
    doc = inspect.getdoc(found.target) or ""
    assert len(found.summary) > 15
    assert re.search(r"[.:`]$", found.summary), "the first paragraph is of sentences"
    beside = inspect.getsource(inspect.getmodule(found.target))  # type: ignore[arg-type]
    assert not found.paper or "References" in doc or re.search(r"References|\b(19|20)\d\d\b", beside), "authors, title, venue"
    assert found.oracle
    assert json.loads(json.dumps(found.record()))["key"] == found.key
    assert re.fullmatch(r"[a-z][a-z0-9_]*", found.key)


@each
def test_reached_through_the_facade(found: Component) -> None:
    if found.kind == "merge rule":  # named by its key, in exapt.combine(rule=...) and on the command line
        assert exapt.components("merge rule")[found.key].target is found.target
        return
    assert getattr(exapt, found.name) is found.target, f"{found.name} is another thing in exapt"


@each
def test_its_file_is_not_named_like_a_function(found: Component) -> None:
    if inspect.isfunction(found.target):
        assert found.module.rpartition(".")[2] != found.name


@each
def test_default_constructible(found: Component) -> None:
    if inspect.isclass(found.target) and dataclasses.is_dataclass(found.target) and issubclass(found.target, (Objective, TestTime)):
        made = found.target()
        assert hash(made) == hash(found.target())
        assert json.dumps(dataclasses.asdict(made), default=str)
        doc = inspect.getdoc(found.target) or ""
        assert all(f"{f.name}" in doc for f in dataclasses.fields(found.target)), "every field is documented"


@pytest.mark.parametrize("key", sorted(exapt.components("objective")))
def test_objectives_say_their_setting(key: str) -> None:
    made = objective(key)
    assert made.setting in SETTINGS
    assert made.equation


def test_unknown_keys() -> None:
    with pytest.raises(exapt.InputError, match='no objective "dan_n"; did you mean'):
        objective("dan_n")
    with pytest.raises(exapt.InputError, match="objective dann: "):
        objective("dann", wait=1)
    with pytest.raises(exapt.InputError, match="no guard"):
        component_of("tent", "guard")
