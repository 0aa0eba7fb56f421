"""The commands: what each takes, and who does it. Everything that takes time to import is imported by the command that needs it."""

from __future__ import annotations

import contextlib
import json as jsonlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import App, CycloptsError, Parameter

from exapt.cli import algebra, stream
from exapt.cli.compress import compress
from exapt.cli.edit import edit
from exapt.cli.merge import merge_models
from exapt.core import __version__
from exapt.core.errors import InputError

app = App(
    name="exapt",
    help="Adapts pretrained models: fit, evaluate, inspect and merge parameter shifts. Data goes to stdout, talk to stderr.",
    version=__version__,
    default_parameter=Parameter(negative=""),
    help_format="markdown",
    result_action="return_value",
    suppress_keyboard_interrupt=False,
)
Overrides = Annotated[str, Parameter(show=False, allow_leading_hyphen=True)]
Output = Annotated[Path, Parameter(name=["--output", "-o"])]
OptionalOutput = Annotated[Path | None, Parameter(name=["--output", "-o"])]


def run(argv: Sequence[str]) -> None:
    """Runs one command; what the user got wrong is an ``InputError``."""
    try:
        app(list(argv), exit_on_error=False, print_error=False)
    except CycloptsError as e:
        chain = " ".join(e.command_chain or ())
        raise InputError(f"{str(e).rstrip('.')}; see exapt {chain + ' ' if chain else ''}--help") from e


@contextlib.contextmanager
def _talk_to_stderr() -> Iterator[None]:
    """Keeps stdout for the result, whatever a library below prints."""
    with contextlib.redirect_stdout(sys.stderr):
        yield


@app.command
def fit(
    config: Path,
    /,
    *overrides: Overrides,
    model: str | None = None,
    where: str | None = None,
    output: OptionalOutput = None,
    resume: bool = False,
    json: bool = False,
) -> None:
    """Trains an adapter as a YAML file says, evaluates it, and writes it to one file.

    Any setting can be changed on the line, after CONFIG: `--rank 16` sets a field of the method (`exapt methods lora` lists
    them), `--method dora` takes another, `--train.lr 1e-3`, `--task.max-length 128` and `--data.test FILE` set keys of those sections.

    Args:
        config: The YAML file.
        overrides: Settings laid over the file.
        model: Base model: a folder, a GGUF file, package:NAME or python:module:function.
        where: Sites to adapt: a role, a glob, "linear", or "[a, b]".
        output: The adapter file to write.
        resume: Go on from the last checkpoint in train.folder.
        json: Print the result as JSON.
    """
    from exapt.cli.config import read_config
    from exapt.cli.run import fit_and_save, print_metrics

    read = read_config(config, overrides, {"model": model, "where": where, "output": str(output) if output else None})
    with _talk_to_stderr():
        result = fit_and_save(read, resume)
    print_metrics(result, json)


@app.command
def evaluate(config: Path, /, *overrides: Overrides, adapter: Path | None = None, base: bool = False, bootstrap: int = 0, json: bool = False) -> None:
    """Measures an adapter on the configuration's test data (validation data if there is no test).

    Args:
        config: The YAML file the adapter was made with; settings can be changed after it as with `exapt fit`.
        overrides: Settings laid over the file.
        adapter: The adapter file; by default the file's output.
        base: Measure the base model alone.
        bootstrap: Resamples of the examples for a 95 % interval; 0 for none.
        json: Print the result as JSON.
    """
    from exapt.cli.config import read_config
    from exapt.cli.run import evaluate_file, print_metrics

    read = read_config(config, overrides)
    if base and adapter is not None:
        raise InputError("--base and --adapter were both given; the base alone has no adapter, keep one")
    with _talk_to_stderr():
        result = evaluate_file(read, None if base else adapter or Path(read["output"]), bootstrap)
    print_metrics(result, json)


@app.command
def predict(config: Path, /, *overrides: Overrides, adapter: Path | None = None, data: str | None = None, output: OptionalOutput = None) -> None:
    """Writes what an adapter predicts, one JSON object a line, in the order of the data.

    Args:
        config: The YAML file the adapter was made with; settings can be changed after it as with `exapt fit`.
        overrides: Settings laid over the file.
        adapter: The adapter file; by default the file's output.
        data: The data; by default the file's test data.
        output: The file to write; by default stdout.
    """
    from exapt.cli.config import read_config
    from exapt.cli.run import predict_file
    from exapt.cli.write import write_text

    read = read_config(config, overrides)
    with _talk_to_stderr():
        rows = predict_file(read, adapter or Path(read["output"]), data)
    text = "".join(jsonlib.dumps(r, ensure_ascii=False) + "\n" for r in rows)
    if output is None:
        sys.stdout.write(text)
    else:
        write_text(output, text)
        print(f"{len(rows)} predictions in {output}", file=sys.stderr)


@app.command
def search(
    config: Path,
    /,
    *overrides: Overrides,
    folder: Path | None = None,
    trials: int | None = None,
    processes: int | None = None,
    json: bool = False,
) -> None:
    """Tries the configurations that the `search` section of a YAML file spans, and prints the Pareto set of its objectives.

    Each is trained on the training data and measured on the validation data; the test data are not touched. Calling again goes on, also
    after a crash: what was measured is not measured again. Each cell's folder holds a `config.yaml` for `exapt fit`, and the adapter.

    Args:
        config: The YAML file; settings can be changed after it as with `exapt fit`.
        overrides: Settings laid over the file.
        folder: Where everything is kept.
        trials: How many cells there are to be in the end.
        processes: Processes that share the work.
        json: Print the result as JSON.
    """
    from exapt.cli.config import read_config
    from exapt.cli.search import print_front, search_file

    given = {"folder": None if folder is None else str(folder), "trials": trials, "processes": processes}
    words = [f"--search.{k}={v}" for k, v in given.items() if v is not None]
    read = read_config(config, [*overrides, *words], verb="search")
    with _talk_to_stderr():
        found = search_file(read)
    print_front(found, json)


@app.command
def sites(model: str, /, *, where: str | None = None, json: bool = False) -> None:
    """Lists what of a model can be adapted, without loading its weights.

    Args:
        model: A folder, a GGUF file, package:NAME or python:module:function.
        where: Only the sites that this names.
        json: Print JSON.
    """
    from exapt.cli.models import outline
    from exapt.cli.show import list_sites

    with _talk_to_stderr():
        found = outline(model)
    list_sites(found, where, json)


@app.command
def methods(key: str | None = None, /, *, contract: str | None = None, json: bool = False) -> None:
    """Lists the methods, or one method with its parameters.

    Args:
        key: One method.
        contract: Only those of one contract: weight, activation, token, subset, side, output or recipe.
        json: Print JSON, with every parameter.
    """
    from exapt.cli.show import list_methods

    list_methods(key, contract, json)


@app.command
def show(file: Path, /, *, json: bool = False) -> None:
    """Prints what is in an adapter file.

    Args:
        file: The adapter file.
        json: Print JSON.
    """
    from exapt.cli.show import show_file

    show_file(file, json)


@app.command
def merge(model: str, file: Path, /, *, output: Output) -> None:
    """Writes a model with an adapter merged into its weights.

    Args:
        model: The base model the adapter was made for.
        file: The adapter file.
        output: NAME.safetensors for one file of weights; anything else is a new folder, as save_pretrained makes it.
    """
    from exapt.cli.run import merge_file

    with _talk_to_stderr():
        merge_file(model, file, output)
    print(output)


@app.command
def export(
    model: str,
    file: Path,
    /,
    *,
    output: Output,
    format: Literal["peft", "vllm", "merged", "lora"] = "peft",
    rank: int = 8,
    limit: float = 0.1,
    force: bool = False,
) -> None:
    """Writes an adapter for another library: a folder for PEFT or vLLM, a whole model, or a LoRA that approximates it.

    What PEFT or vLLM would refuse, or load wrongly, is refused here, with the field.

    Args:
        model: The base model the adapter was made for.
        file: The adapter: an exapt file, or a PEFT folder.
        output: The new folder.
        format: "peft", "vllm", "merged", or "lora" (any mergeable method, compressed by singular value decomposition).
        rank: Rank of "lora".
        limit: Largest relative error that "lora" accepts at a site.
        force: Write "lora" above the limit all the same.
    """
    from exapt.cli.run import export_file

    with _talk_to_stderr():
        export_file(model, file, output, format, {"rank": rank, "limit": limit, "force": force} if format == "lora" else {})
    print(output)


@app.command
def env() -> None:
    """Prints versions and the machine, for a bug report."""
    from exapt.cli.show import environment

    print(environment())


for command in (algebra.merge_adapters, algebra.arithmetic, algebra.diff, stream.components, stream.watch, stream.adapt, stream.report, stream.rollback):
    app.command(command)
app.command(merge_models)
app.command(compress)
app.command(edit)
