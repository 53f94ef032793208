"""A case that takes a moment, and every way to run it."""

from spark_me.bench.workloads import Case, Variant

TINY = Case("resnet18", batch=2, image_size=(64, 64), mask_ratio=0.5, decoder_width=32)
NATIVE, MINKOWSKI = Variant("native"), Variant("minkowski")
MASKED, DENSE = (
    [Variant(backend, memory_format) for memory_format in ("contiguous", "channels_last")]
    for backend in ("masked_dense", "dense")
)
COMPILED = Variant("masked_dense", "channels_last", compiled=True)
