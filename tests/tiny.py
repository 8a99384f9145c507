"""Tiny random transformers of four families, and honest sampling loops around them.

Everything is small enough for milliseconds a forward; weights are random, those that are trained from zero included, so
that every gate is open and a wrongly reused feature shows.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    DiTTransformer2DModel,
    FluxTransformer2DModel,
    PixArtTransformer2DModel,
)
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from dittocache import clock
from dittocache.bundled.pipeline import GlyphsPipeline
from dittocache.models.uvit import UViT

TEXT = 7  # text tokens of PixArt and FLUX; prime, so that nothing fits by accident
DTYPE = torch.float32


def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    """Random weights everywhere, scaled so that activations keep their size; switched to evaluation."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim > 1:
                p.copy_(torch.randn(p.shape, generator=generator) / p[0].numel() ** 0.5)
            elif "norm" in name and name.endswith("weight"):
                p.copy_(1 + 0.1 * torch.randn(p.shape, generator=generator))
            else:
                p.copy_(0.1 * torch.randn(p.shape, generator=generator))
    return model.eval()


def dit(seed: int = 0, **config: Any) -> nn.Module:
    """3 blocks, 16 tokens of 16 channels."""
    config = {
        "in_channels": 4,
        "out_channels": 4,
        "sample_size": 8,
        "num_embeds_ada_norm": 10,
        "num_layers": 3,
    } | config
    return randomize(DiTTransformer2DModel(num_attention_heads=2, attention_head_dim=8, patch_size=2, **config), seed)


def pixart(seed: int = 0, **config: Any) -> nn.Module:
    """3 blocks with cross-attention to 7 text tokens, 16 tokens of 16 channels."""
    config = {"num_layers": 3} | config
    return randomize(
        PixArtTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=8,
            in_channels=4,
            out_channels=4,
            sample_size=8,
            patch_size=2,
            cross_attention_dim=16,
            caption_channels=12,
            norm_num_groups=4,
            **config,
        ),
        seed,
    )


def flux(seed: int = 0, **config: Any) -> nn.Module:
    """2 dual-stream and 2 single-stream blocks, 16 image and 7 text tokens of 32 channels."""
    config = {"num_layers": 2, "num_single_layers": 2} | config
    return randomize(
        FluxTransformer2DModel(
            patch_size=1,
            in_channels=4,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=12,
            pooled_projection_dim=10,
            axes_dims_rope=(4, 4, 8),
            **config,
        ),
        seed,
    )


def uvit(seed: int = 0, **config: Any) -> nn.Module:
    """3 blocks, the last with a long skip, 16 patches, time and label of 32 channels."""
    config = {"img_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 11} | config
    return randomize(UViT(**config), seed)


BUILDERS: dict[str, Callable[..., nn.Module]] = {"dit": dit, "pixart": pixart, "flux": flux, "uvit": uvit}


def build(name: str, seed: int = 0) -> nn.Module:
    """One of the four by name, or the transformer of the bundled pipeline."""
    if name == "glyphs":
        from dittocache import bundled

        return bundled.load("glyphs").transformer
    return BUILDERS[name](seed)


def pipeline(seed: int = 0, transformer: nn.Module | None = None, scheduler: Any = None) -> GlyphsPipeline:
    """The bundled pipeline's class around a tiny random DiT."""
    transformer = transformer or dit(seed, in_channels=1, out_channels=1, num_embeds_ada_norm=36)
    pipe = GlyphsPipeline(transformer=transformer, scheduler=scheduler or DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe: Any, steps: int = 6, labels: Any = "AB", guidance: float = 1.5, seed: int = 3, **kwargs: Any) -> Tensor:
    """Pictures of a `GlyphsPipeline`, one seed each."""
    generators = [torch.Generator().manual_seed(seed + n) for n in range(len(labels))]
    return pipe(
        labels, num_inference_steps=steps, guidance_scale=guidance, generator=generators, output_type="pt", **kwargs
    ).images


# ---- inputs ---------------------------------------------------------------------------------------------------------
def _is_flux(model: nn.Module) -> bool:
    return isinstance(model, FluxTransformer2DModel)


def latents(model: nn.Module, batch: int = 2, seed: int = 0, size: int | None = None) -> Tensor:
    """Start noise; `size` is the side in pixels (DiT, PixArt; patches are 2 wide) or in tokens (FLUX)."""
    generator = torch.Generator().manual_seed(1000 + seed)
    if _is_flux(model):
        return torch.randn(batch, (size or 4) ** 2, model.config.in_channels, generator=generator)
    if isinstance(model, UViT):
        return torch.randn(batch, model.in_chans, model.img_size, model.img_size, generator=generator)
    side = size or model.config.sample_size
    return torch.randn(batch, model.config.in_channels, side, side, generator=generator)


def condition(model: nn.Module, batch: int = 2, seed: int = 0) -> dict[str, Tensor]:
    """What the model is conditioned on; other seeds are other prompts (seed -1: the unconditional one)."""
    generator = torch.Generator().manual_seed(2000 + seed)
    if isinstance(model, DiTTransformer2DModel):
        classes = model.config.num_embeds_ada_norm
        if seed == -1:
            return {"class_labels": torch.full((batch,), classes)}
        return {"class_labels": torch.randint(classes, (batch,), generator=generator)}
    if isinstance(model, UViT):
        null = model.num_classes - 1
        return {"y": torch.full((batch,), null) if seed == -1 else torch.randint(null, (batch,), generator=generator)}
    text = torch.randn(batch, TEXT, 12, generator=generator)
    if _is_flux(model):
        return {"encoder_hidden_states": text, "pooled_projections": torch.randn(batch, 10, generator=generator)}
    return {"encoder_hidden_states": text}


def inputs(model: nn.Module, x: Tensor, t: Any, given: dict[str, Tensor]) -> dict[str, Any]:
    """Keyword arguments of one forward at latents `x` and timestep `t` of 0 .. 1000."""
    t = torch.as_tensor(t, dtype=torch.float32).expand(len(x))
    if isinstance(model, UViT):
        return {"x": x, "timesteps": t, **given}
    if _is_flux(model):
        side = round(x.shape[1] ** 0.5)
        ids = torch.zeros(x.shape[1], 3)
        ids[:, 1], ids[:, 2] = torch.arange(x.shape[1]) // side, torch.arange(x.shape[1]) % side
        return {"hidden_states": x, "timestep": t / 1000, "img_ids": ids, "txt_ids": torch.zeros(TEXT, 3), **given}
    extra = (
        {"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}} if "encoder_hidden_states" in given else {}
    )
    return {"hidden_states": x, "timestep": t.long(), **given, **extra}


def call(model: nn.Module, kwargs: dict[str, Any]) -> Tensor:
    """The prediction of one forward."""
    return model(**kwargs) if isinstance(model, UViT) else model(**kwargs, return_dict=False)[0]


def step(
    model: nn.Module, k: int, steps: int = 8, batch: int = 2, seed: int = 0, size: int | None = None
) -> dict[str, Any]:
    """Inputs of step k of a run: latents that drift slowly, a falling timestep. Always step 0: a frozen input."""
    start, drift = latents(model, batch, seed, size), latents(model, batch, seed + 50, size)
    angle = torch.tensor(0.8 * k / steps)
    x = start * angle.cos() + drift * angle.sin()
    return inputs(model, x, 999 - 999 * k // steps, condition(model, batch, seed))


# ---- sampling -------------------------------------------------------------------------------------------------------
def predict(model: nn.Module, x: Tensor, t: Any, guidance: str = "none", seed: int = 0, scale: float = 2.0) -> Tensor:
    """One step's prediction: `none`, `batched` (one forward of both halves) or `separate` (two forwards) guidance."""
    if guidance == "none":
        return call(model, inputs(model, x, t, condition(model, len(x), seed)))
    yes, no = condition(model, len(x), seed), condition(model, len(x), -1)
    if guidance == "batched":
        both = {name: torch.cat([yes[name], no[name]]) for name in yes}
        conditional, unconditional = call(model, inputs(model, torch.cat([x, x]), t, both)).chunk(2)
    else:
        conditional, unconditional = (call(model, inputs(model, x, t, given)) for given in (yes, no))
    return unconditional + scale * (conditional - unconditional)


def sample(
    model: nn.Module,
    scheduler: Any = None,
    steps: int = 7,
    batch: int = 2,
    guidance: str = "none",
    seed: int = 0,
    size: int | None = None,
    before: Callable[[int], Any] | None = None,
    after: Callable[[int, Tensor], Any] | None = None,
) -> Tensor:
    """A sampling loop as users write it; `before(k)` and `after(k, prediction)` are called around every forward."""
    scheduler = DDIMScheduler() if scheduler is None else scheduler
    x = latents(model, batch, seed, size)
    scheduler.set_timesteps(steps)
    with torch.no_grad():
        for k, t in enumerate(scheduler.timesteps):
            if before is not None:
                before(k)
            scaled = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
            prediction = predict(model, scaled, t, guidance, seed)
            if after is not None:
                after(k, prediction)
            x = scheduler.step(prediction, t, x, return_dict=False)[0]
    return x


def sample_explicit(model: nn.Module, cache: Any, steps: int = 7, **kwargs: Any) -> Tensor:
    """The same loop with the clock set by hand; its scheduler is nobody's but its own."""
    with cache.run(steps):
        return sample(model, DDIMScheduler(), steps, before=cache.step, **kwargs)


def predictions(
    model: nn.Module, cache: Any, steps: int = 7, batch: int = 2, frozen: bool = False, **kwargs: Any
) -> list[Tensor]:
    """Outputs of the steps of an explicit run over inputs that drift (or are frozen); `cache=None`: the plain model."""
    out = []
    with torch.no_grad(), cache.run(steps) if cache is not None else contextlib.nullcontext():
        for k in range(steps):
            if cache is not None:
                cache.step(k)
            out.append(call(model, step(model, 0 if frozen else k, steps, batch, **kwargs)))
    return out


class LoopPipeline(DiffusionPipeline):
    """A pipeline around any of the tiny models."""

    def __init__(self, transformer: Any, scheduler: Any):
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler)

    @torch.no_grad()
    def __call__(self, num_inference_steps: int = 7, guidance: str = "none", **kwargs: Any) -> Tensor:
        return sample(self.transformer, self.scheduler, num_inference_steps, guidance=guidance, **kwargs)


# ---- what calibrated and learned methods need -----------------------------------------------------------------------
def data_for(method: str, model: nn.Module | None = None, steps: int = 8, scale: float = 0.0) -> dict[str, Any]:
    """Parameters with made-up tensors for methods that need some: L2C's scores (half of them reused), EOC's trends
    (times `scale`; on inputs that never change the true ones are 0), ICC's factors of rank 2, of
    the weights themselves. Others need none."""
    from dittocache import describe, recipe
    from dittocache.cache import wanted

    found = describe(model or dit())
    sites = [found.columns[j].name for j in wanted(recipe("none"), found)]
    generator = torch.Generator().manual_seed(7)
    if method == "l2c":
        scores = torch.randn(steps, len(sites), generator=generator)
        return {"router_logits": scores, "threshold": 0.5}
    if method == "eoc":
        outputs = site_outputs(model or dit())
        return {
            "trend": {
                f"{name}@{k}": scale * torch.randn(outputs[name].shape[1:], generator=generator)
                for name in sites
                for k in range(1, steps)
            }
        }
    if method == "block-caching":
        blocks = [span.site.name for span in found.spans if len(span.blocks) == 1]
        return {"changes": {name: torch.full((steps,), 0.3) for name in blocks}}
    if method == "magcache":
        return {"ratios": (1.0, 1.04, 0.97, 1.02, 0.96)}
    if method in ("dpcache", "lemica"):
        return {"full_steps": (0, 1, 2, 4), "num_steps": steps}
    if method == "icc":
        factors = {}
        for e in found.linears:
            u, values, vt = torch.linalg.svd(e.module.weight.detach())  # type: ignore[operator, union-attr]
            factors[f"{e.site.name}/A"], factors[f"{e.site.name}/B"] = u[:, :2] * values[:2], vt[:2]
        return {"factor_tensors": factors}
    return {}


def site_outputs(model: nn.Module) -> dict[str, Tensor]:
    """What every site's module returns (the first, if several) in one plain forward; before any cache is on."""
    from dittocache import describe

    found: dict[str, Tensor] = {}
    handles = []
    for e in describe(model).entries:

        def see(module: nn.Module, args: Any, output: Any, name: str = e.site.name) -> None:
            found[name] = output if isinstance(output, Tensor) else output[0]

        handles.append(e.module.register_forward_hook(see))
    with torch.no_grad():
        call(model, step(model, 0))
    for handle in handles:
        handle.remove()
    return found


def columns(count: int) -> list[Any]:
    """Made-up columns of a plan: attention and feed-forward of block after block."""
    from dittocache.plan import Site

    kinds = ("attention", "feed-forward")
    return [
        Site(f"blocks.{n // 2}.{kinds[n % 2]}", kinds[n % 2], "blocks", n // 2, count // 2, n // 2)
        for n in range(count)
    ]


# ---- independent measurements ---------------------------------------------------------------------------------------
# the layers that every site runs exactly once per computation
_LEAF = {"attn": "to_q", "attn1": "to_q", "attn2": "to_q", "ff": "net.0.proj", "ff_context": "net.0.proj", "mlp": "fc1"}


class Counter(TorchFunctionMode):
    """Counts tokens that really went through the first layer of every site; knows nothing of hooks or caches.

    Of FLUX's single-stream blocks, `attn`, `proj_mlp` and `proj_out` count apart.
    """

    def __init__(self, model: nn.Module, linears: bool = False) -> None:
        super().__init__()
        self.calls: dict[str, list[int]] = {}
        self.weights: dict[int, str] = {}
        for name, module in model.named_modules():
            last = name.rpartition(".")[2]
            layer = module if last in ("proj_mlp", "proj_out") and "single" in name else None
            if last in _LEAF:
                layer = module.get_submodule("qkv" if hasattr(module, "qkv") else _LEAF[last])
            if linears:  # every single linear layer, under its own name
                layer = module if isinstance(module, nn.Linear) else None
            if layer is not None:
                self.calls[name] = []
                self.weights[id(layer.weight)] = name

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.functional.linear and id(args[1]) in self.weights:
            self.calls[self.weights[id(args[1])]].append(args[0].shape[1] if args[0].ndim > 2 else 1)
        return func(*args, **(kwargs or {}))

    def tokens(self) -> dict[str, int]:
        return {name: sum(calls) for name, calls in self.calls.items()}

    @property
    def total(self) -> int:
        return sum(self.tokens().values())


def count_flops(function: Callable[[], Any]) -> int:
    """FLOPs of whatever the function runs; torch lacks a formula for the CPU's attention kernel."""
    cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    mapping = {cpu: lambda q, k, v, *args, **kwargs: sdpa_flop_count(q, k, v)}
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        function()
    return counter.get_total_flops()


def fingerprint(target: Any) -> dict[str, Any]:
    """Everything that a cache may touch on a model, pipeline or scheduler, for before-and-after comparisons."""
    model = target if isinstance(target, nn.Module) else getattr(target, "transformer", nn.Identity())
    # classes of watched objects equal plain ones
    found: dict[str, Any] = {"class": id(type(target)), "scheduler": id(type(getattr(target, "scheduler", None)))}
    for name, module in model.named_modules():
        hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
        found[name] = (id(type(module)), tuple(sorted(module.__dict__)), len(hooks))
    return found


def traces_of_cache(model: nn.Module) -> list[str]:
    """What is left on a model that nobody uses a cache on: must be empty."""
    left = []
    for name, module in model.named_modules():
        if hasattr(module, "_diffusers_hook"):
            left.append(f"{name}: registry")
        if "forward" in module.__dict__:
            left.append(f"{name}: forward")
        if clock.is_watched(module):
            left.append(f"{name}: class")
        if module._forward_hooks or module._forward_pre_hooks:
            left.append(f"{name}: hook")
    return left


def relative(a: Tensor, b: Tensor) -> float:
    """||a - b|| / ||b||."""
    return float((a - b).norm() / b.norm())


@contextlib.contextmanager
def patched_family(name: str, **changes: Any) -> Iterator[None]:
    """A family of blocks with other properties, for descriptions made inside."""
    import dataclasses

    from dittocache.describe import FAMILIES

    old = FAMILIES[name]
    FAMILIES[name] = dataclasses.replace(old, **changes)
    try:
        yield
    finally:
        FAMILIES[name] = old
