"""Loads an int4 checkpoint into a torch module, runs it and measures it.

import runtime
model = runtime.load("folder-or-hub-id")
"""

from runtime.linear import Int4Linear
from runtime.load import load, load_into
from runtime.quantize import quantize_

__all__ = ["Int4Linear", "load", "load_into", "quantize_"]
