"""How every command ends: one line on stderr for what a user can mend, and a status for the shell."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable

from .errors import SpecStreamError, printable
from .machine import ranks

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells have it
EXIT_BROKEN_PIPE = 141  # 128 + SIGPIPE


def exit_status(work: Callable[[], int], name: str = "specstream") -> int:
    """Return the status of `work`, or that of the error that ended it, told on one line of stderr."""
    try:
        status = work()
        sys.stdout.flush()
        return status
    except SpecStreamError as error:
        return _complain(name, str(error), EXIT_USER_ERROR)
    except RuntimeError as error:
        if not ranks.is_loss(error):
            ranks.speak_again()
            raise
        return _complain(name, _lost(error), EXIT_USER_ERROR)
    except KeyboardInterrupt:
        return _complain(name, "interrupted.", EXIT_INTERRUPTED)
    except BrokenPipeError:
        # The reader of our output is gone (`specstream ... | head`); keep the interpreter's last
        # flush quiet as well.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_BROKEN_PIPE
    except OSError as error:
        # A file that is not there, may not be read, or does not fit on the disk.
        place = f"{error.filename}: " if error.filename else ""
        return _complain(name, f"{place}{error.strerror or error}.", EXIT_USER_ERROR)
    except BaseException:  # a fault of ours, which must be seen
        ranks.speak_again()
        raise


def end_if_lost(error: BaseException, name: str = "specstream") -> None:
    """End the process, with a sentence, if the error is the loss of another one.

    For whoever lives on after errors: a message that is sent after a loss is waited for forever.
    """
    if ranks.is_loss(error):
        status = _complain(name, _lost(error), EXIT_USER_ERROR)
        sys.stderr.flush()
        os._exit(status)


def _lost(error: BaseException) -> str:
    return f"another process was lost ({error}); start all of them again."


def _complain(name: str, message: str, status: int) -> int:
    if ranks.is_follower():
        # What fails everywhere is told by the leader, whose end ends this process too.
        time.sleep(ranks.FOLLOWER_PATIENCE)
        ranks.speak_again()
        name = f"{name}, process {ranks.rank()}"
    print(f"{name}: {printable(message)}", file=sys.stderr)
    return status
