"""Loads an int4 checkpoint into a torch module, runs it and measures it.

In short::

    import runtime

    model = runtime.load("folder-or-hub-id")

With it imported, transformers loads such checkpoints too: `AutoModelForCausalLM.from_pretrained(folder, variant="i4")`.
"""

from runtime.fill import load_into
from runtime.integrations import register_with_transformers, when_imported
from runtime.linear import Int4Linear
from runtime.load import load
from runtime.quantize import quantize_

__all__ = ["Int4Linear", "load", "load_into", "quantize_"]

when_imported("transformers.modeling_utils", register_with_transformers)
