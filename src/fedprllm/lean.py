"""Start a process of ours without what it never uses of torch: the compiler and the distributed runtime.

transformers imports both in any case, which takes more than a third of the time from start to computation
(docs/decisions/start.md). A program that imports the library keeps torch as it is.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

__all__ = ["start_lean"]

_COMPILER, _DISTRIBUTED = "torch._dynamo", "torch.distributed"
_LARGE = ("torch", "transformers.modeling_utils")
# What transformers takes from the compiler: decorators that describe functions to it, and one module.
_MARKS = {"allow_in_graph", "assume_constant_result", "disable"}
_ALONE = f"{_COMPILER}._trace_wrapped_higher_order_op"


def start_lean() -> None:
    """Leave out what is not needed; call it before torch is imported, or it does nothing.

    The compiler is still loaded when anything is asked of it, and torch says that it was built without the
    distributed runtime, as some builds are.
    """
    if "torch" not in sys.modules and not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder(MetaPathFinder):
    """Finds a few packages as Python does, and changes how they are loaded."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname.startswith(f"{_COMPILER}.") and fullname != _ALONE and _load_compiler():
            # Loading the compiler has loaded most of its modules.
            return ModuleSpec(fullname, _Loaded()) if fullname in sys.modules else None
        if fullname not in (_COMPILER, _DISTRIBUTED, *_LARGE):
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            changed = {_COMPILER: _Deferred, _DISTRIBUTED: _Unavailable}
            spec.loader = changed.get(fullname, _Uncollected)(spec.loader)
        return spec


class _Changed(Loader):
    """Loads a module with its own loader, which the module keeps."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__loader__ = module.__spec__.loader = self._loader
        self._loader.exec_module(module)


class _Uncollected(_Changed):
    """Searches for no garbage while modules are loaded, nor later among them: they are made to stay."""

    def exec_module(self, module: ModuleType) -> None:
        with _no_collection():
            super().exec_module(module)


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if enabled:
            gc.enable()


class _Unavailable(_Changed):
    """Loads ``torch.distributed``, and lets it say that it is not available."""

    def exec_module(self, module: ModuleType) -> None:
        super().exec_module(module)
        vars(module)["is_available"] = lambda: False


class _Deferred(_Changed):
    """Loads a stand-in for ``torch._dynamo``."""

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _StandIn(spec.name, super().exec_module)

    def exec_module(self, module: ModuleType) -> None:
        """Do nothing: the module is loaded when it is used."""


class _Loaded(Loader):
    """Finds a module among those that are loaded."""

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return sys.modules[spec.name]

    def exec_module(self, module: ModuleType) -> None:
        """Do nothing: the module is complete."""


class _StandIn(ModuleType):
    """Becomes the real module as soon as anything but a decorator is asked of it."""

    def __init__(self, name: str, become_real: Callable[[ModuleType], None]) -> None:
        super().__init__(name)
        self._become_real = become_real

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        if name in _MARKS:
            return _mark
        _load_compiler()
        return getattr(self, name)


def _mark(function: Callable[..., Any] | None = None, *_: Any, **__: Any) -> Any:
    """A decorator, with or without arguments, that returns the function as it is: nothing is compiled."""
    return _mark if function is None else function


def _load_compiler() -> bool:
    """Let the stand-in become the real module; False if it has done so before."""
    module = importlib.import_module(_COMPILER)
    if not isinstance(module, _StandIn):
        return False
    become_real = module._become_real
    module.__class__ = ModuleType  # type: ignore[assignment]
    become_real(module)
    return True
