"""The command-line entry point of all stages: loads the settings, runs the stage, turns errors into one message."""

import signal
import sys
from collections.abc import Callable
from types import FrameType

from d2r_core.errors import UserError
from tasks.config import settings as settings_file
from tasks.config.paths import Paths
from tasks.config.settings import Settings


def main(run: Callable[[Settings, Paths], object]) -> None:
    """Run one stage in the current folder and exit the process.

    Exit codes: 0: success; 1: an error that the user can fix, printed as one message; 130: interrupted. Any other
    exception is a bug and keeps its traceback.
    """
    # The default action of SIGTERM skips every `finally`; an exception cleans up as for Ctrl-C.
    signal.signal(signal.SIGTERM, _interrupt)
    paths = Paths()
    try:
        run(settings_file.load(paths.params), paths)
    except UserError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt as interruption:
        print(f"interrupted: {str(interruption) or 'nothing was written.'}", file=sys.stderr)
        sys.exit(130)


def _interrupt(signum: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
