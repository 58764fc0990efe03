"""``python -m train`` trains both models on the bundled digits; ``--help`` lists what else it can do."""

import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import tyro
from tyro.conf import FlagCreatePairsOff

from train.command import one_line_errors
from train.config import Config, read_config


@one_line_errors
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    config = _parse(arguments, Config(), FlagCreatePairsOff)
    if config.resume:
        started = read_config(config.resume)
        here = {"resume": config.resume, "coordinator": None, "num_processes": None, "process_id": None}
        config = _parse(arguments, replace(started, **here))  # a flag that is on has both spellings
        config.check_resumes(started)
    config.check()
    from train.devices import keep_programs  # JAX loads here, after mistakes and --help have been answered
    from train.run import run

    if arguments is None:  # a process of its own
        keep_programs()
    return run(config)


def _parse(arguments: Sequence[str] | None, default: Config, *config: Any) -> Config:
    return tyro.cli(Config, prog="python -m train", args=arguments, default=default, config=config)


if __name__ == "__main__":
    sys.exit(main())
