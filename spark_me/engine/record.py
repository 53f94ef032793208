"""What a build was made from: its key in the cache, and the record that an installed engine carries."""

import hashlib
import importlib.metadata
import json
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path

from spark_me.engine import ENGINE_NAME, ENGINE_VERSION
from spark_me.engine.blas import Blas
from spark_me.engine.edits import digest, edits_for
from spark_me.engine.target import Target

RECORD_NAME = "spark_me_build.json"


@dataclass(frozen=True)
class BuildRecord:
    """All that decides what a built wheel contains and where it fits. Any difference gives another key.

    Attributes:
        engine: MinkowskiEngine's version.
        edits: fingerprint of our edits and our build script.
        torch: torch's full version.
        abi: tag of Python's extension modules.
        platform: operating system and machine.
        device: "cpu" or "cuda".
        cuda: toolkit version and GPU architectures, "" for a CPU build.
        blas: BLAS library and its version.
    """

    engine: str
    edits: str
    torch: str
    abi: str
    platform: str
    device: str
    cuda: str
    blas: str

    @property
    def key(self) -> str:
        """Name of this build in the cache: 16 hexadecimal digits."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:16]

    def to_json(self) -> str:
        """The record as the installed engine carries it."""
        return json.dumps(asdict(self), indent=1, sort_keys=True)


def record_of(target: Target, blas: Blas) -> BuildRecord:
    """The record of a build for this target and BLAS."""
    cuda = target.cuda
    return BuildRecord(
        engine=ENGINE_VERSION,
        edits=digest(edits_for(target), setup_script().encode())[:16],
        torch=target.torch,
        abi=target.abi,
        platform=target.platform,
        device=target.device,
        cuda=f"{cuda.version[0]}.{cuda.version[1]} for {cuda.archs}" if cuda else "",
        blas=f"{blas.name} {blas.version}",
    )


def setup_script() -> str:
    """Text of the setup.py that takes the place of upstream's."""
    return resources.files("spark_me.engine").joinpath("resources", "setup.py").read_text(encoding="utf-8")


def installed_record() -> BuildRecord | None:
    """The record of the installed engine; None if there is none, or if this spark_me did not build it."""
    try:
        distribution = importlib.metadata.distribution(ENGINE_NAME)
    except importlib.metadata.PackageNotFoundError:
        return None
    path = Path(str(distribution.locate_file(f"{ENGINE_NAME}/{RECORD_NAME}")))
    if not path.is_file():
        return None
    try:
        return BuildRecord(**json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError):  # cut short, or written by a spark_me with other fields
        return None
