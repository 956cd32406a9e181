"""The ledger of a driver: its lease on the run, the committed parts, the failures, and the manifest that notes both."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress

from scaling.config import SettingsError
from scaling.library.failures import FailureLog, read_failures
from scaling.library.manifest import Event, Manifest, publish, read_manifest
from scaling.library.parts import Part, describe_part, is_part, order, part_name
from scaling.library.run_folder import RunFolder
from scaling.storage.lease import Lease, LeaseLost

PUBLISH_SECONDS = 60.0  # least time between two manifests while scenes are committed


class Ledger:
    """What a driver notes of its run. The one process that drives a stage opens it with `open_ledger`."""

    def __init__(self, run: RunFolder, lease: Lease) -> None:
        self.run, self.lease, self.epoch = run, lease, lease.epoch
        self.log = FailureLog(run.failures, self.epoch)
        self.replaced: set[str] = set()  # names of parts that this driver joined into others
        self.manifest = _closing(run, self.epoch)
        self._publish()

    def check(self) -> None:
        """Raise LeaseLost where another driver has taken the run over."""
        self.lease.check()

    def check_shared(self, shared_hash: str) -> None:
        """Raise SettingsError where the library holds scenes of another shared model than `shared_hash`."""
        others = {part.shared for part in self.manifest.parts.values()} - {shared_hash}
        if others:
            raise SettingsError(
                f"{self.run.path} holds scenes fitted on shared model {min(others)[:12]}…, not on {shared_hash[:12]}…: "
                "a run folder holds scenes of one shared model; choose another --run"
            )

    def other_settings(self, settings_hash: str) -> bool:
        """Whether the library holds stage-2 scenes that were fitted with other settings."""
        return any(part.stage == 2 and part.settings_hash != settings_hash for part in self.manifest.parts.values())

    def find(self, attempt: int, batch: Iterable[str]) -> Part | None:
        """The part that this attempt at a batch committed; None where it committed none."""
        path = self.run.library.folder / "parts" / part_name(self.epoch, attempt, list(batch))
        return describe_part(path) if path.is_file() else None

    def add(self, part: Part) -> None:
        """Note a part that was committed under this epoch; publish the manifest if the last one is old."""
        self.manifest.parts[part.name] = part
        if time.monotonic() - self._published > PUBLISH_SECONDS:
            self.publish()

    def record(self, events: Iterable[Event]) -> None:
        """Write what happened to scenes to the run's failures."""
        self.log.add(events)

    def publish(self) -> None:
        """Write the manifest as it stands. Raises LeaseLost where another driver has taken the run over."""
        self.check()
        self.manifest.number += 1
        self.manifest.failures = read_failures(self.run.failures, self.manifest)
        self._publish()

    def _publish(self) -> None:
        publish(self.run.library.folder, self.manifest)
        self._published = time.monotonic()


def _closing(run: RunFolder, epoch: int) -> Manifest:
    """The first manifest of an epoch. It lists all parts that count now, and so closes the earlier epochs."""
    snapshot = run.library.snapshot()
    described = [snapshot.listed(path) or describe_part(path) for path in snapshot.paths]
    return Manifest(
        epoch=epoch,
        parts={part.name: part for part in described},
        replaced=snapshot.manifest.replaced,
        failures=read_failures(run.failures, snapshot.manifest),
    )


@contextmanager
def open_ledger(run: RunFolder) -> Iterator[Ledger]:
    """Take the run's lease and close earlier epochs; at the end publish the manifest and release the lease.

    Raises LeaseHeld where another driver works on the run; what `RunFolder.check_own` raises.
    """
    run.check_own()
    library = run.library.folder
    # The new epoch must be above all epochs on disk, even where the lease files were lost.
    parts = [order(path.name)[0] for path in (library / "parts").glob("part-*.parquet") if is_part(path.name)]
    lease = Lease.take(library / "leases", max([read_manifest(library).epoch, *parts]) + 1)
    try:
        ledger = Ledger(run, lease)
        try:
            yield ledger
        except BaseException:
            with suppress(OSError, LeaseLost):  # the error that stopped the driver is raised, not this one
                ledger.publish()
            raise
        ledger.publish()
    finally:
        with suppress(OSError):
            lease.release()
