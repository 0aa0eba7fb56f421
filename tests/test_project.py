"""What the project says of itself: versions agree, pages and examples run, commands exist."""

import ast
import inspect
import json
import os
import re
import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from torch import nn

import exapt
from exapt.core import registry

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def blocks(page: str) -> list[str]:
    """The Python blocks of a Markdown page."""
    return re.findall(r"^```python\n(.*?)^```", text(page), re.S | re.M)


def pins() -> dict[str, str]:
    lines = (line for line in text("constraints.txt").splitlines() if line and not line.startswith("#"))
    return {canonicalize_name(k): v for k, v in (line.split("==") for line in lines)}


def test_versions_agree() -> None:
    assert exapt.__version__ == PROJECT["version"]
    assert f"## [{PROJECT['version']}]" in text("CHANGELOG.md")
    assert "## [Unreleased]" in text("CHANGELOG.md")


def test_pins_satisfy_every_stated_range() -> None:
    stated = [*PROJECT["dependencies"], *(r for extra in PROJECT["optional-dependencies"].values() for r in extra)]
    assert len(stated) > 10
    for requirement in map(Requirement, stated):
        pin = pins().get(canonicalize_name(requirement.name))
        assert pin is not None, f"{requirement.name} is not in constraints.txt"
        assert requirement.specifier.contains(pin), f"{requirement}: constraints.txt has {pin}"


def test_the_core_depends_on_little() -> None:
    assert {Requirement(r).name for r in PROJECT["dependencies"]} == {"torch", "safetensors", "numpy"}


@pytest.mark.parametrize("target", ["demo", "test", "check", "docs", "bench", "clean"])
def test_make_knows_its_targets(target: str) -> None:
    assert re.search(rf"^{target}:", text("Makefile"), re.M)
    assert target in re.findall(r"^\.PHONY:(.*)$", text("Makefile"), re.M)[0].split()


def test_ci_is_a_sound_script() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    subprocess.run(["bash", "-n", str(script)], check=True)


def test_licence() -> None:
    assert PROJECT["license"] == "Apache-2.0"
    assert "Apache License" in text("LICENSE")
    assert "[yyyy]" not in text("LICENSE")


def test_public_names_are_documented_and_sorted() -> None:
    assert exapt.__all__ == sorted(exapt.__all__)
    bare = [n for n in exapt.__all__ if not inspect.getdoc(getattr(exapt, n))]
    assert not bare, f"no docstring: {bare}"


def test_public_verbs_are_in_the_reference() -> None:
    page = text("docs/api.md")
    missing = [n for n in exapt.__all__ if inspect.isfunction(getattr(exapt, n)) and not re.search(rf"\.{n}$", page, re.M)]
    assert set(missing) <= {"frozen", "seeded"}, f"docs/api.md does not list {missing}"  # these two are for authors of methods


@pytest.mark.parametrize("page", [p.relative_to(ROOT).as_posix() for p in sorted((ROOT / "docs").rglob("*")) if p.suffix in (".md", ".py")])
def test_references_name_the_module_that_defines(page: str) -> None:
    for module, name in re.findall(r"~?(exapt\.(?:core|train|report)\.\w+)\.(\w+)[`>\n]", text(page)):
        assert getattr(import_module(module), name).__module__ == module, f"{page}: {module}.{name}"


def test_quickstart_runs(capsys: pytest.CaptureFixture[str]) -> None:
    code = "\n".join(blocks("docs/quickstart.md"))
    assert code.count("assert") >= 8
    exec(compile(code, "docs/quickstart.md", "exec"), {})
    assert "Count(trainable=" in capsys.readouterr().out


def test_the_contributors_example_is_a_whole_method(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_METHODS", registry.methods())
    method, golden = blocks("CONTRIBUTING.md")
    scope: dict[str, Any] = {"__name__": "contributed", "exapt": exapt, "torch": torch, "np": np, "nn": nn}
    exec(compile(method, "CONTRIBUTING.md", "exec"), scope)
    exec(compile(golden, "CONTRIBUTING.md", "exec"), scope)
    scope["test_output_scaling_against_its_formula"]()
    assert exapt.methods()["output_scaling"] is scope["OutputScaling"]

    model, x = nn.Sequential(nn.Linear(3, 4), nn.Conv1d(4, 2, 1)), torch.randn(2, 4, 3)
    with pytest.raises(exapt.InputError):
        exapt.attach(model, scope["OutputScaling"](), where="norm")
    exapt.attach(model[1], scope["OutputScaling"](), where="all")
    for p in exapt.trainable(model[1]).values():
        nn.init.normal_(p)
    y = model[1](x)
    exapt.merge(model[1])
    torch.testing.assert_close(model[1](x), y)


def test_the_format_page_describes_what_is_written(tmp_path: Path) -> None:
    """Follows docs/file_format.md without exapt's own reader: layout, keys, fingerprint, and its closing example."""
    page = text("docs/file_format.md")
    torch.manual_seed(0)
    model = exapt.attach(nn.Sequential(nn.Linear(40, 8), nn.Linear(8, 2)), exapt.LoRA(rank=2), where="all")
    path = exapt.save(model, tmp_path / "adapter.safetensors", metrics={"loss": 1.5})
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(json.loads(raw[8 : 8 + size])["__metadata__"]["exapt"])
    described = set(re.findall(r"^\| `(\w+)` \| ", page.partition("## Compressed files")[0], re.M)) - {"subset"}
    assert set(header) == described
    assert list(header) == sorted(header)
    assert header["fingerprint"] == fingerprint_by_the_page(exapt.detach(model))
    assert header["rules"][0]["shapes"] == [[8, 40], [2, 8]]
    assert set(header["tensors"]) == {f"0:{s}/{t}" for s in "01" for t in "AB"}

    (code,) = blocks("docs/file_format.md")
    scope: dict[str, Any] = {}
    exec(code.replace("adapter.safetensors", str(path)), scope)
    assert scope["update"].shape == (8, 40)


def fingerprint_by_the_page(model: nn.Module) -> str:
    import hashlib

    names, values = [], b""
    for name, p in model.named_parameters():
        names.append(f"{name}{tuple(p.shape)}")
        flat = p.detach().flatten().numpy()
        bits = flat[:: max(1, len(flat) // 16)][:16].astype("<f4").view("<u4").astype(np.uint64)
        values += ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2").tobytes()  # to nearest bfloat16, ties to even
    return hashlib.sha256("\n".join(names).encode() + values).hexdigest()[:16]


def test_links_between_pages_lead_somewhere() -> None:
    pages = [*(p for p in ROOT.glob("*.md") if p.name != "README.md"), *(ROOT / "docs").glob("*.md")]
    broken = []
    for page in pages:
        for link in re.findall(r"\]\((?!https?:|#|mailto:)([^)#\s]+)", page.read_text(encoding="utf-8")):
            if not (page.parent / link).exists() and not link.startswith("auto_examples"):
                broken.append(f"{page.name}: {link}")
    assert pages
    assert not broken, broken


@pytest.mark.slow
@pytest.mark.parametrize("example", sorted((ROOT / "docs" / "gallery").glob("plot_*.py")), ids=lambda p: p.stem)
def test_gallery_examples_run(example: Path, tmp_path: Path) -> None:
    assert ast.get_docstring(ast.parse(example.read_text(encoding="utf-8")))
    done = subprocess.run([sys.executable, str(example)], cwd=tmp_path, env={**os.environ, "MPLBACKEND": "Agg"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
