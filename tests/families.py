"""Small models of every family: random weights, the tokenizer of assets/tiny_vlm, no downloads."""

import torch
import transformers as hf
from conftest import TINY
from tokenizers.processors import TemplateProcessing

from assets.make_tiny import CHAT_TEMPLATE

QWEN = ["Qwen2VL", "Qwen2_5_VL", "Qwen3VL", "Qwen3_5"]
TILED = ["InternVL", "Llava", "LlavaNext", "LlavaOnevision"]
SIDE, PATCH = 28, 7  # pixels of a tile, and of a patch of it: 4 x 4 patches
SQUARE = {"height": SIDE, "width": SIDE}
GRIDS = [[28, 56], [56, 28], [56, 56], [28, 84]]  # of tiles, in pixels (height, width)

PART = "{% for part in message.content %}{% if part.type == 'image' %}IMAGE\n{% else %}"
PART += "{{ part.text }}{% endif %}{% endfor %}"
CHATML = "{% for message in messages %}<|im_start|>{{ message.role }}\n" + PART
CHATML += "<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
VICUNA = "{% for message in messages %}USER: " + PART + "{% endfor %} ASSISTANT:"


def small_policy(kind, tokenizer=None):
    """(model, processor) of a family; tokenizer: for Qwen-VL, any with its special tokens."""
    if kind in QWEN:
        processor = qwen_processor(kind, tokenizer or hf.AutoTokenizer.from_pretrained(TINY))
        text, vision, more = qwen_config(kind, processor)
    else:
        processor = tiled_processor(kind)
        text, vision, more = tiled_config(kind, processor)
    text |= {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16}
    text["num_hidden_layers"] = 4 if kind == "Qwen3_5" else 2
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    text["vocab_size"] = max(len(processor.tokenizer), 1000)
    text["pad_token_id"] = processor.tokenizer.pad_token_id
    text["eos_token_id"] = processor.tokenizer.eos_token_id
    config = getattr(hf, f"{kind}Config")(text_config=text, vision_config=vision, **more)
    torch.manual_seed(0)
    model = getattr(hf, f"{kind}ForConditionalGeneration")(config).eval()
    model.can_share = kind != "Qwen3_5"  # as load_policy finds out
    return model, processor


def saved_policy(kind, folder):
    """`folder`, with a small policy in it."""
    for part in small_policy(kind):
        part.save_pretrained(folder)
    return str(folder)


def qwen_processor(kind, tokenizer):
    kind = "Qwen3VL" if kind == "Qwen3_5" else kind
    patch = 16 if kind == "Qwen3VL" else 14
    images = {"patch_size": patch, "merge_size": 2, "temporal_patch_size": 2}
    size = {"shortest_edge": 56 * 56, "longest_edge": 224 * 224}
    video = hf.Qwen3VLVideoProcessor if kind == "Qwen3VL" else hf.Qwen2VLVideoProcessor
    parts = hf.Qwen2VLImageProcessor(**images, size=size), tokenizer, video(**images)
    return getattr(hf, f"{kind}Processor")(*parts, chat_template=CHAT_TEMPLATE)


def qwen_config(kind, processor):
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
    vision = {"depth": 2, "num_heads": 2, "spatial_merge_size": 2, "temporal_patch_size": 2}
    newer = {"hidden_size": 32, "out_hidden_size": 64, "intermediate_size": 64}
    vision |= {
        "Qwen2VL": {"embed_dim": 32, "hidden_size": 64, "patch_size": 14, "mlp_ratio": 2},
        "Qwen2_5_VL": {**newer, "patch_size": 14, "window_size": 56, "fullatt_block_indexes": [1]},
        "Qwen3VL": {**newer, "patch_size": 16, "num_position_embeddings": 64}
        | {"deepstack_visual_indexes": [0]},
        "Qwen3_5": {**newer, "patch_size": 16, "num_position_embeddings": 64},
    }[kind]
    ids = processor.tokenizer.convert_tokens_to_ids
    tokens = {"vision_start": "<|vision_start|>", "vision_end": "<|vision_end|>"}
    tokens |= {"image": "<|image_pad|>", "video": "<|video_pad|>"}
    more = {f"{name}_token_id": ids(token) for name, token in tokens.items()}
    text = {"rope_parameters": rope}
    if kind == "Qwen3_5":  # three of four layers are linear attention
        rope |= {"mrope_interleaved": True, "partial_rotary_factor": 1.0}
        text |= {"linear_num_key_heads": 2, "linear_num_value_heads": 4}
        text |= {"linear_key_head_dim": 16, "linear_value_head_dim": 16}
    return text, vision, more


def tiled_processor(kind):
    """The processor of a family that cuts images into tiles of SIDE pixels; LLaVA-1.5's as it is
    published: it cuts off what is not in the middle square."""
    names = {
        "InternVL": {"start_image_token": "<img>", "end_image_token": "</img>"}
        | {"context_image_token": "<IMG_CONTEXT>", "video_token": "<video>"},
        "LlavaOnevision": {"image_token": "<image>", "video_token": "<video>"},
    }.get(kind, {"image_token": "<image>"})
    tokenizer = hf.AutoTokenizer.from_pretrained(TINY, extra_special_tokens=names)
    if kind == "InternVL":
        images = hf.GotOcr2ImageProcessor(size=SQUARE, min_patches=1, max_patches=4)
        video = hf.InternVLVideoProcessor(size=SQUARE)
        template = CHATML.replace("IMAGE", "<IMG_CONTEXT>")
        return hf.InternVLProcessor(images, tokenizer, video, 4, chat_template=template)
    if kind == "LlavaOnevision":
        images = hf.LlavaOnevisionImageProcessor(size=SQUARE, image_grid_pinpoints=GRIDS)
        video = hf.LlavaOnevisionVideoProcessor(size=SQUARE)
        options = {"num_image_tokens": 16, "vision_feature_select_strategy": "full"}
        options["chat_template"] = CHATML.replace("IMAGE", "<image>")
        return hf.LlavaOnevisionProcessor(images, tokenizer, video, **options)
    # as Llama's tokenizer does: a token of its own at the beginning
    start = [("<|im_start|>", tokenizer.convert_tokens_to_ids("<|im_start|>"))]
    start = TemplateProcessing(single="<|im_start|> $A", special_tokens=start)
    tokenizer.backend_tokenizer.post_processor = start
    options = {"patch_size": PATCH, "vision_feature_select_strategy": "default"}
    options["chat_template"] = VICUNA.replace("IMAGE", "<image>")
    options["num_additional_image_tokens"] = 1
    images = {"size": {"shortest_edge": SIDE}, "crop_size": SQUARE}
    if kind == "Llava":
        return hf.LlavaProcessor(hf.CLIPImageProcessor(**images), tokenizer, **options)
    images = hf.LlavaNextImageProcessor(**images, image_grid_pinpoints=GRIDS)
    return hf.LlavaNextProcessor(images, tokenizer, **options)


def tiled_config(kind, processor):
    text = {"model_type": {"Llava": "llama", "LlavaNext": "mistral"}.get(kind, "qwen2")}
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3}
    vision |= {"num_attention_heads": 2, "image_size": SIDE, "patch_size": PATCH}
    more = {"image_token_id": processor.image_token_id, "tie_word_embeddings": False}
    if kind == "InternVL":
        vision |= {"image_size": [SIDE, SIDE], "patch_size": [PATCH, PATCH]}
        return text, vision, {**more, "image_seq_length": 4}
    if kind in ("LlavaNext", "LlavaOnevision"):
        more["image_grid_pinpoints"] = GRIDS
    if kind == "LlavaOnevision":
        vision |= {"model_type": "siglip_vision_model", "vision_use_head": False}
        more |= {"vision_feature_select_strategy": "full", "vision_feature_layer": -1}
        return text, vision, {**more, "video_token_id": processor.video_token_id}
    more["image_token_index"] = more.pop("image_token_id")
    text |= {"sliding_window": None} if kind == "LlavaNext" else {}
    return text, {**vision, "model_type": "clip_vision_model", "projection_dim": 32}, more
