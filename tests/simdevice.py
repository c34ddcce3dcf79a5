"""SimDevice: a deterministic, GPU-free simulation of device placement.

SimT is a wrapper subclass that *reports* device simgpu:0 but holds a CPU tensor. Every op is run on
the CPU elem, and everything that would need the host to wait for (or read from) the device is
counted: _local_scalar_dense (item/bool/float/int/python indexing with a 0-d device tensor),
device->host copies (.cpu/.numpy/.tolist), nonzero/masked_select/unique/equal, _linalg_check_errors;
host->device copies are counted apart (h2d).
"""

import collections
import contextlib
import traceback

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

_setup_privateuseone_for_python_backend("simgpu")  # python-only device: guards/hooks are dummies
CUDA = torch.device("simgpu:0")
_Gen = torch.Generator


class _SimGenerator(_Gen):  # a simgpu generator is a CPU generator
    def __new__(cls, device="cpu"):
        return _Gen.__new__(_Gen, "cpu")


torch.Generator = _SimGenerator
STATE = dict(paused=0, float64=True)
NO_FLOAT64 = "this device has no float64"
SYNC = collections.Counter()
H2D = collections.Counter()
SITES = collections.Counter()


def site():
    for fr in reversed(traceback.extract_stack(limit=40)):
        f = fr.filename
        if "simdevice" in f or "/torch/" in f:
            continue
        return f"{f.rsplit('/', 1)[-1]}:{fr.lineno} {fr.line[:70] if fr.line else ''}"
    return "?"


def hit(c, name):
    if STATE["paused"]:
        return
    c[name] += 1
    SITES[("sync " if c is SYNC else "h2d ") + name + " @ " + site()] += 1


class SimT(torch.Tensor):
    @staticmethod
    def __new__(cls, elem):
        r = torch.Tensor._make_wrapper_subclass(
            cls,
            elem.size(),
            strides=elem.stride(),
            storage_offset=elem.storage_offset(),
            dtype=elem.dtype,
            layout=elem.layout,
            device=CUDA,
        )
        r.elem = elem
        return r

    def __format__(self, spec):
        return format(self.elem.item() if self.elem.ndim == 0 else self.elem, spec)

    def __repr__(self):
        return f"SimT({tuple(self.elem.shape)})"

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return handle(func, args, kwargs or {})


SYNC_OPS = {
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "equal",
    "_linalg_check_errors",
    "_unique2",
    "unique_consecutive",
    "is_nonzero",
    "item",
    "repeat_interleave",
    "bincount",
}


def iscuda(d):
    return d is not None and torch.device(d).type == CUDA.type


def handle(func, args, kwargs):
    name = func._schema.name.split("::")[1]
    flat, _ = tree_flatten((args, kwargs))
    sims = [a for a in flat if isinstance(a, SimT)]
    w = {id(a.elem): a for a in sims}
    dev = kwargs.get("device", None)

    def un(t):
        return t.elem if isinstance(t, SimT) else t

    a2, k2 = tree_map(un, args), tree_map(un, kwargs)
    if "device" in k2:
        k2 = dict(k2, device="cpu" if k2["device"] is not None else None)
    out_cuda = bool(sims)
    if dev is not None:
        out_cuda = iscuda(dev)
    if name == "_to_copy" and dev is not None:
        if sims and not iscuda(dev):
            hit(SYNC, "d2h_copy")
        if not sims and iscuda(dev):
            hit(H2D, "to")
        if (bool(sims)) != iscuda(dev) and k2.get("dtype") is None:
            k2 = dict(k2)
    if name == "copy_":
        d, s = isinstance(args[0], SimT), isinstance(args[1], SimT)
        if s and not d:
            hit(SYNC, "d2h_copy_")
        if d and not s and args[1].numel() >= 1:
            hit(H2D, "copy_")
    if sims and name in SYNC_OPS:
        hit(SYNC, name)
    if sims and name in ("index", "index_put_", "index_put"):
        idx = args[1]
        if any(isinstance(i, torch.Tensor) and i.dtype in (torch.bool, torch.uint8) for i in idx if i is not None):
            hit(SYNC, "index_bool")
        if not isinstance(args[0], SimT):
            out_cuda = False
            hit(SYNC, "index_cpu_by_cuda")
    out = func(*a2, **k2)

    def wrap(t):
        if not isinstance(t, torch.Tensor):
            return t
        if id(t) in w:
            return w[id(t)]
        if out_cuda and not STATE["float64"] and t.dtype in (torch.float64, torch.complex128):
            raise TypeError(f"{NO_FLOAT64}: {name} @ {site()}")
        return SimT(t) if out_cuda and not isinstance(t, SimT) else t

    return tree_map(wrap, out)


class SimMode(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return handle(func, args, kwargs or {})


class SimFn(TorchFunctionMode):
    """torch.tensor / as_tensor hide their element reads from dispatch modes; torch.tensor(device=cuda) is h2d."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in (torch.tensor, torch.as_tensor, torch.asarray):
            data = args[0]
            dev = kwargs.get("device", None)
            if isinstance(data, torch.Tensor):
                return data.to(dev) if dev is not None else data.clone() if func is torch.tensor else data

            def conv(o):
                if isinstance(o, SimT):
                    hit(SYNC, "torch.tensor([cuda 0-d])")
                    return o.elem.item()
                if isinstance(o, torch.Tensor):
                    return o.item()
                if isinstance(o, (list, tuple)):
                    return [conv(i) for i in o]
                return o

            with torch._C.DisableTorchFunction():
                t = torch.tensor(conv(data), dtype=kwargs.get("dtype"))
            if iscuda(dev):
                if not STATE["float64"] and t.dtype in (torch.float64, torch.complex128):
                    raise TypeError(f"{NO_FLOAT64}: torch.tensor @ {site()}")
                hit(H2D, "torch.tensor(device=cuda)")
                return SimT(t)
            return t
        if func in (torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.__array__) and isinstance(args[0], SimT):
            hit(SYNC, func.__name__)
            return getattr(args[0].elem, func.__name__)(*args[1:], **kwargs)
        return func(*args, **kwargs)


@contextlib.contextmanager
def sim(float64=True):
    SYNC.clear()
    H2D.clear()
    SITES.clear()
    STATE["float64"] = float64
    try:
        with SimFn(), SimMode():
            yield
    finally:
        STATE["float64"] = True


def to_sim(t):
    return SimT(t)
