"""Names that Triton changed after 3.6, under one name each: the copy engine's, and other views of shared memory."""

from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import tma

reinterpret = getattr(gl.shared_memory_descriptor, "reinterpret", None) or gl.shared_memory_descriptor._reinterpret
box_to_shared = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
box_to_global = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global
gather_to_shared = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared
