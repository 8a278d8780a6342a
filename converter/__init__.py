"""From a Hugging Face checkpoint to an int4 checkpoint, streamed tensor by tensor.

What `int4-convert` does, from Python::

    from pathlib import Path

    from converter.convert import convert, make_recipe
    from converter.plan import make_plan
    from converter.source import open_source
    from formats.devices import parse_devices
    from formats.layout import Scheme

    source = open_source("folder-or-hub-id")
    recipe = make_recipe(Scheme(group_size=256), "search", include=(), exclude=("*.down_proj",))
    plan = make_plan(source, recipe)
    for tensor in plan.tensors:
        print(tensor.name, tensor.quantized, tensor.reason)
    manifest = convert(source, plan, Path("out"), parse_devices(None))
"""
