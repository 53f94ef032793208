"""Sparse encoders and their registry."""

from spark_me.encoders.registry import (
    ENCODERS,
    EncoderEntry,
    build_encoder,
    list_encoders,
    patch_size_of,
    register_encoder,
)

__all__ = ["ENCODERS", "EncoderEntry", "build_encoder", "list_encoders", "patch_size_of", "register_encoder"]
