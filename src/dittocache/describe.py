"""What a transformer is made of: its stacks of blocks, and in each block the sites whose output can be kept.

Discovery goes by the structure that all diffusers transformers share (lists of like blocks with attention and
feed-forward children); what it cannot see is registered per family in `models/`. A block of a registered family that is
in no list counts as a stack of one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from .plan import Site

ReuseBlock = Callable[..., Any]


@dataclass(frozen=True)
class Family:
    """What discovery cannot find out about a class of blocks.

    Args:
        blocks: class names of the blocks.
        fused: for single-stream blocks whose last projection holds attention and feed-forward at once: path of that
            projection, whose output before the gate is the site.
        mutes: paths of the modules that only feed the fused projection, and need not run when it is reused.
        reuse_block: `reuse_block(block, features, *inputs, **inputs) -> outputs`, the block when all its sites are
            reused: gates and additions, nothing else. `features` maps the site's path in the block to its tensors.
            Returns NotImplemented for inputs it does not cover. Optional.
        package: the package that the classes are from; a class of another one that bears the same name is not meant.
        ff_input: path of the norm whose input are the tokens of the feed-forward before norm and modulation.
    """

    blocks: tuple[str, ...]
    fused: str | None = None
    mutes: tuple[str, ...] = ()
    reuse_block: ReuseBlock | None = None
    ff_input: Callable[[Any], str] | None = None
    package: str = "diffusers"


FAMILIES: dict[str, Family] = {}


def register_family(family: Family) -> Family:
    """Makes a family known; later registrations win."""
    for name in family.blocks:
        FAMILIES[name] = family
    return family


@dataclass
class SiteModule:
    """A site with the module whose output it is; `path` is relative to the block."""

    site: Site
    module: nn.Module
    path: str
    mutes: tuple[nn.Module, ...] = ()


@dataclass
class Block:
    """A block with its sites, as indices into `Description.columns`; `stack` is the index of its stack's site."""

    module: nn.Module
    name: str
    sites: tuple[int, ...]
    stack: int
    first: bool
    last: bool
    family: Family
    linears: tuple[int, ...] = ()


@dataclass
class Description:
    """The sites and blocks of a transformer, in order of execution."""

    model: str
    entries: list[SiteModule] = field(default_factory=list)
    blocks: list[Block] = field(default_factory=list)
    stacks: list[Site] = field(default_factory=list)
    linears: list[SiteModule] = field(default_factory=list)

    @property
    def sites(self) -> list[Site]:
        """Module sites first, then one site for every stack of blocks."""
        return [entry.site for entry in self.entries] + self.stacks

    @property
    def columns(self) -> list[Site]:
        """All that a plan can have a column for: the sites, then the single linear layers inside of modules."""
        return self.sites + [entry.site for entry in self.linears]

    def to_dict(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "stacks": [{"name": s.name, "blocks": s.depth} for s in self.stacks],
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
        lines = [f"{self.model}: {len(self.entries)} sites in {len(self.blocks)} blocks"]
        for stack in self.stacks:
            members = [b for b in self.blocks if self.sites[b.stack].name == stack.name]
            classes = ", ".join(dict.fromkeys(type(b.module).__name__ for b in members))
            shortcut = " (with shortcut)" if members[0].family.reuse_block else ""
            lines.append(f"  {stack.name}: {stack.depth} x {classes}{shortcut}")
            seen: dict[tuple[str, str, str, bool], int] = {}
            for j in (j for b in members for j in b.sites):
                e = self.entries[j]
                key = (e.path, e.site.kind, type(e.module).__name__, e.site.tokenwise)
                seen[key] = seen.get(key, 0) + 1
            for (path, kind, cls, tokenwise), count in seen.items():
                lines.append(f"    {path:<14}{kind:<22}{cls:<24}{'token-wise' if tokenwise else '':<12}x {count}")
        return "\n".join(lines)


def describe(module: nn.Module) -> Description:
    """Finds the sites of a transformer.

    Args:
        module: a diffusers transformer, a pipeline with one, or any module with lists of blocks that hold attention or
            feed-forward parts.

    Returns:
        A `Description`; printing it shows a table.

    Raises:
        TypeError: not a module.
        ValueError: no repeated blocks with attention or feed-forward parts were found.
    """
    module = getattr(module, "transformer", module) if not isinstance(module, nn.Module) else module
    if not isinstance(module, nn.Module):
        raise TypeError(f"describe needs a torch module; got {type(module).__name__}")
    description = Description(type(module).__name__)
    found = [(name, blocks, [_parts(b) for b in blocks.values()]) for name, blocks in _stacks(module, "")]
    modules = [id(block) for _, blocks, _ in found for block in blocks.values()]
    if len(set(modules)) < len(modules):
        raise ValueError(f"{type(module).__name__} uses one of its blocks several times, which is not supported")
    order, total = 0, sum(len(part) for _, _, parts in found for part in parts)
    for name, blocks, parts in found:
        stack = total + len(description.stacks)
        for l, ((block_name, block), part) in enumerate(zip(blocks.items(), parts, strict=True)):
            indices = []
            for path, kind, child, mutes in part:
                indices.append(len(description.entries))
                tokenwise = kind.endswith("feed-forward") and _tokenwise(child)
                site = Site(f"{block_name}.{path}", kind, name, l, len(blocks), order, tokenwise)
                description.entries.append(SiteModule(site, child, path, mutes))
            description.blocks.append(
                Block(block, block_name, tuple(indices), stack, l == 0, l == len(blocks) - 1, _family(block))
            )
            order += 1
        description.stacks.append(Site(name, "stack", name, len(blocks) - 1, len(blocks), order - 1))
    for found_block in description.blocks:
        found_linears = [part for j in found_block.sites for part in _linears(description.entries[j], found_block)]
        first = len(description.sites) + len(description.linears)
        found_block.linears = tuple(range(first, first + len(found_linears)))
        description.linears += found_linears
    if not description.entries:
        raise ValueError(
            f"{type(module).__name__} has no list of blocks with attention or feed-forward parts: nothing to cache"
        )
    return description


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
        if isinstance(child, nn.ModuleList) and len(child) and all(_parts(block) for block in child):
            yield path, {f"{path}.{l}": block for l, block in enumerate(child)}
        elif not isinstance(module, nn.ModuleList) and _registered(child) and _parts(child):
            yield path, {path: child}
        elif not _is_attention(child):
            yield from _stacks(child, f"{path}.")


def _parts(block: nn.Module) -> list[tuple[str, str, nn.Module, tuple[nn.Module, ...]]]:
    """(path, kind, module, muted modules) of the sites of a block, in order of definition."""
    family = _family(block)
    if family.fused is not None:
        mutes = tuple(block.get_submodule(path) for path in family.mutes)
        return [(family.fused, "fused", block.get_submodule(family.fused), mutes)]
    return [(path, kind, child, ()) for path, kind, child in _walk(block, "")]


def _walk(module: nn.Module, prefix: str) -> Iterator[tuple[str, str, nn.Module]]:
    for name, child in module.named_children():
        path = f"{prefix}{name}"
        if _is_attention(child):
            cross = getattr(child, "is_cross_attention", False) or name in ("cross_attn", "cross_attention")
            yield path, "cross-attention" if cross else "attention", child
        elif _is_feed_forward(name, child):
            yield path, "context-feed-forward" if "context" in name else "feed-forward", child
        elif not isinstance(child, nn.ModuleList) and not any(w in name for w in ("norm", "emb")):
            yield from _walk(child, f"{path}.")


# what a linear layer does, by its name in an attention or feed-forward module
ROLES = {
    "to_q": "q", "to_k": "k", "to_v": "v", "qkv": "qkv", "to_qkv": "qkv", "to_out.0": "proj", "proj": "proj",
    "net.0.proj": "fc1", "net.2": "fc2", "fc1": "fc1", "fc2": "fc2",
}  # fmt: skip


def _linears(entry: SiteModule, block: Block) -> Iterator[SiteModule]:
    """The single linear layers inside of a module, in order of definition; a fused site is one itself, and has none."""
    site = entry.site
    for name, child in entry.module.named_modules():
        if isinstance(child, nn.Linear) and name and "lora_" not in name:
            # an adapter (peft) wraps a layer: what it adds is computed as before, around the kept part
            name = name.replace(".base_layer", "")
            path = f"{entry.path}.{name}"
            of_block = f"{block.name}.{path}"
            linear = Site(of_block, ROLES.get(name, "linear"), site.stack, site.block, site.depth, site.order)
            yield SiteModule(linear, child, path)


def _is_attention(module: nn.Module) -> bool:
    """diffusers' Attention, its AttentionModuleMixin classes, and look-alikes with their projections."""
    projections = ("to_q", "to_qkv", "qkv", "q_proj")
    return "Att" in type(module).__name__ and any(hasattr(module, name) for name in projections)


def _is_feed_forward(name: str, module: nn.Module) -> bool:
    named = name in ("ff", "ff_context", "ffn", "mlp", "feed_forward", "txt_mlp", "img_mlp")
    classed = any(word in type(module).__name__ for word in ("FeedForward", "Mlp", "MLP", "FFN"))
    linears = sum(isinstance(m, nn.Linear) for m in module.modules())
    return (named or classed) and linears >= 2


def _tokenwise(module: nn.Module) -> bool:
    """No part of a feed-forward mixes tokens: no convolutions, no norms over tokens."""
    return not any(
        "Conv" in type(m).__name__ or isinstance(m, (nn.GroupNorm, nn.modules.batchnorm._BatchNorm))
        for m in module.modules()
    )
