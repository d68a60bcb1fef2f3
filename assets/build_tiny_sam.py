"""The architecture of the tiny SAM, whose weights are in assets/tiny_sam."""

from functools import partial

from segment_anything.modeling import (
    ImageEncoderViT,
    MaskDecoder,
    PromptEncoder,
    Sam,
    TwoWayTransformer,
)
from torch import nn


def build_tiny_sam(image_size=128, patch=8, width=96, depth=4, channels=64):
    """segment-anything's own modules at about 0.5 M parameters (the smallest published: 91 M)."""
    side = image_size // patch
    return Sam(
        image_encoder=ImageEncoderViT(
            img_size=image_size,
            patch_size=patch,
            embed_dim=width,
            depth=depth,
            num_heads=3,
            mlp_ratio=2,
            out_chans=channels,
            norm_layer=partial(nn.LayerNorm, eps=1e-6),
            use_rel_pos=True,
        ),
        prompt_encoder=PromptEncoder(
            embed_dim=channels,
            image_embedding_size=(side, side),
            input_image_size=(image_size, image_size),
            mask_in_chans=4,
        ),
        mask_decoder=MaskDecoder(
            transformer_dim=channels,
            transformer=TwoWayTransformer(
                depth=2, embedding_dim=channels, mlp_dim=128, num_heads=4
            ),
            iou_head_depth=2,
            iou_head_hidden_dim=64,
        ),
    )
