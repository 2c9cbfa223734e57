"""What the kernels rely on, checked before a launch: a wrong stride would read other memory, not fail."""

from __future__ import annotations

import torch

MAX_EXPERTS = 512
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def check_arguments(
    x: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    router_logits: torch.Tensor | None,
    topk_ids: torch.Tensor | None,
    topk_weights: torch.Tensor | None,
    top_k: int | None,
    scoring: str,
    temperature: float,
    bias: torch.Tensor | None,
    expert_map: torch.Tensor | None,
    out: torch.Tensor | None,
) -> int:
    """Return K. Raises ValueError, with the values, for arguments of fused_moe that do not fit together."""
    _check_weights(x, w13, w2)
    tokens, experts = len(x), len(w13)
    if router_logits is not None:
        if topk_ids is not None or topk_weights is not None or expert_map is not None:
            raise ValueError("router_logits exclude topk_ids, topk_weights and expert_map: the kernel chooses itself")
        _check("router_logits", router_logits, x, (tokens, experts), (*DTYPES, torch.float64), rows_may_be_apart=True)
        if bias is not None:
            _check("bias", bias, x, (experts,), (*DTYPES, torch.float64))
        if top_k is None or not 1 <= top_k <= experts:
            raise ValueError(f"top_k is {top_k}, expected 1 … {experts} (the experts)")
        if scoring not in ("softmax", "sigmoid"):
            raise ValueError(f"scoring is {scoring!r}, expected 'softmax' or 'sigmoid'")
        if not temperature > 0:
            raise ValueError(f"temperature is {temperature}, expected a positive number")
    else:
        top_k = _check_choice(x, topk_ids, topk_weights, top_k, bias)
        if expert_map is not None:
            _check("expert_map", expert_map, x, (expert_map.numel(),), (torch.int32, torch.int64))
    if out is not None:
        _check("out", out, x, tuple(x.shape), (x.dtype,))
    if tokens * top_k >= 2**31:
        raise ValueError(f"{tokens} tokens × {top_k} experts exceed 2³¹ − 1 slots")
    return top_k


def _check_weights(x: torch.Tensor, w13: torch.Tensor, w2: torch.Tensor) -> None:
    """x [T, H], w13 [E, 2·I, H], w2 [E, H, I]: shapes, one dtype, one device, contiguous rows."""
    if x.dim() != 2 or w13.dim() != 3 or w2.dim() != 3:
        raise ValueError(
            f"shapes {_shapes(x=x, w13=w13, w2=w2)}: expected x [T, H], w13 [E, 2·I, H], w2 [E, H, I]"
        )  # fmt: skip
    experts, double, hidden = w13.shape
    if double % 2 or x.shape[1] != hidden or tuple(w2.shape) != (experts, hidden, double // 2) or not w13.numel():
        raise ValueError(
            f"shapes {_shapes(x=x, w13=w13, w2=w2)} do not fit: expected x [T, H], w13 [E, 2·I, H], w2 [E, H, I]"
        )  # fmt: skip
    if experts > MAX_EXPERTS:
        raise ValueError(f"{experts} experts, expected at most {MAX_EXPERTS}")
    if x.dtype not in DTYPES:
        raise ValueError(f"x is {x.dtype}, expected one of {', '.join(map(str, DTYPES))}")
    for name, weight in (("w13", w13), ("w2", w2)):
        _check(name, weight, x, tuple(weight.shape), (x.dtype,), rows_may_be_apart=True)
        if weight.shape[1] * weight.stride(1) >= 2**31:
            raise ValueError(f"one expert of {name} spans {weight.shape[1] * weight.stride(1)} elements, limit 2³¹ − 1")
    _check("x", x, x, tuple(x.shape), DTYPES, rows_may_be_apart=True)


def _check_choice(
    x: torch.Tensor,
    ids: torch.Tensor | None,
    weights: torch.Tensor | None,
    top_k: int | None,
    bias: torch.Tensor | None,
) -> int:
    """topk_ids and topk_weights [T, K] that came from elsewhere."""
    if ids is None or weights is None:
        raise ValueError("expected router_logits and top_k, or topk_ids and topk_weights")
    if bias is not None:
        raise ValueError("bias is for router_logits: with topk_ids the choice has been made")
    if ids.dim() != 2 or not ids.shape[1] or top_k not in (None, ids.shape[1]):
        raise ValueError(f"topk_ids {tuple(ids.shape)}, top_k {top_k}: expected [{len(x)}, top_k]")
    _check("topk_ids", ids, x, (len(x), ids.shape[1]), (torch.int32, torch.int64))
    _check("topk_weights", weights, x, tuple(ids.shape), DTYPES)
    return int(ids.shape[1])


def _check(
    name: str, tensor: torch.Tensor, x: torch.Tensor, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...],
    rows_may_be_apart: bool = False,
) -> None:  # fmt: skip
    """One tensor's shape, dtype, device and strides."""
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} is {list(tensor.shape)}, expected {list(shape)}")
    if tensor.dtype not in dtypes:
        raise ValueError(f"{name} is {tensor.dtype}, expected {' or '.join(map(str, dtypes))}")
    if tensor.device != x.device:
        raise ValueError(f"{name} is on {tensor.device}, x on {x.device}")
    sound = tensor.is_contiguous() or (rows_may_be_apart and tensor.stride(-1) == 1 and min(tensor.stride()) >= 0)
    if not sound:
        wanted = "a last stride of 1" if rows_may_be_apart else "a contiguous tensor"
        raise ValueError(f"{name} has strides {tensor.stride()}, expected {wanted}")


def _shapes(**tensors: torch.Tensor) -> str:
    return ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in tensors.items())
