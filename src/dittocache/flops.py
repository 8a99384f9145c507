"""Counting multiplications and additions while a model runs."""

from __future__ import annotations

from typing import Any

import torch
from torch._ops import HigherOrderOperator
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

# torch's own table of formulas lacks the attention kernel of the CPU, and older ones flex attention
_ATTENTIONS = {"_scaled_dot_product_flash_attention_for_cpu", "flex_attention"}


class FlopCounter(TorchDispatchMode):
    """FLOPs of what runs inside of it: the counts of torch's `FlopCounterMode`, of which it uses the formulas.

    That class also follows modules, for which it hooks the gradients of whatever enters them (an error where a slice
    of a parameter does), and under it flex attention fails, since nothing is compiled while such a mode is on.
    """

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self.total = 0.0

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """torch compiles in spite of this mode: flex attention knows no other way."""
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if isinstance(func, HigherOrderOperator):
            operator, name = func, func.name()
        else:
            operator, name = func._overloadpacket, func._overloadpacket.__name__
        if name in _ATTENTIONS:
            query, key, value, *_ = args
            self.total += sdpa_flop_count(query.shape, key.shape, value.shape)
            return func(*args, **kwargs)
        if operator not in flop_registry and isinstance(func, torch._ops.OpOverload):
            with self:  # composite ones reach this place undivided in inference mode
                output = func.decompose(*args, **kwargs)
            if output is not NotImplemented:
                return output
        output = func(*args, **kwargs)
        if operator in flop_registry:
            self.total += flop_registry[operator](*args, **kwargs, out_val=output)
        return output
