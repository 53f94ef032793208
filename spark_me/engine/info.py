"""`spark-me engine info`: what is installed, what is cached, what a build would use. Changes nothing."""

from pathlib import Path

from spark_me.engine import ENGINE_NAME, ENGINE_VERSION
from spark_me.engine.blas import find_blas
from spark_me.engine.cache import cache_dir, is_as_built
from spark_me.engine.headers import fetched_headers, has_python_headers
from spark_me.engine.packages import installed_version
from spark_me.engine.record import installed_record, record_of
from spark_me.engine.source import ARCHIVE_NAME
from spark_me.engine.target import find_target
from spark_me.engine.toolchain import compiler_version, find_compiler, parallel_jobs
from spark_me.errors import EngineError, printable


def print_info() -> None:
    """Print what is installed, what is cached and what a build would use."""
    for title, facts in (("installed", _installed()), ("cached", _cached()), ("a build would use", _planned())):
        print(f"{title}:")
        for name, value in facts:
            print(f"  {name:<12} {printable(value)}")


def _installed() -> list[tuple[str, str]]:
    version = installed_version(ENGINE_NAME)
    if version is None:
        return [("engine", "none; run: spark-me engine install")]
    record = installed_record()
    if record is None:
        return [("engine", f"{ENGINE_NAME} {version}, not built by spark_me")]
    return [
        ("engine", f"{ENGINE_NAME} {version}"),
        ("device", f"{record.device} {record.cuda}".strip()),
        ("for", f"torch {record.torch}, {record.abi}"),
        ("BLAS", record.blas),
        ("build key", record.key),
    ]


def _cached() -> list[tuple[str, str]]:
    facts = [("cache", str(cache_dir()))]
    if (cache_dir() / "source" / ARCHIVE_NAME).is_file():
        facts.append(("source", ARCHIVE_NAME))
    return facts + [("wheel", _describe(wheel)) for wheel in sorted((cache_dir() / "wheels").glob("*/*.whl"))]


def _describe(wheel: Path) -> str:
    state = "" if is_as_built(wheel) else ", not as it was built or without a digest: would be built again"
    return f"{wheel.parent.name}  {wheel.name}  {wheel.stat().st_size / 1e6:.0f} MB{state}"


def _planned() -> list[tuple[str, str]]:
    compiler = find_compiler()
    try:
        record = record_of(find_target(), find_blas(compiler))
    except EngineError as error:
        return [("nothing", str(error))]
    return [
        ("engine", f"{ENGINE_NAME} {ENGINE_VERSION}, key {record.key}"),
        ("device", f"{record.device} {record.cuda}".strip()),
        ("torch", record.torch),
        ("Python", f"{record.abi} on {record.platform}"),
        ("compiler", compiler_version(compiler) if compiler else "none: sudo apt-get install g++"),
        ("BLAS", record.blas),
        ("headers", _headers()),
        ("jobs", str(parallel_jobs(record.device))),
    ]


def _headers() -> str:
    if has_python_headers():
        return "this Python's own"
    return str(fetched_headers()) if fetched_headers().is_dir() else "none yet: fetched from the distribution"
