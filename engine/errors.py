"""Every exception that sdengine raises on purpose.

SdengineError
├── RequestError            a request that cannot be served as asked; exit status 2
│   ├── UnknownName         a name that is not in a list; the hint holds the nearest known ones
│   └── NotEnoughMemory     what the run would hold is more than there is; nothing was loaded
├── CheckpointError         the model file cannot be used
│   ├── NotACheckpoint      not a file of a known kind, or a truncated one
│   ├── UnsafeCheckpoint    a pickle that asks for more than tensors; nothing of it was run
│   ├── TensorMismatch      missing, unexpected or wrongly shaped tensors; all of them are listed
│   ├── UnknownFact         a fact that the file does not hold and that an option must give
│   └── BadConfig           a config beside the model that cannot be read or contradicts the model
├── BundleError             the bundle on disk cannot be used
│   ├── NotABundle          no manifest there
│   ├── UnknownFormat       a format number that this version does not know
│   ├── BadManifest         the manifest is not what docs/bundle-format.md describes
│   ├── UnsafePath          a path that leaves the bundle's folder
│   ├── MissingPart         a file or component that the manifest or the task needs is not there
│   └── CorruptPart         a file whose size, header or hash is not the manifest's
├── BackendError            an engine library cannot do what is asked
│   ├── BackendUnavailable  it cannot run here: why, and the command that mends it
│   ├── FeedMismatch        wrong names, dtypes or shapes handed to a session
│   ├── SessionClosed       a session used after close
│   └── ArtifactMismatch    a compiled engine made for another machine, library, model or shape
├── ExportError             a checkpoint could not be turned into a bundle
│   ├── MissingExtra        a package of an extra is not installed
│   ├── TraceError          the traced graph is not what the component's spec says
│   └── ParityFailure       a graph differs from its reference by more than its gate
├── PackError               a box's file could not be put together: wheels are missing, or too large
├── NumericsError           NaN or infinity in a result: component, step and cure are named
├── StorageError            no space, no permission, a file where a folder should be
└── ServeError              a server cannot do it, or not now
    ├── QueueFull           as many requests wait as may wait
    ├── Stopping            it is going down and takes no more
    ├── NoWorker            none can be started; starting is tried again for ever
    ├── WorkerLost          the engine's process died or hung, twice with the same request
    ├── DeadlinePassed      the time that the request was given is over
    ├── Cancelled           somebody called the request off
    ├── Forbidden           no token, a wrong one, or a page of another site that asks
    ├── NotFound            no such route, model, job or picture
    └── TooLarge            more bytes, pixels or pictures than this server takes
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any


class SdengineError(Exception):
    """Base of all. `hint` says what to do next; `exit_code` is the CLI's status."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __reduce__(self) -> tuple[Any, ...]:
        """As it is, to another process: the classes do not all take the same arguments."""
        return _restored, (type(self), self.args, self.__dict__)


def _restored(
    kind: type[SdengineError], arguments: tuple[Any, ...], facts: dict[str, Any]
) -> SdengineError:
    error = kind.__new__(kind, *arguments)
    error.__dict__.update(facts)
    return error


class RequestError(SdengineError):
    exit_code = 2


class UnknownName(RequestError):
    """`kind` 'sampler', name 'dmpp', known the full list: the message names the nearest ones."""

    def __init__(self, kind: str, name: str, known: Iterable[str]) -> None:
        names = sorted(known)
        name = name[:80]  # it may be anybody's, of any length
        near = difflib.get_close_matches(name.lower(), names, n=3, cutoff=0.4)
        self.name, self.near = name, near
        hint = f"did you mean {' or '.join(repr(n) for n in near)}? " if near else ""
        super().__init__(f"unknown {kind} {name!r}", hint=f"{hint}known: {', '.join(names)}")


class NotEnoughMemory(RequestError):
    pass


class CheckpointError(SdengineError):
    pass


class NotACheckpoint(CheckpointError):
    pass


class UnsafeCheckpoint(CheckpointError):
    pass


class TensorMismatch(CheckpointError):
    pass


class UnknownFact(CheckpointError):
    pass


class BadConfig(CheckpointError):
    pass


class BundleError(SdengineError):
    pass


class NotABundle(BundleError):
    pass


class UnknownFormat(BundleError):
    pass


class BadManifest(BundleError):
    pass


class UnsafePath(BundleError):
    pass


class MissingPart(BundleError):
    pass


class CorruptPart(BundleError):
    pass


class BackendError(SdengineError):
    pass


class BackendUnavailable(BackendError):
    pass


class FeedMismatch(BackendError):
    pass


class SessionClosed(BackendError):
    pass


class ArtifactMismatch(BackendError):
    pass


class ExportError(SdengineError):
    pass


class MissingExtra(ExportError):
    pass


class TraceError(ExportError):
    pass


class ParityFailure(ExportError):
    pass


class PackError(SdengineError):
    pass


class NumericsError(SdengineError):
    pass


class StorageError(SdengineError):
    pass


class ServeError(SdengineError):
    pass


class QueueFull(ServeError):
    """`after` is when to come again, in seconds."""

    def __init__(self, message: str, *, hint: str, after: float) -> None:
        super().__init__(message, hint=hint)
        self.after = after


class Stopping(ServeError):
    pass


class NoWorker(ServeError):
    pass


class WorkerLost(ServeError):
    pass


class DeadlinePassed(ServeError):
    pass


class Cancelled(ServeError):
    pass


class Forbidden(ServeError):
    pass


class NotFound(ServeError):
    pass


class TooLarge(ServeError):
    pass
