"""Int4 for a model in memory, without files."""

from torch import nn

from formats.errors import NonFiniteError, UsageError
from formats.layout import Scheme
from formats.selection import WEIGHT, kept_by_default, matches, never_quantized
from formats.tensors import spec_of
from runtime.linear import Int4Linear
from runtime.siblings import join as join_siblings
from runtime.swap import is_plain_linear


def quantize_(
    module: nn.Module,
    group_size: int = 256,
    *,
    symmetric: bool = True,
    exclude: tuple[str, ...] = (),
    join: bool | None = None,
    activations: str | None = None,
) -> nn.Module:
    """Replace the linear layers of `module` in place by `Int4Linear` with the codec's absmax scales; returns it.

    Output heads and routers stay, as in the converter, and so do layers that are shared, compute their weight from
    others or have a forward of their own, and what a pattern of `exclude` names. absmax loses more than the methods of
    `int4-convert`. `join` and `activations` are those of `load`. Hooks of the layers that are replaced do not come
    along: register them afterwards. Raises `NonFiniteError` on NaN or infinity, `UsageError` on an impossible group
    size or pattern, for a layer that is in no module, and on the meta device.
    """
    scheme = Scheme(group_size, symmetric)
    if isinstance(module, nn.Linear):
        raise UsageError(
            "quantize_ replaces linear layers in place inside a module, and was given a layer alone; give the module "
            "that holds it, or take Int4Linear.from_linear"
        )
    holders: dict[int, int] = {}
    for _, child in module.named_modules(remove_duplicate=False):
        for parameter in child._parameters.values():
            holders[id(parameter)] = holders.get(id(parameter), 0) + 1
    for path, child in list(module.named_modules()):
        name = path + WEIGHT
        if not isinstance(child, nn.Linear) or not is_plain_linear(child) or holders.get(id(child.weight)) != 1:
            continue
        kept = never_quantized(name, spec_of(child.weight)) or kept_by_default(name)
        if kept or any(matches(pattern, name) for pattern in exclude):
            continue
        if child.weight.is_meta:
            raise UsageError(f"{path}: its weight is on the meta device, which holds no numbers; load the module first")
        try:
            layer = Int4Linear.from_linear(child, scheme, activations)
        except NonFiniteError as error:
            raise NonFiniteError(f"{path}: {error}") from None
        module.set_submodule(path, layer.train(child.training))
    if join is not False:
        join_siblings(module, gpu_only=join is None)
    return module
