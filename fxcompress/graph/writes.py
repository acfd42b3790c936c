"""Writes in place, without writing: the new value is computed, and whoever holds the old tensor reads the new one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .recorder import Recorder


def overwrite(rec: Recorder, base: Tensor, result: Any) -> Tensor:
    """Let `base` stand for `result` from here on, and what it is a part of for the whole with that part written.

    Other views of the memory can't be read any more after that: their new content isn't known here (`torch.export`
    knows it; see `export_.py`).
    """
    old = rec.value(base)
    if not isinstance(result, Tensor) or rec.dtype_of(result) != old.fakes[0].dtype:
        result = rec.call("to", result, dtype=old.fakes[0].dtype)
    tensors, results, whole = [base], [result], old.whole
    while whole is not None:
        tensor, index = whole
        results.append(with_item(rec, tensor, index, results[-1]))
        tensors.append(tensor)
        whole = rec.value(tensor).whole
    news = [rec.value(value) for value in results]
    rec.rebind(tensors, news, f"a view of a tensor is read after that tensor was written in place ({rec.source()})")
    for tensor, new in zip(tensors, news, strict=True):
        if id(tensor) in rec.names:
            write_state(rec, rec.names[id(tensor)])
        if new.fakes[0].shape != tensor.shape:  # unsqueeze_ and its like change the tensor that the model holds
            fake = new.fakes[0]
            tensor.as_strided_(fake.shape, fake.stride(), fake.storage_offset())
    return base


def worked_in_place(rec: Recorder, given: Any, result: Any) -> None:
    """Let `given` stand for `result`, which a module made of it in place."""
    if isinstance(given, Tensor) and isinstance(result, Tensor) and rec.tracked(given) and given is not result:
        value = rec.value(result)
        overwrite(rec, given, result)
        rec.values[id(result)] = replace(value, stale="")


def write_state(rec: Recorder, name: str) -> None:
    """A buffer of the model gets a new value. A graph has no place for that, but for the count of batches that norms
    keep, which is the norm module's affair."""
    if name.endswith("num_batches_tracked"):
        return
    rec.refuse(f"the model writes its buffer `{name}` while it runs")


def set_item(rec: Recorder, base: Tensor, index: Any, value: Any) -> None:
    """`base[index] = value`, as scatters along the dimensions of `index`."""
    index = index if isinstance(index, tuple) else (index,)
    part = rec.values.get(id(value))
    basic = not any(isinstance(item, Tensor) for item in index)
    if basic and part is not None and part.whole is not None and part.whole[0] is base and part.whole[1] == index:
        return  # `base[index] += y` writes the part in place, and then puts it where it is
    overwrite(rec, base, with_item(rec, base, index, value))


def with_item(rec: Recorder, base: Tensor, index: Any, value: Any) -> Any:
    """`base` with `value` at `index`."""
    rank = base.dim()
    index = index if isinstance(index, tuple) else (index,)
    if any(isinstance(item, Tensor | list) for item in index):
        return _with_mask_or_points(rec, base, index, value)
    if Ellipsis in index:
        place = index.index(Ellipsis)
        used = sum(item is not None for item in index) - 1
        index = (*index[:place], *[slice(None)] * (rank - used), *index[place + 1:])
    if None in index:
        rec.refuse("the model writes into a tensor through an index with None")
    places = [(dim, item) for dim, item in enumerate(index) if item != slice(None)]
    return _scatter(rec, base, places, value)


def _scatter(rec: Recorder, base: Tensor, places: list[tuple[int, Any]], value: Any) -> Any:
    """Write `value` where `places`, pairs of a dimension and an integer or slice, meet."""
    if not places:
        return _filled(rec, base, value)
    (dim, item), rest = places[0], places[1:]
    index = (*[slice(None)] * dim, item)
    part = rec.call("getitem", base, index)
    gone = 0 if isinstance(item, slice) else 1  # an integer takes its dimension away
    inner = _scatter(rec, part, [(other - gone, item_) for other, item_ in rest], value)
    if isinstance(item, slice):
        return rec.call("slice_scatter", base, inner, dim=dim, start=item.start, end=item.stop, step=item.step or 1)
    return rec.call("select_scatter", base, inner, dim, item)


def _filled(rec: Recorder, base: Tensor, value: Any) -> Any:
    """`value`, a number or a tensor, with the shape and dtype of `base`."""
    if not isinstance(value, Tensor):
        return rec.call("full_like", base, value)
    if rec.dtype_of(value) != rec.dtype_of(base):
        value = rec.call("to", value, dtype=rec.dtype_of(base))
    if rec.fake(value).shape != rec.fake(base).shape:
        value = rec.call("expand", value, tuple(rec.shape_of(base)))
    return rec.alias(value, torch.clone)  # `base` and `value` go on in memories of their own


def _with_mask_or_points(rec: Recorder, base: Tensor, index: tuple[Any, ...], value: Any) -> Any:
    by_mask = len(index) == 1 and isinstance(index[0], Tensor) and rec.dtype_of(index[0]) == torch.bool
    if by_mask and not isinstance(value, Tensor):
        mask = index[0]
        for _ in range(base.dim() - mask.dim()):
            mask = rec.call("unsqueeze", mask, -1)
        return rec.call("masked_fill", base, mask, value)
    if not all(isinstance(item, Tensor) for item in index):
        rec.refuse("the model writes into a tensor through an index of tensors and slices")
    if not isinstance(value, Tensor):
        value = torch.tensor(value, dtype=rec.dtype_of(base), device=rec.device)
    return rec.call("index_put", base, tuple(index), value)


def _copy(rec: Recorder, base: Tensor, src: Any, non_blocking: bool = False) -> Tensor:
    return overwrite(rec, base, _filled(rec, base, src))


def _zero(rec: Recorder, base: Tensor) -> Tensor:
    return overwrite(rec, base, rec.call("full_like", base, 0))


def _fill(rec: Recorder, base: Tensor, value: Any) -> Tensor:
    return overwrite(rec, base, _filled(rec, base, value))


def _requires_grad(rec: Recorder, base: Tensor, requires_grad: bool = True) -> Tensor:
    return base


def _length(rec: Recorder, base: Tensor) -> int:
    size = rec.shape_of(base)[0]
    return size if type(size) is int else rec.refuse("`len` of a tensor depends on the batch size")


def _size(rec: Recorder, base: Tensor, dim: int | None = None) -> Any:
    return rec.shape_of(base) if dim is None else rec.shape_of(base)[dim]


def _get_device(rec: Recorder, base: Tensor) -> int:
    return -1 if rec.device.index is None else rec.device.index


def _nothing(rec: Recorder, *args: Any, **kwargs: Any) -> None:
    """An assertion on values: the graph has none."""


WRITES: Mapping[str, Callable[..., Any]] = {
    "__setitem__": set_item, "copy_": _copy, "zero_": _zero, "fill_": _fill, "requires_grad_": _requires_grad,
    "__len__": _length, "size": _size, "sym_size": _size, "get_device": _get_device,
    "_assert": _nothing, "_assert_async": _nothing, "_assert_scalar": _nothing, "_assert_tensor_metadata": _nothing,
}
