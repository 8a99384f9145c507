"""ImageReward (Xu et al. 2023): what people would think of a picture for a prompt.

The authors' network is BLIP, whose text tower looks at the picture, and a linear head; their package needs timm, which
brings torchvision. Here transformers' BLIP towers take the authors' weights, and everything about their size is read
from these.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from .weights import fill, read

FILES = ("ImageReward.pt", "med_config.json", "vocab.txt")
WORDS = 35  # tokens of a prompt that are read
MEAN, DEVIATION = 0.16717362830052426, 1.0333394966054072  # of rewards in the authors' data
HEAD = 64  # channels of an attention head of the vision tower, in all sizes of ViT

# the authors' names of the vision tower's parts, and transformers'
_VISION = (
    ("patch_embed.proj.", "embeddings.patch_embedding."),
    ("cls_token", "embeddings.class_embedding"),
    ("pos_embed", "embeddings.position_embedding"),
    ("blocks.", "encoder.layers."),
    (".attn.proj.", ".self_attn.projection."),
    (".attn.", ".self_attn."),
    (".norm1.", ".layer_norm1."),
    (".norm2.", ".layer_norm2."),
)


class ImageReward(nn.Module):
    """Pictures and prompts -> rewards float32 [n], about standard normal over the authors' data; larger is better.

    Args:
        folder: has ImageReward.pt, med_config.json (both the authors') and vocab.txt (of bert-base-uncased).
    """

    def __init__(self, folder: Path) -> None:
        from transformers import BertTokenizer, BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

        super().__init__()
        path = folder / FILES[0]
        tensors = read(path)
        vision = {_vision_name(name): t for name, t in _below("blip.visual_encoder.", tensors).items()}
        text, head = _below("blip.text_encoder.", tensors), _below("mlp.layers.", tensors)
        try:
            self.vision = BlipVisionModel(BlipVisionConfig(**_vision_size(vision)))
            width = vision["post_layernorm.weight"].numel()
            config = BlipTextConfig(encoder_hidden_size=width, **_text_size(folder / FILES[1]))
            self.head = nn.Sequential(*(nn.Linear(*head[f"{n}.weight"].shape[::-1]) for n in _numbers(head)))
        except KeyError as error:
            raise ValueError(f"{path} does not hold ImageReward's weights: no {error}") from None
        self.text = BlipTextModel(config, add_pooling_layer=False)
        fill(self.vision, vision, path)
        fill(self.text, text, path)
        order = {str(n): str(place) for place, n in enumerate(_numbers(head))}
        fill(self.head, {f"{order[n]}.{kind}": head[f"{n}.{kind}"] for n in order for kind in ("weight", "bias")}, path)
        self.tokenizer = BertTokenizer.from_pretrained(str(folder))
        self.side = self.vision.config.image_size

    def forward(self, pictures: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        # CLIP's preparation of pictures is the authors' too: the short side to this length, bicubic, then the middle
        from transformers import CLIPImageProcessor

        device = next(self.parameters()).device
        prepare = CLIPImageProcessor(size={"shortest_edge": self.side}, crop_size=self.side)
        pixels = prepare(list(pictures), return_tensors="pt")["pixel_values"].to(device)
        options = {"padding": "max_length", "truncation": True, "max_length": WORDS, "return_tensors": "pt"}
        words = self.tokenizer(list(prompts), **options).to(device)
        seen = self.vision(pixel_values=pixels).last_hidden_state
        read_out = self.text(
            input_ids=words.input_ids,
            attention_mask=words.attention_mask,
            encoder_hidden_states=seen,
            encoder_attention_mask=torch.ones(seen.shape[:2], dtype=torch.long, device=device),
            is_decoder=False,  # every word sees every other
        ).last_hidden_state[:, 0]
        return (self.head(read_out)[:, 0] - MEAN) / DEVIATION


def _below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _numbers(head: Mapping[str, Tensor]) -> list[int]:
    """Places of the linear layers in the head; between them are dropouts."""
    return sorted({int(name.partition(".")[0]) for name in head})


def _vision_name(name: str) -> str:
    if name.startswith("norm."):
        return name.replace("norm.", "post_layernorm.")
    for theirs, ours in _VISION:
        name = name.replace(theirs, ours)
    return name


def _vision_size(tensors: Mapping[str, Tensor]) -> dict[str, float]:
    """Sizes of a vision tower, as its configuration names them, from its tensors."""
    width, _, patch, _ = tensors["embeddings.patch_embedding.weight"].shape
    positions = tensors["embeddings.position_embedding"].shape[1] - 1
    return {
        "hidden_size": width,
        "patch_size": patch,
        "image_size": patch * math.isqrt(positions),
        "num_hidden_layers": sum(name.endswith(".layer_norm1.weight") for name in tensors),
        "num_attention_heads": width // HEAD,
        "intermediate_size": tensors["encoder.layers.0.mlp.fc1.weight"].shape[0],
        "layer_norm_eps": 1e-6,
    }


def _text_size(path: Path) -> dict[str, float]:
    """Sizes of the text tower from the authors' med_config.json."""
    config = json.loads(path.read_text())
    sizes = ("hidden_size", "intermediate_size", "max_position_embeddings", "num_attention_heads", "num_hidden_layers")
    return {name: config[name] for name in (*sizes, "layer_norm_eps", "vocab_size", "hidden_act")}
