"""Whether others put hooks or a forward of their own on modules that merged layers do not call."""

from torch import nn
from torch.nn.modules import module as everywhere


class Hooks:
    """Of a module's parts, asked once a call: hooks come and go while a model is in use."""

    def __init__(self, module: nn.Module) -> None:
        """module: its own hooks run where it is called, and are not asked for."""
        self._parts = tuple(each for each in module.modules() if each is not module)
        held = ((each._forward_hooks, each._forward_pre_hooks) for each in self._parts)
        self._held = tuple(hooks for both in held for hooks in both)

    def __bool__(self) -> bool:
        return (
            any(self._held)
            or any("forward" in part.__dict__ for part in self._parts)
            or bool(everywhere._global_forward_hooks or everywhere._global_forward_pre_hooks)
        )


def is_hooked(module: nn.Module) -> bool:
    """Whether a module has any, itself too."""
    hooks = module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
    return bool(hooks) or bool(Hooks(module))
