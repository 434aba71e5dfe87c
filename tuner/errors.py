"""What can go wrong in the tuner, and the exit code by which a script tells one from another.

TunerError                   70  internal: a defect, please report it
├── ProposalFailed               the search process died, overran its time or answered nonsense
├── SettingsError             2  a flag, environment variable or settings file is wrong
├── EvidenceUnreadable       65  a file that was given is not what it should be, or is damaged
├── ModelMissing             66  the model folder is missing, incomplete or damaged
├── Unavailable              69  something that must answer does not
│   ├── RuntimeStartFailed       the runtime ended, or was not ready in time
│   ├── RuntimeGaveUp            the runtime died again and again; it is not restarted any more
│   └── DaemonNotRunning         no daemon answers for this data folder
└── Busy                     75  try again later, or elsewhere
    ├── PortInUse                another process listens there
    └── OtherRuntime             the runtime found there serves another model

0 is success. The numbers follow sysexits.h (EX_DATAERR, EX_NOINPUT, EX_UNAVAILABLE, EX_SOFTWARE, EX_TEMPFAIL).
"""

from typing import ClassVar

EXIT_OK = 0


class TunerError(Exception):
    """Base of all errors raised by the tuner. `exit_code` is what the command line ends with."""

    exit_code: ClassVar[int] = 70


class ProposalFailed(TunerError):
    """Raised when the search process died, overran its time or answered nonsense. The daemon goes on without it."""


class SettingsError(TunerError):
    """Raised when settings are wrong; one line a problem, each with its place, the rule, what was got, the fix."""

    exit_code = 2

    def __init__(self, *problems: str) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


class EvidenceUnreadable(TunerError):
    """Raised when a file is not an exported evidence, or of a newer version."""

    exit_code = 65


class ModelMissing(TunerError):
    """Raised when the model folder is missing, incomplete or damaged."""

    exit_code = 66


class Unavailable(TunerError):
    """Raised when something that must answer does not."""

    exit_code = 69


class RuntimeStartFailed(Unavailable):
    """Raised when the runtime ended while starting, or was not ready in time."""


class RuntimeGaveUp(Unavailable):
    """Raised when the runtime died so often that it is not restarted any more."""


class DaemonNotRunning(Unavailable):
    """Raised when no daemon answers for this data folder."""


class Busy(TunerError):
    """Raised when another process holds what is needed."""

    exit_code = 75


class PortInUse(Busy):
    """Raised when another process listens on the port."""


class OtherRuntime(Busy):
    """Raised when the runtime that serves from this data folder serves another model than the one asked for."""
