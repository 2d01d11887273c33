"""Values on the stand-in device: PyTorch's CUDA dispatch runs with all its checks, and results come from the CPU.

Each operator is called twice: on the CUDA tensors, where it checks, allocates and launches nothing, and on the same
memory seen from the CPU, whose result is then written to where the first call put its own. Products of 16-bit tensors
are formed as tensor cores do, exactly and rounded once. Triton's kernels are executed as they are compiled.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from vgs_kernels import operators

aten = torch.ops.aten
_CPU = torch.device("cpu")
#: Operators that read values on the host.
_READ = (
    *(aten._local_scalar_dense.default, aten.item.default, aten.equal.default, aten.is_nonzero.default),
    aten.allclose.default,
)
#: Operators whose shapes, or those of what they use inside, depend on values: the first call could not know them.
_DEPENDENT = (
    *(aten.nonzero, aten.masked_select, aten._unique2, aten.bincount, aten.unique_dim, aten.unique_consecutive),
    *(aten.isin, aten.repeat_interleave, aten.embedding_dense_backward, aten.masked_scatter_backward),
)
#: Operators that PyTorch compiles when they are first called, for which it needs a real driver.
_COMPILED_LATE = (aten.exp2, aten.exp2_, aten.prod, aten.gcd, aten.lcm)
#: New memory, or the same memory under another name.
_NO_VALUES = (
    *(aten.empty.memory_format, aten.empty_like.default, aten.empty_strided.default, aten.new_empty.default),
    *(aten.new_empty_strided.default, aten.detach.default, aten.set_.source_Storage, aten._unsafe_view.default),
    *(aten.lift_fresh.default, aten.record_stream.default, aten.resize_.default),
)
_PRODUCTS = {aten.mm: 0, aten.bmm: 0, aten.addmm: 1, aten.baddbmm: 1}  # tensors before the two factors


def use_no_other_library() -> None:
    """Keep PyTorch from libraries that have no stand-in: it has other ways to the same results."""
    torch.backends.cudnn.enabled = False
    for kind in ("flash", "mem_efficient", "cudnn"):
        getattr(torch.backends.cuda, f"enable_{kind}_sdp")(False)


def on_host(x: Any) -> Any:
    """A CUDA tensor's memory as a tensor of the CPU; anything else as it is."""
    if not isinstance(x, Tensor) or x.device.type != "cuda":
        return x
    size = x.untyped_storage().nbytes()
    if x.numel() == 0 or size == 0:
        return torch.empty(x.shape, dtype=x.dtype)
    memory = (ctypes.c_uint8 * size).from_address(x.untyped_storage().data_ptr())
    flat = torch.frombuffer(memory, dtype=x.dtype, count=size // x.element_size())
    return flat.as_strided(x.size(), x.stride(), x.storage_offset())


def _fill(native: Any, values: Any) -> None:
    if not isinstance(native, Tensor) or native is values:
        return
    if (native.shape, native.dtype) != (values.shape, values.dtype):
        raise AssertionError(f"CUDA gives {native.dtype} {[*native.shape]}, the CPU {values.dtype} {[*values.shape]}")
    if native.numel():
        on_host(native).copy_(values)


def _upload(x: Any) -> Any:
    if not isinstance(x, Tensor):
        return x
    made = torch.empty(x.shape, dtype=x.dtype, device="cuda")
    _fill(made, x)
    return made


def _product(func: Any, args: tuple, kwargs: dict, dtype: torch.dtype) -> Tensor:
    """alpha * a @ b + beta * addend, exact and rounded once."""
    before = _PRODUCTS[func.overloadpacket]
    a, b = args[before : before + 2]
    total = torch.matmul(a.double(), b.double()) * kwargs.get("alpha", 1)
    if before and kwargs.get("beta", 1) != 0:
        total += kwargs.get("beta", 1) * args[0].double()
    return total.to(dtype)


def _masks(func: Any, args: tuple) -> bool:
    indices = args[1] if len(args) > 1 and isinstance(args[1], (list, tuple)) else ()
    return "index" in func.overloadpacket.__name__ and any(
        isinstance(x, Tensor) and x.dtype in (torch.bool, torch.uint8) for x in indices
    )


class CPUValues(TorchDispatchMode):
    """While this is on, CUDA tensors have the values that they would have on a GPU.

    Args:
        most: elements of a tensor; operators on larger ones leave what was in memory.
    """

    def __init__(self, most: float = float("inf")) -> None:
        super().__init__()
        self._most = most
        self._generators: dict[int, tuple[torch.Generator, torch.Generator]] = {}  # the CUDA one, and its stand-in

    def _host(self, x: Any) -> Any:
        """An argument for the second call."""
        if isinstance(x, torch.device):
            return _CPU
        if isinstance(x, torch.Generator) and x.device.type == "cuda":
            return self._generators.setdefault(id(x), (x, torch.Generator().manual_seed(x.initial_seed())))[1]
        return on_host(x)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        leaves = pytree.tree_leaves((args, kwargs))
        if not any(_names_cuda(x.device if isinstance(x, Tensor) else x) for x in leaves):
            return func(*args, **kwargs)
        if func.namespace == "vgs_kernels":  # what it calls has values
            with self:
                return operators.run(*args, **kwargs)
        if func._can_decompose():
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        host_args, host_kwargs = pytree.tree_map(self._host, (args, kwargs))
        if func in _READ:
            return func(*host_args, **host_kwargs)
        if func.overloadpacket in _DEPENDENT or (_masks(func, args) and not _writes(func)):
            return pytree.tree_map(_upload, func(*host_args, **host_kwargs))
        if func.overloadpacket in _COMPILED_LATE or (_masks(func, args) and _writes(func)):
            result = func(*host_args, **host_kwargs)
            return _upload(result) if not _writes(func) else kwargs.get("out", args[0])
        native = func(*args, **kwargs)
        sizes = (x.numel() for x in pytree.tree_leaves((native, args, kwargs)) if isinstance(x, Tensor))
        if func.is_view or func in _NO_VALUES or max(sizes, default=0) > self._most:
            return native
        if func.overloadpacket in _PRODUCTS:
            of = args[_PRODUCTS[func.overloadpacket]].dtype
            if of in (torch.bfloat16, torch.float16):
                on_host(native).copy_(_product(func, host_args, host_kwargs, native.dtype))
                return native
        if "pin_memory" in host_kwargs:
            host_kwargs["pin_memory"] = False
        values = func(*host_args, **host_kwargs)
        if not _writes(func):
            for made, wanted in zip(pytree.tree_leaves(native), pytree.tree_leaves(values), strict=True):
                _fill(made, wanted)
        return native


def _names_cuda(x: Any) -> bool:
    return isinstance(x, torch.device) and x.type == "cuda"


def _writes(func: Any) -> bool:
    """Whether an operator writes into its arguments."""
    return any(x.alias_info is not None and x.alias_info.is_write for x in func._schema.arguments)
