"""Gluon's asynchronous copies under one name each: Triton 3.9 renamed what 3.6 called async_copy_*."""

from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import tma

gather_to_shared = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared
box_to_shared = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
box_to_global = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global
