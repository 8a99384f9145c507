"""ToCa and DuCa on PixArt, Open-Sora and FLUX, and TaylorSeer, against their rules written out.

The oracle is a copy of the network whose blocks follow specs/toca.md and specs/duca.md, sections 3 to 5 and addenda,
sentence by sentence: kinds, counts, scores and ages are their own, and so is every attention map. Numbers are drawn
wide: ratios that clamp at 0 and 1, other intervals, weights and selectors than the published ones.
"""

from __future__ import annotations

import copy
import math
import types
import warnings
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from diffusers.models.embeddings import apply_rotary_emb
from test_stdit3 import build as build_stdit3
from torch import Tensor

import dittocache
from dittocache.models.stdit3 import by_frame

STEPS = 14
FULL, PARTIAL, AGGRESSIVE = "full", "partial", "aggressive"


# ---- what the three have in common ----------------------------------------------------------------------------------
def tokens_of(ratio: float, n: int) -> int:
    return int(np.float32(min(max(np.float32(ratio), np.float32(0)), np.float32(1))) * np.float32(n))


def unit(score: Tensor) -> Tensor:
    return score / score.pow(2).sum(-1, keepdim=True).sqrt()


def softmax_map(q: Tensor, k: Tensor, mask: Tensor | None = None) -> Tensor:
    """[batch, heads, queries, keys], mean over the heads."""
    logits = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    return (logits if mask is None else logits + mask).softmax(-1).mean(1)


def entropy(cross: Tensor) -> Tensor:
    """Texts of all rows side by side: the map of a row is zero outside of its own text."""
    rows, n, text = cross.shape
    wide = torch.zeros(rows, n, rows * text)
    for b in range(rows):
        wide[b, :, b * text : (b + 1) * text] = cross[b]
    mean = 0.5 * wide[: rows // 2] + 0.5 * wide[rows // 2 :]
    return unit(1 - (mean * (mean + 1e-7).log()).sum(-1)).repeat(2, 1)


class Rows:
    """One module of one block: its held output, and the ages of its tokens."""

    def __init__(self) -> None:
        self.held: Tensor = torch.zeros(0)
        self.ages: Tensor = torch.zeros(0)
        self.counts: list[int] = []

    def full(self, output: Tensor) -> Tensor:
        self.held, self.ages = output.clone(), torch.zeros(output.shape[:2])
        return self.held

    def choose(self, base: Tensor, count: int, rule: dict[str, Any]) -> Tensor:
        score = base + rule["soft_weight"] * self.ages / rule["interval"]
        if rule["bonus"]:
            side, g = int(score.shape[1] ** 0.5), rule["grid"]
            for row in score:
                for y in range(0, side, g):
                    for x in range(0, side, g):
                        cell = [(y + dy) * side + x + dx for dy in range(g) for dx in range(g)]
                        row[max(cell, key=lambda n: float(row[n]))] *= 1 + rule["bonus"]
        order = torch.stack([torch.tensor(sorted(range(len(r)), key=lambda n: (-float(r[n]), n))) for r in score])
        chosen = order[:, :count]
        self.ages = self.ages + 1
        self.ages.scatter_(1, chosen, 0.0)
        self.counts.append(count)
        return chosen

    def write(self, chosen: Tensor, rows: Tensor) -> Tensor:
        for b in range(len(chosen)):
            self.held[b, chosen[b]] = rows[b]
        return self.held


def some(x: Tensor, chosen: Tensor) -> Tensor:
    return torch.stack([x[b, chosen[b]] for b in range(len(x))])


def compare(model: Any, oracle: Any, recipe: Any, forward: Any, batch: dict[str, Any], k_of: Any) -> None:
    """Outputs of every step of a run on inputs that change from step to step."""
    generator = torch.Generator().manual_seed(0)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.filterwarnings("ignore", message=".*skipped nothing|.*spatial_bonus is left out")
        with dittocache.enable(model, recipe) as cache, cache.run(STEPS):
            for k in range(STEPS):
                drift = 0.5 * torch.randn(batch["x"].shape, generator=generator)
                now = {**batch, "x": batch["x"] + torch.cat([drift[: len(drift) // 2]] * 2)}
                k_of(k)
                cache.step(k)
                found, expected = forward(model, now, k), forward(oracle, now, k)
                assert float((found - expected).norm() / expected.norm()) < 2e-5, f"step {k}"


# ---- PixArt ---------------------------------------------------------------------------------------------------------
class PixArt:
    """Steps are numbered upwards; a full block sets P after its self-attention; kinds are decided in every block."""

    def __init__(self, model: Any, rule: dict[str, Any]) -> None:
        self.rule, self.k, self.P, self.left = rule, 0, rule["interval"], torch.zeros(0)
        self.blocks = list(model.transformer_blocks)
        self.kinds: dict[tuple[int, int], str] = {}
        for l, block in enumerate(self.blocks):
            block.rows = [Rows(), Rows()]
            block.forward = types.MethodType(lambda block, *args, l=l, **kw: self.block(block, l, *args, **kw), block)

    def kind(self) -> str:
        if self.k == 0 or self.k % self.P == 0:
            return FULL
        return AGGRESSIVE if self.rule["duca"] and (self.k % self.P) % 2 == 0 else PARTIAL

    def block(self, block: Any, l: int, x: Tensor, **kwargs: Any) -> Tensor:
        rule, text, mask = self.rule, kwargs["encoder_hidden_states"], kwargs["encoder_attention_mask"]
        kind = self.kinds[self.k, l] = self.kind()
        if kind == AGGRESSIVE:
            return self.left if l == len(self.blocks) - 1 else x
        six = (block.scale_shift_table + kwargs["timestep"].reshape(len(x), 6, -1)).unsqueeze(2).unbind(1)
        heads = block.attn1.heads

        def split(t: Tensor) -> Tensor:
            return t.unflatten(-1, (heads, -1)).transpose(1, 2)

        def cross_map(rows: Tensor) -> Tensor:
            return softmax_map(split(block.attn2.to_q(rows)), split(block.attn2.to_k(text)), mask.unsqueeze(1))

        def count(module: float) -> int:
            a = rule["ratio"] * (1.9 - 1.8 * self.k / STEPS) * (1.6 - 1.2 * l / (len(self.blocks) - 1)) * module
            return tokens_of(a, x.shape[1])

        def base() -> Tensor:
            if rule["selector"] == "value-norm":
                first, second = block.norms.chunk(2)
                return unit((1 - (first + second) / 2).sum(1)).repeat(2, 1)
            return entropy(block.map)

        cross, mlp = block.rows
        if kind == FULL:
            normed = block.norm1(x) * (1 + six[1]) + six[0]
            block.attended = block.attn1(normed)
            block.norms = split(block.attn1.to_v(normed)).norm(dim=-1)
            a = rule["warp"] if rule["ratio"] else 0.0
            self.P = int(np.rint(np.float32(rule["interval"]) / np.float32(1 - a + 2 * a * self.k / STEPS)))
            x = x + six[2] * block.attended
            block.map = cross_map(x)
            x = x + cross.full(block.attn2(x, encoder_hidden_states=text, attention_mask=mask))
            x = x + six[5] * mlp.full(block.ff(block.norm2(x) * (1 + six[4]) + six[3]))
        else:
            x = x + six[2] * block.attended
            chosen = cross.choose(base(), count(0.6), rule)
            if chosen.shape[1]:
                rows = some(x, chosen)
                cross.write(chosen, block.attn2(rows, encoder_hidden_states=text, attention_mask=mask))
                new = cross_map(rows)
                for b in range(len(x)):
                    block.map[b, chosen[b]] = new[b]
            x = x + cross.held
            chosen = mlp.choose(base(), count(1.6), rule)
            if chosen.shape[1]:
                mlp.write(chosen, block.ff(block.norm2(some(x, chosen)) * (1 + six[4]) + six[3]))
            x = x + six[5] * mlp.held
        if l == len(self.blocks) - 1:
            self.left = x
        return x


@pytest.mark.parametrize(
    ("method", "interval", "ratio", "weight", "selector"),
    [
        ("toca", 3, 0.3, 0.25, "cross-attention-entropy"),
        ("toca", 4, 0.6, 0.014, "cross-attention-entropy"),
        ("toca", 5, 0.12, 0.0, "cross-attention-entropy"),
        ("toca", 3, 0.0, 0.25, "cross-attention-entropy"),
        ("duca", 5, 0.3, 0.01, "cross-attention-entropy"),
        ("duca", 5, 0.2, 0.05, "value-norm"),
        ("duca", 4, 0.75, 0.25, "value-norm"),
    ],
)
def test_pixart(method: str, interval: int, ratio: float, weight: float, selector: str) -> None:
    model = tiny.pixart(num_layers=3)
    duca, warp = method == "duca", 0.0 if method == "duca" else 0.2
    rule = {"interval": interval, "ratio": ratio, "soft_weight": weight, "bonus": 0.4, "grid": 4, "warp": warp}
    oracle: Any = copy.deepcopy(model)
    written = PixArt(oracle, {**rule, "duca": duca, "selector": selector})
    published = dittocache.methods()[method].settings["PixArt-alpha 256, DPM-Solver++ 20 steps"]
    changed = {"interval": interval, "ratio": ratio, "soft_weight": weight, "selector": selector}
    x = torch.randn(3, 4, 16, 16, generator=torch.Generator().manual_seed(1))  # 64 tokens, four cells
    mask = torch.ones(6, tiny.TEXT)
    mask[1, 4:] = mask[4, 4:] = mask[2, 2:] = mask[5, 2:] = 0
    text = torch.randn(6, tiny.TEXT, 12, generator=torch.Generator().manual_seed(2))

    def forward(model: Any, now: dict[str, Any], k: int) -> Tensor:
        return model(
            now["x"],
            encoder_hidden_states=text,
            encoder_attention_mask=mask,
            timestep=torch.full((6,), 999 - 49.95 * k),
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
        ).sample

    recipe = dittocache.recipe(method, **{**published, **changed})
    compare(model, oracle, recipe, forward, {"x": torch.cat([x, x])}, lambda k: setattr(written, "k", k))
    counts = [n for block in written.blocks for rows in block.rows for n in rows.counts]
    if ratio:
        assert any(0 < n < 64 for n in counts)
    mixed = {k for k in range(STEPS) if written.kinds[k, 0] != written.kinds[k, 2]}
    assert bool(mixed) == (method == "toca" and ratio > 0)


# ---- Open-Sora ------------------------------------------------------------------------------------------------------
class OpenSora:
    """Kinds of a module by its own interval; spatial and temporal blocks apart."""

    def __init__(self, model: Any, rule: dict[str, Any]) -> None:
        self.rule, self.k = rule, 0
        for name in ("spatial", "temporal"):
            blocks = getattr(model, f"{name}_blocks")
            for l, block in enumerate(blocks):
                block.rows, block.last = [Rows(), Rows()], l == len(blocks) - 1
                block.forward = types.MethodType(lambda block, *args: self.block(block, *args), block)

    def kind(self, interval: int) -> str:
        if self.k < 3 or self.k % interval == 0:
            return FULL
        return AGGRESSIVE if self.rule["duca"] and self.k % 3 == 2 else PARTIAL

    def block(self, block: Any, x: Tensor, text: Tensor, mask: Any, time: Tensor, frames: int, turn: Any = None) -> Any:
        rule, heads, (cross, mlp) = self.rule, block.attn.heads, block.rows
        if self.kind(3) == AGGRESSIVE:
            return block.left if block.last else x
        shift1, scale1, gate1, shift2, scale2, gate2 = (block.scale_shift_table + time).unbind(-2)

        def cross_map(rows: Tensor) -> Tensor:
            q = block.cross_attn.q_linear(rows).unflatten(-1, (heads, -1)).transpose(1, 2)
            k = block.cross_attn.kv_linear(text).unflatten(-1, (2, heads, -1))[:, :, 0].transpose(1, 2)
            return softmax_map(q, k, torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)[:, None, None])

        def count(part: str) -> int:
            factor = {"cross": 1 - 0.67 * 1.5, "mlp": 1 + 0.33 * 1.5}[part] if rule["schedule"] == "stdit3" else 1.0
            g = 1.9 - 1.8 * self.k / STEPS if rule["schedule"] == "linear" else 1.0
            return tokens_of(rule["ratio"] * factor * g, x.shape[1])

        def base() -> Tensor:
            return unit((1 - block.norms).sum(-1)) if rule["selector"] == "value-norm" else entropy(block.map)

        if self.kind(3) == FULL:
            normed = by_frame(block.norm1(x), 1 + scale1, shift1)
            block.attended = block.attn(normed, frames, turn)
            block.norms = block.attn.qkv(normed).chunk(3, -1)[2].unflatten(-1, (heads, -1)).norm(dim=-1)
        x = x + by_frame(block.attended, gate1)
        if self.kind(6) == FULL:
            block.map = cross_map(x)
            cross.full(block.cross_attn(x, text, mask))
        elif not rule["duca"] and (n := count("cross")):
            chosen = cross.choose(base(), n, rule)
            cross.write(chosen, block.cross_attn(some(x, chosen), text, mask))
            new = cross_map(some(x, chosen))
            for b in range(len(x)):
                block.map[b, chosen[b]] = new[b]
        x = x + cross.held
        modulated = by_frame(block.norm2(x), 1 + scale2, shift2)
        if self.kind(3) == FULL:
            mlp.full(block.mlp(modulated))
        else:
            chosen = mlp.choose(base(), count("mlp"), rule)
            if chosen.shape[1]:
                mlp.write(chosen, block.mlp(some(modulated, chosen)))
        x = x + by_frame(mlp.held, gate2)
        block.left = x
        return x


@pytest.mark.parametrize(
    ("method", "ratio", "schedule", "selector", "weight", "interval"),
    [
        ("toca", 0.1, "stdit3", "cross-attention-entropy", 0.25, 3),
        ("toca", 0.2, "constant", "cross-attention-entropy", 0.05, 3),
        ("toca", 0.3, "linear", "cross-attention-entropy", 0.01, 4),
        ("toca", 0.75, "stdit3", "value-norm", 0.1, 3),
        ("toca", 0.6, "linear", "value-norm", 0.25, 3),
        ("toca", 0.0, "stdit3", "cross-attention-entropy", 0.25, 3),
        ("duca", 0.1, "stdit3", "value-norm", 0.25, 3),
        ("duca", 0.3, "constant", "value-norm", 0.25, 3),
        ("duca", 0.4, "stdit3", "cross-attention-entropy", 0.25, 3),
    ],
)
def test_open_sora(method: str, ratio: float, schedule: str, selector: str, weight: float, interval: int) -> None:
    model = build_stdit3(depth=2)
    oracle: Any = copy.deepcopy(model)
    rule = {"interval": interval, "ratio": ratio, "soft_weight": weight, "bonus": None, "grid": 2}
    written = OpenSora(oracle, {**rule, "duca": method == "duca", "schedule": schedule, "selector": selector})
    published = dittocache.methods()[method].settings["Open-Sora 1.2, 30 steps"]
    changed = {"interval": interval, "ratio": ratio, "soft_weight": weight, "selector": selector}
    changed |= {"ratio_schedule": schedule, "share_guidance_indices": selector != "value-norm"}
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(2, 4, 3, 4, 8, generator=generator), torch.randn(4, 1, 5, 6, generator=generator)
    mask = torch.ones(4, 5, dtype=torch.int64)
    mask[1, 3:] = mask[3, 3:] = 0

    def forward(model: Any, now: dict[str, Any], k: int) -> Tensor:
        return model(now["x"], 999.0 - 60 * k, y, mask, fps=24.0, height=256.0, width=256.0)

    recipe = dittocache.recipe(method, **{**published, **changed})
    compare(model, oracle, recipe, forward, {"x": torch.cat([x, x])}, lambda k: setattr(written, "k", k))
    counts = [n for block in oracle.temporal_blocks for n in block.rows[1].counts]
    assert counts and (all(n > 0 for n in counts) or not ratio)


# ---- FLUX -----------------------------------------------------------------------------------------------------------
class Flux:
    """A counter: with a ratio steps 0, 1, 2, without one step 0, then every interval-th after the last full one."""

    def __init__(self, model: Any, rule: dict[str, Any]) -> None:
        self.rule, self.full, self.last = rule, True, 0
        self.full_steps: list[int] = []
        for name in ("transformer_blocks", "single_transformer_blocks"):
            for l, block in enumerate(getattr(model, name)):
                block.rows = [Rows(), Rows()]
                rule_of = self.double if name == "transformer_blocks" else self.single
                block.forward = types.MethodType(lambda b, *a, f=rule_of, l=l, **kw: f(b, l, *a, **kw), block)

    def begin(self, k: int) -> None:
        self.full = k < (3 if self.rule["ratio"] else 1) or k - self.last == self.rule["interval"]
        if self.full:
            self.last = k
            self.full_steps.append(k)

    def count(self, l: int, factor: float, n: int) -> int:
        return tokens_of(self.rule["ratio"] * (1.5 - l / 27) * factor, n)

    def score(self, attn: Any, streams: list[tuple[Tensor, str, Any]], rope: Any) -> Tensor:
        """Raw scores of the tokens of an attention: how much they are attended to, or norms of keys or values.

        streams: (normed states, names of the projections, norm) of text and image, in this order.
        """

        def project(letter: str) -> Tensor:
            parts = [getattr(attn, name.format(letter))(x).unflatten(-1, (-1, attn.head_dim)) for x, name, _ in streams]
            return torch.cat(parts, 1)

        if self.rule["selector"] == "large-value-norm":
            return project("v").norm(dim=-1).mean(-1)
        if self.rule["selector"] == "key-norm":
            return project("k").norm(dim=-1).mean(-1)

        def normed(letter: str) -> Tensor:
            parts = [
                getattr(attn, norm.format(letter))(
                    getattr(attn, name.format(letter))(x).unflatten(-1, (-1, attn.head_dim))
                )
                for x, name, norm in streams
            ]
            return apply_rotary_emb(torch.cat(parts, 1), rope, sequence_dim=1).transpose(1, 2)

        return softmax_map(normed("q"), normed("k")).mean(1)

    def double(self, block: Any, l: int, *args: Any, **kwargs: Any) -> Any:
        x, text, temb, rope = (*args, *kwargs.values())[:4]
        normed, gate, shift2, scale2, gate2 = block.norm1(x, emb=temb)
        context, c_gate, c_shift2, c_scale2, c_gate2 = block.norm1_context(text, emb=temb)
        if self.full:
            block.attended = block.attn(hidden_states=normed, encoder_hidden_states=context, image_rotary_emb=rope)
            added = {"q": "add_q_proj", "k": "add_k_proj", "v": "add_v_proj"}
            assert all(hasattr(block.attn, name) for name in added.values())
            streams: Any = [(context, "add_{}_proj", "norm_added_{}"), (normed, "to_{}", "norm_{}")]
            block.scores = self.score(block.attn, streams, rope)
        attended, c_attended = block.attended
        x = x + gate.unsqueeze(1) * attended
        text = text + c_gate.unsqueeze(1) * c_attended
        n = text.shape[1]
        sides = [
            (x, block.norm2, block.ff, scale2, shift2, gate2, block.scores[:, n:]),
            (text, block.norm2_context, block.ff_context, c_scale2, c_shift2, c_gate2, block.scores[:, :n]),
        ]
        done = []
        for (s, norm, ff, scale, shift, out_gate, raw), rows in zip(sides, block.rows, strict=True):
            modulated = norm(s) * (1 + scale[:, None]) + shift[:, None]
            if self.full:
                rows.full(ff(modulated))
            else:
                chosen = rows.choose(unit(raw), self.count(l, 0.4, s.shape[1]), self.rule)
                if chosen.shape[1]:
                    rows.write(chosen, ff(some(modulated, chosen)))
            done.append(s + out_gate.unsqueeze(1) * rows.held)
        return done[1], done[0]

    def single(self, block: Any, l: int, *args: Any, **kwargs: Any) -> Any:
        x, text, temb, rope = (*args, *kwargs.values())[:4]
        n, x = text.shape[1], torch.cat([text, x], 1)
        normed, gate = block.norm(x, emb=temb)
        rows = block.rows[0]
        if self.full:
            block.attended = block.attn(hidden_states=normed, image_rotary_emb=rope)
            block.scores = self.score(block.attn, [(normed, "to_{}", "norm_{}")], rope)
            rows.full(block.proj_out(torch.cat([block.attended, block.act_mlp(block.proj_mlp(normed))], 2)))
        else:
            chosen = rows.choose(unit(block.scores), self.count(l, 1.6, x.shape[1]), self.rule)
            if chosen.shape[1]:
                mlp = block.act_mlp(block.proj_mlp(some(normed, chosen)))
                rows.write(chosen, block.proj_out(torch.cat([some(block.attended, chosen), mlp], 2)))
        x = x + gate.unsqueeze(1) * rows.held
        return x[:, :n], x[:, n:]


@pytest.mark.parametrize(
    ("interval", "ratio", "weight", "selector"),
    [
        (4, 0.1, 0.25, "attention"),
        (5, 0.3, 0.02, "attention"),
        (6, 0.3, 0.05, "large-value-norm"),
        (4, 0.2, 0.0, "key-norm"),
        (5, 0.4, 0.1, "key-norm"),
        (4, 0.43, 0.25, "attention"),  # all tokens of the single-stream blocks, whose attention is held all the same
        (4, 1.0, 0.25, "large-value-norm"),
        (3, 0.0, 0.25, "attention"),
    ],
)
def test_flux(interval: int, ratio: float, weight: float, selector: str) -> None:
    model = tiny.flux()
    oracle: Any = copy.deepcopy(model)
    rule = {"interval": interval, "ratio": ratio, "soft_weight": weight, "bonus": None, "grid": 2}
    written = Flux(oracle, {**rule, "selector": selector})
    published = dittocache.methods()["toca"].settings["FLUX.1-dev, 50 steps"]
    changed = {"interval": interval, "ratio": ratio, "soft_weight": weight, "selector": selector}
    given, x = tiny.condition(model), tiny.latents(model)

    def forward(model: Any, now: dict[str, Any], k: int) -> Tensor:
        kwargs = tiny.inputs(model, now["x"], 1000 - 1000 * k / STEPS, given)
        return tiny.call(model, kwargs)

    recipe = dittocache.recipe("toca", **{**published, **changed})
    compare(model, oracle, recipe, forward, {"x": x}, written.begin)
    assert written.full_steps[:3] == ([0, 1, 2] if ratio else [0, 3, 6])
    singles = {n for block in oracle.single_transformer_blocks for n in block.rows[0].counts}
    assert (23 in singles) == (ratio > 0.42)


def test_keys_that_are_not_seen_before_their_norm_are_refused() -> None:
    """Open-Sora norms keys by head, [batch, heads, tokens, channels]; DiT has no norm."""
    recipe = dittocache.recipe("toca", selector="key-norm", ratio=0.3, ratio_schedule="constant")
    given: dict[str, Any] = {"fps": 24.0, "height": 256.0, "width": 256.0}
    video, text = torch.randn(2, 4, 3, 4, 8), torch.randn(2, 1, 5, 6)
    model = build_stdit3(depth=2)
    with torch.no_grad(), dittocache.enable(model, recipe) as cache, cache.run(8):
        cache.step(0)
        with pytest.raises(RuntimeError, match="'key-norm' sees no keys"):
            model(video, 999.0, text, **given)
    small = tiny.dit()
    tiny.sample_explicit(small, cache := dittocache.enable(small, recipe))
    shares = cache.trace.table[:, [kind == "feed-forward" for kind in cache.trace.kinds]]
    assert ((shares > 0) & (shares < 1)).any()
    cache.disable()


# ---- TaylorSeer -----------------------------------------------------------------------------------------------------
class Series:
    """specs/taylorseer.md, section 1, around one module: full at k < first, then N after the last full step."""

    def __init__(self, module: Any, interval: int, order: int, first: int) -> None:
        self.plain, self.interval, self.order, self.first = module.forward, interval, order, first
        self.k, self.last, self.ladder = 0, 0, []  # type: ignore[var-annotated]
        module.forward = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.k < self.first or self.k - self.last == self.interval:
            output = self.plain(*args, **kwargs)
            new, h = [[t.double() for t in (output if isinstance(output, tuple) else (output,))]], self.k - self.last
            while self.k > self.first - 2 and len(new) <= min(self.order, len(self.ladder)):
                new.append([(a - b) / h for a, b in zip(new[-1], self.ladder[len(new) - 1], strict=True)])
            self.ladder, self.last, self.pair = new, self.k, isinstance(output, tuple)
            return output
        d, found = self.k - self.last, [torch.zeros_like(t) for t in self.ladder[0]]
        for j, rung in enumerate(self.ladder):
            found = [sum_ + t * d**j / math.factorial(j) for sum_, t in zip(found, rung, strict=True)]
        return tuple(t.float() for t in found) if self.pair else found[0].float()


@pytest.mark.parametrize("name", ["dit", "flux"])
@pytest.mark.parametrize(
    ("interval", "order", "first", "lite"),
    [(4, 4, 2, False), (3, 3, 2, False), (6, 1, 3, False), (4, 2, 1, False), (3, 2, 5, False), (5, 0, 1, False)]
    + [(3, 2, 3, True), (5, 1, 1, True)],
)
def test_taylorseer(name: str, interval: int, order: int, first: int, lite: bool) -> None:
    model = tiny.build(name)
    oracle: Any = copy.deepcopy(model)
    paths = {"attn", "attn1", "ff", "ff_context", "proj_out"}
    blocks = [block for list_ in oracle.children() if isinstance(list_, torch.nn.ModuleList) for block in list_]
    modules = [m for block in blocks for path, m in block.named_children() if path in paths]
    if name == "flux":  # of a single-stream block the whole output before the gate
        modules = [m for m in modules if not any(m is block.attn for block in oracle.single_transformer_blocks)]
    # lite: the projection that the network ends with, from which on all is linear
    last = {"dit": "proj_out_2", "flux": "proj_out"}[name]
    series = [Series(m, interval, order, first) for m in ([getattr(oracle, last)] if lite else modules)]
    given, x = tiny.condition(model), tiny.latents(model)

    def forward(model: Any, now: dict[str, Any], k: int) -> Tensor:
        return tiny.call(model, tiny.inputs(model, now["x"], 999 - 60 * k, given))

    def begin(k: int) -> None:
        for one in series:
            one.k = k

    recipe = dittocache.recipe("taylorseer", interval=interval, order=order, first_full=first, lite=lite)
    compare(model, oracle, recipe, forward, {"x": x}, begin)
    assert len(series) == (1 if lite else {"dit": 6, "flux": 8}[name])
