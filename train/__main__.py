"""``python -m train`` trains both models on the bundled digits; ``--help`` lists what else it can do."""

import sys
from collections.abc import Sequence
from dataclasses import replace

import tyro
from tyro.conf import FlagCreatePairsOff

from train.config import Config, UserError, read_config


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; every error that the user can mend is one line on stderr."""
    config = _parse(arguments, Config())
    try:
        if config.resume:
            started = read_config(config.resume)
            config = _parse(arguments, replace(started, resume=config.resume))
            config.check_resumes(started)
        config.check()
        from train.run import run  # JAX loads here, after mistakes and --help have been answered

        return run(config)
    except UserError as error:
        return _fail(str(error), error.exit_code)
    except OSError as error:
        return _fail(str(error), 2)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)


def _parse(arguments: Sequence[str] | None, default: Config) -> Config:
    return tyro.cli(Config, prog="python -m train", args=arguments, default=default, config=(FlagCreatePairsOff,))


def _fail(message: str, exit_code: int) -> int:
    print("error:", " ".join(message.split()), file=sys.stderr)
    return exit_code


if __name__ == "__main__":
    sys.exit(main())
