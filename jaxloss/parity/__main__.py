"""Checks a port from the command line: `python -m jaxloss.parity check module:torch_model module:flax_model …`.

`record` keeps the original in a golden file, and `replay` checks a port against that, without PyTorch.
Exit status: 0 equal (or recorded), 1 different, 2 could not.
"""

import importlib
import inspect
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from tyro.conf import Positional

COULD_NOT = 2


@dataclass(kw_only=True)
class Run:
    """How the original is run."""

    loss: Literal["cross_entropy", "nll_loss", "none"] = "cross_entropy"
    """what the outputs are for"""
    train: bool = False
    """train mode, with the same dropout masks in both"""
    steps: int = 10
    """steps with Adam; 0 for none"""
    dtypes: tuple[str, ...] = ("float64", "float32")
    """float64 is always there"""


@dataclass(kw_only=True)
class Pairing:
    """What of the port belongs to what of the original."""

    names: dict[str, str] = field(default_factory=dict)
    """the port's names of weights and PyTorch's, in turn, where they would be paired otherwise"""
    ignore: tuple[str, ...] = ()
    """names of PyTorch's weights or buffers that the port does not need, or patterns"""


@dataclass(kw_only=True)
class Output:
    """Where a report goes."""

    json: Path | None = None
    """write the report here too"""
    html: Path | None = None
    """write it as a page"""
    junit: Path | None = None
    """write it as JUnit XML, for CI systems"""

    def refuse_paths(self) -> None:
        """Raises at once for what could not be written after a long comparison."""
        for path in filter(None, (self.json, self.html, self.junit)):
            if path.is_dir():
                raise IsADirectoryError(f"{path} cannot be written: it is a folder.")
            if not path.parent.is_dir():
                raise FileNotFoundError(f"{path} cannot be written: there is no folder {path.parent}.")

    def tell(self, report: Any, console: Console) -> int:
        """Writes a report, prints it, and gives the exit status."""
        try:
            if self.json is not None:
                report.to_json(self.json)
            if self.html is not None:
                report.to_html(self.html)
            if self.junit is not None:
                report.to_junit(self.junit)
        finally:
            console.print(report if console.is_terminal else str(report))
        return 0 if report.ok else 1


@dataclass(kw_only=True)
class Check(Run, Pairing, Output):
    """Compare a Flax port with its PyTorch original, layer by layer."""

    torch_model: Positional[str]
    """module:attribute of a torch.nn.Module, or of a function without arguments that makes one"""
    flax_model: Positional[str]
    """module:attribute of an nnx.Module, or of a function without arguments that makes one"""
    batch: Path
    """.npz file: the inputs in their order, as PyTorch takes them; "targets"; and if Flax's inputs are not PyTorch's \
with 4-D ones transposed, those as flax_NAME"""

    def run(self, console: Console) -> int:
        """Prints the report."""
        from torch.nn import functional

        import jaxloss
        from jaxloss import parity

        self.refuse_paths()
        losses = None if self.loss == "none" else (getattr(functional, self.loss), getattr(jaxloss, self.loss))
        torch_model, flax_model = _load(self.torch_model, "torch.nn"), _load(self.flax_model, "flax.nnx")
        theirs, ours = _read_batch(self.batch, with_targets=losses is not None)
        with _stages(console, 5 + 2 * len(set(self.dtypes) - {"float64"})) as progress:
            report = parity.check(
                torch_model,
                flax_model,
                theirs,
                ours,
                names=self.names,
                ignore=self.ignore,
                losses=losses,
                train=self.train,
                steps=self.steps,
                dtypes=self.dtypes,
                progress=progress,
            )
        return self.tell(report, console)


@dataclass(kw_only=True)
class Record(Run):
    """Keep a PyTorch original in a golden file, for `replay`."""

    torch_model: Positional[str]
    """module:attribute of a torch.nn.Module, or of a function without arguments that makes one"""
    batch: Positional[Path]
    """.npz file: the inputs in their order, as PyTorch takes them, and "targets"; better a small batch"""
    golden_file: Positional[Path]
    """where to; a .safetensors file"""

    def run(self, console: Console) -> int:
        """Writes the file, and prints its size."""
        from torch.nn import functional

        from jaxloss import parity

        loss = None if self.loss == "none" else getattr(functional, self.loss)
        theirs, _ = _read_batch(self.batch, with_targets=loss is not None)
        with _stages(console) as progress:
            parity.record(
                self.golden_file,
                _load(self.torch_model, "torch.nn"),
                theirs,
                loss=loss,
                train=self.train,
                steps=self.steps,
                dtypes=self.dtypes,
                progress=progress,
            )
        size = self.golden_file.stat().st_size
        console.print(f"{self.golden_file}: {size:,} bytes")
        return 0


@dataclass(kw_only=True)
class Replay(Pairing, Output):
    """Compare a Flax port with a golden file, without PyTorch."""

    golden_file: Positional[Path]
    """what `record` has written"""
    flax_model: Positional[str]
    """module:attribute of an nnx.Module, or of a function without arguments that makes one"""
    batch: Path | None = None
    """.npz file, if Flax's inputs are not the recorded ones with 4-D ones transposed: those, as flax_NAME \
and in their order; other arrays are not read"""

    def run(self, console: Console) -> int:
        """Prints the report."""
        from jaxloss import parity

        self.refuse_paths()
        ours = None if self.batch is None else _read_flax_inputs(self.batch)
        flax_model = _load(self.flax_model, "flax.nnx")
        with _stages(console) as progress:
            report = parity.replay(
                self.golden_file, flax_model, ours, names=self.names, ignore=self.ignore, progress=progress
            )
        return self.tell(report, console)


@dataclass
class Diff:
    """Compare the arrays of two .npz files by name."""

    ours: Positional[Path]
    theirs: Positional[Path]
    tolerance: float = 1e-12
    """relative L2 distance that passes"""

    def run(self, console: Console) -> int:
        """Prints a line for every array."""
        from jaxloss.parity._assert_close import parts
        from jaxloss.parity._compare import UNKNOWN, compare
        from jaxloss.parity._faults import classify

        ours, theirs = (
            {key: part for name, array in _read_arrays(path).items() for key, part in parts(name, array).items()}
            for path in (self.ours, self.theirs)
        )
        if not ours or not theirs:
            raise ValueError(f"{self.ours if not ours else self.theirs} holds no arrays.")
        differ = compared = False
        for name in ours | theirs:
            if name not in ours or name not in theirs:
                console.print(f"FAIL {name}: only in {self.theirs if name in theirs else self.ours}")
                differ = True
                continue
            outcome = compare(ours[name], theirs[name], tolerance=self.tolerance)
            fault = None if outcome.ok or outcome.problem.endswith(UNKNOWN) else classify(ours[name], theirs[name])
            why = f" [{fault.kind}] {fault.seen}".rstrip() if fault else ""
            what = outcome.problem or f"{outcome.error:.2g} of its norm"
            console.print(f"{'FAIL' if fault else '  ok' if outcome.ok else '   -'} {name}: {what}{why}")
            differ |= fault is not None
            compared |= fault is not None or outcome.ok
        return int(differ) if compared or differ else COULD_NOT


@dataclass
class Doctor:
    """Show what on this machine can make equal programs differ."""

    def run(self, console: Console) -> int:
        """Prints a table."""
        from jaxloss.parity._doctor import examine

        for name, value, remark in examine():
            console.print(f"{name:26} {value:24} {remark}".rstrip())
        return 0


Command = (
    Annotated[Check, tyro.conf.subcommand("check")]
    | Annotated[Record, tyro.conf.subcommand("record")]
    | Annotated[Replay, tyro.conf.subcommand("replay")]
    | Annotated[Diff, tyro.conf.subcommand("diff")]
    | Annotated[Doctor, tyro.conf.subcommand("doctor")]
)


def main() -> int:
    """Runs a command, and turns what cannot be compared into a line."""
    command = tyro.cli(Command, prog="python -m jaxloss.parity", description=__doc__)
    try:
        width = None if sys.stdout.isatty() else 10_000
        return command.run(_Console(width=width, markup=False, emoji=False, highlight=False, soft_wrap=True))
    except KeyboardInterrupt:
        return 130
    except (Exception, SystemExit) as error:  # whatever a stranger's module raises
        what = "record" if isinstance(command, Record) else "compare"
        print(f"Could not {what}. {type(error).__name__}: {error}", file=sys.stderr)
        return COULD_NOT


class _Console(Console):
    """One that is silent where nobody reads any more, as behind `| head`; by default rich exits."""

    def on_broken_pipe(self) -> None:
        """Called by rich."""
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextmanager
def _stages(console: Console, total: int | None = None) -> Iterator[Callable[[str], None]]:
    """A bar of the stages so far, in a terminal."""
    columns = SpinnerColumn(), BarColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task("starting", total=total)
        yield lambda stage: progress.update(bar, description=stage, advance=1)


def _load(where: str, kind: str) -> Any:
    """The object, or what it makes if it is a function or a class."""
    module, _, attribute = where.partition(":")
    if not attribute:
        raise ValueError(f"{where!r} should be module:attribute.")
    try:
        found = getattr(_import(module), attribute)
        if inspect.isroutine(found) or inspect.isclass(found):
            found = found()
    except SystemExit as error:
        raise RuntimeError(f'{where} calls sys.exit: do that under `if __name__ == "__main__":` only.') from error
    if not isinstance(found, importlib.import_module(kind).Module):
        raise TypeError(f"{where} gives a {type(found).__name__}, expected a {kind}.Module.")
    return found


def _import(module: str) -> Any:
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    return importlib.import_module(module)


def _read_arrays(path: Path) -> dict[str, np.ndarray]:
    try:
        arrays = np.load(path, allow_pickle=False)
    except ValueError as error:  # what NumPy takes for a pickle
        raise ValueError(f"{path} is no .npz file of numbers.") from error
    if isinstance(arrays, np.ndarray):
        raise ValueError(f"{path} holds one array, expected an .npz file.")
    with arrays:
        found = dict(arrays)
    if words := [name for name, array in found.items() if array.dtype.kind in "SUMmV"]:
        raise ValueError(f"{path}: {words[0]} is of {found[words[0]].dtype}, expected numbers.")
    return found


def _read_batch(path: Path, *, with_targets: bool) -> tuple[tuple[np.ndarray, ...], tuple[np.ndarray, ...] | None]:
    arrays = _read_arrays(path)
    inputs = {name: array for name, array in arrays.items() if name != "targets" and not name.startswith("flax_")}
    theirs = tuple(inputs.values())
    given = any(name.startswith("flax_") for name in arrays)
    if missing := [name for name in inputs if given and f"flax_{name}" not in arrays]:
        raise ValueError(f"{path} holds some inputs as flax_NAME, but no flax_{missing[0]}.")
    ours = tuple(arrays[f"flax_{name}"] for name in inputs) if given else ()
    if not theirs:
        raise ValueError(f"{path} holds no inputs.")
    if with_targets and "targets" in arrays:
        theirs += (arrays["targets"],)
    elif with_targets and len(theirs) > 1:
        raise ValueError(f'{path} holds several inputs but no "targets".')
    return theirs, ours or None


def _read_flax_inputs(path: Path) -> tuple[np.ndarray, ...]:
    inputs = tuple(array for name, array in _read_arrays(path).items() if name.startswith("flax_"))
    if not inputs:
        raise ValueError(f"{path} holds no flax_NAME: name the port's inputs so, or leave out --batch.")
    return inputs


if __name__ == "__main__":
    sys.exit(main())
