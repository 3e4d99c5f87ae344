"""A device without memory or kernels, "gpu", that sees what makes the CPU wait for it.

Tensors on it have shapes and no numbers; those on the CPU are computed as always. Operations that would start a kernel are
counted. Each one for which a real device would make the CPU wait is recorded with the place in the source that asked for
it, and answered with made-up numbers, so that one run shows all of them.

Importing this registers the device with torch, for good: import it in a process of its own.
"""

import sys
import sysconfig
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from helpers.paths import ROOT

_setup_privateuseone_for_python_backend(rename="gpu")
# Or torch asks the device for memory when it makes a tensor without numbers.
mock.patch.object(FakeTensorMode, "avoid_device_init", True).start()
# One copy, as on a device, where fake tensors take number by number.
mock.patch.object(FakeTensor, "tolist", lambda tensor: tensor.cpu().tolist()).start()
GPU = torch.device("gpu", 0)

_aten = torch.ops.aten


def _attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    """torch's attention with CUDA's kernels: torch takes this device for one that has none."""
    if attn_mask is None:
        return _aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, scale=scale)[0]
    bias = torch.zeros_like(attn_mask, dtype=query.dtype)
    bias = bias.expand(query.size(0), query.size(1), -1, -1)
    saves = torch.is_grad_enabled()
    return _aten._scaled_dot_product_efficient_attention(query, key, value, bias, saves, dropout_p, is_causal, scale=scale)[0]


_KERNELS = torch.library.Library("aten", "IMPL")
_KERNELS.impl("scaled_dot_product_attention", _attention, "AutogradPrivateUse1")
_PACKAGES = Path(sysconfig.get_path("purelib"))
#: Operations whose result has a size, or is a number, that only the device knows.
_OF_VALUES = {
    _aten._local_scalar_dense.default: "item",
    _aten.equal.default: "item",
    _aten.nonzero.default: "nonzero",
    _aten.masked_select.default: "boolean index",
    _aten._unique2.default: "nonzero",
    _aten.repeat_interleave.Tensor: "nonzero",
}
_WITHOUT_KERNEL = (
    _aten.detach.default,
    _aten._unsafe_view.default,
    _aten.empty.memory_format,
    _aten.empty_strided.default,
    _aten.empty_like.default,
    _aten.new_empty.default,
    _aten.new_empty_strided.default,
)
_COPIES = (_aten._to_copy.default, _aten.copy_.default)


@dataclass(frozen=True)
class Wait:
    """One wait for the device: its kind, and the file (of this checkout or of a package), function and line that ask for it."""

    kind: str
    file: str
    function: str
    line: int

    @property
    def place(self) -> tuple[str, str, str]:
        """All but the line, which moves."""
        return self.kind, self.file, self.function


class FakeGPU(TorchDispatchMode):
    """Within the block, the device "gpu" works; `waits` and `operations` say what it was asked for."""

    def __init__(self):
        super().__init__()
        self.waits: list[Wait] = []
        self.operations: Counter[str] = Counter()
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)
        self._one_thread = torch.autograd.set_multithreading_enabled(False)

    def __enter__(self):
        self._one_thread.__enter__()  # this mode is of the thread that entered it
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self._one_thread.__exit__(*error)

    def empty(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor of the same shape and type on the device."""
        with self._fake:
            return torch.empty(tensor.shape, dtype=tensor.dtype, device=GPU)

    def moved(self, model: torch.nn.Module) -> torch.nn.Module:
        """The model with parameters and buffers on the device in place of its own; made on "meta", it takes no memory."""
        new: dict[torch.Tensor, torch.Tensor] = {}
        for module in model.modules():
            for held in (module._parameters, module._buffers):
                for name, old in held.items():
                    if old is not None and old not in new:
                        new[old] = self.empty(old)
                        if isinstance(old, torch.nn.Parameter):
                            new[old] = torch.nn.Parameter(new[old], requires_grad=old.requires_grad)
                    held[name] = None if old is None else new[old]
        return model

    def like(self, tensors: dict) -> dict:
        """A batch of the same shapes and types on the device."""
        return {name: self.empty(value) if isinstance(value, torch.Tensor) else value for name, value in tensors.items()}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, torch.Tensor)]
        on_device = any(isinstance(t, FakeTensor) and t.device.type == "gpu" for t in tensors)
        target = kwargs.get("device")
        if not on_device and (target is None or torch.device(target).type == "cpu"):
            return func(*args, **kwargs)
        if func in _COPIES:
            return self._copied(func, args, kwargs)
        self._count(func)
        if func in _OF_VALUES:
            return self._made_up(func, args, kwargs)
        puts = func in (_aten.index_put.default, _aten.index_put_.default)
        # One value put where a mask is true is a masked fill.
        fills = puts and args[2].numel() == 1 and not (len(args) > 3 and args[3])
        if func is _aten.index.Tensor or (puts and not fills):
            args = (args[0], self._indices(args[1]), *args[2:])
        with self._fake:
            return func(*args, **kwargs)

    def _copied(self, func, args, kwargs):
        if func is _aten.copy_.default:
            to, source = args[0].device, args[1].device
            blocking = not (kwargs.get("non_blocking") or (len(args) > 2 and args[2]))
        else:
            source = args[0].device
            to = torch.device(kwargs.get("device") or source)
            blocking = not kwargs.get("non_blocking")
        if to.type == source.type:
            self._count(func)
        elif source.type == "gpu":
            # Never without waiting: the numbers are read next.
            self._note("copy back")
            if func is _aten._to_copy.default:
                # Finite and true, so that checks pass.
                dtype = kwargs.get("dtype") or args[0].dtype
                return torch.full(args[0].shape, dtype == torch.bool, dtype=dtype)
            return args[0].zero_()
        elif blocking:
            self._note("blocking copy")
        with self._fake:
            return func(*args, **kwargs)

    def _count(self, func) -> None:
        if func.namespace != "prim" and not func.is_view and func not in _WITHOUT_KERNEL:
            self.operations[str(func)] += 1

    def _made_up(self, func, args, kwargs):
        self._note(_OF_VALUES[func])
        first = args[0]
        if func is _aten._local_scalar_dense.default:
            return torch.ones((), dtype=first.dtype).item()
        if func is _aten.equal.default:
            return True
        if func is _aten.nonzero.default:
            return self.empty(torch.zeros(first.numel(), first.ndim, dtype=torch.long))
        if func is _aten.masked_select.default:
            return self.empty(torch.zeros(first.numel(), dtype=first.dtype))
        raise NotImplementedError(f"{func} has no made-up answer")

    def _indices(self, indices):
        """The indices with whole numbers in place of masks."""
        given = []
        for index in indices:
            if index is None:
                given.append(None)
            elif index.dtype in (torch.bool, torch.uint8):
                self._note("boolean index")
                given += [self.empty(torch.zeros(index.numel(), dtype=torch.long))] * index.ndim
            else:
                if index.device.type == "cpu" and index.ndim:
                    self._note("index on the CPU")
                given.append(index)
        return given

    def _note(self, kind: str) -> None:
        frame = sys._getframe(1)
        while frame is not None:
            path = Path(frame.f_code.co_filename)
            inside = path.is_relative_to(_PACKAGES) and path.relative_to(_PACKAGES).parts[0]
            if path != Path(__file__) and inside != "torch" and frame.f_back is not None and path.exists():
                break
            frame = frame.f_back
        file = str(path.relative_to(_PACKAGES if inside else ROOT)) if inside or path.is_relative_to(ROOT) else path.name
        self.waits.append(Wait(kind, file, frame.f_code.co_name, frame.f_lineno))
