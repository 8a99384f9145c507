"""Looking without drawing: methods, describe, doctor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .base import (
    MODEL,
    Device,
    Json,
    app,
    device_named,
    examples,
    load,
    method_named,
    parameters_dict,
    print_json,
    show_parameters,
    usage_errors,
)

if TYPE_CHECKING:
    from ..recipe import Method


@app.command(epilog=examples("dittocache methods", "dittocache methods duca", "dittocache methods duca --json"))
def methods(
    name: Annotated[str | None, typer.Argument(help="A method: its parameters, settings and citation.")] = None,
    as_json: Json = False,
) -> None:
    """List the caching methods, or everything about one of them."""
    from .. import methods as known
    from ..evaluate.console import new_table, show

    if name is None:
        found = known()
        if as_json:
            print_json({n: _method_dict(m) for n, m in found.items()})
            return
        table = new_table("method", "paper", "needs", "what it does")
        for n, m in found.items():
            table.add_row(f"[bold]{n}[/bold]", m.arxiv and f"arXiv {m.arxiv}", m.needs, m.summary)
        show(table)
        typer.echo("dittocache methods NAME tells more about one of them.")
        return
    with usage_errors():
        method = method_named(name)
    if as_json:
        print_json(_method_dict(method))
        return
    show(f"[bold]{method.name}[/bold]: {method.title}" + (f" (arXiv {method.arxiv})" if method.arxiv else ""))
    show(f"{method.summary}\nNeeds: {method.needs}.")
    if method.parameters:
        show_parameters(method.parameters)
    for model, values in method.settings.items():
        show(f"Recommended for {model}: {', '.join(f'{k}={v}' for k, v in values.items())}")
    if method.bibtex:
        typer.echo("\n" + method.bibtex)


@app.command(
    epilog=examples(
        "dittocache describe",
        "dittocache describe FluxTransformer2DModel",
        "dittocache describe path/to/pipeline --json",
    )
)
def describe(
    target: Annotated[
        str,
        typer.Argument(help="A bundled model, a class of diffusers, or the folder of a saved pipeline or transformer."),
    ] = MODEL,
    as_json: Json = False,
) -> None:
    """Show what can be cached in a transformer: its sites, block by block. Weights are not needed."""
    from .. import describe as find

    with usage_errors():
        found = find(_network(target))
    if as_json:
        print_json(found.to_dict())
    else:
        typer.echo(str(found))


# sizes of the published models, where a class's own defaults do not make one
_SIZES: dict[str, dict[str, Any]] = {
    "DreamLiteTransformer2DModel": {"in_channels": 320, "cross_attention_dim": 768},
    "EasyAnimateTransformer3DModel": {
        "num_attention_heads": 48, "attention_head_dim": 64, "in_channels": 16, "out_channels": 16, "patch_size": 2,
        "sample_width": 90, "sample_height": 60,
    },
    "HiDreamImageTransformer2DModel": {
        "patch_size": 2, "in_channels": 16, "num_layers": 16, "num_single_layers": 32, "attention_head_dim": 128,
        "num_attention_heads": 20, "caption_channels": [4096, 4096], "text_emb_dim": 2048, "num_routed_experts": 4,
        "num_activated_experts": 2, "axes_dims_rope": (64, 32, 32), "max_resolution": (128, 128),
        "llama_layers": list(range(48)),
    },
    "HunyuanDiT2DModel": {
        "in_channels": 4, "patch_size": 2, "hidden_size": 1408, "num_layers": 40, "mlp_ratio": 4.3637,
        "sample_size": 128,
    },
    "LatteTransformer3DModel": {
        "in_channels": 4, "out_channels": 8, "num_layers": 28, "attention_head_dim": 72, "sample_size": 64,
        "patch_size": 2, "caption_channels": 4096, "norm_type": "ada_norm_single", "cross_attention_dim": 1152,
        "num_embeds_ada_norm": 1000,
    },
    "LuminaNextDiT2DModel": {"num_kv_heads": 8, "cross_attention_dim": 2048},
    "OmniGenTransformer2DModel": {"rope_scaling": {"short_factor": [1.0] * 48, "long_factor": [1.0] * 48}},
    "Transformer2DModel": {"in_channels": 320, "cross_attention_dim": 768},
    "TransformerTemporalModel": {"in_channels": 320},
}  # fmt: skip


def _network(target: str) -> Any:
    """A transformer without weights (on the meta device), from what `describe` takes.

    Raises:
        ValueError: there is no such thing, or it cannot be built.
    """
    import diffusers
    import torch

    from .. import bundled

    config: dict[str, Any] = {}
    if target in bundled.names():
        target = str(bundled.folder(target))
    folder = Path(target)
    if folder.is_dir():
        places = [folder, *(folder / name for name in ("transformer", "unet"))]
        file = next((place / "config.json" for place in places if (place / "config.json").is_file()), None)
        if file is None:
            raise ValueError(f"{target!r} holds no transformer: config.json is missing")
        try:
            config = json.loads(file.read_text(encoding="utf-8"))
            name = config["_class_name"]
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{str(file)!r} is damaged, or not a config of diffusers") from None
    else:
        name = target
        if "/" in target or not hasattr(diffusers, name):
            raise ValueError(
                f"{target!r} is neither a bundled model ({', '.join(bundled.names())}), nor a class of diffusers, "
                "nor a folder"
            )
    cls: Any = getattr(diffusers, str(name), None)
    if not hasattr(cls, "from_config") or not issubclass(cls, diffusers.ModelMixin):
        raise ValueError(f"{name!r} is not a network of diffusers {diffusers.__version__}")
    try:
        with torch.device("meta"):
            return cls.from_config(config) if config else cls(**_SIZES.get(str(name), {}))
    except Exception as error:  # whatever a foreign constructor raises when its default configuration is incomplete
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        whose = "saved" if config else "default"
        raise ValueError(f"{name} cannot be built from its {whose} configuration: {reason}") from None


@app.command(epilog=examples("dittocache doctor", "dittocache doctor --json"))
def doctor(device: Device = "auto", as_json: Json = False) -> None:
    """Check the installation: versions, device, bundled model, and that a cache really skips. Exit code 1 if not."""
    from ..evaluate.console import new_table, show
    from ..evaluate.doctor import examine

    with usage_errors():
        device = device_named(device)
    checks = examine(device, lambda: load(device))
    if as_json:
        print_json([check._asdict() for check in checks])
    else:
        table = new_table("", "check", "found")
        for check in checks:
            table.add_row("[green]ok[/green]" if check.ok else "[red]wrong[/red]", check.name, check.found)
        show(table)
    if not all(check.ok for check in checks):
        raise typer.Exit(1)


def _method_dict(method: Method) -> dict[str, Any]:
    names = ("name", "title", "arxiv", "needs", "summary", "settings", "bibtex")
    return {name: getattr(method, name) for name in names} | {"parameters": parameters_dict(method.parameters)}
