"""A network under the wrappers that training puts around it, with its own names for modules and parameters.

`torch.compile`, `DistributedDataParallel` and activation checkpointing put a module around another and lengthen
every name below it (`_orig_mod.`, `module.`, `_checkpoint_wrapped_module.`). Here they are looked through, wherever
they stand, so that a group declared for the plain network fits the wrapped one. `fully_shard` renames nothing.
"""

from __future__ import annotations

import copy
import sys
from typing import TYPE_CHECKING

from torch import nn

from etp_deploy.errors import ModelError, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator

_PARALLEL = (nn.parallel.DistributedDataParallel, nn.DataParallel)
_WRAPPED = ("_orig_mod", "_checkpoint_wrapped_module")


def unwrapped(module: nn.Module) -> nn.Module:
    """Return the module inside all wrappers; itself where there are none.

    Raises:
        UsageError: it is wrapped by `FullyShardedDataParallel`, which flattens parameters so that no module of a
            group can be told in them.
    """
    while True:
        children = module._modules  # noqa: SLF001 - get_submodule would search for each name and raise
        if "_fsdp_wrapped_module" in children:
            hint = "shard with torch.distributed.fsdp.fully_shard, which keeps the parameters' axes"
            raise UsageError("FullyShardedDataParallel flattens the parameters", where="model", hint=hint)
        if isinstance(module, _PARALLEL):
            module = module.module
            continue
        inner = next((children[name] for name in _WRAPPED if name in children), None)
        if inner is None:
            return module
        module = inner


def named_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield what `nn.Module.named_modules` of the plain network would."""
    seen: set[nn.Module] = set()

    def walk(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
        module = unwrapped(module)
        if module in seen:
            return
        seen.add(module)
        yield prefix, module
        for name, child in module.named_children():
            yield from walk(child, f"{prefix}.{name}" if prefix else name)

    yield from walk(model, "")


def named_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield what `nn.Module.named_parameters` of the plain network would."""
    seen: set[nn.Parameter] = set()
    for prefix, module in named_modules(model):
        for name, weight in module.named_parameters(prefix, recurse=False):
            if weight not in seen:
                seen.add(weight)
                yield name, weight


def parameter(model: nn.Module, name: str) -> nn.Parameter:
    """Return a parameter by its name in the plain network.

    Raises:
        ModelError: there is no such parameter.
    """
    *path, last = name.split(".")
    module = unwrapped(model)
    for step in path:
        child = module._modules.get(step)  # noqa: SLF001 - as above
        if child is None:
            raise ModelError("the model has no such parameter", where=name)
        module = unwrapped(child)
    weight = module._parameters.get(last)  # noqa: SLF001 - as above
    if weight is None:
        raise ModelError("the model has no such parameter", where=name)
    return weight


def plain_copy(model: nn.Module) -> nn.Module:
    """Return a copy of a network without wrappers, to export.

    Raises:
        UsageError: the network is sharded.
    """
    if next(sharded_modules(model), None) is not None:
        hint = "make blueprints and groups before fully_shard, and prune to params or macs"
        raise UsageError("a sharded network cannot be exported", where=type(model).__name__, hint=hint)
    twin = copy.deepcopy(unwrapped(model))
    for module in list(twin.modules()):
        for name, child in list(module.named_children()):
            setattr(module, name, unwrapped(child))
    return twin


def sharded_modules(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the modules that `fully_shard` was applied to."""
    fsdp = sys.modules.get(
        "torch.distributed.fsdp"
    )  # whoever has such a module has loaded it: it takes a second
    if fsdp is not None:
        yield from (module for module in model.modules() if isinstance(module, fsdp.FSDPModule))
