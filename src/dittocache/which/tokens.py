"""Token selectors: a base score of the tokens, plus age and spatial spread, and the number of tokens to take."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from ..parts import Part, check_bool, check_choice, check_int, check_number
from ..plan import Site
from . import scores
from .ratios import PARTS, SCHEDULES, factor_of, ratio_at, token_count


class Attended(NamedTuple):
    """What an attention handed to torch's kernel: [batch, heads, tokens, channels], scale and mask of the logits.

    `raw_key` are the keys before the norm that the attention has for them, if a selector asks; None if unseen.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    scale: float
    mask: Tensor | None = None
    raw_key: Tensor | None = None


@dataclass(frozen=True)
class Which(Part):
    """Takes the tokens with the highest score: base score + soft_weight * age / interval, times a spatial bonus.

    Args:
        ratio: base share R of the tokens to compute.
        ratio_schedule: how R varies over steps and blocks, see `which.ratios`.
        module_ratio_factor: factor F of the schedule, one for all modules or one for some of `cross_attention`, `mlp`,
            `double` (the feed-forwards of dual-stream blocks) and `single` (single-stream blocks); None for the
            authors' values.
        layer_divisor: the number block indices are divided by; None for depth - 1.
        interval: base interval N, the divisor of the age term.
        soft_weight: weight of the age term (ToCa s3); 0 for none.
        spatial_bonus: bonus for the best token of every cell (ToCa s4); None for none.
        spatial_grid: side of a cell in tokens.
        share_guidance_indices: one selection for both halves of batched guidance, from the mean of their scores.
        select_text: text may be thinned out, too: its own feed-forwards, and blocks that hold text and image at once.
        step_order: ratio schedules see steps numbered from the last to the first, "down", or the other way, "up".
    """

    ratio: float = 0.07
    ratio_schedule: str = "ddim50"
    module_ratio_factor: Any = None
    layer_divisor: int | None = None
    interval: int = 3
    soft_weight: float = 0.25
    spatial_bonus: float | None = 0.6
    spatial_grid: int = 2
    share_guidance_indices: bool = False
    select_text: bool = False
    step_order: str = "down"

    name: ClassVar[str] = ""
    observes: ClassVar[bool] = False  # scores tokens by what an attention was handed
    scored_by: ClassVar[str] = "attention"  # the kind of that attention
    raw_keys: ClassVar[bool] = False  # wants `Attended.raw_key`
    uses_input: ClassVar[bool] = False  # `base` wants the tokens as they stand before the norm of the module
    normalized: ClassVar[bool] = True  # base scores are brought to unit L2 norm over the tokens

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("ratio", self.ratio, 0, 1)
        check_choice("ratio_schedule", self.ratio_schedule, SCHEDULES)
        check_factors("module_ratio_factor", self.module_ratio_factor)
        if self.layer_divisor is not None:
            check_int("layer_divisor", self.layer_divisor, 1)
        check_int("interval", self.interval, 1)
        check_number("soft_weight", self.soft_weight, 0)
        if self.spatial_bonus is not None:
            check_number("spatial_bonus", self.spatial_bonus, 0)
        check_int("spatial_grid", self.spatial_grid, 1)
        check_bool("share_guidance_indices", self.share_guidance_indices)
        check_bool("select_text", self.select_text)
        check_choice("step_order", self.step_order, ("down", "up"))

    def selects(self, site: Site) -> bool:
        """Whether partial steps compute some tokens of a site, rather than none."""
        kinds = ("feed-forward", "cross-attention", *(("context-feed-forward", "fused") if self.select_text else ()))
        return site.tokenwise and site.kind in kinds

    # ---- how many ---------------------------------------------------------------------------------------------------
    def count(self, site: Site, step: int, num_steps: int, tokens: int) -> int:
        """Number of tokens to compute at a site and step."""
        factor = factor_of(self.module_ratio_factor, self.ratio_schedule, site.kind)
        divisor = site.depth - 1 if self.layer_divisor is None else self.layer_divisor
        at = (step, num_steps, site.block, divisor, self.interval, self.step_order)
        return token_count(ratio_at(self.ratio_schedule, self.ratio, factor, *at), tokens)

    # ---- which ------------------------------------------------------------------------------------------------------
    def observe(self, seen: Attended, halves: int) -> Tensor:
        """Raw score [batch, tokens] of an attention; `halves` is 2 if the batch holds two guidance halves, else 1."""
        raise NotImplementedError

    def base(self, observed: Tensor | None, x: Tensor, held: Tensor, halves: int, generator: torch.Generator) -> Tensor:
        """Raw score of every token, before normalisation, age and bonus.

        Args:
            observed: what `observe` returned at the block's last full attention, None if it observes nothing.
            x: inputs of the module [batch, tokens, channels] (before its norm if `uses_input`).
            held: the output that is kept for it, [batch, tokens, channels].
            halves: 2 if the batch holds two guidance halves, else 1.
            generator: the run's own, on the CPU.

        Returns:
            [batch, tokens].
        """
        raise NotImplementedError

    def score(self, base: Tensor, ages: Tensor, grid: tuple[int, int] | None, halves: int) -> Tensor:
        """Score that ranks the tokens, from raw scores and ages [batch, tokens]; grid is (height, width) in tokens."""
        if self.share_guidance_indices and halves == 2:
            base = base.unflatten(0, (2, -1)).mean(0).repeat(2, 1)
        if self.normalized:
            base = scores.normalize(base)
        if self.soft_weight:
            base = base + self.soft_weight * ages / self.interval
        if self.spatial_bonus and grid is not None:
            base = scores.spatial_bonus(base, grid, self.spatial_grid, self.spatial_bonus)
        return base

    def choose(self, score: Tensor, count: int) -> Tensor:
        """Indices [batch, count] of the tokens to compute, from scores [batch, tokens]."""
        return scores.select(score, count)


@dataclass(frozen=True)
class AttentionReceived(Which):
    """ToCa's s1: attention received from all tokens, at the last full step of the block."""

    name = "attention"
    observes = True

    def observe(self, seen: Attended, halves: int) -> Tensor:
        return scores.attention_received(seen.query, seen.key, seen.scale, mask=seen.mask)

    def base(self, observed: Any, x: Tensor, held: Tensor, halves: int, generator: torch.Generator) -> Tensor:
        return observed


@dataclass(frozen=True)
class ValueNorm(Which):
    """1 - norm of the value vector, summed over heads: small values win. Known as `kv-norm` to the authors."""

    name = "value-norm"
    observes = True

    def observe(self, seen: Attended, halves: int) -> Tensor:
        return scores.value_norms(seen.value.norm(dim=-1).float())

    def base(self, observed: Any, x: Tensor, held: Tensor, halves: int, generator: torch.Generator) -> Tensor:
        return observed


@dataclass(frozen=True)
class LargeValueNorm(ValueNorm):
    """Norm of the value vector, mean over heads: large values win. `v-norm` of ToCa's authors on FLUX."""

    name = "large-value-norm"

    def observe(self, seen: Attended, halves: int) -> Tensor:
        return scores.mean_norms(seen.value)


@dataclass(frozen=True)
class LargeKeyNorm(ValueNorm):
    """Norm of the key before its own norm and rotation, mean over heads: large ones win. `k-norm` on FLUX."""

    name = "key-norm"
    raw_keys = True

    def observe(self, seen: Attended, halves: int) -> Tensor:
        """Raises a RuntimeError if the keys were not seen before their norm."""
        if seen.raw_key is None:
            raise RuntimeError(
                "selector 'key-norm' sees no keys [batch, tokens, heads, channels] before the norm of this attention; "
                "use attention, value-norm or large-value-norm"
            )
        return scores.mean_norms(seen.raw_key)


@dataclass(frozen=True)
class CrossAttentionEntropy(Which):
    """ToCa's s2: entropy of a token's attention to the text, over both guidance halves; they share the indices."""

    name = "cross-attention-entropy"
    observes = True
    scored_by = "cross-attention"

    def observe(self, seen: Attended, halves: int) -> Tensor:
        return scores.entropy_rows(scores.attention_map(seen.query, seen.key, seen.scale, seen.mask), halves)

    def base(self, observed: Any, x: Tensor, held: Tensor, halves: int, generator: torch.Generator) -> Tensor:
        return (1 + observed.unflatten(0, (halves, -1)).sum(0)).repeat(halves, 1)


@dataclass(frozen=True)
class RandomTokens(Which):
    """Uniform random scores, the same for both guidance halves, drawn anew at every call from the run's generator."""

    seed: int = 0

    name = "random"
    normalized = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_int("seed", self.seed, 0)

    def base(self, observed: Any, x: Tensor, held: Tensor, halves: int, generator: torch.Generator) -> Tensor:
        draws = torch.rand(x.shape[0] // halves, x.shape[1], generator=generator)
        return draws.to(x.device).repeat(halves, 1)


@dataclass(frozen=True)
class Similarity(Which):
    """1 - cosine similarity of the input tokens and the outputs that are held for them."""

    name = "similarity"
    uses_input = True

    def base(self, observed: Any, x: Tensor, held: Tensor, halves: int, generator: torch.Generator) -> Tensor:
        return 1 - torch.cosine_similarity(x.float(), held.float(), dim=-1)


@dataclass(frozen=True)
class TokenNorm(Which):
    """L2 norm of the input tokens."""

    name = "norm"
    uses_input = True
    normalized = False

    def base(self, observed: Any, x: Tensor, held: Tensor, halves: int, generator: torch.Generator) -> Tensor:
        return x.float().norm(dim=-1)


@dataclass(frozen=True)
class Compress(RandomTokens):
    """Half random, half attention received relative to its maximum."""

    name = "compress"
    observes = True

    def observe(self, seen: Attended, halves: int) -> Tensor:
        received = scores.attention_received(seen.query, seen.key, seen.scale, mask=seen.mask)
        return received / received.amax(-1, keepdim=True)

    def base(self, observed: Any, x: Tensor, held: Tensor, halves: int, generator: torch.Generator) -> Tensor:
        return 0.5 * super().base(observed, x, held, halves, generator) + 0.5 * observed


@dataclass(frozen=True)
class Straight(Which):
    """All tokens alike: age, bonus and position decide."""

    name = "straight"
    normalized = False

    def base(self, observed: Any, x: Tensor, held: Tensor, halves: int, generator: torch.Generator) -> Tensor:
        return torch.ones(x.shape[:2], device=x.device)


SELECTORS: dict[str, type[Which]] = {
    cls.name: cls
    for cls in (
        AttentionReceived,
        ValueNorm,
        LargeValueNorm,
        LargeKeyNorm,
        CrossAttentionEntropy,
        RandomTokens,
        Similarity,
        TokenNorm,
        Compress,
        Straight,
    )
}


def selector(name: Any, **params: Any) -> Which:
    """The selector of that name.

    Raises:
        ValueError: unknown name, or a parameter out of range.
    """
    check_choice("selector", name, SELECTORS)
    return SELECTORS[name](**params)


def check_factors(name: str, value: Any) -> None:
    """Raises a ValueError unless a value is None, a finite number, or finite numbers for some of the parts."""
    known = tuple(dict.fromkeys(part for parts in PARTS.values() for part in parts))
    for part, factor in value.items() if isinstance(value, Mapping) else [(None, value)]:
        if part is not None:
            check_choice(f"a part of {name}", part, known)
        if factor is not None or part is not None:
            check_number(name if part is None else f"{name} of {part}", factor)
