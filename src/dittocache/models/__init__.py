"""What discovery cannot find out about a family of models, one short file a family."""

from . import bare, basic, flux, hunyuan, joint, unet, uvit, video

__all__ = ["bare", "basic", "flux", "hunyuan", "joint", "unet", "uvit", "video"]
