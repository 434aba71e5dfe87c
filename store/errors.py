"""What can go wrong in the store.

StoreError
├── NoStore              there is no store in this folder, or not yet
├── StoreLocked          another process writes this store
├── StoreBusy            a session is open already, or a lock was not released in time
├── OlderStore           the files were written by an older version; only the writer may upgrade them
├── NewerStore           the files were written by a newer version than this one
├── DamagedStore         a file is not a database, or fails its check
│   └── ForeignStore     it is a database of something else, which nobody here may move
├── StoreFull            the disk is full
├── StoreUnavailable     a file cannot be opened, read or written (permissions, a failing disk)
├── UnsafeFilesystem     the folder lies on a network file system, where SQLite's locks do not hold
├── RowRefused           a row breaks a rule of the schema
├── UnknownRow           no row has this id
├── UnknownMetric        no metric of this name, or no such label, is declared
└── BadExport            a text is not an exported configuration
"""


class StoreError(Exception):
    """Base of all errors raised by the store."""


class NoStore(StoreError):
    """Raised when a reader finds no store in the folder."""


class StoreLocked(StoreError):
    """Raised when another process holds the folder for writing; `pid` is that process where it is known."""

    def __init__(self, message: str, pid: int | None) -> None:
        super().__init__(message)
        self.pid = pid


class StoreBusy(StoreError):
    """Raised when a thread opens a second session of a file, or a lock was not released in time."""


class OlderStore(StoreError):
    """Raised when a reader finds files of an older schema."""


class NewerStore(StoreError):
    """Raised when the files carry a schema that this version does not know."""


class DamagedStore(StoreError):
    """Raised when a file is not a database, or fails its check; `path` is that file, `what` is wrong with it."""

    def __init__(self, message: str, path: str, what: str | None = None) -> None:
        super().__init__(message)
        self.path = path
        self.what = what or message


class ForeignStore(DamagedStore):
    """Raised when a file is a database of something else."""


class StoreFull(StoreError):
    """Raised when a write finds no room on the disk."""


class StoreUnavailable(StoreError):
    """Raised when a file cannot be opened, read or written."""


class UnsafeFilesystem(StoreError):
    """Raised when the folder lies on a network file system."""


class RowRefused(StoreError):
    """Raised when a row breaks a rule of the schema: a key used twice, a missing value, an unknown reference."""


class UnknownRow(StoreError):
    """Raised when no row has the id that was asked for."""


class UnknownMetric(StoreError):
    """Raised when a metric or a label is not declared in `store.metrics`."""


class BadExport(StoreError):
    """Raised when a text is not a configuration exported by a version that this one can read."""
