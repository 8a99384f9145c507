"""Training of the bundled diffusion transformer: v-prediction on 32x32 pixels with label dropout.

Every random number is a function of the seed and the step, so a run that was stopped continues exactly where it was.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, DiTTransformer2DModel
from diffusers.models.attention_processor import AttnProcessor
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from .data import CHARACTERS, Split, to_model_range
from .pipeline import GlyphsPipeline

IMAGES = 900_000  # training images in all
BATCH = 64
LEARNING_RATE = 1e-3
WARM_UP = 200  # steps
CONSTANT = 0.6  # share of the run at the full rate; then linear to FINAL_RATE
FINAL_RATE = 0.02
EMA = 0.999
LABEL_DROPOUT = 0.1
CLIP = 1.0
SEED = 0


def new_transformer() -> DiTTransformer2DModel:
    """2.8 M parameters, 64 tokens of 4x4 pixels, with the adaLN-zero start that diffusers leaves out."""
    model = DiTTransformer2DModel(
        num_attention_heads=4, attention_head_dim=32, num_layers=8, in_channels=1, out_channels=1,
        sample_size=32, patch_size=4, num_embeds_ada_norm=len(CHARACTERS), norm_eps=1e-6,
    )  # fmt: skip
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.xavier_uniform_(module.weight)
            torch.nn.init.zeros_(module.bias)
        elif isinstance(module, torch.nn.Conv2d):
            torch.nn.init.xavier_uniform_(module.weight.flatten(1))
            torch.nn.init.zeros_(module.bias)  # type: ignore[arg-type]
        elif isinstance(module, torch.nn.Embedding) or name.endswith("timestep_embedder"):
            for weight in (p for p in module.parameters() if p.ndim == 2):
                torch.nn.init.normal_(weight, std=0.02)
    for block in model.transformer_blocks:
        torch.nn.init.zeros_(block.norm1.linear.weight)
    for layer in (model.proj_out_1, model.proj_out_2):
        torch.nn.init.zeros_(layer.weight)
    return model


def new_scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        num_train_timesteps=1000, beta_start=1e-4, beta_end=0.02, beta_schedule="linear", clip_sample=False,
        set_alpha_to_one=True, prediction_type="v_prediction", timestep_spacing="trailing",
    )  # fmt: skip


def learning_rate(step: int, steps: int) -> float:
    done = step / steps
    decay = 1.0 if done < CONSTANT else 1.0 - (1.0 - FINAL_RATE) * (done - CONSTANT) / (1.0 - CONSTANT)
    return LEARNING_RATE * min(1.0, (step + 1) / WARM_UP) * decay


def train(
    data: Split,
    checkpoint: Path,
    images: int = IMAGES,
    precision: str = "bf16",
    save_every: float = 300.0,
    on_save: Callable[[DiTTransformer2DModel, dict], None] | None = None,
    progress: Callable | None = None,
) -> DiTTransformer2DModel:
    """Train to `images` images, from `checkpoint` if that exists; returns the averaged (EMA) model.

    `save_every` is in seconds; `on_save` gets the averaged model and the state of the run after each checkpoint.
    """
    torch.manual_seed(SEED)
    model = new_transformer()
    # eval() on purpose: in train mode each block would drop the class label on its own. Dropout is done below, once.
    model.eval()
    for block in model.transformer_blocks:
        # Plain matrix products: at 64 tokens the backward pass of the fused CPU attention takes half of a step.
        block.attn1.set_processor(AttnProcessor())
    average = new_transformer().eval().requires_grad_(False)
    average.load_state_dict(model.state_dict())
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    state: dict[str, Any] = {"step": 0, "seconds": 0.0, "loss": None, "precision": precision, "history": []}
    if checkpoint.exists():
        state |= _load(checkpoint, model, average, optimizer)
    pictures, labels = torch.from_numpy(to_model_range(data.pictures)), torch.from_numpy(data.labels)
    alphas = new_scheduler().alphas_cumprod
    steps, count = images // BATCH, len(labels)
    rng, order, epoch = torch.Generator(), torch.empty(0), -1
    weights, averages = list(model.parameters()), list(average.parameters())
    bar = progress(total=steps, initial=state["step"], desc="train", unit="step") if progress else None
    saved = last = time.monotonic()
    for step in range(state["step"], steps):
        if step * BATCH // count != epoch:
            epoch = step * BATCH // count
            order = torch.randperm(count, generator=torch.Generator().manual_seed(_seed(1, epoch)))
        rows = order[(torch.arange(BATCH) + step * BATCH) % count]
        rng.manual_seed(_seed(2, step))
        x, label = pictures[rows], labels[rows]
        label = torch.where(torch.rand(BATCH, generator=rng) < LABEL_DROPOUT, len(CHARACTERS), label)
        # One timestep from each of 64 equal slices: less noise in the loss than independent draws.
        t = ((torch.arange(BATCH) + torch.rand(BATCH, generator=rng)) / BATCH * len(alphas)).long()
        noise = torch.randn(x.shape, generator=rng)
        signal, sigma = (a.sqrt().view(-1, 1, 1, 1) for a in (alphas[t], 1 - alphas[t]))
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            prediction = model(signal * x + sigma * noise, timestep=t, class_labels=label).sample
        # Uniform weight: min-SNR weights would all but ignore the noisy half of this schedule.
        loss = (prediction.float() - (signal * noise - sigma * x)).square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, CLIP)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps)
        optimizer.step()
        optimizer.zero_grad()
        torch._foreach_lerp_(averages, weights, 1.0 - min(EMA, (1 + step) / (10 + step)))

        value = loss.item()
        now = time.monotonic()
        state["seconds"] += now - last
        last = now
        state["step"], state["images"] = step + 1, (step + 1) * BATCH
        state["loss"] = value if state["loss"] is None else 0.99 * state["loss"] + 0.01 * value
        if bar is not None:
            bar.update()
            bar.set_postfix(loss=f"{state['loss']:.4f}")
        if now - saved > save_every or step + 1 == steps:
            saved = now
            state["history"].append([state["images"], round(state["seconds"], 1), round(state["loss"], 5)])
            _save(checkpoint, model, average, optimizer, state)
            if on_save is not None:
                on_save(average, state)
    return average


def export(model: DiTTransformer2DModel, folder: Path) -> None:
    """Write a pipeline in float16 to `folder`, file by file and atomically: it may be in use."""
    half = new_transformer().eval()
    half.load_state_dict(model.state_dict())
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".export-") as scratch:
        GlyphsPipeline(half.half(), new_scheduler()).save_pretrained(scratch)
        for path in sorted(p for p in Path(scratch).rglob("*") if p.is_file()):
            target = folder / path.relative_to(scratch)
            target.parent.mkdir(parents=True, exist_ok=True)
            path.chmod(0o644)
            os.replace(path, target)


def load_average(checkpoint: Path) -> tuple[DiTTransformer2DModel, dict]:
    """The averaged model of a checkpoint, and the state of its run."""
    model = new_transformer().eval()
    tensors = load_file(checkpoint)
    model.load_state_dict({k.removeprefix("average."): v for k, v in tensors.items() if k.startswith("average.")})
    return model, _state(checkpoint)


def _seed(stream: int, index: int) -> int:
    return (SEED * 4 + stream) << 32 | index


def _save(
    path: Path, model: torch.nn.Module, average: torch.nn.Module, optimizer: torch.optim.Optimizer, state: dict
) -> None:
    tensors = {f"model.{k}": v for k, v in model.state_dict().items()}
    tensors |= {f"average.{k}": v for k, v in average.state_dict().items()}
    for index, slots in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{k}": v for k, v in slots.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".part")
    save_file({k: v.detach().contiguous() for k, v in tensors.items()}, partial, {"state": json.dumps(state)})
    os.replace(partial, path)


def _load(path: Path, model: torch.nn.Module, average: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict:
    tensors = load_file(path)

    def part(prefix: str) -> dict[str, torch.Tensor]:
        return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}

    model.load_state_dict(part("model."))
    average.load_state_dict(part("average."))
    slots: dict[int, dict[str, torch.Tensor]] = {}
    for key, value in part("optimizer.").items():
        index, name = key.split(".")
        slots.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict(optimizer.state_dict() | {"state": slots})
    return _state(path)


def _state(path: Path) -> dict:
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["state"])
