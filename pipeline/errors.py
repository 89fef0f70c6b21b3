"""What a user can act on. Every error says what was got, what is required and what to do, and carries its exit code.

    NightlabelError
    ├── UnfitError        2   the job file, the environment, the model or the store cannot do what is asked
    │   ├── JobError          the job file
    │   │   └── Complaints        several things in it
    │   ├── ModelError        the artifact
    │   └── StoreError        the object store or the disk
    ├── InputError        3   an input changed, is missing or is broken
    │   ├── InputMissing
    │   ├── InputChanged
    │   └── ShardError        a whole shard cannot be read; `error_class` says why
    ├── UnitsLeft         5   units are left that no pass could finish
    ├── Conflict          6   another run's object stands where ours belongs
    ├── Temporary        75   try again
    │   └── Stalled           something hangs
    └── PermissionDenied 77
        └── Unidentified      of whoever asks, not of what is asked for: no credentials, or none that are taken
    Interrupted     130/143   stopped by a signal; resumable. Beside the tree, for what catches trouble must let it through

Anything else that escapes is a bug of ours: a traceback and exit code 70.
"""

from __future__ import annotations

import copyreg
import re
from collections.abc import Iterable
from enum import IntEnum


class ExitCode(IntEnum):
    """How a command ends; the table in README.md says what each means to a user."""

    DONE = 0
    UNFIT = 2
    INPUT = 3
    TOO_MANY_FAILED = 4
    UNITS_LEFT = 5
    CONFLICT = 6
    BUG = 70
    TEMPORARY = 75
    NO_PERMISSION = 77
    INTERRUPTED = 130
    TERMINATED = 143


#: Everything is labelled, committed and verified.
COMPLETE = (ExitCode.DONE, ExitCode.TOO_MANY_FAILED)
#: From the mildest to the gravest: what the same command mends; what somebody must mend first, from one input over the rights to
#: the whole job, and what nobody should run over: a stranger's object in our output, which has an alert of its own, and a bug.
_GRAVITY = (
    ExitCode.DONE,
    ExitCode.TOO_MANY_FAILED,
    ExitCode.UNITS_LEFT,
    ExitCode.TEMPORARY,
    ExitCode.INPUT,
    ExitCode.NO_PERMISSION,
    ExitCode.UNFIT,
    ExitCode.CONFLICT,
    ExitCode.BUG,
)


def gravest(codes: Iterable[int]) -> int:
    """The exit code of several units, or of several days: that of the gravest."""
    return max(codes, key=_GRAVITY.index, default=ExitCode.DONE)


_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")


def one_line(text: str) -> str:
    """Text for a screen, on one line: newlines and what a terminal obeys, which a file's name may hold, are spelt out."""
    return _CONTROL.sub(lambda found: repr(found[0])[1:-1], text)


class NightlabelError(Exception):
    """Base of every error a user can act on; `str()` is the one sentence (or two) shown to the user."""

    exit_code = ExitCode.BUG
    error_class = "ERROR"

    def __init__(self, got: str, *, need: str = "", do: str = "") -> None:
        self.got, self.need, self.do = got, need, do
        super().__init__(got, need, do)

    def __str__(self) -> str:
        fact = f"{self.got}; required: {self.need}" if self.need else self.got
        text = one_line(f"{fact}. {self.do}" if self.do else fact)
        return text if text.endswith(("?", ".")) else f"{text}."

    def __reduce__(self) -> tuple[object, ...]:
        # Errors cross process borders, and pickle would call __init__, which takes other arguments.
        return copyreg.__newobj__, (type(self), *self.args), self.__dict__  # type: ignore[attr-defined]


def first_line(error: BaseException) -> str:
    """What an error of somebody else says, in one line; its kind when it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


class UnfitError(NightlabelError):
    exit_code = ExitCode.UNFIT
    error_class = "UNFIT"


class JobError(UnfitError):
    pass


class Complaints(JobError):
    """Several sentences about one job file, each on a line of its own."""

    def __init__(self, sentences: Iterable[str]) -> None:
        self.sentences = tuple(map(one_line, sentences))
        super().__init__(" ".join(self.sentences))

    def __str__(self) -> str:
        return "\n".join(self.sentences)


class ModelError(UnfitError):
    pass


class StoreError(UnfitError):
    pass


class InputError(NightlabelError):
    exit_code = ExitCode.INPUT
    error_class = "INPUT_BROKEN"


class InputMissing(InputError):
    error_class = "INPUT_MISSING"


class InputChanged(InputError):
    error_class = "INPUT_CHANGED"


class ShardError(InputError):
    """A shard that cannot be read as a whole; `error_class` is one of rows.UnitError."""

    def __init__(self, error_class: str, got: str, *, need: str, do: str) -> None:
        super().__init__(got, need=need, do=do)
        self.error_class = error_class


class UnitsLeft(NightlabelError):
    exit_code = ExitCode.UNITS_LEFT
    error_class = "LOST"


class Conflict(NightlabelError):
    exit_code = ExitCode.CONFLICT
    error_class = "CONFLICT"


class Temporary(NightlabelError):
    exit_code = ExitCode.TEMPORARY
    error_class = "TEMPORARY"


class Stalled(Temporary):
    """Nothing arrived for so long that something must hang."""


class PermissionDenied(NightlabelError):
    exit_code = ExitCode.NO_PERMISSION
    error_class = "PERMISSION_DENIED"


class Unidentified(PermissionDenied):
    """No credentials, or expired or unknown ones, or a clock that is wrong: so it is with every input, and no fault of any."""

    error_class = "UNIDENTIFIED"


_KINDS = {kind.error_class: kind for kind in (UnfitError, UnitsLeft, Conflict, Temporary, PermissionDenied, Unidentified)}


def kind_of(error_class: str) -> type[NightlabelError]:
    """The branch of the tree that a unit's `error_class` belongs to; that of any other is InputError."""
    return _KINDS.get(error_class, InputError)


class Interrupted(BaseException):
    """Raised by a signal, wherever the main thread is just then. No Exception, like KeyboardInterrupt: what catches trouble there
    to blame a unit for it, or to go on without, lets it through."""

    def __init__(self, got: str, *, signal_number: int = 2, do: str = "") -> None:
        super().__init__(f"{got}. {do}." if do else f"{got}.")
        self.got, self.exit_code = got, 128 + signal_number
