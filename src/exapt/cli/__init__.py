"""The command line, ``exapt``. Data goes to stdout, talk to stderr; the exit code is 0, 2 (the user's input), 1 (a bug) or 130."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from exapt.core.errors import InputError


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code.

    Args:
        argv: The words after ``exapt``; by default those of this process.

    Returns:
        0: done. 2: the input is wrong, and one line on stderr says what, where and what to do. 130: interrupted. A bug is
        an exception, which leaves the process with its traceback and code 1.

    >>> main(["show", "no.such.file"])
    2
    """
    try:
        from exapt.cli.app import run

        run(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
        return 0
    except InputError as e:
        return _refuse(str(e))
    except ModuleNotFoundError as e:
        advice = _advice(e.name or "")
        if advice is None:
            raise
        return _refuse(advice)
    except BrokenPipeError:
        # The reader of stdout (head, say) has gone; nothing is wrong, and the interpreter must not flush into it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as e:
        if e.filename is None or e.strerror is None:
            raise
        return _refuse(f"{e.filename}: {e.strerror}; check the path and your rights to it")
    except KeyboardInterrupt:
        print("exapt: interrupted", file=sys.stderr)
        return 130


def _refuse(text: str) -> int:
    print("exapt:", " ".join(text.split()), file=sys.stderr)
    return 2


def _advice(module: str) -> str | None:
    """What to install for a package that is missing, if one of exapt's extras brings it."""
    from exapt.cli.extras import extra_of

    extra = extra_of(module)
    return f'the package {module.partition(".")[0]} is not installed; run pip install "exapt[{extra}]"' if extra else None
