"""What all commands share: an error that the user can mend is one line on stderr, a file of weights is whole."""

import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import wraps
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from train.config import UserError

Run = Positional[Annotated[Path, arg(metavar="RUN", help="Folder that python -m train has written.")]]


def one_line_errors(main: Callable[[Sequence[str] | None], int | None]) -> Callable[..., int]:
    """A command that returns its exit code, also for errors and Ctrl-C."""

    @wraps(main)
    def command(arguments: Sequence[str] | None = None) -> int:
        try:
            return main(arguments) or 0
        except UserError as error:
            return _fail(str(error), error.exit_code)
        except OSError as error:
            return _fail(str(error), 2)
        except KeyboardInterrupt:
            return _fail("interrupted", 130)

    return command


def write_whole(path: Path, content: bytes) -> None:
    """Write a file whole or not at all."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        part.write_bytes(content)
        part.rename(path)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error}") from error
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)


def _fail(message: str, exit_code: int) -> int:
    print("error:", " ".join(message.split()), file=sys.stderr)
    return exit_code
