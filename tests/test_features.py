"""Learned metrics with random weights in the layouts of the real ones."""

from __future__ import annotations

import json
import math
import string
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dittocache import bundled
from dittocache.bundled.judge import load_judge
from dittocache.evaluate.features import METRICS, check, load
from dittocache.evaluate.inception import Inception, resize

PROMPTS = ["a red heart", "a cat", "the sun over the sea"]


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def made(network: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Weights for every tensor of a network, each from a generator of its own."""
    found = {}
    for seed, (name, tensor) in enumerate(sorted(network.state_dict().items())):
        value = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(seed))
        if name.endswith("running_var"):
            value = 1 + 0.5 * value.abs()
        elif name.endswith("bn.weight"):
            value = 1 + 0.1 * value
        elif tensor.ndim > 1:
            value = value * math.sqrt(2 / tensor[0].numel())
        else:
            value = 0.1 * value
        if not name.endswith("num_batches_tracked"):
            found[name] = value
    return found


# ---- asking for metrics ---------------------------------------------------------------------------------------------
@pytest.fixture
def empty(tmp_path, monkeypatch) -> Path:
    """No weights anywhere."""
    monkeypatch.setenv("DITTOCACHE_CACHE", str(tmp_path))
    return tmp_path / "metrics"


@pytest.mark.parametrize("name", ["inception", "lpips", "image-reward", "clip"])
def test_missing_weights_are_refused_with_the_way_to_get_them(name, empty):
    with pytest.raises(ValueError, match=f"^{name}: no weights at ") as caught:
        check(["judge", name])
    line = str(caught.value)
    assert "\n" not in line
    assert ("curl -L" in line and f"{empty}/" in line and "https://" in line) or "hf download" in line
    assert f"weights: {name}=PATH" in line


def test_a_missing_package_is_refused_with_the_way_to_install_it(monkeypatch):
    monkeypatch.setattr(METRICS["clip"], "packages", ("nobody_has_this",))
    with pytest.raises(ImportError, match=r"^clip needs nobody_has_this: pip install 'dittocache\[metrics\]'$"):
        check(["clip"])


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="unknown metric 'fid'; known: judge, inception, clip, lpips, image-reward"):
        check(["judge", "fid"])
    with pytest.raises(ValueError, match="unknown metric 'incepton'"):
        check(["judge"], {"incepton": "file"})
    with pytest.raises(ValueError, match=r"judge: nobody is no bundled model \(emoji, glyphs\) and no folder"):
        check(["judge"], {"judge": "nobody"})


def test_files_in_the_cache_folder_are_found(empty):
    empty.mkdir()
    (empty / METRICS["lpips"].default).write_bytes(b"")
    check(["lpips"])


def test_broken_and_foreign_files_are_refused_in_one_line(tmp_path):
    broken = tmp_path / "broken.pth"
    broken.write_bytes(b"not weights")
    with pytest.raises(ValueError, match=r"broken\.pth cannot be read as weights: .+$") as caught:
        load("inception", {"inception": broken})
    assert "\n" not in str(caught.value)
    foreign = tmp_path / "foreign.safetensors"
    save_file({"features.0.weight": torch.zeros(64, 3, 7, 7)}, foreign)
    with pytest.raises(ValueError, match=r"weights of Inception: no 'Conv2d_1a_3x3\.conv\.weight'"):
        load("inception", {"inception": foreign})
    with pytest.raises(ValueError, match=r"'features\.0\.weight' is \[64, 3, 7, 7\] instead of \[64, 3, 11, 11\]"):
        load("lpips", {"lpips": foreign})


@pytest.mark.parametrize(
    ("pictures", "message"),
    [
        (torch.zeros(2, 1, 32, 32, dtype=torch.uint8), r"pictures are float.*got uint8 \[2, 1, 32, 32\]"),
        (torch.zeros(2, 32, 32), r"got float32 \[2, 32, 32\]"),
        (torch.zeros(0, 1, 32, 32), r"at least 1; got float32 \[0, 1, 32, 32\]"),
        (torch.full((1, 1, 32, 32), 255.0), r"in \[0, 1\]; got values from 255 to 255"),
        (torch.zeros(1, 3, 32, 32), "pictures of 1 channels; got 3"),
    ],
)
def test_bad_pictures(pictures, message):
    with pytest.raises(ValueError, match=message):
        load("judge")(pictures)


# ---- features -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("model", "channels"), [("glyphs", 1), ("emoji", 3)])
def test_judge(model, channels):
    pictures = noise(5, channels, 32, 32)
    for place in (model, bundled.folder(model)):
        found = load("judge", {"judge": place})(pictures, batch=2)
        judge = load_judge(model)
        torch.testing.assert_close(found["features"], judge.features(pictures))
        torch.testing.assert_close(found["probabilities"], judge(pictures).softmax(1))


@pytest.fixture(scope="module")
def inception(tmp_path_factory):
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(made(Inception()), path)
    return load("inception", {"inception": path})


def test_inception_has_the_layout_of_the_public_file():
    tensors = Inception().state_dict()
    named = {name for name in tensors if not name.endswith("num_batches_tracked")}
    assert len(named) == 472
    assert {"Mixed_5b.branch3x3dbl_3.conv.weight", "Mixed_6a.branch3x3.bn.running_var", "fc.bias"} < named
    assert {"Mixed_7a.branch7x7x3_4.conv.weight", "Mixed_7c.branch3x3dbl_3b.bn.bias"} < named
    assert tensors["Mixed_6b.branch7x7dbl_2.conv.weight"].shape == (128, 128, 7, 1)
    assert tensors["Mixed_7b.branch3x3_2a.conv.weight"].shape == (384, 384, 1, 3)
    assert tensors["fc.weight"].shape == (1008, 2048)


def test_inception_equals_torch_fidelity(inception):
    """Numbers by FeatureExtractorInceptionV3 of torch-fidelity 0.4.0 with these weights and this picture."""
    levels = (noise(2, 3, 40, 56) * 255).round()
    found = inception(levels / 255)
    assert {name: tuple(tensor.shape) for name, tensor in found.items()} == {
        "features": (2, 2048),
        "spatial": (2, 2023),
        "probabilities": (2, 1008),
    }
    close = {"rtol": 1e-3, "atol": 1e-5}
    wanted = torch.tensor([0.012409, 0.014007, 0.353568, 0.023865, 0.016956])
    torch.testing.assert_close(found["features"][0, :5], wanted, **close)
    assert found["features"][0].mean().item() != pytest.approx(found["features"][1].mean().item(), rel=1e-6)
    assert found["features"].mean().item() == pytest.approx(0.102026, rel=1e-4)
    # row 3, column 5, the seven channels
    place = (3 * 17 + 5) * 7
    wanted = torch.tensor([0.0, 0.0, 0.0, 0.036649, 0.209557, 0.0, 0.0])
    torch.testing.assert_close(found["spatial"][0, place : place + 7], wanted, **close)
    wanted = torch.tensor([0.0011274, 0.0008361, 0.0008671])
    torch.testing.assert_close(found["probabilities"][0, :3], wanted, rtol=1e-3, atol=1e-8)


def test_inception_takes_grey_pictures_as_saved_ones(inception):
    grey = noise(1, 1, 32, 32)
    found = inception(grey)["features"]
    torch.testing.assert_close(inception(((grey * 255).round() / 255).repeat(1, 3, 1, 1))["features"], found)


def test_resizing_reads_at_multiples_of_the_scale():
    ramp = torch.arange(4.0).expand(1, 1, 3, 4)
    assert resize(ramp, 8)[0, 0, 0].tolist() == [0, 0.5, 1, 1.5, 2, 2.5, 3, 3]
    assert resize(ramp.mT, 2)[0, 0].tolist() == [[0, 0], [2, 2]]
    assert torch.equal(resize(noise(1, 3, 9, 9), 9), noise(1, 3, 9, 9))


# ---- CLIP score -----------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory) -> Path:
    """A tiny CLIP model with a vocabulary of letters, as save_pretrained leaves it."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

    folder = tmp_path_factory.mktemp("clip")
    words = [*string.ascii_lowercase, *(f"{c}</w>" for c in string.ascii_lowercase)]
    vocabulary = {word: n for n, word in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\nc a\n")
    (folder / "vocab.json").write_text(json.dumps(vocabulary | {"ca": len(vocabulary)}))
    tower = {"hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = {"vocab_size": 64, "max_position_embeddings": 77, "eos_token_id": 53, "bos_token_id": 52, "pad_token_id": 53}
    config = CLIPConfig(
        text_config=tower | text, vision_config=tower | {"image_size": 30, "patch_size": 6}, projection_dim=16
    )
    torch.manual_seed(0)
    CLIPModel(config).save_pretrained(folder)
    tokenizer = CLIPTokenizer.from_pretrained(str(folder), model_max_length=77)
    images = CLIPImageProcessor(size={"shortest_edge": 30}, crop_size={"height": 30, "width": 30})
    CLIPProcessor(images, tokenizer).save_pretrained(folder)
    return folder


def test_clip_score(clip_folder):
    from transformers import CLIPModel, CLIPProcessor

    metric = load("clip", {"clip": clip_folder})
    pictures = noise(3, 3, 40, 30)
    found = metric(pictures, PROMPTS, batch=2)
    assert found.shape == (3,)
    assert found.dtype == torch.float64
    model, processor = CLIPModel.from_pretrained(clip_folder).eval(), CLIPProcessor.from_pretrained(clip_folder)
    images = list((pictures * 255).round().to(torch.uint8))
    for score, image, prompt in zip(found, images, PROMPTS):
        inputs = processor(images=[image], text=[prompt], return_tensors="pt")
        logits = model(**inputs).logits_per_image.item() / model.logit_scale.exp().item()
        assert score.item() == pytest.approx(max(100 * logits, 0), abs=1e-3)
    assert found.max() > 0
    assert metric(pictures[:1], ["cat " * 100]).isfinite().all()  # too long a prompt is cut


def test_clip_score_needs_prompts(clip_folder):
    metric = load("clip", {"clip": clip_folder})
    with pytest.raises(TypeError, match="clip needs prompts, one for every picture; got Tensor"):
        metric(noise(2, 3, 32, 32), noise(2, 3, 32, 32))
    with pytest.raises(ValueError, match="clip needs prompts for 2 pictures; got 3"):
        metric(noise(2, 3, 32, 32), PROMPTS)
    with pytest.raises(TypeError, match="got str"):
        metric(noise(2, 3, 32, 32), "ab")


def test_a_folder_without_weights_is_no_clip_model(tmp_path):
    with pytest.raises(ValueError, match=r"has no model\.safetensors"):
        check(["clip"], {"clip": tmp_path})


# ---- LPIPS ----------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def lpips_file(tmp_path_factory) -> Path:
    layers = {0: (64, 3, 11), 3: (192, 64, 5), 6: (384, 192, 3), 8: (256, 384, 3), 10: (256, 256, 3)}
    convolutions = {f"features.{n}": torch.nn.Conv2d(i, o, k) for n, (o, i, k) in layers.items()}
    tensors = {f"{name}.{k}": t for name, layer in convolutions.items() for k, t in made(layer).items()}
    path = tmp_path_factory.mktemp("lpips") / "alexnet.pth"
    torch.save(tensors | {"classifier.6.bias": torch.zeros(1000)}, path)
    return path


def test_lpips_equals_torchmetrics(lpips_file, monkeypatch):
    """torchmetrics' own distance, given the network that it would take from torchvision."""
    import torchmetrics.functional.image.lpips as theirs

    metric = load("lpips", {"lpips": lpips_file})
    monkeypatch.setattr(theirs, "_get_tv_model_features", lambda *_, **__: metric.network.features)
    network = theirs._LPIPS(pretrained=True, net="alex").eval()
    pictures, references = noise(3, 3, 48, 40), noise(3, 3, 48, 40, seed=1)
    found = metric(pictures, references, batch=2)
    with torch.no_grad():
        wanted = network(pictures, references, normalize=True).flatten()
    torch.testing.assert_close(found.float(), wanted)
    assert found.min() > 0.01


def test_lpips_of_equal_pictures_is_zero_and_grows(lpips_file):
    metric = load("lpips", {"lpips": lpips_file})
    grey = noise(2, 1, 32, 32)
    assert metric(grey, grey).tolist() == [0, 0]
    slight, strong = (metric(grey.lerp(noise(2, 1, 32, 32, seed=1), share), grey) for share in (0.1, 0.5))
    assert (slight > 0).all()
    assert (slight < strong).all()


def test_lpips_refuses(lpips_file):
    metric = load("lpips", {"lpips": lpips_file})
    with pytest.raises(ValueError, match=r"31 pixels a side or more; got \[1, 1, 28, 28\]"):
        metric(noise(1, 1, 28, 28), noise(1, 1, 28, 28))
    with pytest.raises(ValueError, match=r"share a shape; got \[1, 3, 40, 40\] and \[1, 1, 40, 40\]"):
        metric(noise(1, 3, 40, 40), noise(1, 1, 40, 40))
    assert metric(noise(1, 1, 31, 31), noise(1, 1, 31, 31)).tolist() == [0]


# ---- ImageReward ----------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def reward_folder(tmp_path_factory) -> Path:
    """Random weights under the authors' names: two layers, 32 pixels, a vocabulary of a few words."""
    folder = tmp_path_factory.mktemp("reward")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *["a", "the", "red", "heart", "cat", "sun", "over", "sea"]]
    (folder / "vocab.txt").write_text("\n".join(words))
    sizes = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "layer_norm_eps": 1e-12, "vocab_size": 16, "hidden_act": "gelu", "max_position_embeddings": 40,
        "architectures": ["BertModel"], "encoder_width": 768, "add_cross_attention": True,
    }  # fmt: skip
    (folder / "med_config.json").write_text(json.dumps(sizes))
    wide, slim = 128, 32
    shapes = {
        "blip.visual_encoder.cls_token": (1, 1, wide),
        "blip.visual_encoder.pos_embed": (1, 5, wide),
        "blip.visual_encoder.patch_embed.proj": (wide, 3, 16, 16),
        "blip.visual_encoder.norm": (wide,),
        "blip.text_encoder.embeddings.word_embeddings.weight": (16, slim),
        "blip.text_encoder.embeddings.position_embeddings.weight": (40, slim),
        "blip.text_encoder.embeddings.LayerNorm": (slim,),
        "blip.vision_proj": (4, wide),  # not used
    }
    for n in range(2):
        block, layer = f"blip.visual_encoder.blocks.{n}", f"blip.text_encoder.encoder.layer.{n}"
        shapes |= {f"{block}.norm1": (wide,), f"{block}.norm2": (wide,), f"{block}.attn.qkv": (3 * wide, wide)}
        shapes |= {f"{block}.attn.proj": (wide, wide), f"{block}.mlp.fc1": (80, wide), f"{block}.mlp.fc2": (wide, 80)}
        for attention, source in (("attention", slim), ("crossattention", wide)):
            shapes |= {f"{layer}.{attention}.self.{part}": (slim, source) for part in ("key", "value")}
            shapes |= {f"{layer}.{attention}.self.query": (slim, slim)}
            shapes |= {f"{layer}.{attention}.output.dense": (slim, slim)}
            shapes |= {f"{layer}.{attention}.output.LayerNorm": (slim,)}
        shapes |= {f"{layer}.intermediate.dense": (48, slim), f"{layer}.output.dense": (slim, 48)}
        shapes |= {f"{layer}.output.LayerNorm": (slim,)}
    widths = {0: (24, slim), 2: (16, 24), 4: (8, 16), 6: (4, 8), 7: (1, 4)}
    shapes |= {f"mlp.layers.{n}": shape for n, shape in widths.items()}
    tensors: dict[str, torch.Tensor] = {}
    generator = torch.Generator().manual_seed(0)
    for name, shape in shapes.items():
        if name.endswith(("cls_token", "pos_embed", "embeddings.weight")):
            tensors[name] = torch.randn(shape, generator=generator) * 0.3
        elif len(shape) == 1:  # a norm
            tensors[f"{name}.weight"] = 1 + 0.2 * torch.randn(shape, generator=generator)
            tensors[f"{name}.bias"] = 0.2 * torch.randn(shape, generator=generator)
        else:
            tensors[f"{name}.weight"] = torch.randn(shape, generator=generator) * math.prod(shape[1:]) ** -0.5
            tensors[f"{name}.bias"] = 0.2 * torch.randn(shape[:1], generator=generator)
    torch.save(tensors, folder / "ImageReward.pt")
    return folder


def test_image_reward_equals_the_authors_code(reward_folder):
    """Numbers by vit.py and med.py of THUDM/ImageReward with these weights, and its preparation of pictures."""
    metric = load("image-reward", {"image-reward": reward_folder})
    pictures = noise(3, 3, 40, 48)
    found = metric(pictures, PROMPTS, batch=2)
    assert found.tolist() == pytest.approx([5.030233, 4.573673, 4.409872], abs=1e-4)
    # picture and prompt both count
    assert abs(metric(1 - pictures, PROMPTS) - found).min() > 1e-3
    assert abs(metric(pictures, PROMPTS[::-1]) - found)[[0, 2]].min() > 1e-3


def test_image_reward_names_the_file_that_is_missing(reward_folder, tmp_path):
    for file in ("ImageReward.pt", "med_config.json"):
        (tmp_path / file).write_bytes((reward_folder / file).read_bytes())
    with pytest.raises(ValueError, match=r"no weights at .*vocab\.txt; get them with `hf download THUDM/ImageReward"):
        check(["image-reward"], {"image-reward": tmp_path})


def test_foreign_weights_are_no_image_reward(reward_folder, tmp_path):
    for file in ("vocab.txt", "med_config.json"):
        (tmp_path / file).write_bytes((reward_folder / file).read_bytes())
    torch.save({"a": torch.zeros(2)}, tmp_path / "ImageReward.pt")
    with pytest.raises(ValueError, match=r"does not hold ImageReward's weights: no 'embeddings\.patch_embedding"):
        load("image-reward", {"image-reward": tmp_path})
