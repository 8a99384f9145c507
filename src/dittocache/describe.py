"""What a transformer is made of: its stacks of blocks, and in each block the sites whose output can be kept.

Discovery goes by the structure that all diffusers transformers share (lists of like blocks with attention and
feed-forward children); what it cannot see is registered per family in `models/`. A block of a registered family that is
in no list counts as a stack of one.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .plan import Site as Site  # models/ makes sites of its own

ReuseBlock = Callable[..., Any]
Carry = Callable[[Tensor, torch.Size], Tensor]


@dataclass(frozen=True)
class Family:
    """What discovery cannot find out about a class of blocks.

    Args:
        blocks: class names of the blocks.
        fused: for single-stream blocks whose last projection holds attention and feed-forward at once: path of that
            projection, whose output before the gate is the site.
        mutes: names of the modules that only feed the fused projection, and need not run when it is reused.
        reuse_block: `reuse_block(block, features, *inputs, **inputs) -> outputs`, the block when all its sites are
            reused: gates and additions, nothing else. `features` maps the site's path in the block to its tensors.
            Returns NotImplemented for inputs it does not cover. Optional.
        package: the package that the classes are from; a class of another one that bears the same name is not meant.
        ff_input: path of the norm whose input are the tokens of the feed-forward before norm and modulation.
        text: where text stands in one sequence with the image, in a joint attention or in all of the block, "first" or
            "last"; None: not known, or no text. Whatever else stands beside the sample's own tokens (registers, time,
            history) counts as text.
        splits: some tokens of the fused projection can be computed: all that its mutes do besides attention is
            token-wise.
        parts: (path, kind, mutes) of sites that discovery misses, or whose kind it gets wrong.
        whole: paths or classes of sites that are not token-wise, though others of their kind are: positions come with
            the tokens, tokens are mixed, or the layout is not [batch, tokens, channels]. "*": all of the block.
        twice: paths of feed-forwards that are called a second time, with the text.
        unused: paths of modules that the block holds, but never calls.
    """

    blocks: tuple[str, ...]
    fused: str | None = None
    mutes: tuple[str, ...] = ()
    reuse_block: ReuseBlock | None = None
    ff_input: Callable[[Any], str] | None = None
    package: str = "diffusers"
    text: str | None = None
    splits: bool = False
    parts: tuple[tuple[str, str, tuple[str, ...]], ...] = ()
    whole: tuple[str, ...] = ()
    twice: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()


FAMILIES: dict[str, Family] = {}


def register_family(family: Family) -> Family:
    """Makes a family known; later registrations win."""
    for name in family.blocks:
        FAMILIES[name] = family
    return family


@dataclass(frozen=True)
class Layout:
    """What discovery cannot find out about a class of transformers.

    Args:
        models: class names of the transformers.
        interleaved: groups of block lists that run in turn; a group is one stack. The blocks of a shorter list are
            spread evenly over the first; those of a `ModuleDict` follow on the block of the first that they are named
            after.
        carry: `carry(stream, shape) -> stream`, from the layout of the first list of a group to that of the last, whose
            blocks give that shape, where these differ. Optional.
        lead: `lead(model) -> ((list, list), ...)`: all blocks of the first list run before those of the second, and do
            nothing but serve them (control branches): together they are one stack. Optional.
        side: block lists that run beside the stacks that carry the sample (refiners of the text, control branches), or
            before them: never passed by.
        main: block lists that carry the sample, though they lie deeper, or have the name of one that runs beside.
        whole: no site is token-wise: tokens do not lie as [batch, tokens, channels], or text cannot be told from them.
        together: rows of the batch cannot be told apart in what the blocks are given: they are decided about as one.
        stream: position of the sample's tokens among what blocks and attentions are given.
        package: the package that the classes are from.
        order: children that hold the blocks, in order of execution, where they are defined in another.
        spans: `spans(model, description) -> spans or None`, in place of stacks and single blocks; it adds the blocks
            that they are made of to the description. None: this model is not of that kind after all. Optional.
    """

    models: tuple[str, ...]
    interleaved: tuple[tuple[str, ...], ...] = ()
    carry: Carry | None = None
    lead: Callable[[Any], tuple[tuple[str, str], ...]] | None = None
    side: tuple[str, ...] = ()
    main: tuple[str, ...] = ()
    whole: bool = False
    together: bool = False
    stream: int = 0
    package: str = "diffusers"
    order: tuple[str, ...] = ()
    spans: Callable[[Any, Description], list[Span] | None] | None = None


LAYOUTS: dict[str, Layout] = {}


def register_layout(layout: Layout) -> Layout:
    """Makes a class of transformers known; later registrations win."""
    for name in layout.models:
        LAYOUTS[name] = layout
    return layout


@dataclass
class SiteModule:
    """A site with the module whose output it is; `path` is relative to the block."""

    site: Site
    module: nn.Module
    path: str
    mutes: tuple[nn.Module, ...] = ()


@dataclass
class Block:
    """A block with its sites, as indices into `Description.columns`.

    `spans` are the columns of the spans that it belongs to, the widest first: its stack's, then its own. `reshapes`:
    its output is of another shape than its input, so that no stream can be handed through when it is passed by.
    `inner` are attentions in front of a fused site, for recipes about attention alone.
    """

    module: nn.Module
    name: str
    sites: tuple[int, ...]
    family: Family
    linears: tuple[int, ...] = ()
    spans: tuple[int, ...] = ()
    reshapes: bool = False
    inner: tuple[int, ...] = ()


@dataclass
class Span:
    """Blocks that can be passed by as a whole: a stack, a single block, or what lies below a skip branch of a U-Net.

    Attributes:
        site: its column, of kind `stack` or `block`; in a U-Net `deep`, `block`, `resnet` or `resample`.
        blocks: numbers of the blocks in `Description.blocks`, in order of execution.
        main: it carries the sample: `where="stack"` is about all main stacks together.
        lead: how many of its first blocks do nothing but serve the others.
        carry: see `Layout`.
    """

    site: Site
    blocks: tuple[int, ...]
    main: bool = True
    lead: int = 0
    carry: Carry | None = None


@dataclass
class Description:
    """The sites and blocks of a transformer, in order of execution."""

    model: str
    entries: list[SiteModule] = field(default_factory=list)
    blocks: list[Block] = field(default_factory=list)
    spans: list[Span] = field(default_factory=list)
    linears: list[SiteModule] = field(default_factory=list)
    together: bool = False  # see `Layout`, here as below
    stream: int = 0

    @property
    def stacks(self) -> list[Span]:
        return [span for span in self.spans if span.site.kind == "stack"]

    @property
    def output(self) -> Site:
        """The column of the whole network: what it returns."""
        last = len(self.blocks) - 1
        return Site("output", "model", "", last, len(self.blocks), last)

    @property
    def sites(self) -> list[Site]:
        """Module sites first, then one site for every stack of blocks."""
        return [entry.site for entry in self.entries] + [span.site for span in self.stacks]

    @property
    def columns(self) -> list[Site]:
        """All that a plan can have a column for: the sites, other spans, the whole network, single linear layers."""
        blocks = [span.site for span in self.spans[len(self.stacks) :]]
        return [*self.sites, *blocks, self.output, *(entry.site for entry in self.linears)]

    def to_dict(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "stacks": [{"name": s.site.name, "blocks": len(s.blocks), "main": s.main} for s in self.stacks],
            "sites": [
                {
                    "name": e.site.name,
                    "kind": e.site.kind,
                    "block": e.site.block,
                    "class": type(e.module).__name__,
                    "tokenwise": e.site.tokenwise,
                }
                for e in self.entries
            ],
        }

    def __str__(self) -> str:
        inner = [block for block in self.blocks if block.sites]
        lines = [f"{self.model}: {len(self.entries)} sites in {len(inner)} blocks"]
        lists = [(s.site.name, [self.blocks[n] for n in s.blocks], s.main) for s in self.stacks]
        for name, members, main in lists or [("all", inner, True)] * bool(inner):
            classes = ", ".join(dict.fromkeys(type(b.module).__name__ for b in members))
            notes = ["with shortcut"] if members[0].family.reuse_block else []
            notes += [] if main else ["beside the sample"]
            noted = f" ({', '.join(notes)})" if notes else ""
            lines.append(f"  {name}: {len(members)} x {classes}{noted}")
            rows: dict[tuple[str, str, str, str], int] = {}
            for e in (self.entries[j] for b in members for j in b.inner + b.sites):
                row = e.path, e.site.kind, type(e.module).__name__, "token-wise" if e.site.tokenwise else ""
                rows[row] = rows.get(row, 0) + 1
            widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
            for row, count in rows.items():
                cells = "  ".join(word.ljust(width) for word, width in zip(row, widths, strict=True))
                lines.append(f"    {cells}  x {count}")
        if not lists:
            lines += self._spans()
        return "\n".join(lines)

    def _spans(self) -> list[str]:
        """The spans of a model without stacks: single ones by their kind, the others one by one."""
        lines: list[str] = []
        singles: dict[str, int] = {}
        for span in self.spans:
            first, last = (self.blocks[n] for n in (span.blocks[0], span.blocks[-1]))
            if first is last and span.site.name == first.name:
                key = f"{span.site.kind}: {{}} x {type(first.module).__name__}"
                singles[key] = singles.get(key, 0) + 1
            else:
                lines.append(f"  {span.site.name}: {len(span.blocks)} modules, {first.name} to {last.name}")
        return [*(f"  {key.format(count)}" for key, count in singles.items()), *lines]


def describe(module: nn.Module) -> Description:
    """Finds the sites of a transformer.

    Args:
        module: a diffusers transformer or U-Net, a pipeline with one, or any module with lists of blocks that hold
            attention or feed-forward parts.

    Returns:
        A `Description`; printing it shows a table.

    Raises:
        TypeError: not a module.
        ValueError: no repeated blocks with attention or feed-forward parts were found.
    """
    if not isinstance(module, nn.Module):
        module = getattr(module, "transformer", None) or getattr(module, "unet", module)
    if not isinstance(module, nn.Module):
        raise TypeError(f"describe needs a torch module; got {type(module).__name__}")
    layout = _layout(module)
    description = Description(type(module).__name__, together=layout.together, stream=layout.stream)
    found = _lists(module, layout)
    modules = [id(block) for blocks in found.values() for block in blocks.values()]
    if len(set(modules)) < len(modules):
        raise ValueError(f"{type(module).__name__} uses one of its blocks several times, which is not supported")
    leading = dict(layout.lead(module)) if layout.lead is not None else {}
    for name, members in _in_turn(module, found, layout, leading).items():
        first = len(description.blocks)
        for listed, l, block_name in members:
            _add(description, layout, found[listed][block_name], block_name, (listed, l, len(found[listed])))
        last = len(description.blocks) - 1
        site = Site(name, "stack", name, last - first, last - first + 1, last)
        lead = sum(listed in leading for listed, _, _ in members)
        carry = layout.carry if len({listed for listed, _, _ in members[lead:]}) > 1 else None
        main = not _beside(members[lead][0], layout)
        description.spans.append(Span(site, tuple(range(first, last + 1)), main, lead, carry))
    own = layout.spans(module, description) if layout.spans is not None else None
    if not description.entries and not own:
        raise ValueError(
            f"{type(module).__name__} has no list of blocks with attention or feed-forward parts: nothing to cache"
        )
    if not any(span.main for span in description.spans):  # nothing but lists deep inside, as in a U-Net
        description.spans = [dataclasses.replace(span, main=True) for span in description.spans]
    description.spans = description.spans if own is None else own
    for stack in description.stacks:
        for l, n in enumerate(stack.blocks):
            if len(stack.blocks) > 1:  # a lone block is its stack
                site = Site(description.blocks[n].name, "block", stack.site.name, l, len(stack.blocks), n)
                description.spans.append(Span(site, (n,), stack.main))
    for j, span in enumerate(description.spans, len(description.entries)):
        for n in span.blocks:
            description.blocks[n].spans += (j,)
    for found_block in description.blocks:
        found_linears = [part for j in found_block.sites for part in _linears(description.entries[j], found_block)]
        first = len(description.columns)
        found_block.linears = tuple(range(first, first + len(found_linears)))
        description.linears += found_linears
    return description


def _add(description: Description, layout: Layout, block: nn.Module, name: str, place: tuple[str, int, int]) -> None:
    """Adds a block with its sites; place: the list that it belongs to, its index there, and the length of the list."""
    family, order = _family(block), len(description.blocks)
    indices, inner = [], []
    for path, kind, child, mutes in _parts(block):
        indices.append(len(description.entries))
        tokenwise = not layout.whole and _tokenwise(path, kind, child, family)
        if TEXTS.search(place[0]):  # a list of blocks for the text
            kind = "context-feed-forward" if kind == "feed-forward" else kind
            tokenwise = tokenwise and kind != "cross-attention"
        site = Site(f"{name}.{path}", kind, *place, order, tokenwise)
        description.entries.append(SiteModule(site, child, path, mutes))
    for path in family.mutes:
        child = getattr(block, path)
        if child is not None and is_attention(child):
            inner.append(len(description.entries))
            site = Site(f"{name}.{path}", _attention_kind(path, child), *place, order)
            description.entries.append(SiteModule(site, child, path))
    description.blocks.append(Block(block, name, tuple(indices), family, inner=tuple(inner)))


def _layout(module: nn.Module) -> Layout:
    for cls in type(module).__mro__:
        layout = LAYOUTS.get(cls.__name__)
        if layout is not None and cls.__module__.split(".")[0] == layout.package:
            return layout
    return Layout(models=(type(module).__name__,))


def _lists(module: nn.Module, layout: Layout) -> dict[str, dict[str, nn.Module]]:
    """All lists of blocks in order of execution: dotted path -> blocks by theirs. What a layout names need hold no
    site, and may be missing."""
    found = dict(_stacks(module, ""))
    there = {path: list(child.named_children()) for path, child in module.named_modules()}
    for name in (name for group in layout.interleaved for name in group if there.get(name)):
        found = {path: blocks for path, blocks in found.items() if not path.startswith(f"{name}.")}
        found[name] = {f"{name}.{key}": block for key, block in there[name]}
    return dict(sorted(found.items(), key=lambda one: _place(one[0], layout)))


def _place(name: str, layout: Layout) -> int:
    """Where a list of blocks stands in the order of execution; of a model without a stated one, where it is defined."""
    first = name.split(".")[0]
    return layout.order.index(first) if first in layout.order else -1


def _in_turn(
    module: nn.Module, found: dict[str, dict[str, nn.Module]], layout: Layout, leading: dict[str, str]
) -> dict[str, list[tuple[str, int, str]]]:
    """Stack name -> (list, index in it, block name) in order of execution; lists that run in turn are one stack."""
    lists = {name: [(name, l, block) for l, block in enumerate(blocks)] for name, blocks in found.items()}
    for group in layout.interleaved:
        there = [name for name in group if name in lists]
        first, *others = (lists.pop(name) for name in there)
        after: list[list[tuple[str, int, str]]] = [[one] for one in first]
        for members in others:
            named = isinstance(module.get_submodule(members[0][0]), nn.ModuleDict)
            every = -(-len(first) // len(members))
            for n, one in enumerate(members):
                after[int(one[2].rpartition(".")[2]) if named else n * every].append(one)
        lists[" + ".join(there)] = [one for row in after for one in row]
    for before, name in leading.items():
        lists[f"{before} + {name}"] = lists.pop(before) + lists.pop(name)
    return dict(sorted(lists.items(), key=lambda one: list(found).index(one[1][0][0])))


# in the names of lists that run beside the stacks that carry the sample
BESIDE = ("refiner", "control", "vace", "context", "cond", "text", "txt", "caption", "face", "embed")


def _beside(name: str, layout: Layout) -> bool:
    """Whether a list of blocks does not carry the sample: known of its model, or by its place and name."""
    if name in layout.side or name in layout.main:
        return name in layout.side
    return "." in name or any(word in name for word in BESIDE)


def _family(block: nn.Module) -> Family:
    return _registered(block) or Family(blocks=(type(block).__name__,))


def _registered(block: nn.Module) -> Family | None:
    for cls in type(block).__mro__:
        family = FAMILIES.get(cls.__name__)
        if family is not None and cls.__module__.split(".")[0] == family.package:
            return family
    return None


def _stacks(module: nn.Module, prefix: str) -> Iterator[tuple[str, dict[str, nn.Module]]]:
    """Outermost lists of which every member holds a site, and lone blocks of registered families, with their blocks.

    All are named by their dotted paths; a lone block and its stack of one share theirs.
    """
    for name, child in module.named_children():
        path = f"{prefix}{name}"
        if isinstance(child, nn.ModuleList) and len(child) and all(_is_block(block) for block in child):
            yield path, {f"{path}.{l}": block for l, block in enumerate(child)}
        elif not isinstance(module, nn.ModuleList) and _registered(child) and _parts(child):
            yield path, {path: child}
        elif not is_attention(child):
            yield from _stacks(child, f"{path}.")


def _is_block(module: nn.Module) -> bool:
    """Whether it holds a site; a list inside of a list is never called itself."""
    return not isinstance(module, nn.ModuleList) and bool(_parts(module))


def _parts(block: nn.Module) -> list[tuple[str, str, nn.Module, tuple[nn.Module, ...]]]:
    """(path, kind, module, muted modules) of the sites of a block: attentions, then the others, each as defined."""
    family = _family(block)
    stated = {path: (kind, mutes) for path, kind, mutes in family.parts}
    if family.fused is not None:
        stated = {family.fused: ("fused", family.mutes), **stated}
        found = {}
    else:
        found = {path: kind for path, kind, _ in _walk(block, "") if path not in (*stated, *family.unused)}
    parts = {path: (kind, ()) for path, kind in found.items()} | stated
    defined = {path: n for n, (path, _) in enumerate(block.named_modules())}
    order = sorted(parts, key=lambda path: ("attention" not in parts[path][0], defined[path]))
    return [
        (
            path,
            parts[path][0],
            block.get_submodule(path),
            tuple(getattr(block, m) for m in parts[path][1] if getattr(block, m) is not None),
        )
        for path in order
    ]


def _walk(module: nn.Module, prefix: str) -> Iterator[tuple[str, str, nn.Module]]:
    for name, child in module.named_children():
        path = f"{prefix}{name}"
        if is_attention(child):
            yield path, _attention_kind(path, child, module), child
        elif _is_feed_forward(name, child):
            yield path, "context-feed-forward" if TEXT.search(name) else "feed-forward", child
        elif not any(word in name for word in ("norm", "emb")) and not _is_list(child):
            yield from _walk(child, f"{path}.")


def _is_list(module: nn.Module) -> bool:
    """Modules of one class: blocks of their own, or experts; others are parts of the block that holds them."""
    return isinstance(module, nn.ModuleList) and len({type(member) for member in module}) < 2


# what a linear layer does, by its name in an attention or feed-forward module
ROLES = {
    "to_q": "q", "to_k": "k", "to_v": "v", "qkv": "qkv", "to_qkv": "qkv", "to_out.0": "proj", "proj": "proj",
    "net.0.proj": "fc1", "net.2": "fc2", "fc1": "fc1", "fc2": "fc2",
}  # fmt: skip


def _linears(entry: SiteModule, block: Block) -> Iterator[SiteModule]:
    """The single linear layers inside of a module, in order of definition; a fused site is one itself, and has none.

    Those of experts are none: which tokens they are given changes from step to step.
    """
    site, named = entry.site, dict(entry.module.named_modules())
    lists = {f"{name}.": list(child.children()) for name, child in named.items() if _is_list(child)}
    experts = [name for name, members in lists.items() if len(members) > 1 and not isinstance(members[0], nn.Linear)]
    for name, child in named.items():
        if isinstance(child, nn.Linear) and name and "lora_" not in name and not name.startswith(tuple(experts)):
            # an adapter (peft) wraps a layer: what it adds is computed as before, around the kept part
            name = name.replace(".base_layer", "")
            path = f"{entry.path}.{name}"
            of_block = f"{block.name}.{path}"
            linear = Site(of_block, ROLES.get(name, "linear"), site.stack, site.block, site.depth, site.order)
            yield SiteModule(linear, child, path)


# what a projection inside of an attention makes, by a word of its name
MADE = {"q": "q", "query": "q", "k": "k", "key": "k", "v": "v", "value": "v", "kv": "kv", "qkv": "qkv"}


def is_attention(module: nn.Module) -> bool:
    """By structure: its children project to queries, keys and values, on their own or several at once."""
    names = [name.split("_") for name, _ in module.named_children() if "norm" not in name]
    made = {letter for words in names for word in words for letter in MADE.get(word, "")}
    return made == {"q", "k", "v"} or isinstance(module, nn.MultiheadAttention)


def _attention_kind(path: str, module: nn.Module, parent: nn.Module | None = None) -> str:
    """Cross-attention by what it says of itself, by name, or by a class around it; the second of a block by custom."""
    name, said = path.rpartition(".")[2], getattr(module, "is_cross_attention", None)
    around = f"{name} {type(module).__name__} {type(parent).__name__}".lower()
    if "self" in name:
        cross = False
    elif "cross" in around or "_to_" in name:
        cross = True
    else:
        cross = bool(said) if said is not None else bool(re.search(r"attn_?2$", name))
    return "cross-attention" if cross else "attention"


# in the name of a feed-forward, of its class, of one that is for the text, and of lists of blocks that are
FEED_FORWARD = re.compile(r"(^|_)(ff|ffn|mlp|moe|feed_forward|transition)(_|$)")
FEED_FORWARDS = re.compile("FeedForward|FFN|Mlp|MLP|MoE|GLU|Transition|DenseGated")
TEXT = re.compile(r"context|(^|_)(te?xt|t)(_|$)")
TEXTS = re.compile(r"context|te?xt|caption|token_refiner|perceiver")


def _is_feed_forward(name: str, module: nn.Module) -> bool:
    """Two or more layers under the name or the class of a feed-forward."""
    layers = sum(isinstance(m, (nn.Linear, nn.modules.conv._ConvNd)) for m in module.modules())
    return layers >= 2 and bool(FEED_FORWARD.search(name) or FEED_FORWARDS.search(type(module).__name__))


def _tokenwise(path: str, kind: str, module: nn.Module, family: Family) -> bool:
    """Whether some tokens of a module can be computed on their own: nothing in it mixes them.

    Feed-forwards without convolutions and norms over tokens, queries of a cross-attention, and fused projections of
    families that say so.
    """
    if any(word in ("*", path, type(module).__name__) for word in family.whole):
        return False
    if kind == "fused":
        return family.splits
    if kind == "cross-attention" and (getattr(module, "spatial_norm", None) or getattr(module, "group_norm", None)):
        return False
    return kind != "attention" and not any(
        "Conv" in type(m).__name__ or isinstance(m, (nn.GroupNorm, nn.modules.batchnorm._BatchNorm))
        for m in module.modules()
    )
