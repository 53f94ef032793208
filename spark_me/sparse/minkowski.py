"""The one import of MinkowskiEngine; everything else in `spark_me.sparse` takes it from here."""

import warnings
from typing import Any

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

__all__ = ["ME", "Copied"]

_SLOTS = "slots of the engine"


class Copied:
    """A layer of the engine that can be copied, pickled and averaged.

    The engine keeps attributes of its layers in `__slots__`, of which copies of an `nn.Module` know nothing.
    """

    def __getstate__(self) -> dict[str, Any]:
        names = [name for base in type(self).__mro__ for name in getattr(base, "__slots__", ())]
        return {**self.__dict__, _SLOTS: {name: getattr(self, name) for name in names if hasattr(self, name)}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        own = dict(state)
        slots = own.pop(_SLOTS)
        super().__setstate__(own)  # type: ignore[misc]
        for name, value in slots.items():
            object.__setattr__(self, name, value)
