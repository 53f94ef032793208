"""Building, caching, installing and checking MinkowskiEngine. Nothing here needs MinkowskiEngine to import."""

ENGINE_NAME = "MinkowskiEngine"
ENGINE_VERSION = "0.5.4"
