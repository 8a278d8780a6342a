"""Where other libraries meet the runtime; none of them is imported before somebody else does so."""

import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


def when_imported(module: str, then: Callable[[], object]) -> None:
    """Call `then` once `module` has been imported: now, or as soon as anybody imports it."""
    if module in sys.modules:
        then()
    else:
        sys.meta_path.insert(0, _Watch(module, then))


class _Watch(MetaPathFinder):
    """Finds one module as the other finders would, and has `then` called behind its execution."""

    def __init__(self, module: str, then: Callable[[], object]) -> None:
        self._module = module
        self._then = then

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The spec of the module that is watched; None for any other."""
        if fullname != self._module:
            return None
        spec = self._as_the_others(fullname, path, target)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_tell(module: ModuleType) -> None:
            execute(module)
            if self in sys.meta_path:  # until now: many only look whether there is such a module, or fail to import it
                sys.meta_path.remove(self)
                self._then()

        spec.loader.exec_module = execute_and_tell  # type: ignore[method-assign]
        return spec

    def _as_the_others(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None) -> ModuleSpec | None:
        """What the finders behind this one find."""
        finders = list(sys.meta_path)
        behind = finders[finders.index(self) + 1 :] if self in finders else finders
        return next((spec for finder in behind if (spec := finder.find_spec(fullname, path, target))), None)


def register_with_transformers() -> None:
    """Make transformers know the quantisation method `i4`."""
    from runtime.integrations.transformers import register

    register()
