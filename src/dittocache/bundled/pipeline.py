"""The pipelines of the bundled pixel-space diffusion transformers."""

from __future__ import annotations

import inspect
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from diffusers import DiffusionPipeline, DiTTransformer2DModel, ImagePipelineOutput, PixArtTransformer2DModel
from diffusers.schedulers import KarrasDiffusionSchedulers
from diffusers.utils.torch_utils import randn_tensor

from .data import CHARACTERS
from .text import HashedTextEncoder, tokenize

__all__ = ["CHARACTERS", "PIPELINES", "EmojiPipeline", "GlyphsPipeline", "PixelPipeline"]

OUTPUT_TYPES = ("pil", "np", "pt")


class PixelPipeline(DiffusionPipeline):
    """What the bundled pipelines share: checks of the settings, the denoising loop and the form of the pictures."""

    _callback_tensor_inputs: ClassVar[list[str]] = ["latents"]

    def _check(
        self, steps: int, guidance: float, generator: Any, output_type: str, tensor_inputs: Sequence[str], count: int
    ) -> None:
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
            raise ValueError(f"num_inference_steps is {steps!r}; it must be an integer of at least 1")
        if not math.isfinite(guidance):
            raise ValueError(f"guidance_scale is {guidance!r}; it must be a finite number (1 or less: no guidance)")
        if isinstance(generator, (list, tuple)) and len(generator) != count:
            raise ValueError(f"{len(generator)} generators were given for {count} pictures; give one, or {count}")
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type is {output_type!r}; valid are {', '.join(map(repr, OUTPUT_TYPES))}")
        unknown = [name for name in tensor_inputs if name not in self._callback_tensor_inputs]
        if unknown:
            raise ValueError(f"callback_on_step_end_tensor_inputs contains {unknown[0]!r}; valid is 'latents'")

    def _draw(
        self,
        predict: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
        count: int,
        steps: int,
        guidance: float,
        generator: torch.Generator | Sequence[torch.Generator] | None,
        output_type: str,
        return_dict: bool,
        callback: Callable[[Any, int, Any, dict], dict] | None,
        tensor_inputs: Sequence[str],
    ) -> ImagePipelineOutput | tuple:
        """Denoise `count` pictures; `predict` gets both halves of a guided batch at once, the conditional one first."""
        device, config = self._execution_device, self.transformer.config
        guided = guidance > 1
        self.scheduler.set_timesteps(steps, device=device)
        # Drawn in float32 so that a seed means the same picture at every precision.
        shape = (count, config.in_channels, config.sample_size, config.sample_size)
        generator = list(generator) if isinstance(generator, tuple) else generator
        latents = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        latents = latents.to(self.transformer.dtype) * self.scheduler.init_noise_sigma
        # Stochastic schedulers draw noise in every step.
        accepted = inspect.signature(self.scheduler.step).parameters
        step_kwargs = {"generator": generator} if "generator" in accepted else {}

        with self.progress_bar(total=steps) as bar:
            for i, t in enumerate(self.scheduler.timesteps):
                model_input = torch.cat([latents, latents]) if guided else latents
                model_input = self.scheduler.scale_model_input(model_input, t)
                prediction = predict(model_input, t.expand(len(model_input)))
                if guided:
                    conditional, unconditional = prediction.chunk(2)
                    prediction = unconditional + guidance * (conditional - unconditional)
                latents = self.scheduler.step(prediction, t, latents, **step_kwargs).prev_sample
                if callback is not None:
                    inputs = {"latents": latents} if "latents" in tensor_inputs else {}
                    latents = (callback(self, i, t, inputs) or {}).get("latents", latents)
                bar.update()

        images = (latents.float() / 2 + 0.5).clamp(0, 1)
        if output_type != "pt":
            images = images.cpu().permute(0, 2, 3, 1).numpy()
        if output_type == "pil":
            images = self.numpy_to_pil(images)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)


class GlyphsPipeline(PixelPipeline):
    """Draws characters: class-conditional diffusion on grayscale pixels, called like diffusers' `DiTPipeline`.

    `DiTPipeline` itself cannot be used: it needs an autoencoder, and its null class is always 1000.
    """

    model_cpu_offload_seq = "transformer"

    def __init__(self, transformer: DiTTransformer2DModel, scheduler: KarrasDiffusionSchedulers):
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler)

    @property
    def null_label(self) -> int:
        """The class that stands for "no class" under guidance: one past the last."""
        return self.transformer.config.num_embeds_ada_norm

    def get_label_ids(self, class_labels: str | int | Sequence[int | str] | torch.Tensor) -> list[int]:
        """Class numbers of labels: integers, or one-character strings ("5" is the digit, class 31, not class 5)."""
        if isinstance(class_labels, torch.Tensor):
            class_labels = class_labels.reshape(-1).tolist()
        elif isinstance(class_labels, int):
            class_labels = [class_labels]
        ids = [self._label_id(label) for label in class_labels]
        if not ids:
            raise ValueError("class_labels is empty; give at least one label")
        return ids

    def _label_id(self, label: int | str) -> int:
        known = CHARACTERS[: self.null_label]
        number = -1
        if isinstance(label, str):
            number = known.find(label) if len(label) == 1 else -1
        elif hasattr(label, "__index__"):
            number = operator.index(label)
        if not 0 <= number < self.null_label:
            raise ValueError(
                f"class_labels contains {label!r}; valid are integers 0 to {self.null_label - 1} "
                f"or one character out of {known!r}"
            )
        return number

    @torch.no_grad()
    def __call__(
        self,
        class_labels: str | int | Sequence[int | str] | torch.Tensor,
        num_inference_steps: int = 50,
        guidance_scale: float = 1.5,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[Any, int, Any, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> ImagePipelineOutput | tuple:
        """Draw one picture per label.

        Args:
            class_labels: class numbers or characters; a string is one label per character.
            num_inference_steps: number of denoising steps (one transformer call each with first-order schedulers).
            guidance_scale: strength of classifier-free guidance; 1 or less turns it off and halves the work.
            generator: source of the start noise. With a list, picture i depends on generator i only.
            output_type: "pil" (mode L), "np" (float [n, height, width, 1]) or "pt" ([n, 1, height, width]), in [0, 1].
            return_dict: return an `ImagePipelineOutput` instead of a one-element tuple.
            callback_on_step_end: called as f(pipe, step, timestep, {"latents": ...}) after each step; what it returns
                under "latents" replaces them.
            callback_on_step_end_tensor_inputs: which tensors the callback gets; only "latents" exists.
        """
        labels = self.get_label_ids(class_labels)
        count, tensor_inputs = len(labels), callback_on_step_end_tensor_inputs
        self._check(num_inference_steps, guidance_scale, generator, output_type, tensor_inputs, count)
        null = [self.null_label] * count if guidance_scale > 1 else []
        classes = torch.tensor(labels + null, device=self._execution_device)

        def predict(latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
            return self.transformer(latents, timestep=timestep, class_labels=classes).sample

        return self._draw(
            predict, count, num_inference_steps, guidance_scale, generator, output_type, return_dict,
            callback_on_step_end, tensor_inputs,
        )  # fmt: skip


class EmojiPipeline(PixelPipeline):
    """Draws emoji from texts: PixArt blocks on RGB pixels, called like diffusers' `PixArtAlphaPipeline`.

    That one needs an autoencoder and a T5 encoder; here pixels and a table of hashed words take their places.
    """

    model_cpu_offload_seq = "text_encoder->transformer"

    def __init__(
        self,
        transformer: PixArtTransformer2DModel,
        text_encoder: HashedTextEncoder,
        scheduler: KarrasDiffusionSchedulers,
    ):
        super().__init__()
        self.register_modules(transformer=transformer, text_encoder=text_encoder, scheduler=scheduler)

    def encode_prompt(self, texts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Features [n, tokens, width] and mask [n, tokens] of texts; an empty text is the "no text" of guidance."""
        config = self.text_encoder.config
        return self.text_encoder(tokenize(texts, config.rows, config.max_words).to(self._execution_device))

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        negative_prompt: str | Sequence[str] | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 2.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[Any, int, Any, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> ImagePipelineOutput | tuple:
        """Draw one picture per prompt.

        Args:
            prompt: a text, or one per picture: names of emoji, or words of such names.
            negative_prompt: what guidance leads away from, one for all or one per picture; nothing by default.
            num_inference_steps: number of denoising steps (one transformer call each with first-order schedulers).
            guidance_scale: strength of classifier-free guidance; 1 or less turns it off and halves the work.
            generator: source of the start noise. With a list, picture i depends on generator i only.
            output_type: "pil" (mode RGB), "np" (float [n, height, width, 3]) or "pt" ([n, 3, height, width]),
                in [0, 1].
            return_dict: return an `ImagePipelineOutput` instead of a one-element tuple.
            callback_on_step_end: called as f(pipe, step, timestep, {"latents": ...}) after each step; what it returns
                under "latents" replaces them.
            callback_on_step_end_tensor_inputs: which tensors the callback gets; only "latents" exists.
        """
        texts = _texts("prompt", prompt)
        count, tensor_inputs = len(texts), callback_on_step_end_tensor_inputs
        against = _texts("negative_prompt", "" if negative_prompt is None else negative_prompt)
        if len(against) not in (1, count):
            raise ValueError(f"{len(against)} negative prompts were given for {count} pictures; give one, or {count}")
        self._check(num_inference_steps, guidance_scale, generator, output_type, tensor_inputs, count)
        against = against * (count // len(against)) if guidance_scale > 1 else []
        features, mask = self.encode_prompt(texts + against)

        def predict(latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
            return self.transformer(
                latents,
                encoder_hidden_states=features,
                timestep=timestep,
                added_cond_kwargs={"resolution": None, "aspect_ratio": None},
                encoder_attention_mask=mask,
            ).sample

        return self._draw(
            predict, count, num_inference_steps, guidance_scale, generator, output_type, return_dict,
            callback_on_step_end, tensor_inputs,
        )  # fmt: skip


PIPELINES: dict[str, type[PixelPipeline]] = {"emoji": EmojiPipeline, "glyphs": GlyphsPipeline}


def _texts(name: str, value: str | Sequence[str]) -> list[str]:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, (list, tuple)):
        raise TypeError(f"{name} is {value!r}; valid are a text or a list of texts")
    for text in texts:
        if not isinstance(text, str):
            raise TypeError(f"{name} contains {text!r}; valid are a text or a list of texts")
    if not texts:
        raise ValueError(f"{name} is empty; give at least one text")
    return list(texts)
