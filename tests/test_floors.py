"""The house rules that a machine can check: imports point down, files and functions stay small, importing is cheap."""

import ast
import functools
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "exapt"
FILES = sorted(PACKAGE.rglob("*.py"))
FLOORS = {
    "core": 0,
    "methods": 1, "objectives": 1, "shift": 1,
    "algebra": 2, "interop": 2,
    "train": 3, "online": 3, "continual": 3, "labels": 3, "search": 3,
    "loop": 4,
    "cli": 5, "serve": 5, "report": 5,
}  # fmt: skip
HEAVY = ("transformers", "peft", "lightning_fabric", "sklearn", "scipy", "matplotlib", "rich", "cyclopts", "polars", "pandas", "optuna", "sqlalchemy")


@functools.cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def module_of(path: Path) -> list[str]:
    """``["exapt", "core", "file"]``; a package is its folder."""
    parts = list(path.relative_to(PACKAGE.parent).with_suffix("").parts)
    return parts[:-1] if parts[-1] == "__init__" else parts


def imported(path: Path) -> Iterator[tuple[int, str]]:
    """Every exapt module that a file imports, wherever in it the import stands, with its line."""
    package = module_of(path) if path.name == "__init__.py" else module_of(path)[:-1]
    for node in ast.walk(tree(path)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            origin = ".".join(filter(None, (start, node.module)))
            names = [f"{origin}.{a.name}" for a in node.names]
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) in ("import_module", "__import__"):
            names = [a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
        yield from ((getattr(node, "lineno", 0), n) for n in names if n.split(".")[0] == "exapt")


def room(module: str) -> str | None:
    """The package of exapt that a module is in; ``None`` for the façade itself."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and (parts[1] in FLOORS or (PACKAGE / parts[1]).is_dir() or (PACKAGE / f"{parts[1]}.py").is_file()) else None


def upward(path: Path) -> list[str]:
    own = module_of(path)
    wrong = []
    for line, name in imported(path):
        target = room(name)
        here = f"{path.relative_to(ROOT)}:{line} imports {name}"
        if target is None:
            if FLOORS[own[1]] < 5:
                wrong.append(f"{here}: the façade is above floor {FLOORS[own[1]]}; import from the module that defines it")
        elif FLOORS.get(target, 9) > FLOORS[own[1]]:
            wrong.append(f"{here}: floor {FLOORS.get(target, '?')} from floor {FLOORS[own[1]]}")
        elif own[1] == "methods" and target != "core" and path.name != "__init__.py":
            wrong.append(f"{here}: a method imports only exapt.core, never another method")
    return wrong


def test_every_room_has_a_floor() -> None:
    rooms = {module_of(f)[1] for f in FILES if len(module_of(f)) > 1}
    assert "core" in rooms
    assert rooms <= set(FLOORS), f"give {sorted(rooms - set(FLOORS))} a floor in FLOORS, and in docs/concepts.md"


def test_imports_point_down() -> None:
    wrong = [w for f in FILES if len(module_of(f)) > 1 for w in upward(f)]
    assert not wrong, "\n".join(wrong)


def test_the_check_sees_an_upward_arrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "src" / "exapt"
    (package / "core").mkdir(parents=True)
    (package / "methods").mkdir()
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    monkeypatch.setitem(globals(), "PACKAGE", package)
    for text, count in (
        ("from exapt.train import fit", 1),
        ("def f():\n    import exapt.methods.lora", 1),
        ("from ..methods import lora", 1),
        ("from importlib import import_module\nimport_module('exapt.loop')", 1),
        ("import exapt", 1),
        ("import torch\nfrom exapt.core import sites\nfrom .sites import Site", 0),
    ):
        file = package / "core" / "tried.py"
        file.write_text(text)
        tree.cache_clear()
        assert len(upward(file)) == count, text
    file = package / "methods" / "dora.py"
    file.write_text("from exapt.methods.lora import LoRA\nfrom exapt.core.base import Base")
    assert len(upward(file)) == 1
    tree.cache_clear()


def test_files_are_short() -> None:
    long = {str(f.relative_to(ROOT)): n for f in FILES if (n := len(f.read_text(encoding="utf-8").splitlines())) > 400}
    assert not long, f"over 400 lines, find the wall between two rooms: {long}"


def function_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    first = node.body[0]
    has_doc = ast.get_docstring(node, clean=False) is not None
    return (node.end_lineno or 0) - node.lineno + 1 - ((first.end_lineno or 0) - first.lineno + 1 if has_doc else 0)


def test_functions_are_short() -> None:
    long = [
        f"{f.relative_to(ROOT)}:{n.lineno} {n.name}: {function_lines(n)} lines"
        for f in FILES
        for n in ast.walk(tree(f))
        if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef)) and function_lines(n) > 60
    ]
    assert not long, "over 60 lines without docstring:\n" + "\n".join(long)


def unpickles(path: Path) -> list[str]:
    """Places of a file that can execute what a data file says."""
    wrong = []
    safe = {"SafeLoader", "CSafeLoader"}
    safe |= {n.name for n in ast.walk(tree(path)) if isinstance(n, ast.ClassDef) and any(ast.unparse(b).split(".")[-1] in safe for b in n.bases)}
    for node in ast.walk(tree(path)):
        where = f"{path.name}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            modules = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            wrong += [f"{where} imports {m}" for m in modules if m.split(".")[0] in ("pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal")]
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and isinstance(node.func.value, ast.Name):
            given = {k.arg: getattr(k.value, "value", None) for k in node.keywords}
            loader = next((ast.unparse(k.value).split(".")[-1] for k in node.keywords if k.arg == "Loader"), "")
            call = f"{node.func.value.id}.{node.func.attr}"
            if call == "torch.load" and given.get("weights_only") is not True:
                wrong.append(f"{where} torch.load without weights_only=True")
            if call in ("np.load", "numpy.load") and given.get("allow_pickle"):
                wrong.append(f"{where} np.load with allow_pickle")
            if call == "yaml.load" and loader not in safe:
                wrong.append(f"{where} yaml.load without a safe loader")
    return wrong


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    wrong = [w for f in FILES for w in unpickles(f)]
    assert not wrong, "\n".join(wrong)
    bad = tmp_path / "bad.py"
    calls = ("torch.load('x')", "torch.load('x', weights_only=False)", "torch.load('x', weights_only=True)", "yaml.load(f, Loader=yaml.Loader)")
    bad.write_text("\n".join(("import pickle", *calls)))
    assert len(unpickles(bad)) == 4


def project_texts() -> Iterator[tuple[Path, str]]:
    """The text files that belong to the project."""
    skipped = {".git", ".venv", "__pycache__", "_build", "auto_examples", "generated", "build", "dist", "runs", "demo_out"}
    for path in ROOT.rglob("*"):
        inside = path.relative_to(ROOT).parts
        if path.is_file() and not skipped & set(inside) and not any(p.startswith(".") and p != ".ci" for p in inside[:-1]) and path.stat().st_size < 1 << 20:
            try:
                yield path, path.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                continue


def test_no_path_of_one_machine() -> None:
    own = re.compile(r"(?<![\w.])/(?:home|root|Users|work|mnt|workspace)/[\w.]|file:/{2}" + f"|{re.escape(str(ROOT))}(?![\\w.])")
    wrong = [f"{p.relative_to(ROOT)}: {m[0]!r}" for p, text in project_texts() if not p.name.endswith("egg-info") for m in own.finditer(text)]
    assert not wrong, "\n".join(wrong)


def modules_after(code: str, before: str = "") -> set[str]:
    """What a fresh process imports for ``code`` that ``before`` did not."""
    script = f"import sys\n{before}\nhad = set(sys.modules)\n{code}\nprint('', *sorted(set(sys.modules) - had), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(done.stderr.splitlines()[-1].split())


def not_ours(modules: set[str]) -> set[str]:
    """The packages among them that are neither exapt nor Python's own."""
    return {m.partition(".")[0] for m in modules} - {"exapt"} - set(sys.stdlib_module_names)


def test_import_brings_neither_torch_nor_another_package() -> None:
    alone = modules_after("import exapt")
    assert not not_ours(alone), f"import exapt pulls in {sorted(not_ours(alone))}"
    assert len({m for m in alone if m.startswith("exapt")}) <= 10
    assert "torch" in modules_after("import exapt; exapt.attach")


def test_beside_torch_import_brings_only_the_core() -> None:
    """Who has torch already gets what the verbs need at once, so that the first call does not pay for it."""
    base = "import torch, numpy, safetensors.torch"
    found = modules_after("import exapt", base)
    assert not not_ours(found), f"import exapt pulls in {sorted(not_ours(found))}; import it where it is used"
    assert len({m for m in found if m.startswith("exapt")}) <= 45
    assert len(found) <= 110, sorted(found)
    used = modules_after("exapt.attach, exapt.detach, exapt.merge, exapt.save, exapt.load, exapt.sites", f"{base}, exapt")
    assert not {m for m in used if m.startswith("exapt")}


@pytest.mark.parametrize("words", [["--help"], ["methods"], ["methods", "--json"], ["methods", "lora"], ["components", "--json"], ["fit", "--help"]])
def test_listings_import_no_torch(words: list[str]) -> None:
    found = modules_after(f"from exapt.cli import main; assert main({words!r}) == 0")
    heavy = not_ours(found) & {"torch", "numpy", "safetensors", *HEAVY} - {"rich", "cyclopts"}
    assert not heavy, f"exapt {' '.join(words)} imports {sorted(heavy)}"
    assert not {m for m in found if m.startswith(("exapt.methods.", "exapt.shift", "exapt.objectives", "exapt.train"))}
    assert len(found) <= 400, sorted(found)


def test_import_takes_no_time() -> None:
    """The promise in seconds, on the quickest of three; the tests above count what it is made of."""
    script = "import sys, time, torch, numpy, safetensors.torch; t = time.process_time(); import exapt; print(time.process_time() - t)"
    seconds = min(float(subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout) for _ in range(3))
    assert seconds < 0.3, f"import exapt adds {seconds:.2f} s to torch"
