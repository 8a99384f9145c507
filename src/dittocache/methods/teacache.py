"""TeaCache (arXiv 2411.19108)."""

from typing import Annotated, Literal

from ..fill import Hold
from ..parameters import Int, Number, Numbers
from ..recipe import Recipe, method
from ..when import SignalChange

# The authors' polynomials, highest power first, by the model that they were fitted on. Wan's are second-hand; its first
# and HiDream's are for embeddings that the blocks of diffusers are not quite given, see the documentation.
POLYNOMIALS: dict[str, tuple[float, ...]] = {
    "flux": (498.651651, -283.781631, 55.8554382, -3.82021401, 0.264230861),
    "tangoflux": (498.651651, -283.781631, 55.8554382, -3.82021401, 0.264230861),
    "hunyuan-video": (733.226126, -401.131952, 67.5869174, -3.149878, 0.0961237896),
    "mochi": (-3512.41319, 811.675948, -60.9400215, 2.42429681, 0.00305291719),
    "ltx-video": (21.4700694, -12.8016453, 2.31279151, 0.792487521, 0.00969274326),
    "cosmos": (271.156237, -91.9775607, 2.2443725, 2.08355751, 0.14177633),
    "lumina-t2x": (393.76566581, -603.50993606, 209.10239044, -23.00726601, 0.86377344),
    "lumina2": (225.704202, -608.845372, 304.186994, 124.212677, -1.40890669),
    "lumina2-v1": (393.76566581, -603.50993606, 209.10239044, -23.00726601, 0.86377344),
    "hidream-full": (-31360.5009, -712.425503, 49.1363285, 8.2651549, 0.108053901),
    "cogvideox-2b": (-31.0658903, 25.4732368, -5.92380459, 1.75769064, -0.00361568434),
    "cogvideox-5b": (-1538.80483, 843.202495, -134.363087, 7.97131516, -0.0523162339),
    "cogvideox1.5-5b": (250.210439, -165.061612, 35.7804877, -0.781551492, 0.0358559703),
    "cogvideox1.5-5b-i2v": (122.842302, -104.088754, 26.2981677, -0.306009921, 0.037121322),
    "consisid": (-1538.80483, 843.202495, -134.363087, 7.97131516, -0.0523162339),
    "open-sora": (217.546007, -118.329252, 26.8662585, -0.0459364272, 0.048442624),
    "open-sora-plan": (205943.668, -14875.9286, 306.085986, 1.3141808, 0.00239658469),
    "latte": (-2464.34137, 308.044764, 80.7447667, -4.11385132, 0.111001402),
    "wan-t2v-1.3b": (2396.76752, -1311.10545, 201.331979, -8.29855975, 0.137887774),
    "wan-ret": (-52186.2437, 9230.41404, -528.275948, 13.6987616, -0.0499875664),
}
BY_EMBEDDING = ("hidream", "cogvideox", "consisid", "wan")  # models of these look at the time embedding
IDENTITY = (1.0, 0.0)

Model = Literal[
    "flux", "tangoflux", "hunyuan-video", "mochi", "ltx-video", "cosmos", "lumina-t2x", "lumina2", "lumina2-v1",
    "hidream-full", "cogvideox-2b", "cogvideox-5b", "cogvideox1.5-5b", "cogvideox1.5-5b-i2v", "consisid", "open-sora",
    "open-sora-plan", "latte", "wan-t2v-1.3b", "wan-ret",
]  # fmt: skip


@method(
    name="teacache",
    title="Timestep Embedding Tells: It's Time to Cache for Video Diffusion Model",
    arxiv="2411.19108",
    bibtex="""@inproceedings{liu2025teacache,
  title={Timestep Embedding Tells: It's Time to Cache for Video Diffusion Model},
  author={Liu, Feng and Zhang, Shiwei and Wang, Xiaofeng and Wei, Yujie and Qiu, Haonan and Zhao, Yuzhong and
    Zhang, Yingya and Ye, Qixiang and Wan, Fang},
  booktitle={Proceedings of the IEEE/CVF Conference on Computer Vision and Pattern Recognition},
  year={2025},
  note={arXiv:2411.19108}
}""",
    settings={
        "FLUX.1-dev, 1.5x": {"model": "flux", "threshold": 0.25},
        "FLUX.1-dev, 1.8x": {"model": "flux", "threshold": 0.4},
        "FLUX.1-dev, 2x": {"model": "flux", "threshold": 0.6},
        "FLUX.1-dev, 2.25x": {"model": "flux", "threshold": 0.8},
        "HunyuanVideo, 1.6x": {"model": "hunyuan-video", "threshold": 0.1},
        "HunyuanVideo, 2.1x": {"model": "hunyuan-video", "threshold": 0.15},
        "Mochi, slow": {"model": "mochi", "threshold": 0.06},
        "Mochi, fast": {"model": "mochi", "threshold": 0.09},
        "LTX-Video, slow": {"model": "ltx-video", "threshold": 0.03},
        "LTX-Video, fast": {"model": "ltx-video", "threshold": 0.05},
        "CogVideoX1.5-5B": {"model": "cogvideox1.5-5b", "threshold": 0.1},
        "Lumina-Image-2.0": {"model": "lumina2", "threshold": 0.2},
        "Open-Sora, slow": {"model": "open-sora", "threshold": 0.1},
        "Open-Sora, fast": {"model": "open-sora", "threshold": 0.2},
        "Latte, slow": {"model": "latte", "threshold": 0.1},
        "Latte, fast": {"model": "latte", "threshold": 0.2},
        "Open-Sora-Plan, slow": {"model": "open-sora-plan", "threshold": 0.1},
        "Open-Sora-Plan, fast": {"model": "open-sora-plan", "threshold": 0.2},
    },
)
def teacache(
    threshold: Annotated[float, Number(0, help="accumulated change, below which all blocks are skipped")] = 0.1,
    model: Annotated[Model | None, "model whose polynomial is taken; None for the coefficients"] = None,
    coefficients: Annotated[
        tuple[float, ...] | None,
        Numbers(count=5, help="of a polynomial, highest power first; None for change as it is"),
    ] = None,
    indicator: Annotated[
        Literal["modulated", "embedding"] | None,
        "what is watched: the input of the first attention, or the time embedding; None for the model's",
    ] = None,
    first_full: Annotated[int, Int(1, help="steps computed at the start")] = 1,
    last_full: Annotated[bool, "the last step is computed"] = True,
    batch: Annotated[
        Literal["sample", "batch"], "decide for every sample on its own, or once for all, as the authors do"
    ] = "sample",
) -> Recipe:
    """All blocks are skipped while an accumulated polynomial of the change of their first input stays small."""
    if model is not None and coefficients is not None:
        raise ValueError(f"pass a model or coefficients, not both; got model={model!r} and {len(coefficients)} numbers")
    if indicator is None:
        indicator = "embedding" if (model or "").startswith(BY_EMBEDDING) else "modulated"
    polynomial = POLYNOMIALS[model] if model is not None else coefficients or IDENTITY
    when = SignalChange(threshold, polynomial, indicator, first_full, last_full, batch)
    return Recipe(when=when, where="stack", keeps="change", fill=Hold())
