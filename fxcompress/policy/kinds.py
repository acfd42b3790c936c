"""What selectors may name: operator kinds, facts in `[...]`, helper functions. Plain tables, no torch.

`graph/ops.py` and `graph/predicates.py` implement them; tests hold both sides together. They stand here because a
policy is checked, and its misspelt names are mended, without loading torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

KINDS = frozenset("""
    abs acos acosh adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d
    adaptive_max_pool2d adaptive_max_pool3d add addcdiv addcmul addmm affine_grid all alpha_dropout amax amin and
    angle any arange argmax argmin argsort asin asinh atan atan2 atanh avg_pool1d avg_pool2d avg_pool3d baddbmm
    batchnorm batchnorm1d batchnorm2d batchnorm3d bernoulli bilinear bitwise_not bmm cat cdist ceil celu
    channel_shuffle chunk clamp clone complex contiguous conv1d conv2d conv3d conv_transpose1d conv_transpose2d
    conv_transpose3d cos cosh cosine_similarity cumprod cumsum deg2rad detach diagonal digamma div div_rounding dot
    dropout dropout1d dropout2d dropout3d einsum elu embedding embedding_bag empty empty_like eq erf erfc erfinv exp
    exp2 expand expm1 eye feature_alpha_dropout flatten flip floor floor_divide fmod fold frac full full_like gather
    ge gelu getattr getitem glu grid_sample groupnorm gru gru_cell gt gumbel_softmax hardshrink hardsigmoid
    hardswish hardtanh hypot imag index_add index_copy index_fill index_put index_select input instancenorm
    instancenorm1d instancenorm2d instancenorm3d interpolate invert isfinite isinf isnan item layernorm le
    leaky_relu lerp lgamma linear linspace local_response_norm log log10 log1p log2 log_softmax logical_and
    logical_not logical_or logical_xor logsigmoid logsumexp lp_pool1d lp_pool2d lstm lstm_cell lt masked_fill
    masked_scatter masked_select matmul max max_pool1d max_pool2d max_pool3d maximum mean median meshgrid min
    minimum mish mm movedim mul multihead_attention mv nan_to_num nansum narrow ne neg new_empty new_full new_ones
    new_tensor new_zeros nonzero norm normalize numel one_hot ones ones_like or outer output pad parameter permute
    pixel_shuffle pixel_unshuffle polar positive pow prelu prod rad2deg rand rand_like randn randn_like real
    reciprocal relu relu6 remainder repeat repeat_interleave reshape rmsnorm rnn rnn_cell roll rot90 round rrelu
    rsqrt scaled_dot_product_attention scatter scatter_add select_scatter selu sgn sigmoid sign silu sin sinh size
    slice_scatter softmax softmin softplus softshrink softsign sort split sqrt square squeeze stack std std_mean
    stochastic_depth sub sum take_along_dim tan tanh tanhshrink tensor tensordot threshold tile to topk transpose
    tril triu trunc unbind unflatten unfold unfold_dim unsqueeze var var_mean vector_norm view_as_complex
    view_as_real where xlogy xor zeros zeros_like
""".split())

#: the facts a predicate may ask for, and what they are compared with; `graph/predicates.py` has their meaning
PREDICATES: Mapping[str, Literal["text", "count", "bytes", "bool"]] = {
    "name": "text", "params": "count", "macs": "count", "bytes": "bytes",
    "out_channels": "count", "in_channels": "count",
    "kernel_size": "count", "stride": "count", "padding": "count", "dilation": "count", "groups": "count",
    "depthwise": "bool", "out_features": "count", "in_features": "count", "channels": "count", "embeddings": "count",
    "embedding_dim": "count", "hidden_size": "count", "heads": "count", "bias": "bool", "rank": "count",
    "dtype": "text",
    "depth": "count",
}
TEXT_OPERATORS, EQUALITY, ORDER = ("~", "==", "!="), ("==", "!="), ("<", "<=", ">", ">=")

#: helper functions: what each argument is, the last one optional where it ends with `?`, and a doc line
HELPERS: Mapping[str, tuple[tuple[str, ...], str]] = {
    "first": (("selector", "count?"), "the first one, or the first so many, in the order of the graph"),
    "last": (("selector", "count?"), "the last one, or the last so many, in the order of the graph"),
    "inside": (("selector",), "everything inside the modules of this path, or inside what is selected"),
    "inputs_of": (("selector",), "the nearest operators with parameters that feed what is selected"),
    "coupled": (("selector",), "what is selected and every layer whose channels are tied to it"),
}

DTYPES = ("f64", "f32", "f16", "bf16", "i64", "i32", "i16", "i8", "u8", "bool")
INPUT_DTYPES = ("f64", "f32", "f16", "bf16", "i64", "i32", "u8", "bool")  # those that `input` may declare
TARGETS = ("cpu", "cuda", "auto")
PRECISIONS = ("fp32", "bf16", "fp16")  # `precision = bf16`: what a training computes in; weights stay in float32
