"""Which algorithms the sparse operations of a run take on a GPU: in its checkpoints, on the machine, for all processes.

Two algorithms add in different orders, so that a run which goes on repeats bit by bit only in those that it had. They
are measured when an operation first comes up (`spark_me.sparse.kernels.autotune`), unless their times are known: from
the checkpoint that the run goes on from, from another process, or from an earlier run on such a machine.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch.distributed import DistStoreError, PrefixStore, Store

from spark_me import sparse
from spark_me.engine import installed_version
from spark_me.engine.source import cache_dir
from spark_me.errors import UserError, first_line
from spark_me.files import atomic_write
from spark_me.sparse.kernels.autotune import CHOICES, Operation, Times

PATIENCE = timedelta(minutes=2)
"""How long a process waits for another one's times, before it measures them itself: processes whose images have
different numbers of patches with data may come to an operation at different places of a step."""

_log = logging.getLogger(__name__)


class Algorithms:
    """Times of algorithms by operation; `find` is what `Choices` asks for those that it does not know."""

    def __init__(self, device: torch.device, store: Store | None) -> None:
        """
        Args:
            device: that the run computes on.
            store: what its processes have in common; None for a single one.
        """
        self.machine = describe(device)
        self.times: dict[str, Times] = {}
        """By operation, as JSON."""
        self._store = None if store is None else PrefixStore("algorithms", store)

    @contextmanager
    def used(self) -> Iterator[None]:
        """Within, operations take these algorithms."""
        with CHOICES.found_by(self.find):
            yield

    def entry(self) -> dict[str, Any]:
        """What a checkpoint holds: the times of this process. Those that another one alone needs are kept there."""
        return {"machine": self.machine, "times": dict(self.times)}

    def restore(self, entry: Any) -> None:
        """Bring that back, if it is of such a machine; else the run goes on in what is fastest here."""
        times = entry.get("times") if isinstance(entry, dict) else None
        if not isinstance(times, dict):  # of an earlier version, or damaged: measured anew
            return
        if entry.get("machine") == self.machine:
            self.times = dict(times)
        elif times:
            _log.warning(
                "the algorithms of this checkpoint were measured on another GPU or by other versions: they are "
                "measured anew, and the run goes on within rounding of what it would have been"
            )

    def find(self, operation: Operation, names: Sequence[str], measure: Callable[[], Times]) -> Times:
        """The times of an operation's algorithms."""
        key = json.dumps(operation)
        if not _fits(self.times.get(key), names):
            self.times[key] = self._agreed(key, names, lambda: self._kept(key, names, measure))
        return self.times[key]

    def _agreed(self, key: str, names: Sequence[str], find: Callable[[], Times]) -> Times:
        """What the process that asks first finds; the others wait for it."""
        if self._store is None:
            return find()
        if self._store.add(f"asked/{key}", 1) == 1:
            times = find()
            self._store.set(key, json.dumps(times))
            return times
        try:
            self._store.wait([key], PATIENCE)
            times = json.loads(self._store.get(key))
        except DistStoreError as error:
            _log.warning("another process does not say which algorithm is the fastest (%s)", first_line(error))
            return find()
        return times if _fits(times, names) else find()

    def _kept(self, key: str, names: Sequence[str], measure: Callable[[], Times]) -> Times:
        """From an earlier run on such a machine, else measured and kept for the next one."""
        content = {"machine": self.machine, "operation": key}
        path = cache_dir() / "algorithms" / f"{hashlib.sha256(json.dumps(content).encode()).hexdigest()[:32]}.json"
        times = _read(path)
        if not _fits(times, names):
            times = measure()
            _write(path, content | {"times": times})
        return times


def describe(device: torch.device) -> dict[str, str]:
    """What times, and which algorithm is right, depend on: the GPU, versions, and the sources of `spark_me.sparse`."""
    sources = sorted(Path(sparse.__file__).parent.rglob("*.py"))
    content = b"".join(path.read_bytes() for path in sources)
    machine = {
        "device": device.type,
        "torch": str(torch.__version__),
        "triton": installed_version("triton") or "",
        "sparse": hashlib.sha256(content).hexdigest()[:16],
    }
    if device.type == "cuda":
        machine["device"] = torch.cuda.get_device_name(device)
        machine["cuda"], machine["cudnn"] = str(torch.version.cuda), str(torch.backends.cudnn.version())
    return machine


def _fits(times: Any, names: Sequence[str]) -> TypeGuard[Times]:
    """Whether these are times of the algorithms of that name, and nothing that lay in their place."""
    return (
        isinstance(times, dict)
        and times.keys() == set(names)
        and all(isinstance(each, float) and each >= 0 for each in times.values())
    )


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())["times"]
    except (OSError, ValueError, KeyError, TypeError):  # not there, or damaged: measured anew
        return None


def _write(path: Path, content: dict[str, Any]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path, alone=False) as file:
            file.write(json.dumps(content, indent=2).encode())
    except (OSError, UserError) as error:
        _log.warning("which algorithm is the fastest is not kept for other runs: %s", first_line(error))
