"""The entry point that every stage shares: settings in, artifacts out, errors as one message."""

import signal
import sys
from collections.abc import Callable
from types import FrameType

from d2r_core.errors import UserError
from tasks.config import settings as settings_file
from tasks.config.paths import Paths
from tasks.config.settings import Settings


def main(run: Callable[[Settings, Paths], object]) -> None:
    """Run one stage in the current folder and leave the process with its exit code.

    0: done. 1: something the user can mend, said in one message. 130: interrupted. Anything else is our own defect
    and keeps its traceback.
    """
    # The default action of SIGTERM would skip every `finally`; as an exception it cleans up like Ctrl-C.
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
