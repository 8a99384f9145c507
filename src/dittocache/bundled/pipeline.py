"""The pipeline of the bundled pixel-space diffusion transformer."""

from __future__ import annotations

import inspect
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from diffusers import DiffusionPipeline, DiTTransformer2DModel, ImagePipelineOutput
from diffusers.schedulers import KarrasDiffusionSchedulers
from diffusers.utils.torch_utils import randn_tensor

from .data import CHARACTERS

__all__ = ["CHARACTERS", "GlyphsPipeline"]

OUTPUT_TYPES = ("pil", "np", "pt")


class GlyphsPipeline(DiffusionPipeline):
    """Draws characters: class-conditional diffusion on grayscale pixels, called like diffusers' `DiTPipeline`.

    `DiTPipeline` itself cannot be used: it needs an autoencoder, and its null class is always 1000.
    """

    model_cpu_offload_seq = "transformer"
    _callback_tensor_inputs: ClassVar[list[str]] = ["latents"]

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

    def _check(self, steps: int, guidance: float, generator: Any, output_type: str, count: int) -> None:
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
            raise ValueError(f"num_inference_steps is {steps!r}; it must be an integer of at least 1")
        if not math.isfinite(guidance):
            raise ValueError(f"guidance_scale is {guidance!r}; it must be a finite number (1 or less: no guidance)")
        if isinstance(generator, (list, tuple)) and len(generator) != count:
            raise ValueError(f"{len(generator)} generators were given for {count} pictures; give one, or {count}")
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type is {output_type!r}; valid are {', '.join(map(repr, OUTPUT_TYPES))}")

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
        self._check(num_inference_steps, guidance_scale, generator, output_type, len(labels))
        unknown = [name for name in callback_on_step_end_tensor_inputs if name not in self._callback_tensor_inputs]
        if unknown:
            raise ValueError(f"callback_on_step_end_tensor_inputs contains {unknown[0]!r}; valid is 'latents'")

        device, config = self._execution_device, self.transformer.config
        guided = guidance_scale > 1
        classes = torch.tensor(labels + [self.null_label] * len(labels) * guided, device=device)

        self.scheduler.set_timesteps(num_inference_steps, device=device)
        # Drawn in float32 so that a seed means the same picture at every precision.
        shape = (len(labels), config.in_channels, config.sample_size, config.sample_size)
        generator = list(generator) if isinstance(generator, tuple) else generator
        latents = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        latents = latents.to(self.transformer.dtype) * self.scheduler.init_noise_sigma
        # Stochastic schedulers draw noise in every step.
        accepted = inspect.signature(self.scheduler.step).parameters
        step_kwargs = {"generator": generator} if "generator" in accepted else {}

        with self.progress_bar(total=num_inference_steps) as bar:
            for i, t in enumerate(self.scheduler.timesteps):
                model_input = torch.cat([latents, latents]) if guided else latents
                model_input = self.scheduler.scale_model_input(model_input, t)
                prediction = self.transformer(
                    model_input, timestep=t.expand(len(model_input)), class_labels=classes
                ).sample
                if guided:
                    conditional, unconditional = prediction.chunk(2)
                    prediction = unconditional + guidance_scale * (conditional - unconditional)
                latents = self.scheduler.step(prediction, t, latents, **step_kwargs).prev_sample
                if callback_on_step_end is not None:
                    inputs = {"latents": latents} if "latents" in callback_on_step_end_tensor_inputs else {}
                    latents = (callback_on_step_end(self, i, t, inputs) or {}).get("latents", latents)
                bar.update()

        images = (latents.float() / 2 + 0.5).clamp(0, 1)
        if output_type != "pt":
            images = images.cpu().permute(0, 2, 3, 1).numpy()
        if output_type == "pil":
            images = self.numpy_to_pil(images)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)
