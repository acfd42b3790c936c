"""The table of canonical operators. Each row: family, name, callable, signature, then the other ways to write it.

A source is `torch.f`, `F.f`, `.method`, `op.f` (module operator) or `aten.f.overload`. `*f` is short for the first
three, their in-place forms and every ATen overload of `f` and `f_`; each row has `*name` by itself. A source has the
row's signature (ATen operators their schema's names, `self` being the first parameter), unless one follows in
brackets. Options without a meaning for us (`inplace`, `_stacklevel`, `memory_format`, ...) are dropped. Where names
alone don't tell, `convert.py` has a function.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .opbase import Op

TABLE: list[Op] = []


def _add(family: str, name: str, target: Callable[..., Any], signature: str, *sources: str) -> None:
    TABLE.append(Op(name, target, signature, family, (f"*{name}", *sources)))


def _unary() -> None:
    names = ("abs exp expm1 exp2 log log1p log2 log10 sqrt rsqrt reciprocal sin cos tan asin acos atan sinh cosh "
             "asinh acosh atanh erf erfc erfinv sign floor ceil trunc frac square sigmoid tanh isnan isinf isfinite "
             "logical_not bitwise_not deg2rad rad2deg positive real imag angle sgn digamma lgamma view_as_real "
             "view_as_complex").split()
    for name in names:
        _add("elementwise", name, getattr(torch, name), "input", f"F.{name}", f"torch.special.{name}")
    add = _add
    add("elementwise", "neg", operator.neg, "input", "*negative", ".__neg__")
    add("elementwise", "invert", operator.invert, "input", ".__invert__")
    add("elementwise", "round", torch.round, "input, decimals=0")
    add("elementwise", "nan_to_num", torch.nan_to_num, "input, nan=None, posinf=None, neginf=None")
    add("elementwise", "clamp", torch.clamp, "input, min=None, max=None", "*clip", "*clamp_min(input, min)",
        "*clamp_max(input, max)")
    add("elementwise", "detach", torch.detach, "input")
    add("elementwise", "clone", torch.clone, "input")
    add("elementwise", "contiguous", Tensor.contiguous, "input")
    add("elementwise", "to", Tensor.to, "input, dtype=None, device=None", "*_to_copy", "*type_as", "*type", *(
        f".{name}" for name in "float half double bfloat16 int long bool short byte cpu cuda".split()))
    add("elementwise", "zeros_like", torch.zeros_like, "input, dtype=None, device=None")
    add("elementwise", "ones_like", torch.ones_like, "input, dtype=None, device=None")
    add("elementwise", "empty_like", torch.empty_like, "input, dtype=None, device=None")
    add("elementwise", "rand_like", torch.rand_like, "input, dtype=None, device=None")
    add("elementwise", "randn_like", torch.randn_like, "input, dtype=None, device=None")
    add("elementwise", "full_like", torch.full_like, "input, fill_value, dtype=None, device=None")
    add("elementwise", "bernoulli", torch.bernoulli, "input, p=None")
    add("elementwise", "tril", torch.tril, "input, diagonal=0")
    add("elementwise", "triu", torch.triu, "input, diagonal=0")


def _operators(name: str) -> tuple[str, ...]:
    """The forms of a Python operator: `.__add__ .__radd__ .__iadd__ op.iadd`."""
    return (f".__{name}__", f".__r{name}__", f".__i{name}__", f"op.i{name}")


def _binary() -> None:
    add = _add
    add("elementwise", "add", operator.add, "input, other", *_operators("add"))
    add("elementwise", "sub", operator.sub, "input, other", *_operators("sub"), "*subtract", "*rsub")
    add("elementwise", "mul", operator.mul, "input, other", *_operators("mul"), "*multiply")
    add("elementwise", "div", operator.truediv, "input, other", *_operators("truediv"), "*true_divide", "*divide",
        ".__rdiv__")
    add("elementwise", "div_rounding", torch.div, "input, other, /, rounding_mode=None")
    add("elementwise", "floor_divide", operator.floordiv, "input, other", *_operators("floordiv"))
    add("elementwise", "remainder", operator.mod, "input, other", *_operators("mod"))
    add("elementwise", "pow", operator.pow, "input, exponent", *_operators("pow"), "*float_power")
    for name in ("eq", "ne", "lt", "le", "gt", "ge"):
        add("elementwise", name, getattr(operator, name), "input, other", f".__{name}__")
    for name, target in (("and", operator.and_), ("or", operator.or_), ("xor", operator.xor)):
        add("elementwise", name, target, "input, other", f"*bitwise_{name}", f"*__{name}__", *_operators(name))
    for name in ("logical_and", "logical_or", "logical_xor", "maximum", "minimum", "atan2", "fmod", "hypot", "xlogy"):
        add("elementwise", name, getattr(torch, name), "input, other", f"torch.special.{name}")
    add("elementwise", "where", torch.where, "condition, input, other")
    add("elementwise", "masked_fill", torch.masked_fill, "input, mask, value")
    add("elementwise", "lerp", torch.lerp, "input, end, weight")
    add("elementwise", "addcmul", torch.addcmul, "input, tensor1, tensor2, /, value=1")
    add("elementwise", "addcdiv", torch.addcdiv, "input, tensor1, tensor2, /, value=1")
    add("elementwise", "polar", torch.polar, "abs, angle")
    add("elementwise", "complex", torch.complex, "real, imag")


def _activations() -> None:
    for name in ("relu", "relu6", "silu", "hardswish", "hardsigmoid", "mish", "selu", "softsign", "tanhshrink"):
        _add("elementwise", name, getattr(F, name), "input")
    add = _add
    add("elementwise", "logsigmoid", F.logsigmoid, "input", "aten.log_sigmoid.default")
    add("elementwise", "gelu", F.gelu, "input, approximate='none'")
    add("elementwise", "leaky_relu", F.leaky_relu, "input, negative_slope=0.01")
    add("elementwise", "elu", F.elu, "input, alpha=1.0", "aten.elu.default(input, alpha=1.0, scale=1, input_scale=1)")
    add("elementwise", "celu", F.celu, "input, alpha=1.0")
    add("elementwise", "hardtanh", F.hardtanh, "input, min_val=-1.0, max_val=1.0")
    add("elementwise", "softplus", F.softplus, "input, beta=1, threshold=20")
    add("elementwise", "softshrink", F.softshrink, "input, lambd=0.5")
    add("elementwise", "hardshrink", F.hardshrink, "input, lambd=0.5")
    add("elementwise", "threshold", F.threshold, "input, threshold, value")
    add("elementwise", "prelu", F.prelu, "input, weight")
    add("elementwise", "rrelu", F.rrelu, "input, lower=0.125, upper=0.3333333333333333, training=False")
    add("glu", "glu", F.glu, "input, dim=-1")
    add("softmax", "softmax", F.softmax, "input, dim=None, dtype=None", "*_softmax", "torch.special.softmax")
    add("softmax", "log_softmax", F.log_softmax, "input, dim=None, dtype=None", "*_log_softmax")
    add("softmax", "softmin", F.softmin, "input, dim=None, dtype=None")
    add("softmax", "gumbel_softmax", F.gumbel_softmax, "logits, tau=1, hard=False, dim=-1")
    for name in ("dropout", "dropout1d", "dropout2d", "dropout3d"):
        add("elementwise", name, getattr(F, name), "input, p=0.5, training=True", *(
            ("*feature_dropout(input, p, training)",) if name == "dropout2d" else ()))
    for name in ("alpha_dropout", "feature_alpha_dropout"):
        add("elementwise", name, getattr(F, name), "input, p=0.5, training=False")


def _reductions() -> None:
    for name in ("sum", "mean", "nansum"):
        _add("reduce", name, getattr(torch, name), "input, dim=None, keepdim=False, dtype=None")
    for name in ("amax", "amin"):
        _add("reduce", name, getattr(torch, name), "input, dim=(), keepdim=False")
    for name in ("all", "any", "argmax", "argmin"):
        _add("reduce", name, getattr(torch, name), "input, dim=None, keepdim=False")
    for name in ("max", "min"):  # with two tensors: maximum, minimum; with dim the value is a pair
        _add("reduce", name, getattr(torch, name), "input, dim=None, keepdim=False")
    add = _add
    add("reduce", "median", torch.median, "input, dim=None, keepdim=False")
    add("reduce", "prod", torch.prod, "input, dim=None, keepdim=False, dtype=None")
    add("reduce", "var", torch.var, "input, dim=None, /, correction=1, keepdim=False")
    add("reduce", "std", torch.std, "input, dim=None, /, correction=1, keepdim=False")
    add("reduce", "var_mean", torch.var_mean, "input, dim=None, /, correction=1, keepdim=False")
    add("reduce", "std_mean", torch.std_mean, "input, dim=None, /, correction=1, keepdim=False")
    add("reduce", "logsumexp", torch.logsumexp, "input, dim, keepdim=False")
    add("reduce", "norm", torch.norm, "input, p='fro', dim=None, keepdim=False")
    add("reduce", "vector_norm", torch.linalg.vector_norm, "input, ord=2, dim=None, keepdim=False",
        "aten.linalg_vector_norm.default")
    add("scan", "cumsum", torch.cumsum, "input, dim, /, dtype=None")
    add("scan", "cumprod", torch.cumprod, "input, dim, /, dtype=None")
    add("scan", "sort", torch.sort, "input, dim=-1, descending=False")
    add("scan", "argsort", torch.argsort, "input, dim=-1, descending=False")
    add("scan", "topk", torch.topk, "input, k, dim=-1, largest=True, sorted=True")
    add("norm", "normalize", F.normalize, "input, p=2.0, dim=1, eps=1e-12")
    add("elementwise", "cosine_similarity", F.cosine_similarity, "x1, x2, dim=1, eps=1e-08")


def _shapes() -> None:
    add = _add
    add("shape", "reshape", torch.reshape, "input, *shape", "*view(input, *shape)", "*_unsafe_view(input, *shape)",
        ".view_as",
        ".reshape_as")
    add("shape", "flatten", torch.flatten, "input, start_dim=0, end_dim=-1", "*ravel")
    add("shape", "unflatten", torch.unflatten, "input, dim, sizes", ".unflatten")
    add("shape", "permute", torch.permute, "input, *dims")
    add("shape", "transpose", torch.transpose, "input, dim0, dim1", "*swapaxes", "*swapdims", "*t(input)",
        "*adjoint(input)", "*mT(input)", "*mH(input)", "*matrix_H(input)", "*numpy_T(input)")
    add("shape", "movedim", torch.movedim, "input, source, destination", "*moveaxis")
    add("shape", "squeeze", torch.squeeze, "input, dim=None")
    add("shape", "unsqueeze", torch.unsqueeze, "input, dim")
    add("shape", "expand", Tensor.expand, "input, *size", "*broadcast_to", ".expand_as")
    add("shape", "repeat", Tensor.repeat, "input, *repeats")
    add("shape", "tile", torch.tile, "input, *dims")
    add("shape", "repeat_interleave", torch.repeat_interleave, "input, repeats, dim=None, /, output_size=None")
    add("shape", "chunk", torch.chunk, "input, chunks, dim=0")
    add("shape", "split", torch.split, "tensor, split_size_or_sections, dim=0", "*split_with_sizes", "*tensor_split")
    add("shape", "unbind", torch.unbind, "input, dim=0")
    add("shape", "narrow", torch.narrow, "input, dim, start, length")
    add("shape", "roll", torch.roll, "input, shifts, dims=None")
    add("shape", "flip", torch.flip, "input, *dims")
    add("shape", "rot90", torch.rot90, "input, k=1, dims=(0, 1)")
    add("shape", "diagonal", torch.diagonal, "input, offset=0, dim1=0, dim2=1")
    add("shape", "unfold_dim", Tensor.unfold, "input, dimension, size, step", ".unfold", "aten.unfold.default")
    add("shape", "channel_shuffle", F.channel_shuffle, "input, groups", "*native_channel_shuffle")
    add("shape", "pixel_shuffle", F.pixel_shuffle, "input, upscale_factor")
    add("shape", "pixel_unshuffle", F.pixel_unshuffle, "input, downscale_factor")
    add("shape", "unfold", F.unfold, "input, kernel_size, dilation=1, padding=0, stride=1", "*im2col")
    add("shape", "fold", F.fold, "input, output_size, kernel_size, dilation=1, padding=0, stride=1", "*col2im")
    add("shape", "pad", F.pad, "input, pad, mode='constant', value=None", "*constant_pad_nd(input, pad, value=0)")
    add("shape", "cat", torch.cat, "tensors, dim=0", "*concat", "*concatenate")
    add("shape", "stack", torch.stack, "tensors, dim=0")
    add("shape", "meshgrid", torch.meshgrid, "*tensors, indexing=None")
    add("shape", "one_hot", F.one_hot, "input, num_classes=-1")


def _indexing() -> None:
    add = _add
    add("index", "getitem", operator.getitem, "input, index", "*slice", "*select", "*index", ".__getitem__")
    add("index", "index_select", torch.index_select, "input, dim, index")
    add("index", "gather", torch.gather, "input, dim, index")
    add("index", "take_along_dim", torch.take_along_dim, "input, indices, dim=None")
    add("index", "masked_select", torch.masked_select, "input, mask")
    add("index", "nonzero", torch.nonzero, "input, /, as_tuple=False")
    add("index", "scatter", torch.scatter, "input, dim, index, src")
    add("index", "scatter_add", torch.scatter_add, "input, dim, index, src")
    add("index", "slice_scatter", torch.slice_scatter, "input, src, dim=0, start=None, end=None, step=1")
    add("index", "select_scatter", torch.select_scatter, "input, src, dim, index")
    add("index", "index_put", torch.index_put, "input, indices, values, accumulate=False")
    add("index", "index_add", torch.index_add, "input, dim, index, source, /, alpha=1")
    add("index", "index_copy", torch.index_copy, "input, dim, index, source")
    add("index", "index_fill", torch.index_fill, "input, dim, index, value")
    add("index", "masked_scatter", torch.masked_scatter, "input, mask, source")
    add("embedding", "embedding", F.embedding,
        "input, weight, padding_idx=None, max_norm=None, norm_type=2.0, scale_grad_by_freq=False, sparse=False",
        "aten.embedding.default(weight, input, padding_idx=-1, scale_grad_by_freq=False, sparse=False)")
    add("size", "size", Tensor.size, "input, dim", "aten.sym_size.int")
    add("size", "numel", torch.numel, "input", "aten.sym_numel.default")
    add("size", "getattr", getattr, "input, name")


def _contractions() -> None:
    add = _add
    add("matmul", "matmul", operator.matmul, "input, other", *_operators("matmul"), "*linalg_matmul")
    add("matmul", "bmm", torch.bmm, "input, mat2")
    add("matmul", "mm", torch.mm, "input, mat2")
    add("matmul", "mv", torch.mv, "input, vec")
    add("matmul", "dot", torch.dot, "input, tensor")
    add("matmul", "outer", torch.outer, "input, vec2")
    add("matmul", "addmm", torch.addmm, "input, mat1, mat2, /, beta=1, alpha=1")
    add("matmul", "baddbmm", torch.baddbmm, "input, batch1, batch2, /, beta=1, alpha=1")
    add("matmul", "einsum", torch.einsum, "equation, *operands", "aten.einsum.default(equation, operands, path=None)")
    add("matmul", "tensordot", torch.tensordot, "a, b, dims=2")
    add("matmul", "linear", F.linear, "input, weight, bias=None, /")
    add("matmul", "bilinear", F.bilinear, "input1, input2, weight, bias=None, /")
    for n in (1, 2, 3):
        add("conv", f"conv{n}d", getattr(F, f"conv{n}d"),
            "input, weight, bias=None, /, stride=1, padding=0, dilation=1, groups=1")
        add("conv", f"conv_transpose{n}d", getattr(F, f"conv_transpose{n}d"),
            "input, weight, bias=None, /, stride=1, padding=0, "
            "output_padding=0, groups=1, dilation=1", f"aten.conv_transpose{n}d.input")
    add("attention", "scaled_dot_product_attention", F.scaled_dot_product_attention,
        "query, key, value, attn_mask=None, /, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False")
    add("distance", "cdist", torch.cdist, "x1, x2, p=2.0, compute_mode=None")


def _norms() -> None:
    add = _add
    add("norm", "batchnorm", F.batch_norm,
        "input, running_mean, running_var, weight=None, bias=None, /, training=False, momentum=0.1, eps=1e-05",
        "*batch_norm")
    add("norm", "instancenorm", F.instance_norm,
        "input, running_mean=None, running_var=None, weight=None, bias=None, /, "
        "use_input_stats=True, momentum=0.1, eps=1e-05", "*instance_norm")
    add("norm", "layernorm", F.layer_norm, "input, normalized_shape, weight=None, bias=None, /, eps=1e-05",
        "*layer_norm")
    add("norm", "groupnorm", F.group_norm, "input, num_groups, weight=None, bias=None, /, eps=1e-05", "*group_norm")
    add("norm", "rmsnorm", F.rms_norm, "input, normalized_shape, weight=None, /, eps=None", "*rms_norm")
    add("norm", "local_response_norm", F.local_response_norm, "input, size, alpha=0.0001, beta=0.75, k=1.0")


def _pools() -> None:
    add = _add
    for n in (1, 2, 3):
        add("pool", f"max_pool{n}d", getattr(F, f"max_pool{n}d"),
            "input, kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False",
            )
        add("pool", f"adaptive_avg_pool{n}d", getattr(F, f"adaptive_avg_pool{n}d"), "input, output_size")
        add("pool", f"adaptive_max_pool{n}d", getattr(F, f"adaptive_max_pool{n}d"), "input, output_size")
        tail = ", divisor_override=None" if n > 1 else ""
        add("pool", f"avg_pool{n}d", getattr(F, f"avg_pool{n}d"),
            f"input, kernel_size, stride=None, padding=0, ceil_mode=False, count_include_pad=True{tail}")
        if n < 3:
            add("pool", f"lp_pool{n}d", getattr(F, f"lp_pool{n}d"),
                "input, norm_type, kernel_size, stride=None, ceil_mode=False")
    modes = "nearest1d nearest2d nearest3d linear1d bilinear2d trilinear3d bicubic2d _bilinear2d_aa _bicubic2d_aa"
    add("resize", "interpolate", F.interpolate,
        "input, size=None, scale_factor=None, mode='nearest', align_corners=None, recompute_scale_factor=None, "
        "antialias=False", "F.upsample", *(f"*upsample_{mode}" for mode in modes.split()))
    add("resize", "grid_sample", F.grid_sample,
        "input, grid, mode='bilinear', padding_mode='zeros', align_corners=None")
    add("resize", "affine_grid", F.affine_grid, "theta, size, align_corners=None")


def _creation() -> None:
    add = _add
    for name in ("zeros", "ones", "empty", "rand", "randn"):
        add("create", name, getattr(torch, name), "*size, dtype=None, device=None")
    for name in ("zeros", "ones", "empty"):
        add("create", f"new_{name}", getattr(Tensor, f"new_{name}"), "input, *size, dtype=None, device=None")
    add("create", "full", torch.full, "size, fill_value, /, dtype=None, device=None")
    add("create", "new_full", Tensor.new_full, "input, size, fill_value, /, dtype=None, device=None")
    add("create", "arange", torch.arange, "start=0, end=None, step=1, /, dtype=None, device=None")
    add("create", "linspace", torch.linspace, "start, end, steps, /, dtype=None, device=None")
    add("create", "eye", torch.eye, "n, m=None, /, dtype=None, device=None")
    add("create", "tensor", torch.tensor, "data, /, dtype=None, device=None", "*scalar_tensor", "*as_tensor")
    add("create", "new_tensor", Tensor.new_tensor, "input, data, /, dtype=None, device=None")
    add("create", "item", Tensor.item, "input")


for _part in (_unary, _binary, _activations, _reductions, _shapes, _indexing, _contractions, _norms, _pools, _creation):
    _part()
