"""Building, caching, installing and checking MinkowskiEngine. Nothing here needs MinkowskiEngine to import."""

import importlib.metadata

ENGINE_NAME = "MinkowskiEngine"
ENGINE_VERSION = "0.5.4"


def installed_version(name: str) -> str | None:
    """Version of an installed distribution, None if it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
