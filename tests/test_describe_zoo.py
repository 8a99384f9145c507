"""What `describe` says of every transformer class of diffusers, against what a forward of it does."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import diffusers
import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F
from test_zoo import entry, model
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from zoo import ZOO, prediction

import dittocache
from dittocache import Recipe, describe
from dittocache.describe import FAMILIES, LAYOUTS, Description, Layout
from dittocache.flops import FlopCounter
from dittocache.forward import _embedding
from dittocache.plan import COMPUTE, OPEN
from dittocache.selection import Selection
from dittocache.when import Every, Look, When

every = pytest.mark.parametrize("name", sorted(ZOO))
FLEX = {"AnyFlowFARTransformer3DModel", "WanAnimate2Transformer3DModel", "Kandinsky6SRTransformer3DModel"}

# less than this share of the blocks' FLOPs is in sites, and why; everywhere else it is 90 %
LOW = {
    "WanAnimateTransformer3DModel": (0.85, "attentions to the face are blocks of their own, without sites"),
}

# stacks that carry the sample, with their blocks; "+": in turn; (): beside the sample
A = "transformer_blocks"
DUAL = f"{A} 3, single_{A} 3"
STACKS = {
    **dict.fromkeys(ZOO, f"{A} 3"),
    **dict.fromkeys(
        [
            "FluxTransformer2DModel", "BriaTransformer2DModel", "BriaFiboTransformer2DModel",
            "ChromaTransformer2DModel", "Flux2Transformer2DModel", "LongCatImageTransformer2DModel",
            "OvisImageTransformer2DModel",
        ],
        DUAL,
    ),
    **dict.fromkeys(
        [
            "WanTransformer3DModel", "ChronoEditTransformer3DModel", "SkyReelsV2Transformer3DModel",
            "AnyFlowTransformer3DModel", "AnyFlowFARTransformer3DModel", "WanAnimate2Transformer3DModel",
            "HeliosTransformer3DModel", "PRXTransformer2DModel", "LongCatAudioDiTTransformer",
        ],
        "blocks 3",
    ),
    **dict.fromkeys(
        [
            "ErnieImageTransformer2DModel", "Ideogram4Transformer2DModel", "LuminaNextDiT2DModel",
            "OmniGenTransformer2DModel", "Cosmos3OmniTransformer",
        ],
        "layers 3",
    ),
    "Flux3Transformer2DModel": (
        f"(txt_mode_blocks 3), mode_blocks.image 3, (mode_blocks.image_cond 3), single_{A} 3"
    ),
    "AuraFlowTransformer2DModel": f"joint_{A} 3, single_{A} 3",
    "HiDreamImageTransformer2DModel": "double_stream_blocks 3, single_stream_blocks 3",
    "HunyuanImageTransformer2DModel": f"(context_embedder.token_refiner.refiner_blocks 2), {DUAL}",
    "SD3Transformer2DModel": f"{A} 4",
    "JoyImageEditTransformer3DModel": "double_blocks 3",
    "JoyImageEditPlusTransformer3DModel": "double_blocks 3",
    "BriaFibo2Transformer2DModel": "(noise_refiner 3), (perceiver.layers 2), layers 4",
    "Krea2Transformer2DModel": f"(text_fusion.layerwise_blocks 2), (text_fusion.refiner_blocks 2), {A} 3",
    "Lumina2Transformer2DModel": "(context_refiner 3), (noise_refiner 3), layers 3",
    "ZImageTransformer2DModel": "(noise_refiner 3), (context_refiner 3), layers 3",
    "NucleusMoEImageTransformer2DModel": f"{A} 4",
    "HunyuanDiT2DModel": "blocks 6",
    "UVit2DModel": (
        "down_block.res_blocks + down_block.attention_blocks 6, transformer_layers 3, "
        "up_block.res_blocks + up_block.attention_blocks 6"
    ),
    "WanVACETransformer3DModel": "(vace_blocks 3), blocks 5",
    "WanAnimateTransformer3DModel": "blocks + face_adapter 9",
    "LatteTransformer3DModel": f"{A} + temporal_{A} 6",
    "SanaWMTransformer3DModel": "blocks 4",
    "ConsisIDTransformer3DModel": f"{A} + perceiver_cross_attention 9",
    "EasyAnimateTransformer3DModel": f"{A} 4",
    "HunyuanVideoTransformer3DModel": f"(context_embedder.token_refiner.refiner_blocks 2), {DUAL}",
    "HunyuanVideoFramepackTransformer3DModel": f"(context_embedder.token_refiner.refiner_blocks 2), {DUAL}",
    "HunyuanVideo15Transformer3DModel": f"(context_embedder.token_refiner.refiner_blocks 2), {A} 3",
    "Kandinsky5Transformer3DModel": f"(text_{A} 3), visual_{A} 3",
    "Kandinsky6Transformer3DModel": f"(video_text_{A} 3), (audio_text_{A} 3), visual_{A} 3",
    "Kandinsky6SRTransformer3DModel": f"visual_{A} 3",
    "MiniMaxH3Transformer3DModel": f"(token_refiner.refiner_blocks 3), {A} 3",
    "MotifVideoTransformer3DModel": f"{A} 3, single_{A} 5",
    "AceStepTransformer1DModel": "layers 4",
    "T5FilmDecoder": "decoders 3",
    "RFD4ProteinaTransformer": "transformer_layers + pair_update_layers 6",
}  # fmt: skip

# beside the sample by custom, though the latents go through: why
SIDE = {
    "noise_refiner": "comes before text and image are joined; 1/16 of the real depth, and no published method skips it",
    "vace_blocks": "the last hint is added behind the last block here, so that it has to be right",
}


# ---- one forward, looked at -----------------------------------------------------------------------------------------
@dataclass
class Seen:
    """What one forward did."""

    described: Description
    blocks: list[str] = field(default_factory=list)  # in the order of their first calls
    calls: list[str] = field(default_factory=list)  # of sites
    whole: float = 0.0  # FLOPs of all blocks
    covered: float = 0.0  # of that in sites, and in what only feeds them
    inputs: dict[str, tuple[Any, Any, Any]] = field(default_factory=dict)  # site -> args, kwargs, output: first call


@functools.cache
def seen(name: str) -> Seen:
    net = entry(name).build(0)
    found = Seen(describe(net))
    handles, inner = ExitStack(), {j for block in found.described.blocks for j in block.inner}
    with torch.no_grad(), FlopCounter() as counter, handles:

        def listen(module: nn.Module, note: Callable[[float, Any, Any, Any], None]) -> None:
            begun: list[float] = []
            first = module.register_forward_pre_hook(lambda *_: begun.append(counter.total))
            last = module.register_forward_hook(
                lambda m, args, kwargs, output: note(counter.total - begun.pop(), args, kwargs, output),
                with_kwargs=True,
            )
            handles.callback(first.remove)
            handles.callback(last.remove)

        def site(j: int, cost: float, args: Any, kwargs: Any, output: Any) -> None:
            one = found.described.entries[j].site
            found.calls.append(one.name)
            found.covered += 0 if j in inner else cost
            if one.tokenwise and one.name not in found.inputs:
                found.inputs[one.name] = args, kwargs, output

        def block(place: str, cost: float, *_: Any) -> None:
            found.blocks.append(place)
            found.whole += cost

        def feeds(cost: float, *_: Any) -> None:
            found.covered += cost

        for b in found.described.blocks:
            listen(b.module, functools.partial(block, b.name))
        for j, one in enumerate(found.described.entries):
            listen(one.module, functools.partial(site, j))
            for module in one.mutes:
                listen(module, feeds)
        prediction(net, entry(name).inputs(net))
    return found


@every
def test_sites_hold_the_work(name):
    share = seen(name).covered / seen(name).whole
    least, reason = LOW.get(name, (0.9, ""))
    assert least <= share <= 1 and (share < 0.9 or not reason), f"{share:.3f}; {reason}"


@every
def test_blocks_stand_in_the_order_in_which_they_run(name):
    assert list(dict.fromkeys(seen(name).blocks)) == [block.name for block in seen(name).described.blocks]
    orders = [one.site.order for one in seen(name).described.entries]
    assert orders == sorted(orders)


@every
def test_every_site_is_called_in_order(name):
    """An attention in front of a fused site comes after it: it is for recipes about attention alone."""
    found = seen(name).described
    inner = {found.entries[j].site.name for block in found.blocks for j in block.inner}
    names = [one.site.name for one in found.entries]
    assert set(names) == set(seen(name).calls)
    called = dict.fromkeys(call for call in seen(name).calls if call not in inner)
    assert list(called) == [one for one in names if one not in inner]


@every
def test_text_is_what_sites_are_called_a_second_time_for(name):
    found = seen(name).described
    often = {call for call, count in Counter(seen(name).calls).items() if count > 1}
    stated = {
        one.site.name for block in found.blocks for one in found.entries
        if one.site.name == f"{block.name}.{one.path}" and one.path in block.family.twice
    }  # fmt: skip
    assert often <= stated and bool(often) == (name.startswith(("CogView4", "Glm", "EasyAnimate")))


@every
def test_stacks_and_which_of_them_carry_the_sample(name):
    stacks = seen(name).described.stacks
    shown = ", ".join(("{} {}" if s.main else "({} {})").format(s.site.name, len(s.blocks)) for s in stacks)
    assert shown == STACKS[name]


@every
def test_a_description_prints_and_goes_to_json(name):
    found = seen(name).described
    lines = str(found).splitlines()
    assert lines[0].startswith(f"{name}: ") and max(map(len, lines)) <= 120
    for stack in found.stacks:
        assert any(line.startswith(f"  {stack.site.name}: {len(stack.blocks)} x ") for line in lines)
    for one in found.entries:
        assert any(line.split()[:2] == [one.path, one.site.kind] for line in lines)
    assert json.loads(json.dumps(found.to_dict())) == found.to_dict()
    assert len({site.name for site in found.columns}) == len(found.columns)


@every
def test_modules_are_where_their_sites_say(name):
    net = model(name)
    for one in describe(net).entries + describe(net).linears:
        assert net.get_submodule(one.site.name) is one.module


# ---- kinds, by what follows the latents -----------------------------------------------------------------------------
class Apart(TorchFunctionMode):
    """Attentions give zeros, so that nothing passes from token to token; what they were handed is noted."""

    def __init__(self) -> None:
        super().__init__()
        self.handed: list[tuple[Tensor, Tensor]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        query, key, value = [*args, *(v for n, v in (kwargs or {}).items() if n in ("query", "key", "value"))][:3]
        self.handed.append((query, key))
        return value.new_zeros(*query.shape[:-1], value.shape[-1])


@dataclass
class Traced:
    """Of forwards with attentions apart, one of them with other latents, one with another text.

    Attributes:
        attends: attention -> whether its queries, and its keys, follow the latents.
        stacks: stack -> whether what its first block is given follows the latents.
        text: token-wise site -> which tokens of its first input are text: follow it, and not the latents. [tokens]
    """

    attends: dict[str, list[tuple[bool, bool]]]
    stacks: dict[str, bool]
    text: dict[str, Tensor]


@functools.cache
def traced(name: str) -> Traced:
    net, given, other = model(name), entry(name).inputs(model(name)), entry(name).inputs(model(name), seed=11)
    changes = [{}, *({key: other[key] for key in keys[:1]} for keys in (entry(name).latents, entry(name).conditions))]
    (handed, inputs), (moved, latents), (_, texts) = (apart(net, given | changed) for changed in changes)
    attends = {
        site: [(differ(q, r), differ(k, s)) for (q, k), (r, s) in zip(pairs, moved[site], strict=True)]
        for site, pairs in handed.items()
    }
    found = describe(net)
    begin = {stack.site.name: found.blocks[stack.blocks[0]].name for stack in found.stacks}
    stacks = {stack: differ(inputs[block], latents[block]) for stack, block in begin.items()}
    text = {site: follows(x, texts[site]) & ~follows(x, latents[site]) for site, x in inputs.items() if x.ndim == 3}
    return Traced(attends, stacks, text)


def apart(net: nn.Module, given: dict[str, Any]) -> tuple[dict[str, list[tuple[Tensor, Tensor]]], dict[str, Tensor]]:
    """Site -> queries and keys of its attentions; site or block -> its first input."""
    handed: dict[str, list[tuple[Tensor, Tensor]]] = {}
    inputs: dict[str, Tensor] = {}

    def before(site: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        mode.handed.clear()
        position = found.stream if isinstance(module, tuple(type(block.module) for block in found.blocks)) else 0
        inputs.setdefault(site, main(args, kwargs, position))

    def after(site: str, module: nn.Module, args: Any, output: Any) -> None:
        if mode.handed:
            handed.setdefault(site, mode.handed[:])

    with torch.no_grad(), ExitStack() as handles, Apart() as mode:
        found = describe(net)
        named = [(one.site.name, one.module) for one in found.entries]
        for name, module in [*named, *((block.name, block.module) for block in found.blocks)]:
            for handle in (
                module.register_forward_pre_hook(functools.partial(before, name), with_kwargs=True),
                module.register_forward_hook(functools.partial(after, name)),
            ):
                handles.callback(handle.remove)
        prediction(net, given)
    return handed, inputs


def follows(a: Tensor, b: Tensor) -> Tensor:
    """Which tokens of [batch, tokens, channels] differ, [tokens]."""
    return (a - b).abs().amax((0, 2)) > 1e-6 * a.abs().max()


def main(args: Any, kwargs: Any, position: int = 0) -> Tensor:
    value = kwargs.get("hidden_states", args[position] if position else None)
    return value if value is not None else next(v for v in (*args, *kwargs.values()) if isinstance(v, Tensor))


def differ(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).abs().max() > 1e-6 * a.abs().max())


@pytest.mark.parametrize("name", sorted(ZOO.keys() - FLEX))
def test_cross_attention_is_where_keys_and_queries_are_of_different_things(name):
    kinds = {one.site.name: one.site.kind for one in seen(name).described.entries}
    for site, attends in traced(name).attends.items():
        crosses = all(queries != keys for queries, keys in attends)
        told = any(queries or keys for queries, keys in attends)  # not of sound or text alone
        if "attention" in kinds.get(site, "") and (told or kinds[site] == "attention"):
            assert crosses == (kinds[site] == "cross-attention"), (site, attends)


@pytest.mark.parametrize("name", sorted(ZOO.keys() - FLEX))
def test_what_is_beside_the_sample_does_not_depend_on_it(name):
    for stack in describe(model(name)).stacks:
        assert traced(name).stacks[stack.site.name] == (stack.main or stack.site.name in SIDE), stack.site.name


def test_most_cross_attentions_are_told():
    found = [
        (one.site.name, traced(name).attends.get(one.site.name, []))
        for name in ZOO.keys() - FLEX
        for one in seen(name).described.entries
        if one.site.kind == "cross-attention" and one.site.block == 0
    ]
    assert sum(any(map(any, attends)) for _, attends in found) > 0.7 * len(found) > 25


# ---- tokens ---------------------------------------------------------------------------------------------------------
@every
def test_token_wise_sites_are(name):
    """Some tokens of the input give those tokens of the output."""
    found = seen(name).described
    modules = {one.site.name: one.module for one in found.entries}
    assert seen(name).inputs.keys() == {one.site.name for one in found.entries if one.site.tokenwise}
    with torch.no_grad():
        for site, (args, kwargs, output) in seen(name).inputs.items():
            x = main(args, kwargs)
            chosen = torch.arange(x.shape[1] - 1, -1, -2)
            some = [x[:, chosen] if value is x else value for value in args]
            named = {key: x[:, chosen] if value is x else value for key, value in kwargs.items()}
            part = modules[site](*some, **named)
            assert isinstance(output, Tensor) and part.shape == output[:, chosen].shape, site
            assert (part - output[:, chosen]).abs().max() <= 1e-5 * output.abs().max(), site


@pytest.mark.parametrize(
    "name",
    [
        "SanaTransformer2DModel", "SanaVideoTransformer3DModel", "SanaWMTransformer3DModel",
        "ErnieImageTransformer2DModel", "Cosmos3OmniTransformer", "RFD4ProteinaTransformer", "UVit2DModel",
    ],
)  # fmt: skip
def test_no_convolution_and_no_layout_of_another_kind_is_token_wise(name):
    sites = [one.site for one in seen(name).described.entries]
    mixing = [s for s in sites if s.kind == "feed-forward" and not s.name.startswith("transformer_layers")]
    assert mixing and not any(site.tokenwise for site in mixing)


def test_experts_mix_tokens():
    sites = {type(one.module).__name__: one.site for one in seen("NucleusMoEImageTransformer2DModel").described.entries}
    assert not sites["NucleusMoELayer"].tokenwise and sites["FeedForward"].tokenwise


def wise(name: str) -> bool:
    return any(one.site.tokenwise and "context" not in one.site.kind for one in seen(name).described.entries)


@pytest.mark.parametrize("name", sorted(ZOO))
def test_text_is_never_selected_unless_asked(name, monkeypatch):
    """Whatever tokens partial steps take, they are none that follow the text and not the latents."""
    toca = dittocache.recipe(
        "toca", selector="norm", ratio=0.5, ratio_schedule="constant", interval=4, spatial_bonus=None
    )
    if not wise(name):
        with pytest.raises(ValueError, match=f"{name} has no token-wise feed-forward"):
            dittocache.enable(model(name), toca)
        return
    net, chosen = entry(name).build(0), {}
    choose = Selection._choose

    def noting(self: Selection, j: int, x: Tensor, held: Tensor, count: int) -> Tensor:
        taken = choose(self, j, x, held, count)
        if not self.forward.turns.get(j):
            chosen[self.attachment.columns[j].name] = taken
        return taken

    monkeypatch.setattr(Selection, "_choose", noting)
    given = entry(name).inputs(net)
    with torch.no_grad(), dittocache.enable(net, toca) as cache, cache.run(5):
        for k in range(5):
            cache.step(k)
            prediction(net, given)
    assert chosen
    for site, taken in chosen.items():
        if name not in FLEX:  # where nothing can be kept apart, but text comes through cross-attention alone
            assert not traced(name).text[site][taken].any(), (site, traced(name).text[site], taken)


def test_where_text_is_told_from_the_rest():
    """Else the test before could not fail."""
    first = [*range(7)]
    for name, site, expected in (
        ("CogVideoXTransformer3DModel", "transformer_blocks.0.ff", first),
        ("AuraFlowTransformer2DModel", "single_transformer_blocks.0.ff", [*range(8, 15)]),
        ("Lumina2Transformer2DModel", "layers.0.feed_forward", first),
        ("HiDreamImageTransformer2DModel", "single_stream_blocks.0.block.ff_i", [*range(16, 21)]),
        ("FluxTransformer2DModel", "transformer_blocks.0.ff", []),
        ("FluxTransformer2DModel", "transformer_blocks.0.ff_context", first),
        ("FluxTransformer2DModel", "single_transformer_blocks.0.proj_out", first),
    ):
        assert traced(name).text[site].nonzero().flatten().tolist() == expected, (name, site)


# ---- blocks in turn, blocks that serve others -----------------------------------------------------------------------
STACK = Recipe(where="stack", keeps="change", when=Every(2, "start"))
TURNS = sorted(name for name in ZOO if "+" in STACKS[name])


def cached(name: str, recipe: Any, steps: int, net: Any = None, **given: Any) -> tuple[list[Tensor], Any]:
    """Predictions of steps that move on, and the trace."""
    net = net or model(name)
    with torch.no_grad(), dittocache.enable(net, recipe) as cache:
        with cache.run(steps):
            out = []
            for k in range(steps):
                cache.step(k)
                out.append(prediction(net, entry(name).inputs(net, k=k, **given)))
        return out, cache.trace


def listen(net: nn.Module, path: str, note: list[Any]) -> Any:
    return net.get_submodule(path).register_forward_hook(
        lambda module, args, kwargs, output: note.append((main(args, kwargs), output)), with_kwargs=True
    )


@pytest.mark.parametrize(
    ("name", "first", "last", "arrange"),
    [
        (
            "LatteTransformer3DModel",
            "transformer_blocks.0",
            "temporal_transformer_blocks.2",
            lambda x: torch.stack([x[b * 3 + f] for b in range(2) for f in range(3)]).view(2, 3, 4, -1)
            .permute(0, 2, 1, 3).reshape(8, 3, -1),
        ),
        (
            "UVit2DModel",
            "down_block.res_blocks.0",
            "down_block.attention_blocks.2",
            lambda x: torch.stack([x[..., i, j] for i in range(4) for j in range(4)], 1),
        ),
    ],
)  # fmt: skip
def test_a_change_is_carried_to_the_layout_of_the_last_block(name, first, last, arrange):
    """On a reused step the last block hands on what entered the first, in its own layout, plus the change before."""
    net = entry(name).build(0)
    begun: list[Any] = []
    ended: list[Any] = []
    listen(net, first, begun)
    listen(net, last, ended)
    cached(name, STACK, 2, net)
    (x, _), (y, _) = begun[:2]
    before, after = ended[0][1], ended[1][1]
    assert (x - y).abs().max() > 1e-2
    torch.testing.assert_close(after, arrange(y) + before - arrange(x))


@pytest.mark.parametrize("name", [*TURNS, "ZImageTransformer2DModel"])
def test_samples_of_a_batch_go_their_own_ways(name):
    """A picture is computed at the steps at which it is computed alone, whatever is beside it."""

    @dataclass(frozen=True)
    class Alternate(When):
        """Every second step, by a property of the sample: even steps or odd ones."""

        border: float = 0.0
        head: int = 0

        def table(self, num_steps: int, sites: Any) -> Any:
            return np.full((num_steps, len(sites)), OPEN)

        def decide(self, look: Look, memory: dict[str, Any]) -> Any:
            if look.forced:
                memory["odd"] = look.state.double().flatten(1).std(1) > self.border
                stds.extend(look.state.double().flatten(1).std(1).tolist())
                return COMPUTE
            return (look.step + memory["odd"].long()) % 2 == 0

    for where, head in (("stack", 0), ("tail", 1)):
        stds: list[float] = []
        for j in (0, 1):  # what either is like
            cached(name, Recipe(where="stack", keeps="change", when=Alternate(head=head)), 1, batch=1, seed=j)
        recipe = Recipe(where=where, keeps="change", when=Alternate(sum(stds[:2]) / 2, head))
        (first, _), (second, _) = (cached(name, recipe, 5, batch=1, seed=j) for j in (0, 1))
        both, trace = cached(name, recipe, 5, batch=2)
        assert set(trace.table[1:, -1]) == {0.5}
        for k, row in enumerate(both):
            assert tiny.relative(row[: len(row) // 2], first[k]) < 1e-5, (where, k)
            assert tiny.relative(row[len(row) // 2 :], second[k]) < 1e-5, (where, k)


def vace(layers: list[int]) -> nn.Module:
    config = {k: v for k, v in model("WanVACETransformer3DModel").config.items() if not k.startswith("_")}
    return tiny.randomize(diffusers.WanVACETransformer3DModel(**config | {"vace_layers": layers}), 0)


def test_hints_are_passed_by_with_the_blocks_that_they_are_for():
    """Unless one is added behind the last block: then they are computed, and where they are passed by all is as were
    they not: the change is that of the blocks that carry the sample."""
    name, net, aside = "WanVACETransformer3DModel", vace([0, 2]), vace([0, 4])
    assert [(s.site.name, s.lead, s.main) for s in describe(net).stacks] == [("vace_blocks + blocks", 2, True)]
    assert [(s.site.name, s.lead, s.main) for s in describe(aside).stacks] == [
        ("vace_blocks", 0, False), ("blocks", 0, True),
    ]  # fmt: skip
    calls: list[Any] = []
    listen(net, "vace_blocks.1.attn1.to_q", calls)
    out, trace = cached(name, STACK, 2, net)
    assert len(calls) == 1 and trace.compute_fraction < 0.6
    layouts = {**LAYOUTS}
    try:
        LAYOUTS[name] = Layout(models=(name,), order=("vace_blocks", "blocks"))
        beside, _ = cached(name, STACK, 2, net)
    finally:
        LAYOUTS.clear()
        LAYOUTS.update(layouts)
    assert len(calls) == 3
    assert torch.equal(out[0], beside[0]) and tiny.relative(out[1], beside[1]) < 1e-6


def test_blocks_that_serve_others_are_no_steps_of_the_head():
    """The head of one block is the first that carries the sample; the decision falls with the second."""
    for name, first, second in (
        ("ConsisIDTransformer3DModel", "transformer_blocks.0", "transformer_blocks.1"),
        ("WanAnimateTransformer3DModel", "blocks.0", "blocks.1"),
    ):
        net = entry(name).build(0)
        calls: dict[str, list[Any]] = {}
        with torch.no_grad(), dittocache.enable(net, "fbcache", threshold=10.0) as cache, cache.run(3):
            inner = cache._attachments[0].position
            for block in (first, second):
                path = next(s.name for s in describe(net).sites if s.name.startswith(f"{block}."))
                listen(net, f"{path}.to_q", calls.setdefault(block, []))
            for k in range(3):
                cache.step(k)
                prediction(net, entry(name).inputs(net, k=k))
        assert inner[first] == 0 and inner[second] == 1
        assert len(calls[first]) == 3 and len(calls[second]) < 3, name


# ---- the embedding of the timestep ----------------------------------------------------------------------------------
TIMELESS = {
    "Cosmos3OmniTransformer": "added to the tokens",
    "DreamLiteTransformer2DModel": "of a U-Net, which adds it before",
    "MiniMaxMusic3Transformer1DModel": "a token",
    "OmniGenTransformer2DModel": "a token",
    "PriorTransformer": "a token",
    "RFD4ProteinaTransformer": "within the condition of every residue",
    "StableAudioDiTModel": "a token",
    "TransformerTemporalModel": "of a U-Net, which adds it before",
    "UVit2DModel": "there is none",
}


@every
def test_what_a_block_is_given_of_the_timestep(name):
    """It follows the timestep and nothing that changes along with it."""
    net, given, later = model(name), entry(name).inputs(model(name)), entry(name).inputs(model(name), k=4)
    stack = next(stack for stack in describe(net).stacks if stack.main)
    first = describe(net).blocks[stack.blocks[0]].module
    found: list[Tensor | None] = []
    handle = first.register_forward_pre_hook(lambda *call: found.append(_embedding(*call)), with_kwargs=True)
    with torch.no_grad():
        for keys in ((), entry(name).latents, entry(name).time):
            prediction(net, given | {key: later[key] for key in keys})
    handle.remove()
    if name in TIMELESS:
        assert found == [None] * 3
    else:
        plain, moved, timed = found
        assert torch.equal(plain, moved) and differ(plain, timed)


# ---- fused blocks ---------------------------------------------------------------------------------------------------
FUSED = sorted(name for name in ZOO if any(e.site.kind == "fused" for e in describe(model(name)).entries))
LONE = {"PRXTransformer2DModel", "MiniMaxMusic3Transformer1DModel", "UVit2DModel"}  # feed-forwards with mutes


def test_which_models_have_fused_blocks():
    assert [name.removesuffix("Model") for name in FUSED] == [
        "BriaFiboTransformer2D", "BriaTransformer2D", "ChromaTransformer2D", "Flux2Transformer2D", "FluxTransformer2D",
        "HunyuanImageTransformer2D", "HunyuanVideoFramepackTransformer3D", "HunyuanVideoTransformer3D",
        "LongCatImageTransformer2D", "MotifVideoTransformer3D", "OvisImageTransformer2D",
    ]  # fmt: skip


@pytest.mark.parametrize("name", [*FUSED, *sorted(LONE)])
def test_what_feeds_a_site_rests_while_it_is_reused(name, monkeypatch):
    """Moving inputs: the shortcut of a block equals its own code, and both skip all that they can."""
    fora, net = dittocache.recipe("fora", interval=2, anchor="start"), model(name)
    families = [block.family for block in describe(net).blocks if block.family.reuse_block]
    short, less = reused(name, fora)
    for family in families:
        for block in family.blocks:
            monkeypatch.setitem(FAMILIES, block, dataclasses.replace(family, reuse_block=None))
    plain, spent = reused(name, fora)
    with torch.no_grad():
        whole = tiny.count_flops(lambda: prediction(net, entry(name).inputs(net)))
    assert spent == whole - seen(name).covered  # nothing of the sites, nor of what feeds them
    assert less <= spent
    assert tiny.relative(short, plain) < 1e-6


def reused(name: str, recipe: Any) -> tuple[Tensor, float]:
    """The prediction of the second step, and what it takes."""
    net = model(name)
    with torch.no_grad(), dittocache.enable(net, recipe) as cache, cache.run(2):
        for k in range(2):
            cache.step(k)
            with FlopCounter() as counter:
                out = prediction(net, entry(name).inputs(net, k=k))
    return out, counter.total


@pytest.mark.parametrize("name", sorted({*FUSED} - {"Flux2Transformer2DModel"} | {"PRXTransformer2DModel"}))
def test_some_tokens_of_a_fused_site(name):
    """On inputs that never change, whatever is chosen equals what is kept."""
    toca = dittocache.recipe(
        "toca", selector="attention", ratio=0.5, ratio_schedule="constant", spatial_bonus=None, select_text=True
    )
    net, given = model(name), entry(name).inputs(model(name))
    with torch.no_grad():
        plain = prediction(net, given)
        with dittocache.enable(net, toca) as cache, cache.run(6):
            for k in range(6):
                cache.step(k)
                assert tiny.relative(prediction(net, given), plain) < 1e-5, k
    shares = cache.report().kinds
    assert 0 < shares.get("fused", shares["feed-forward"]) < 1


# ---- FLOPs ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "name",
    [
        "FluxTransformer2DModel", "SanaTransformer2DModel", "UVit2DModel", "WanTransformer3DModel",
        "NucleusMoEImageTransformer2DModel", "MochiTransformer3DModel", "RFD4ProteinaTransformer",
    ],
)  # fmt: skip
def test_flops_are_those_of_torch_s_counter(name):
    net, given = model(name), entry(name).inputs(model(name))
    with torch.no_grad():
        expected = tiny.count_flops(lambda: prediction(net, given))
        with FlopCounter() as counter:
            prediction(net, given)
    assert counter.total == expected
    with torch.inference_mode(), FlopCounter() as counter:
        prediction(net, given)
    assert counter.total == expected


def test_flex_attention_runs_and_counts_as_attention():
    """[batch, heads, tokens, channels] of queries, keys and values: two products of tokens x tokens x channels."""
    from torch.nn.attention.flex_attention import flex_attention

    q, k, v = torch.randn(3, 2, 4, 128, 16)
    with torch.no_grad():
        plain = flex_attention(q, k, v)
        with FlopCounter() as counter:
            counted = flex_attention(q, k, v)
        after = flex_attention(q, k, v)
    assert counter.total == 2 * 2 * 2 * 4 * 128 * 128 * 16
    assert torch.equal(plain, counted) and torch.equal(plain, after)


def test_a_block_may_be_given_a_slice_of_a_parameter():
    """Which torch's own counter cannot bear: its hooks ask for gradients."""
    name = "BriaFibo2Transformer2DModel"
    assert all(p.requires_grad for p in model(name).parameters())
    _, trace = cached(name, dittocache.recipe("fora", interval=2, anchor="start"), 2)
    assert trace.flops_full > 0


def test_linear_layers_of_experts_are_no_sites():
    """Which tokens an expert is given changes from step to step."""
    linears = [one.site.name for one in seen("HiDreamImageTransformer2DModel").described.linears]
    experts = [name for name, child in model("HiDreamImageTransformer2DModel").named_modules() if ".experts." in name]
    assert experts and not set(experts) & set(linears)
    assert any(".shared_experts." in name for name in linears)
