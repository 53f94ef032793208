"""The one import of MinkowskiEngine; everything else in `spark_me.sparse` takes it from here."""

import warnings

from spark_me.errors import EngineError

with warnings.catch_warnings():
    # A CPU build says so at every import; `spark-me doctor` reports it where it is asked for.
    warnings.filterwarnings("ignore", message=".*compiled with CPU_ONLY.*")
    try:
        import MinkowskiEngine as ME
    except ModuleNotFoundError as error:
        if error.name not in ("MinkowskiEngine", "MinkowskiEngineBackend"):
            raise
        raise EngineError("MinkowskiEngine is not installed: run `spark-me engine install`") from error
    except ImportError as error:
        raise EngineError(
            f"MinkowskiEngine does not load with this torch ({error}): run `spark-me engine install --rebuild`"
        ) from error

__all__ = ["ME"]
