"""Training of the bundled diffusion transformers: v-prediction on pixels with label (or text) dropout.

Every random number is a function of the seed and the step, so a run that was stopped continues exactly where it was.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast

import torch
from diffusers import DDIMScheduler, DiffusionPipeline, DiTTransformer2DModel, PixArtTransformer2DModel
from diffusers.models.attention_processor import Attention, AttnProcessor
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from .data import CHARACTERS, Split, to_model_range
from .noto import EmojiSet
from .pipeline import EmojiPipeline, GlyphsPipeline
from .text import PADDING, HashedTextEncoder, tokenize

IMAGES = 900_000  # training images in all, of glyphs
BATCH = 64
EMOJI_IMAGES = 200_000
EMOJI_BATCH = 32  # fewer images, so that steps are what is short
LEARNING_RATE = 1e-3
WARM_UP = 200  # steps
CONSTANT = 0.6  # share of the run at the full rate; then linear to FINAL_RATE
FINAL_RATE = 0.02
EMA = 0.999
LABEL_DROPOUT = 0.1
KEYWORDS = 0.2  # share of the emoji prompts that are keywords, not the name
CLIP = 1.0
SEED = 0


Data = TypeVar("Data", contravariant=True)


class Recipe(Protocol[Data]):
    """What the training loop has to know about one of the models."""

    images: int  # to train on
    batch: int

    def new_model(self) -> nn.Module:
        """The network to train, with its initial weights."""

    def pictures(self, data: Data) -> torch.Tensor:
        """All training pictures, float32 [n, channels, height, width] in [-1, 1]."""

    def condition(self, data: Data, rows: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
        """Labels or texts of the pictures `rows`, some of them dropped, as `predict` takes them."""

    def predict(self, model: nn.Module, x: torch.Tensor, t: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        """The network's v-prediction for noisy pictures `x` at timesteps `t`."""

    def scheduler(self) -> DDIMScheduler:
        """The noise schedule, and the sampler that ships."""

    def pipeline(self, model: nn.Module) -> DiffusionPipeline:
        """The pipeline that ships."""


class Glyphs:
    """Characters: a class-conditional DiT."""

    images, batch = IMAGES, BATCH

    def new_model(self) -> DiTTransformer2DModel:
        return new_transformer()

    def pictures(self, data: Split) -> torch.Tensor:
        return torch.from_numpy(to_model_range(data.pictures))

    def condition(self, data: Split, rows: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
        dropped = torch.rand(len(rows), generator=rng) < LABEL_DROPOUT
        return torch.where(dropped, len(CHARACTERS), torch.from_numpy(data.labels)[rows])

    def predict(self, model: nn.Module, x: torch.Tensor, t: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        return model(x, timestep=t, class_labels=condition).sample

    def pipeline(self, model: nn.Module) -> DiffusionPipeline:
        return GlyphsPipeline(model, self.scheduler())

    def scheduler(self) -> DDIMScheduler:
        return new_scheduler()


class TextToImage(nn.Module):
    """The emoji networks: PixArt blocks, 2.3 M parameters, 64 tokens of 2x2 pixels; 0.3 M for the text."""

    def __init__(self) -> None:
        super().__init__()
        self.text_encoder = HashedTextEncoder()
        width = self.text_encoder.config.width
        self.transformer = PixArtTransformer2DModel(
            num_attention_heads=4, attention_head_dim=32, num_layers=8, in_channels=3, out_channels=3, sample_size=16,
            patch_size=2, cross_attention_dim=128, caption_channels=width, norm_eps=1e-6,
            use_additional_conditions=False,
        )  # fmt: skip
        _initialise(self.transformer)
        nn.init.normal_(self.text_encoder.table.weight, std=0.5)
        nn.init.zeros_(self.text_encoder.table.weight[PADDING])
        # As in PixArt-alpha (arXiv:2310.00426, section 2.3) a block starts as the identity: gates and the projection
        # out of the cross-attention are zero.
        nn.init.zeros_(self.transformer.adaln_single.linear.weight)
        nn.init.zeros_(self.transformer.proj_out.weight)
        for block in self.transformer.transformer_blocks:
            nn.init.zeros_(block.attn2.to_out[0].weight)
            nn.init.zeros_(block.scale_shift_table)

    def forward(self, x: torch.Tensor, t: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        text, mask = self.text_encoder(ids)
        return self.transformer(x, encoder_hidden_states=text, timestep=t, encoder_attention_mask=mask).sample


class Emoji:
    """Emoji from their names: PixArt blocks and a text encoder, trained together."""

    images, batch = EMOJI_IMAGES, EMOJI_BATCH

    def new_model(self) -> TextToImage:
        return TextToImage()

    def pictures(self, data: EmojiSet) -> torch.Tensor:
        flat = data.pictures.reshape(-1, *data.pictures.shape[2:])
        return torch.from_numpy(flat).permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0)

    def condition(self, data: EmojiSet, rows: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
        texts = []
        for row, draw in zip((rows // data.pictures.shape[1]).tolist(), torch.rand(len(rows), generator=rng).tolist()):
            emoji = data.emoji[row]
            text = emoji.name
            if draw < LABEL_DROPOUT:
                text = ""
            elif draw < LABEL_DROPOUT + KEYWORDS and emoji.keywords:
                picked = torch.randperm(len(emoji.keywords), generator=rng)[:3].tolist()
                text = " ".join(emoji.keywords[i] for i in picked)
            texts.append(text)
        return tokenize(texts)

    def predict(self, model: nn.Module, x: torch.Tensor, t: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        return model(x, t, condition)

    def pipeline(self, model: nn.Module) -> DiffusionPipeline:
        model = cast(TextToImage, model)
        return EmojiPipeline(model.transformer, model.text_encoder, self.scheduler())

    def scheduler(self) -> DDIMScheduler:
        # Pixels of smaller pictures differ more from one another: less noise hides them than the linear betas add.
        return new_scheduler("squaredcos_cap_v2")


def new_transformer() -> DiTTransformer2DModel:
    """2.8 M parameters, 64 tokens of 4x4 pixels, with the adaLN-zero start that diffusers leaves out."""
    model = DiTTransformer2DModel(
        num_attention_heads=4, attention_head_dim=32, num_layers=8, in_channels=1, out_channels=1,
        sample_size=32, patch_size=4, num_embeds_ada_norm=len(CHARACTERS), norm_eps=1e-6,
    )  # fmt: skip
    _initialise(model)
    for block in model.transformer_blocks:
        nn.init.zeros_(block.norm1.linear.weight)
    for layer in (model.proj_out_1, model.proj_out_2):
        nn.init.zeros_(layer.weight)
    return model


def _initialise(model: nn.Module) -> None:
    """Xavier for products and convolutions, 0.02 for embeddings, no biases."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Conv2d):
            nn.init.xavier_uniform_(module.weight.flatten(1))
            nn.init.zeros_(module.bias)  # type: ignore[arg-type]
        elif isinstance(module, nn.Embedding) or name.endswith("timestep_embedder"):
            for weight in (p for p in module.parameters() if p.ndim == 2):
                nn.init.normal_(weight, std=0.02)


GLYPHS, EMOJI = Glyphs(), Emoji()


def new_scheduler(betas: str = "linear") -> DDIMScheduler:
    return DDIMScheduler(
        num_train_timesteps=1000, beta_start=1e-4, beta_end=0.02, beta_schedule=betas, clip_sample=False,
        set_alpha_to_one=True, prediction_type="v_prediction", timestep_spacing="trailing",
    )  # fmt: skip


def learning_rate(step: int, steps: int) -> float:
    done = step / steps
    decay = 1.0 if done < CONSTANT else 1.0 - (1.0 - FINAL_RATE) * (done - CONSTANT) / (1.0 - CONSTANT)
    return LEARNING_RATE * min(1.0, (step + 1) / WARM_UP) * decay


def train(
    data: Any,
    checkpoint: Path,
    images: int | None = None,
    precision: str = "bf16",
    save_every: float = 300.0,
    on_save: Callable[[Any, dict], None] | None = None,
    progress: Callable | None = None,
    recipe: Recipe = GLYPHS,
) -> Any:
    """Train to `images` images, from `checkpoint` if that exists; returns the averaged (EMA) model.

    `save_every` is in seconds; `on_save` gets the averaged model and the state of the run after each checkpoint.
    """
    torch.manual_seed(SEED)
    model = recipe.new_model()
    # eval() on purpose: in train mode each DiT block would drop the class label on its own. Dropout is the recipe's.
    model.eval()
    for module in model.modules():
        if isinstance(module, Attention):
            # Plain matrix products: at 64 tokens the backward pass of the fused CPU attention takes half of a step.
            module.set_processor(AttnProcessor())
    average = recipe.new_model().eval().requires_grad_(False)
    average.load_state_dict(model.state_dict())
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    state: dict[str, Any] = {"step": 0, "seconds": 0.0, "loss": None, "precision": precision, "history": []}
    if checkpoint.exists():
        state |= _load(checkpoint, model, average, optimizer)
    pictures = recipe.pictures(data)
    alphas = recipe.scheduler().alphas_cumprod
    batch, count = recipe.batch, len(pictures)
    steps = (images or recipe.images) // batch
    rng, order, epoch = torch.Generator(), torch.empty(0), -1
    weights: list[torch.Tensor] = list(model.parameters())
    averages: list[torch.Tensor] = list(average.parameters())
    bar = progress(total=steps, initial=state["step"], desc="train", unit="step") if progress else None
    saved = last = time.monotonic()
    for step in range(state["step"], steps):
        if step * batch // count != epoch:
            epoch = step * batch // count
            order = torch.randperm(count, generator=torch.Generator().manual_seed(_seed(1, epoch)))
        rows = order[(torch.arange(batch) + step * batch) % count]
        rng.manual_seed(_seed(2, step))
        x, condition = pictures[rows], recipe.condition(data, rows, rng)
        # One timestep from each of as many equal slices: less noise in the loss than independent draws.
        t = ((torch.arange(batch) + torch.rand(batch, generator=rng)) / batch * len(alphas)).long()
        noise = torch.randn(x.shape, generator=rng)
        signal, sigma = (a.sqrt().view(-1, 1, 1, 1) for a in (alphas[t], 1 - alphas[t]))
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            prediction = recipe.predict(model, signal * x + sigma * noise, t, condition)
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
        state["step"], state["images"] = step + 1, (step + 1) * batch
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


def export(model: nn.Module, folder: Path, recipe: Recipe = GLYPHS) -> None:
    """Write a pipeline in float16 to `folder`, file by file and atomically: it may be in use."""
    half = recipe.new_model().eval()
    half.load_state_dict(model.state_dict())
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".export-") as scratch:
        recipe.pipeline(half.half()).save_pretrained(scratch)
        for path in sorted(p for p in Path(scratch).rglob("*") if p.is_file()):
            target = folder / path.relative_to(scratch)
            target.parent.mkdir(parents=True, exist_ok=True)
            path.chmod(0o644)
            os.replace(path, target)


def load_average(checkpoint: Path, recipe: Recipe = GLYPHS) -> tuple[Any, dict]:
    """The averaged model of a checkpoint, and the state of its run."""
    model = recipe.new_model().eval()
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
