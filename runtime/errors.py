"""What can go wrong in the runtime.

RuntimeFault
├── InvalidKnob          a knob is unknown or its value is out of range
├── PrepareFailed        a configuration could not be prepared; the one in force serves on
├── InvalidPlan          a slice plan contradicts itself
├── StaleVersion         the configuration changed since the caller last read it
├── NoPlan               the slice plan named is not in force
├── InvalidRequest       a client's request cannot be served as asked (HTTP 400)
├── QueueFull            admission is closed for now (HTTP 429)
├── ModelError           the model folder is missing, incomplete or damaged
├── Unauthorized         a control call without the right key
├── LinkBroken           the link between front end and engine closed or carried a malformed frame
├── EngineNotReady       the engine is starting, restarting, draining or gone, and the call needs it
├── UnknownModel         a client names a model that is not served here (HTTP 404)
├── RequestTooLarge      a request body is over the cap (HTTP 413)
├── RequestTimedOut      a request reached its deadline (HTTP 504)
├── RequestFailed        the engine could not finish a request (HTTP 500)
├── AddressInUse         an address or run directory is taken by another process
├── TooFewSteps          the step log is too short to fit a step model
└── RuntimeUnreachable   no answer from the runtime's control address
"""


class RuntimeFault(Exception):
    """Base of all errors raised by the runtime."""


class InvalidKnob(RuntimeFault):
    """Raised when a knob is unknown or its value is out of range."""


class PrepareFailed(RuntimeFault):
    """Raised when a configuration could not be prepared, for want of memory mostly. Nothing was changed."""


class InvalidPlan(RuntimeFault):
    """Raised when a slice plan contradicts itself or names an unknown configuration."""


class StaleVersion(RuntimeFault):
    """Raised when the configuration changed since the caller last read it."""


class NoPlan(RuntimeFault):
    """Raised when the slice plan named is not in force (it ended, was aborted, or its lease lapsed)."""


class InvalidRequest(RuntimeFault):
    """Raised when a client's request cannot be served as asked."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class QueueFull(RuntimeFault):
    """Raised when the admission queue is at its cap."""

    def __init__(self, message: str, retry_after_s: int) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class ModelError(RuntimeFault):
    """Raised when the model folder is missing, incomplete or damaged."""


class Unauthorized(RuntimeFault):
    """Raised when a control call carries no key or a wrong one."""


class RuntimeUnreachable(RuntimeFault):
    """Raised when the control address does not answer in time."""


class LinkBroken(RuntimeFault):
    """Raised when the link between front end and engine closed or carried a malformed frame."""


class EngineNotReady(RuntimeFault):
    """Raised when a call needs the engine and it is starting, restarting, draining or gone."""


class RequestTooLarge(RuntimeFault):
    """Raised when a request body is over the cap."""


class TooFewSteps(RuntimeFault):
    """Raised when the step log is too short to fit a step model."""


class UnknownModel(RuntimeFault):
    """Raised when a client names a model that is not served here."""


class RequestTimedOut(RuntimeFault):
    """Raised when a request reached its deadline."""


class RequestFailed(RuntimeFault):
    """Raised when the engine could not finish a request; `kind` says why in one word."""

    def __init__(self, message: str, kind: str) -> None:
        super().__init__(message)
        self.kind = kind


class AddressInUse(RuntimeFault):
    """Raised when an address or a run directory is taken by another process."""
