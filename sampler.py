"""Points, policy and SAM: everything between a phrase with an image and a mask.

1. **Points.** A box says where the target is, but not which of the things inside it is meant. So
   we lay a grid of points over the box, and the model judges each point (1 = on the target, 0 =
   off). The number of cells per side grows with the box:

       K = clip(floor(alpha * side / image_side), K_min, K_max),  alpha = 16, K_min = 3, K_max = 6

   A label that the model itself doubts (p < 0.9) is dropped.
2. **Policy.** A multimodal language model that transformers loads: Qwen-VL, Qwen3.5, InternVL or
   LLaVA.
3. **Prefill and decode.** All phrases about an image share its KV cache. Decoding also returns the
   probability of each character, so a label's confidence needs no second forward pass.
4. **Groups.** GRPO samples and scores G completions of a prompt. They share one row with their
   prompt, so the prompt and its image are computed and stored once, not G times. `check_sharing`
   finds out at loading whether a model allows that. If not, each completion has a row of its own.
5. **What trains.** LoRA, or all parameters, of which each of several GPUs has a part; and the files
   that they are saved in.
6. **SAM.** Frozen. Box + positive points + negative points -> mask. Its image encoder is the slow
   part and runs once per image. SAM-HQ, SAM 2 and SAM 3 serve as well.

Departures from the paper (ReSaP): K_min is 3, where the paper has 1, because one point in the
middle of a small box tells SAM nothing new (figures in the README). SAM returns its single-mask
output, where the paper takes the best-scored one of three. `eval.py --paper` restores both.

Errors, processes and the console are at the end of the file: skip them on a first reading.
"""

import argparse
import copy
import hashlib
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import sys
import tempfile
import traceback
import warnings
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.checkpoint import checkpoint

ASSETS = Path(__file__).resolve().parent / "assets"
TINY_VLM, TINY_SAM = ASSETS / "tiny_vlm", ASSETS / "tiny_sam" / "model.safetensors"
# owner/name, but neither a folder of runs nor a file of weights that is not there
HUB_NAME = re.compile(r"(?!runs/|.*\.(pt|pth|safetensors)$)\w[\w.-]*/[\w.-]+")
ADAPTER_CONFIG = "adapter_config.json"  # PEFT's name
LOGITS_IN_MEMORY = 2**27  # float32 numbers, see token_logps


# ------------------------------------------------------------------------- points


def grid_points(box_px, width, height, alpha=16, k_min=3, k_max=6):
    """Scale-aware grid: the centres of Kw x Kh cells of a box, row by row, (N, 2).

    box_px: (x1, y1, x2, y2); width, height: of the image. k_min = k_max gives a fixed grid. Source:
    ReSaP's scale-aware sampling.
    """
    x1, y1, x2, y2 = (float(v) for v in box_px)
    kw = min(max(math.floor(alpha * (x2 - x1) / width), k_min), k_max)
    kh = min(max(math.floor(alpha * (y2 - y1) / height), k_min), k_max)
    x = x1 + (np.arange(kw) + 0.5) * (x2 - x1) / kw  # (Kw,)
    y = y1 + (np.arange(kh) + 0.5) * (y2 - y1) / kh  # (Kh,)
    return np.stack(np.meshgrid(x, y), axis=-1).reshape(-1, 2)


def random_points(box_px, count, rng):
    """`count` points, uniform in the box, (N, 2): the ablation of the grid."""
    box = np.asarray(box_px, dtype=np.float64)
    return rng.uniform(box[:2], box[2:], (count, 2))


def label_points(points_px, mask):
    """1 where a point (N, 2) falls on a pixel of the mask (H, W), 0 elsewhere and outside: (N,)."""
    height, width = mask.shape
    x, y = np.floor(points_px).astype(int).reshape(-1, 2).T
    inside = (x >= 0) & (y >= 0) & (x < width) & (y < height)
    return np.where(inside, mask[y.clip(0, height - 1), x.clip(0, width - 1)], False).astype(int)


def jitter_box(box_px, width, height, rng, amount=0.1):
    """The box with each edge moved by up to `amount` of its side, clipped to the image, (4,).

    At test time the grid lies in a *predicted* box. A model that is trained on true boxes only
    would never see a grid that is off.
    """
    box = np.asarray(box_px, dtype=np.float64)
    side = np.tile(box[2:] - box[:2], 2)
    return (box + rng.uniform(-amount, amount, 4) * side).clip(0, [width, height, width, height])


def is_confident(probs, threshold=0.9):
    """Which labels to keep, bool (N,): those with a probability of `threshold` or more."""
    return np.asarray(probs) >= threshold


# ------------------------------------------------------------------------- policy


def check_device(device):
    """InputError if torch cannot put a tensor on `device`. A GPU becomes the current one, on which
    streams and graphs are made."""
    with error_border(f"--device {device} cannot be used", "--device cpu works"):
        torch.empty(0, device=device)
    if str(device).startswith("cuda:"):
        torch.cuda.set_device(device)


def load_policy(path=TINY_VLM, device="cpu", dtype=None):
    """(model, processor) from a Hugging Face folder or hub name; the model in eval mode.

    A folder that holds only an adapter (sft.py --no-merge, or PEFT's own) is merged into its base.
    dtype: by default float32 on CPU and bfloat16 on CUDA. Weights are read from safetensors only,
    and no code of the checkpoint is run. InputError if there is no such model.
    """
    # NOTE: cuDNN's attention takes up to a second to plan for each new shape, and ours are all new
    torch.backends.cuda.enable_cudnn_sdp(False)
    check_device(device)
    is_cuda = torch.device(device).type == "cuda"
    with in_turns(is_cuda):
        dtype = dtype or (torch.bfloat16 if is_cuda else torch.float32)
        model, processor = read_policy(str(path), dtype)
        model = model.to(device).eval()
    if is_cuda:
        use_fused_layers(model)
    expected = "expected a Qwen-VL, InternVL or LLaVA model with an image token and a chat template"
    with error_border(f"{path} is a {model.config.model_type} that cannot be used", expected):
        tokenizer = processor.tokenizer
        ends = [tokenizer.eos_token] if tokenizer.eos_token else []
        ends += map(tokenizer.decode, end_ids(model, processor))
        in_chats = [end for end in ends if end in str(processor.chat_template)]
        tokenizer.eos_token = (in_chats or ends)[0]  # SFT teaches it
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        check_sharing(model, processor)
    if not model.can_share and rank_and_world()[0] == 0:
        line = "completions cannot share a row with their prompt, which is slower"
        print(f"NOTE: {path}: {line}", file=sys.stderr)
    return model, processor


def read_policy(path, dtype):
    """(model, processor) of load_policy, on the CPU, as they are in the files."""
    from transformers import AutoModelForImageTextToText, AutoProcessor
    from transformers.utils import logging

    logging.disable_progress_bar()
    if not is_hub_model(path):
        hint = f"python sft.py writes runs/sft; the base model is {TINY_VLM}"
        raise InputError(f"no model at {path}: that folder does not exist ({hint})")
    adapters = [f for f in (Path(path), Path(path) / "adapter") if (f / ADAPTER_CONFIG).is_file()]
    if adapters and not (Path(path) / "config.json").is_file():
        return load_merged(adapters[0], dtype)
    expected = "expected a Hugging Face folder (config.json, *.safetensors) or a hub name"
    with error_border(f"no model at {path}", expected):
        safe = {"trust_remote_code": False}  # else transformers asks, and waits for an answer
        processor = AutoProcessor.from_pretrained(path, **safe)
        model = load_weights(AutoModelForImageTextToText, path, dtype=dtype, **safe)
    if model.config.model_type == "llava":
        disable_center_crop(model, processor)
    return model, processor


def load_weights(model_class, path, **options):
    """model_class.from_pretrained, from safetensors alone; LookupError if the file lacks weights,
    which transformers would draw at random."""
    options |= {"use_safetensors": True, "output_loading_info": True}
    model, loading = model_class.from_pretrained(path, **options)
    if loading["missing_keys"]:
        raise LookupError(f"it has no {min(loading['missing_keys'])}")
    return model


def load_merged(adapter, dtype):
    """The base model of an adapter folder, with the adapter merged into it, and the processor."""
    config = read_adapter_config(adapter)
    base, expected = config["base_model_name_or_path"], config.get("base_fingerprint")
    model, processor = read_policy(base, dtype)
    if expected not in (None, fingerprint(model, processor, torch.bfloat16)):
        raise InputError(f"{adapter} is an adapter of another model than the one in {base} now")
    template = adapter / "chat_template.jinja"
    if template.is_file() and template.read_text() != processor.chat_template:
        raise InputError(f"{template} is not the one of {base}: merge the adapter with PEFT")
    merge_adapter(model, adapter)
    return model, processor


def disable_center_crop(model, processor):
    """Let LLaVA-1.5 see the whole image, resized to its square.

    NOTE: the published processor crops the image to its middle square, and a target outside of it
    would never be seen. The model was trained on images padded to a square. Resizing also keeps
    every pixel, and makes boxes relative to the image. On a square image, cropping, padding and
    resizing are the same.
    """
    images, side = processor.image_processor, model.config.vision_config.image_size
    images.size = {"height": side, "width": side}
    images.do_center_crop = images.do_pad = False


def use_fused_layers(model):
    """Compute two kinds of layers in one kernel each, for CUDA. Qwen-VL's patch embedding is a
    Conv3d over patches that do not overlap, which torch does slowly in bfloat16 on some GPUs. An
    RMS norm takes eight kernels in transformers; with an 8B model on an H100, one kernel makes
    scoring faster by a sixth, and it keeps a tenth less for the backward pass."""

    def embed_patches(layer, patches):  # (N, channels, T, H, W)
        return F.linear(patches.flatten(1), layer.weight.flatten(1), layer.bias)

    def rms_norm(layer, x):
        with torch.autocast(x.device.type, enabled=False):  # it would make x float32
            return F.rms_norm(x, x.shape[-1:], layer.weight.to(x.dtype), layer.variance_epsilon)

    for layer in model.modules():
        if isinstance(layer, nn.Conv3d) and layer.stride == layer.kernel_size:
            layer.forward = partial(embed_patches, layer)
        if type(layer).__name__.endswith("RMSNorm") and hasattr(layer, "variance_epsilon"):
            layer.forward = partial(rms_norm, layer)


# Relative frames by config.model_type. LLaVA's instruction data has decimals from 0 to 1. All other
# families, as far as their reports say, write integers from 0 to 1000.
FRAMES = dict.fromkeys(["llava", "llava_next", "llava_onevision"], (1, 1))


def answer_frame(model, processor, width, height):
    """The (width, height) of the frame in which the model writes coordinates of an image.

    Qwen2.5-VL writes pixels of the image *after its processor resized it*. The others use a
    relative scale, 0 to 1000 or 0 to 1 (FRAMES).
    """
    if model.config.model_type != "qwen2_5_vl":
        return FRAMES.get(model.config.model_type, (1000, 1000))
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

    images = processor.image_processor
    min_pixels, max_pixels = images.size["shortest_edge"], images.size["longest_edge"]
    factor = images.patch_size * images.merge_size
    rows, cols = smart_resize(height, width, factor, min_pixels, max_pixels)
    return cols, rows


def is_half(model):
    """Whether the model computes in bfloat16: on CUDA, and wherever its weights are bfloat16."""
    return model.device.type == "cuda" or model.dtype == torch.bfloat16


def mixed_precision(model):
    """bfloat16 arithmetic where is_half holds, as LoRA and the merger train in float32 beside the
    weights. Policy and reference are always called under it."""
    return torch.autocast(model.device.type, torch.bfloat16, enabled=is_half(model))


def end_ids(model, processor):
    """Ids that end an answer: those that the tokenizer and the generation config name."""
    named = model.generation_config.eos_token_id
    named = named if isinstance(named, list) else [named]
    return sorted({processor.tokenizer.eos_token_id, *named} - {None})


def vision_token_ids(model, processor):
    """Ids of the tokens that stand for images and videos. A model must not write them."""
    names = ("image", "video", "vision_start", "vision_end", "start_image", "end_image")
    # InternVL's config names one of its four vision tokens, the tokenizer the others
    places = (model.config, processor, processor.tokenizer)
    ids = {getattr(place, f"{name}_token_id", None) for name in names for place in places}
    return sorted(ids - {None})


def fingerprint(model, processor, dtype=None):
    """16 hex digits that tell one policy from another: a hash of the vocabulary and, for every
    parameter, of its name, dtype, shape and about 256 of its numbers (hashing all is slow). With a
    `dtype`, they are rounded to it first: a model has the same one in float32 and in bfloat16."""
    digest = hashlib.sha256(json.dumps(sorted(processor.tokenizer.get_vocab().items())).encode())
    for name, parameter in model.named_parameters():
        flat = parameter.detach().flatten()
        some = flat[:: max(1, flat.numel() // 256)].to(dtype or parameter.dtype).float().cpu()
        digest.update(f"{name} {dtype or parameter.dtype} {tuple(parameter.shape)}".encode())
        digest.update(some.numpy().tobytes())
    return digest.hexdigest()[:16]


def chat_texts(processor, prompts):
    """Prompt texts (B), each behind an image, in the model's chat template."""
    content = lambda prompt: [{"type": "image"}, {"type": "text", "text": prompt}]
    chats = [[{"role": "user", "content": content(prompt)}] for prompt in prompts]
    return processor.apply_chat_template(chats, tokenize=False, add_generation_prompt=True)


def encode(processor, images, texts):
    """Images (B), chat texts (B) -> model inputs, padded on the left, as generation needs it."""
    start = processor.tokenizer.bos_token  # the template or the tokenizer writes it, not both
    options = {"padding": True, "padding_side": "left", "return_tensors": "pt"}
    options["add_special_tokens"] = not (start and texts[0].startswith(start))
    batch = processor(images=[[image] for image in images], text=texts, **options)
    batch.pop("batch_num_images", None)  # LLaVA-OneVision: 1 each, which is its default
    if "mm_token_type_ids" not in batch:  # Qwen-VL models come with it: 1 on image tokens
        batch["mm_token_type_ids"] = (batch["input_ids"] == processor.image_token_id).long()
    return dict(batch)


def language_model(model):
    return getattr(model.model, "language_model", model.model)


def to_device(inputs, model):
    return {key: value.to(model.device) for key, value in inputs.items()}


# ------------------------------------------------------------------------- prefill and decode
# B prompts, left-padded to P tokens; G completions of each, right-padded to C. The completions of
# prompt b are the rows b*G … b*G + G - 1.


class PrefixCache(NamedTuple):
    """The KV cache of B prompts, padded on the left, and what it takes to go on from there."""

    cache: object  # keys and values of every layer, (B, heads, P, head_dim)
    attention_mask: torch.Tensor  # bool (B, P), False on padding
    next_position: torch.Tensor  # (B,), rotary position of the next token
    last_hidden: torch.Tensor  # (B, D), hidden state of the last token


@contextmanager
def merged_inference(model):
    """Run the model without gradients and dropout, with LoRA merged into the weights: one matrix
    product per layer instead of three. A nested call merges nothing again."""
    layers = [m for m in model.modules() if isinstance(m, LoRALinear) and m.merged is None]
    was_training = model.training
    model.eval()  # NOTE: under gradient checkpointing, a model in training keeps no KV cache
    try:
        # NOTE: gathered before, as backward passes cannot use what is made in inference mode
        with gathered(model), torch.inference_mode(), mixed_precision(model):
            for layer in layers:
                layer.merged = merged_weight(layer)
            yield
    finally:
        for layer in layers:
            layer.merged = None
        model.train(was_training)


@contextmanager
def without_updates(model, mergers):
    """The model as it was before training: without LoRA, and with the weights that its mergers had
    then, {name: tensor}. Its log-probs have the bits of those of a model that is loaded anew. All
    is undone before a backward pass, which needs the weights of now."""
    layers = [m for m in model.modules() if isinstance(m, LoRALinear)]
    parameters = dict(model.named_parameters())

    def swap_mergers():
        for name in mergers:
            parameters[name].data, mergers[name] = mergers[name], parameters[name].data

    swap_mergers()
    for layer in layers:
        layer.merged = layer.base_layer.weight.detach()
    try:
        with torch.no_grad():
            yield
    finally:
        for layer in layers:
            layer.merged = None
        swap_mergers()


def text_positions(model, positions):
    """Rotary positions (B, L) of text in the model's own form: M-RoPE has three axes, (3, B, L)."""
    return positions.expand(3, -1, -1) if hasattr(model.model, "get_rope_index") else positions


def prompt_positions(model, prompt):
    """Rotary positions of prompt tokens, (3, B, P) or (B, P) without M-RoPE, and the next, (B,)."""
    attention = prompt["attention_mask"]
    if hasattr(model.model, "get_rope_index"):
        names = ("input_ids", "mm_token_type_ids", "image_grid_thw", "attention_mask")
        positions, _ = model.model.get_rope_index(**{k: prompt[k] for k in names if k in prompt})
    else:
        positions = (attention.cumsum(-1) - 1).clamp(min=0)
    return positions, positions.view(-1, *attention.shape).amax((0, 2)) + 1


def attention_bias(visible, model):
    """Attention mask as a bias: 0 where bool `visible` holds, a large negative number elsewhere."""
    # NOTE: not -inf: a row of padding sees nothing, and a softmax over -inf alone is nan
    bias = torch.zeros(visible.shape, dtype=model.dtype, device=visible.device)
    return bias.masked_fill(~visible, -1e9)


def prefill(model, prompt):
    """Run the model over B prompts (data.collate), or over the images that they start with
    (data.collate_images), and keep the result: a PrefixCache."""
    prompt = to_device(prompt, model)
    with merged_inference(model):
        positions, next_position = prompt_positions(model, prompt)
        out = model.model(**prompt, position_ids=positions, use_cache=True)
        mask, last_hidden = prompt["attention_mask"].bool(), out.last_hidden_state[:, -1]
    return PrefixCache(out.cache, mask, next_position, last_hidden)


@torch.inference_mode()
def select_rows(prefix, rows):
    """Some rows (B,) of a PrefixCache, which may repeat. The old one stays as it is."""
    rows = torch.tensor(rows, device=prefix.next_position.device)
    cache = copy.copy(prefix.cache)  # its tensors are not copied here, but by reorder_cache
    cache.layers = [copy.copy(layer) for layer in cache.layers]
    cache.reorder_cache(rows)
    return PrefixCache(cache, *(tensor[rows] for tensor in prefix[1:]))


def extend(model, prefix, rows, text):
    """Append texts (data.collate_text, B rows) to `rows` (B,) of a PrefixCache: a new PrefixCache.
    The old one stays as it is, so several phrases can follow one image."""
    text, prefix = to_device(text, model), select_rows(prefix, rows)
    counts, start = text["attention_mask"].cumsum(1), prefix.next_position  # (B, Q), (B,)
    mask = torch.cat([prefix.attention_mask, text["attention_mask"].bool()], 1)
    with merged_inference(model):
        last_hidden = model.model(
            input_ids=text["input_ids"],
            attention_mask=mask.long(),  # (B, P + Q)
            position_ids=text_positions(model, start[:, None] + (counts - 1).clamp(min=0)),
            cache=prefix.cache,
            use_cache=True,
        ).last_hidden_state[:, -1]
    return PrefixCache(prefix.cache, mask, start + counts[:, -1], last_hidden)


def sample_token(logits, temperature, banned):
    """A token (N, 1) from logits (N, V), and its log-probability (N, 1) at the temperature. Ids in
    `banned` are not sampled, but stay in the softmax, as they do in completion_logps."""
    logits = logits.float() / (temperature or 1)
    logp = logits.log_softmax(-1)
    logits.index_fill_(1, banned, -math.inf)
    if temperature:
        # argmax(logits + Gumbel noise) is a draw from softmax(logits), in fewer passes; minus the
        # log of an exponential is Gumbel noise
        logits -= torch.empty_like(logits).exponential_().log_()
    token = logits.argmax(1, keepdim=True)
    return token, logp.gather(1, token)


def drop_finished(unfinished, *tensors):
    """Remove finished completions, and prompts that have only such: (kept prompts (B',), what is
    left of the tensors (B, G, …)). A prompt with fewer unfinished completions than the others keeps
    some finished ones. unfinished: bool (B, G)."""
    kept = unfinished.any(1).nonzero()[:, 0]
    order = torch.argsort(unfinished[kept].int(), stable=True, descending=True, dim=1)
    order = order[:, : int(unfinished.sum(1).max())]  # (B', G'), unfinished ones first
    return kept, [tensor[kept[:, None], order] for tensor in tensors]


def decode(model, processor, prefix, group, max_new_tokens, temperature):
    """Sample completions of B prefilled prompts; see sample_group for what it returns. Temperature
    0 is greedy. The prefix cannot be used again.

    Each step feeds G tokens to the row of their prompt. A token sees the prompt and its own
    completion, so the KV cache of a prompt exists once, not G times.
    """
    if not shares_prefix(model):
        rows = range(len(prefix.next_position) * group)
        prefix, group = select_rows(prefix, [row // group for row in rows]), 1
    elif model.device.type == "cuda":
        # NOTE: FSDP2 uses streams of its own, which a graph cannot record
        record = None if hasattr(model, "sharded_call") else record_graph
        options = group, max_new_tokens, temperature, record
        return decode_in_steps(model, processor, prefix, *options)
    cache, prompt_mask, next_position, hidden = prefix
    batch, device, pad = len(prompt_mask), prompt_mask.device, processor.tokenizer.pad_token_id
    ends = torch.tensor(end_ids(model, processor), device=device)
    banned = torch.tensor(vision_token_ids(model, processor), dtype=torch.long, device=device)
    with merged_inference(model):
        hidden = hidden.repeat_interleave(group, 0)  # (B*G, D)
        rows = torch.arange(batch * group, device=device).view(batch, group)  # rows of ids
        ids = rows.new_full((batch * group, max_new_tokens), pad)
        mask, logp = torch.zeros_like(ids, dtype=torch.bool), torch.zeros(ids.shape).to(device)
        unfinished = torch.ones_like(rows, dtype=torch.bool)  # (B, G)
        visible = prompt_mask[:, None].repeat(1, group, 1)  # (B, G, P)
        for step in range(max_new_tokens):
            sampled = sample_token(model.lm_head(hidden), temperature, banned)
            token, token_logp = (x.view(rows.shape) for x in sampled)  # (B, G)
            ids[rows, step] = token.masked_fill(~unfinished, pad)
            mask[rows, step] = unfinished
            logp[rows, step] = token_logp.masked_fill(~unfinished, 0.0)
            unfinished = unfinished & ~torch.isin(token, ends)
            needed = int(unfinished.any(1).sum()) * int(unfinished.sum(1).max())
            if not needed or step + 1 == max_new_tokens:
                break
            # the keys of completions that are dropped stay in the cache, and nobody sees them
            if needed <= 0.75 * unfinished.numel():  # else the copy costs more than it saves
                left = rows, token, visible, unfinished
                kept, (rows, token, visible, unfinished) = drop_finished(unfinished, *left)
                next_position = next_position[kept]
                cache.reorder_cache(kept)
            itself = torch.eye(token.shape[1], dtype=torch.bool, device=device)
            visible = torch.cat([visible, itself.expand(len(token), -1, -1)], 2)
            bias = attention_bias(visible[:, None], model)  # (B, 1, G, columns of the cache)
            position = (next_position + step)[:, None].expand_as(token)
            hidden = model.model(
                input_ids=token,
                attention_mask=bias if shares_prefix(model) else visible[:, 0].long(),
                position_ids=text_positions(model, position),
                cache=cache,
                use_cache=True,
            ).last_hidden_state.flatten(0, 1)
    return ids[:, : step + 1], mask[:, : step + 1], logp[:, : step + 1]


def decode_in_steps(model, processor, prefix, group, max_new_tokens, temperature, record=None):
    """`decode` for a GPU. The kernels of a step take less time than their launches, some 2,000. So
    all steps have the same shapes: the cache has room for all tokens, and finished completions
    stay. `record` (see record_graph) makes a function that repeats a step in one launch."""
    from transformers.cache_utils import StaticLayer

    cache, prompt_mask, next_position, hidden = prefix
    (batch, start), device = prompt_mask.shape, prompt_mask.device
    pad = processor.tokenizer.pad_token_id
    total = math.ceil((start + group * max_new_tokens) / 8) * 8  # else every layer pads its bias
    ends = torch.tensor(end_ids(model, processor), device=device)
    banned = torch.tensor(vision_token_ids(model, processor), dtype=torch.long, device=device)
    with merged_inference(model):
        hidden = hidden.repeat_interleave(group, 0)  # (B*G, D)
        ids = torch.full((batch * group, max_new_tokens), pad, device=device)
        mask, logp = torch.zeros_like(ids, dtype=torch.bool), torch.zeros(ids.shape, device=device)
        unfinished = torch.ones(batch * group, 1, dtype=torch.bool, device=device)
        step_number = torch.zeros(1, dtype=torch.long, device=device)
        columns = start + torch.arange(group, device=device)  # of its tokens in the cache
        for i, layer in enumerate(cache.layers):
            cache.layers[i] = StaticLayer(total)
            cache.layers[i].update(layer.keys, layer.values)
        visible = F.pad(prompt_mask, (0, total - start))
        bias = attention_bias(visible, model)[:, None, None].repeat(1, 1, group, 1)  # (B, 1, G, S)

        def step():
            token, token_logp = sample_token(model.lm_head(hidden), temperature, banned)  # (B*G, 1)
            ids.index_copy_(1, step_number, token.masked_fill(~unfinished, pad))
            mask.index_copy_(1, step_number, unfinished)
            logp.index_copy_(1, step_number, token_logp.masked_fill(~unfinished, 0.0))
            unfinished.logical_and_((token != ends).all(1, keepdim=True))
            bias.scatter_(3, columns.view(1, 1, -1, 1).expand(batch, 1, -1, 1), 0.0)
            position = (next_position + step_number)[:, None].expand(batch, group)
            out = model.model(
                input_ids=token.view(batch, group),
                attention_mask=bias,
                position_ids=text_positions(model, position),
                cache=cache,
                use_cache=True,
            )
            hidden.copy_(out.last_hidden_state.flatten(0, 1))
            columns.add_(group)
            step_number.add_(1)

        repeat = step
        for done in range(1, max_new_tokens + 1):
            repeat()
            if done == 1 and record:
                repeat = record(step)
            if done % 8 == 0 and not unfinished.any():  # not at each step, as it waits for the GPU
                break
        length = int(mask.any(0).sum())
    return ids[:, :length], mask[:, :length], logp[:, :length]


def record_graph(step):
    """Record what a step launches on the GPU, without running it: a function that runs it."""
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    random = torch.cuda.default_generators[torch.cuda.current_device()]
    state = random.clone_state()
    try:
        # another thread may use the GPU meanwhile
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            step()
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        torch.cuda.set_stream(stream)  # torch leaves these two as they were while recording
        random.graphsafe_set_state(state)
        line = f"sampling is slower, as a step cannot be recorded: {one_line(error)}"
        warnings.warn(line, stacklevel=2)
        return step
    return graph.replay


def generate(model, processor, prefix, max_new_tokens, temperature=0.0):
    """Answers to B prefilled prompts: list of (text, char_probs (len(text),)). A character has the
    probability of the token that it came from, at the temperature (greedy: at 1)."""
    tokenizer, ends, answers = processor.tokenizer, end_ids(model, processor), []
    ids, mask, logp = decode(model, processor, prefix, 1, max_new_tokens, temperature)
    for row, kept, row_logp in zip(ids.tolist(), mask.sum(1).tolist(), logp.cpu().numpy()):
        end = kept - (row[kept - 1] in ends)
        text = tokenizer.decode(row[:end])
        lengths = [len(piece) for piece in tokenizer.batch_decode([[token] for token in row[:end]])]
        if sum(lengths) != len(text):  # a character made of several tokens: count what each adds
            lengths = np.diff([len(tokenizer.decode(row[:i])) for i in range(end + 1)]).clip(0)
        answers.append((text, np.repeat(np.exp(row_logp[:end]), lengths)[: len(text)]))
    return answers


# ------------------------------------------------------------------------- groups


def select_prompts(prompt, rows):
    """The inputs of some of B prompts: grpo.py leaves out those without signal. The pixels of all
    images lie in one tensor. Its rows are patches (Qwen-VL; image_grid_thw tells how many belong to
    an image), tiles (InternVL; in proportion to the image's tokens), or whole images (LLaVA)."""
    selected = {key: value[rows] for key, value in prompt.items() if key != "pixel_values"}
    if "pixel_values" not in prompt:
        return selected
    pixels = prompt["pixel_values"]
    if "image_grid_thw" in prompt:
        counts = prompt["image_grid_thw"].prod(-1)
    elif len(pixels) == len(prompt["input_ids"]):
        counts = torch.ones(len(pixels), dtype=torch.long)
    else:
        tokens = prompt["mm_token_type_ids"].sum(1)  # every tile has as many tokens
        counts = tokens * len(pixels) // tokens.sum()
    parts = pixels.split(counts.tolist())
    return {**selected, "pixel_values": torch.cat([parts[row] for row in rows])}


def sample_group(model, processor, prompt, group, max_new_tokens, temperature=1.0):
    """Sample `group` completions of each prompt: (ids, mask, logp), each (B*G, C).

    prompt: inputs of B prompts (data.collate). mask is True up to and including the end-of-sequence
    token; a row without one was cut off. logp: log-probability of each sampled token at this
    temperature, as completion_logps gives it. Vision tokens are never sampled, because a completion
    that holds `<|image_pad|>` cannot be scored.
    """
    with merged_inference(model):  # once for both, as merging takes time
        prefix = prefill(model, prompt)
        sampled = decode(model, processor, prefix, group, max_new_tokens, temperature)
    # a loss cannot use tensors made in inference mode; a copy made outside of it is an ordinary one
    return tuple(tensor.clone() for tensor in sampled)


def token_logps(head, hidden, tokens, temperature=1.0):
    """log p of tokens (N,) after hidden states (N, D), by the output layer `head`: float32 (N,).

    With a vocabulary of 150,000 the logits of a token take 0.6 MB, and autograd keeps them. So they
    are computed in slices, and again in the backward pass: one slice is in memory at a time.
    """

    def slice_logps(hidden, tokens):
        logits = head(hidden).float() / temperature  # (slice, V)
        return -F.cross_entropy(logits, tokens, reduction="none")

    size = max(1, LOGITS_IN_MEMORY // head.out_features)
    if len(tokens) <= size:
        return slice_logps(hidden, tokens)
    slices = zip(hidden.split(size), tokens.split(size))
    return torch.cat([checkpoint(slice_logps, *part, use_reentrant=False) for part in slices])


def grouped_query_attention(module, query, key, value, bias, scaling=None, dropout=0.0, **_):
    """softmax(query key' * scaling + bias) value: (B, L, heads, head_dim).

    query: (B, heads, L, head_dim); key, value: (B, key heads, S, head_dim); bias: (B, 1, L, S).
    Query heads that share a key head are folded into its sequence of queries, so that keys are not
    repeated.
    """
    share = getattr(module, "num_key_value_groups", 1)
    folded = query.unflatten(1, (-1, share)).flatten(2, 3)  # (B, key heads, share * L, head_dim)
    bias = bias.repeat(1, 1, share, 1)
    out = F.scaled_dot_product_attention(
        folded, key, value, attn_mask=bias, dropout_p=dropout, scale=scaling
    )
    return out.unflatten(2, (share, -1)).flatten(1, 2).transpose(1, 2)


def shared_prefix_attention(module, query, key, value, attention_mask, shared=None, **kwargs):
    """Attention in rows [prompt, c_1, …, c_G], in two calls: prompt tokens see the prompt, and
    the tokens of a completion see the prompt and their own completion. One call would need a mask
    (T, T) and compute all pairs, most of them between completions that must not see one another.

    query, key, value: (B, heads, T, head_dim), T = P + G*C; attention_mask: (B, 1, P + C, P + C),
    the bias of one row [prompt, c]; shared: (G, P). Without `shared`, a bias (from `decode`) is
    used as it is, and a mask of transformers' own (bool) is handed to transformers.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if attention_mask is None or attention_mask.dtype == torch.bool:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    attend = partial(grouped_query_attention, module, **kwargs)
    if shared is None:
        return attend(query, key, value, attention_mask), None
    group, start = shared

    def split(x):  # prompt (B, heads, P, head_dim), completions (B*G, heads, C, head_dim)
        completions = x[:, :, start:].unflatten(2, (group, -1)).transpose(1, 2).flatten(0, 1)
        return x[:, :, :start], completions

    def with_prompt(prompt, completions):  # (B*G, heads, P + C, head_dim)
        return torch.cat([prompt.repeat_interleave(group, 0), completions], 2)

    (prompt_query, query), key, value = split(query), split(key), split(value)
    of_prompt = attend(prompt_query, key[0], value[0], attention_mask[:, :, :start, :start])
    bias = attention_mask[:, :, start:].repeat_interleave(group, 0)  # (B*G, 1, C, P + C)
    of_completions = attend(query, with_prompt(*key), with_prompt(*value), bias)
    of_completions = of_completions.unflatten(0, (-1, group)).flatten(1, 2)
    return torch.cat([of_prompt, of_completions], 1), None  # (B, T, heads, head_dim)


def use_shared_prefix_attention(model):
    """Switch the language model's layers to shared_prefix_attention. It stays on, because gradient
    checkpointing runs the layers again after completion_logps has returned. Without `shared` or a
    bias, it is transformers' own attention."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    language = language_model(model)
    if language.config._attn_implementation != "shared_prefix":
        AttentionInterface.register("shared_prefix", shared_prefix_attention)
        AttentionMaskInterface.register("shared_prefix", sdpa_mask)
        language.set_attn_implementation("shared_prefix")


def completion_logps(model, prompt, completions, mask, temperature=1.0):
    """log p(completion token | prompt, tokens before it) at a temperature: float32 (B*G, C).

    prompt: inputs of B prompts (data.collate); completions (B*G, C) and mask (B*G, C), True where a
    token counts; the result is 0 elsewhere. Differentiable. It scores policy, old policy and
    reference alike, so they differ by their weights alone.

    There is one row per prompt, [prompt, c_1, …, c_G], so image and prompt are computed once. A
    completion sees the prompt and itself, and its positions start where the prompt's end. So the
    result equals that of G rows [prompt, c_g].
    """
    completions, mask = completions.to(model.device), mask.to(model.device).bool()
    prompt, (rows, length) = to_device(prompt, model), completions.shape
    group = rows // len(prompt["input_ids"])
    if not shares_prefix(model):
        prompt, group = select_prompts(prompt, [row // group for row in range(rows)]), 1
    positions, next_position = prompt_positions(model, prompt)
    ids, exists = prompt.pop("input_ids"), prompt.pop("attention_mask")  # (B, P)
    (batch, start), packed = ids.shape, group * length
    after = (next_position[:, None] + torch.arange(length, device=ids.device)).repeat(1, group)
    positions = torch.cat([positions, text_positions(model, after)], -1)  # (…, B, T)

    # a token of [prompt, c] sees itself and what stands before it, less padding; the bias of this
    # row holds for all c (see shared_prefix_attention)
    exists = F.pad(exists, (0, length), value=1)  # (B, P + C)
    attention = {"attention_mask": exists}
    if shares_prefix(model):
        causal = torch.ones(2 * exists.shape[1:], dtype=torch.bool, device=ids.device).tril()
        visible = exists.bool()[:, None, None] & causal  # (B, 1, P + C, P + C)
        attention = {"attention_mask": attention_bias(visible, model), "shared": (group, start)}

    prompt = {  # mm_token_type_ids must cover the completions, as text
        key: F.pad(value, (0, packed)) if value.shape == ids.shape else value
        for key, value in prompt.items()
    }
    with mixed_precision(model):
        hidden = model.model(
            input_ids=torch.cat([ids, completions.reshape(batch, packed)], 1),
            position_ids=positions,
            use_cache=False,
            **attention,
            **prompt,
        ).last_hidden_state  # (B, T, D)
        # a hidden state predicts the next token; the prompt's last one predicts the first token of
        # every completion. NOTE: repeat_interleave, because the gradients of an index that occurs G
        # times are added up in any order, and the same seed would not give the same run
        last = hidden[:, start - 1].repeat_interleave(group, 0)[:, None]  # (B*G, 1, D)
        own = hidden[:, start:].reshape(rows, length, -1)[:, :-1]  # (B*G, C - 1, D)
        hidden = torch.cat([last, own], 1)[mask]  # (tokens that count, D)
        counted = token_logps(model.lm_head, hidden, completions[mask], temperature)
    return torch.zeros(rows, length, device=ids.device).masked_scatter(mask, counted)


# ------------------------------------------------------------------------- can rows be shared?


def shares_prefix(model):
    """Whether completions share a row with their prompt. If not, each has a row of its own, and no
    prompt continues from an image: slower, but right for any model."""
    if getattr(model, "can_share", True):
        use_shared_prefix_attention(model)
        return True
    return False


def check_sharing(model, processor):
    """Set model.can_share: whether log-probs in a shared row, and of a prompt that continues from
    its image, are those of rows of their own. A layer of an unknown kind may mix completions.
    LookupError if even without sharing they are not those of the model's own forward pass, alone
    and in a batch, or if a token has other ones when it is sampled than when it is scored.
    """
    config, language = model.config.get_text_config(), language_model(model)
    implementation = language.config._attn_implementation
    rng, texts = np.random.default_rng(0), chat_texts(processor, ["the small ship on the left"] * 2)
    images = [rng.integers(0, 256, size, dtype=np.uint8) for size in ((64, 64, 3), (96, 128, 3))]
    alone = encode(processor, images[1:], texts[1:])
    prompt = to_device(select_prompts(encode(processor, images, texts), [1]), model)
    ids, end = prompt["input_ids"], int(prompt["mm_token_type_ids"][0].nonzero().max()) + 1
    completions = ids[:, -8:].view(2, 4)
    other = torch.stack([completions[0].flip(0), completions[1]])
    everywhere = torch.ones_like(completions)
    first = {key: x[:, :end] if x.shape == ids.shape else x for key, x in prompt.items()}
    # with padding in front, as the shorter of two texts has it
    second = {key: F.pad(prompt[key][:, end:], (3, 0)) for key in ("input_ids", "attention_mask")}

    def log_probs(prompt, first, second=None):
        prefix = prefill(model, first)
        prefix = extend(model, prefix, [0], second) if second else prefix
        after = model.lm_head(prefix.last_hidden).float().log_softmax(-1)  # (1, V)
        scored = completion_logps(model, prompt, completions, everywhere)
        *sampled, logp = decode(model, processor, prefix, 2, 3, temperature=0)
        return after, scored, logp - completion_logps(model, prompt, *sampled)

    def are_close(found, right):
        gap = max((a - b).abs().mean() for a, b in zip(found, right))
        rounding = 0.15 if is_half(model) else 1e-4  # of the spread of log-probs
        return bool(gap < rounding * right[0].std())

    with merged_inference(model):
        model.can_share = False
        own = model(**to_device(alone, model)).logits[:, -1].float().log_softmax(-1)
        right = own, log_probs(alone, alone)[1], torch.zeros(2, 1, device=model.device)
        if not are_close(log_probs(prompt, prompt), right):
            raise LookupError("a token's log-probs depend on how they are computed")
        # no state (Qwen3.5), no window: it may be longer than this prompt
        kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
        if kinds == {"full_attention"} and not getattr(config, "sliding_window", None):
            model.can_share = True
            found = log_probs(prompt, first, second)
            changed = completion_logps(model, prompt, other, everywhere)  # the first of the two
            leak = (changed - found[1])[1].abs().mean()
            model.can_share = are_close(found, right) and bool(leak < 0.005 * right[0].std())
    if not model.can_share:
        language.set_attn_implementation(implementation)


# ------------------------------------------------------------------------- LoRA
# h = W x + (alpha / r) * B A x, B zero at start. The files have PEFT's own layout, so that
# PeftModel.from_pretrained reads them, and merge_adapter reads PEFT's.

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class LoRALinear(nn.Module):
    """A frozen linear layer with a trainable low-rank update, whose weights are float32."""

    def __init__(self, base_layer, rank, alpha, dropout):
        super().__init__()
        self.base_layer, self.scale = base_layer, alpha / rank
        self.merged = None  # W + (alpha / r) B A, inside merged_inference
        self.dropout = nn.Dropout(dropout)
        options = {"bias": False, "device": base_layer.weight.device, "dtype": torch.float32}
        self.lora_A = nn.Linear(base_layer.in_features, rank, **options)
        self.lora_B = nn.Linear(rank, base_layer.out_features, **options)
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x):
        if self.merged is not None:
            return F.linear(x, self.merged, self.base_layer.bias)
        update = self.lora_A(self.dropout(x))  # mixed_precision chooses its type
        return self.base_layer(x) + self.lora_B(self.scale * update)


def add_lora(model, rank=64, alpha=128, dropout=0.05):
    """Freeze the model, except its vision merger and LoRA on the language model's layers."""
    model.requires_grad_(False)
    for name, module in list(model.named_modules()):
        parent, _, leaf = name.rpartition(".")
        if leaf in TARGETS and "language_model" in name:
            setattr(model.get_submodule(parent), leaf, LoRALinear(module, rank, alpha, dropout))
    for name in merger_names(model):
        model.get_submodule(name).float().requires_grad_(True)
    return model


def make_trainable(model, args, dropout):
    """Put the model in training mode, with LoRA or (lora_rank 0) as a whole: the parameters that
    train, equal on all processes. args: lora_rank, lora_alpha, gradient_checkpointing."""
    if args.lora_rank:
        add_lora(model, args.lora_rank, args.lora_alpha, dropout)
    if args.gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    model.train()
    if dist.is_initialized() and not args.lora_rank:
        shard_parameters(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    if dist.is_initialized() and args.lora_rank:
        for parameter in trained:  # LoRA's A is random: take rank 0's
            dist.broadcast(parameter.data, 0)
    return trained


def shard_parameters(model):
    """Keep a part of every parameter on each process (FSDP2). A layer's weights are gathered before
    it runs and given up after that; gradients are summed over all processes, and each gets its
    part. FSDP2 does so around model.forward. We call model.model and lm_head on their own, so it is
    told to do so around a method of ours, too (see `call`)."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    from torch.distributed.fsdp import register_fsdp_forward_method as wrap

    mesh = init_device_mesh(model.device.type, (dist.get_world_size(),))
    half = torch.bfloat16 if is_half(model) else None  # gradients are summed in float32
    precision = MixedPrecisionPolicy(half, torch.float32, cast_forward_inputs=False)
    options = {"mesh": mesh, "mp_policy": precision}
    layers = [m for m in model.modules() if type(m).__name__ in (model._no_split_modules or ())]
    for module in [*layers, model]:
        fully_shard(module, **options)
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # gloo has no other
    model.sharded_call = lambda function, *args: function(model, *args)
    wrap(model, "sharded_call")
    model.sharded_call(lambda model: None)  # FSDP2 takes the first that runs for the outermost
    model.reshard()


def call(function, model, *args):
    """function(model, *args); where the model is sharded, with its weights gathered."""
    sharded = getattr(model, "sharded_call", None)
    return sharded(function, *args) if sharded else function(model, *args)


@contextmanager
def gathered(model):
    """Inside, a sharded model has all of its weights on every process."""
    is_nested = torch.is_inference_mode_enabled()
    is_whole = not hasattr(model, "sharded_call") or is_nested
    parts = [] if is_whole else [m for m in model.modules() if hasattr(m, "unshard")]
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.set_reshard_after_forward(part is not model, recurse=False)
            part.reshard()


def merger_names(model):
    """Names of the modules between vision encoder and language model: Qwen's merger and deepstack
    mergers, InternVL's and LLaVA's projector."""
    pattern = re.compile(r".*(visual\.merger|multi_modal_projector|deepstack_merger_list\.\d+)")
    return [name for name, _ in model.named_modules() if pattern.fullmatch(name)]


def save_adapter(model, folder, base, base_fingerprint=None):
    """Write adapter_model.safetensors and adapter_config.json. base: the base model's path;
    base_fingerprint: its fingerprint in bfloat16."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    layer = next(m for m in model.modules() if isinstance(m, LoRALinear))
    mergers = merger_names(model)
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": str(base),
        "base_fingerprint": base_fingerprint,
        "r": layer.lora_A.out_features,
        "lora_alpha": layer.scale * layer.lora_A.out_features,
        "lora_dropout": layer.dropout.p,
        "target_modules": rf".*language_model.*\.({'|'.join(TARGETS)})",
        "modules_to_save": [name.removeprefix("model.") for name in mergers] or None,
    }
    state = {
        f"base_model.model.{name}": parameter.detach().cpu().contiguous()
        for name, parameter in model.named_parameters()
        if ".lora_" in name or any(name.startswith(merger + ".") for merger in mergers)
    }
    save_file(state, folder / "adapter_model.safetensors.new")
    os.replace(folder / "adapter_model.safetensors.new", folder / "adapter_model.safetensors")
    (folder / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2))


# PEFT's fields that do not change what the weights mean; of all others, the values that do not
ANY_VALUE = """base_model_name_or_path base_fingerprint r lora_alpha lora_dropout target_modules
exclude_modules modules_to_save layers_to_transform layers_pattern inference_mode task_type
auto_mapping peft_version megatron_core qalora_group_size""".split()
USUAL = {
    "peft_type": ["LORA"],
    "bias": ["none"],
    "revision": [None, "main"],
    "init_lora_weights": [True, False, "gaussian"],
}


def read_adapter_config(folder):
    """adapter_config.json as a dict; InputError for an adapter that merge_adapter would misread."""
    path = Path(folder) / ADAPTER_CONFIG
    with error_border(f"{path} cannot be read", "expected the config of a LoRA adapter"):
        config = json.loads(path.read_text())
        if not (base := config["base_model_name_or_path"]):
            raise InputError(f"{path} names no base model: set base_model_name_or_path")
        if path.parent.resolve() in (base := Path(base).resolve(), base / "adapter"):
            raise InputError(f"{path} names itself as its base model")
        for name, value in config.items():
            if name not in ANY_VALUE and value not in USUAL.get(name, (None, False, {}, [])):
                raise InputError(f"{path}: {name} {value} is not supported, merge with PEFT first")
    return config


@torch.no_grad()
def merge_adapter(model, folder):
    """Add an adapter's updates to the model's weights and load its mergers, in place."""
    config, path = read_adapter_config(folder), Path(folder) / "adapter_model.safetensors"
    remedy = "was it trained on another one, or by an old PEFT? merge it with PEFT first"
    with error_border(f"{path} does not fit its base model", remedy):
        state = load_file(path)
        state = {name.removeprefix("base_model.model."): value for name, value in state.items()}
        is_tied = model.lm_head.weight is model.get_input_embeddings().weight
        if not state or (is_tied and any(re.search("lm_head|embed_tokens", n) for n in state)):
            raise LookupError("it is empty, or has one of two layers that the base model ties")
        for name in [name for name in state if name.endswith(".lora_A.weight")]:
            layer = name.removesuffix(".lora_A.weight")
            weight = model.get_submodule(layer).weight
            if len(state[name]) != config["r"]:
                raise LookupError(f"{name} has another rank than its config")
            update = state.pop(f"{layer}.lora_B.weight").float() @ state.pop(name).float()
            weight.copy_(weight.float() + config["lora_alpha"] / config["r"] * update)
        _, unexpected = model.load_state_dict(state, strict=False)
        if unexpected:
            raise LookupError(f"it has no {unexpected[0]}")


@torch.no_grad()
def merged_weight(module):
    """W + (alpha / r) B A of a LoRALinear, in W's type."""
    weight, update = module.base_layer.weight, module.lora_B.weight @ module.lora_A.weight
    return (weight.float() + module.scale * update).to(weight.dtype)


def save_policy(model, processor, folder, state=None):
    """Write a plain Hugging Face folder with merged weights. The model itself does not change.
    state: the weights, if they are not the model's own (a sharded one has parts). When all files
    are written, they are renamed one by one, so none is ever there in part."""
    state = state or model.state_dict()
    state = {name.replace(".base_layer", ""): value for name, value in state.items()}
    state = {name: value for name, value in state.items() if ".lora_" not in name}
    for name, module in model.named_modules():
        if isinstance(module, LoRALinear):
            state[f"{name}.weight"] = merged_weight(module)
    # mergers train in float32
    state = {name: value.to(model.dtype) for name, value in state.items()}
    folder = Path(folder)
    new = folder / ".new"
    shutil.rmtree(new, ignore_errors=True)  # of a run that was killed while saving
    model.save_pretrained(new, state_dict=state)
    processor.save_pretrained(new)
    for file in (path for path in new.rglob("*") if path.is_file()):
        target = folder / file.relative_to(new)
        target.parent.mkdir(exist_ok=True)
        os.replace(file, target)
    shutil.rmtree(new)


# ------------------------------------------------------------------------- SAM


def load_sam(checkpoint=TINY_SAM):
    """A SAM from a file of weights: vit_b, vit_l, vit_h (segment-anything), vit_t (MobileSAM) or
    the tiny one. The weights tell which. InputError for any other file."""
    from segment_anything import sam_model_registry

    from assets.build_tiny_sam import build_tiny_sam

    path, names = Path(checkpoint), {768: "vit_b", 1024: "vit_l", 1280: "vit_h"}
    expected = "expected vit_b, vit_l, vit_h or MobileSAM (pip install mobilesam-mirror timm)"
    with error_border(f"--sam_ckpt {path} cannot be loaded", expected):
        # NOTE: weights_only, so that a checkpoint from the web cannot run code
        is_safe = path.suffix == ".safetensors"
        state = load_file(path) if is_safe else torch.load(path, "cpu", weights_only=True)
        if "image_encoder.patch_embed.seq.0.c.weight" in state:
            from mobile_sam import sam_model_registry as mobile_registry

            sam = mobile_registry["vit_t"]()
        else:
            width = state["image_encoder.pos_embed"].shape[-1]
            sam = sam_model_registry[names[width]]() if width in names else build_tiny_sam()
        sam.load_state_dict(state)
    # NOTE: MobileSAM's TinyViT caches its attention biases on entering eval mode, which the
    # registry did before the weights were there; without train() the embeddings are wrong.
    return sam.train().eval().requires_grad_(False)


# config.model_type: the name of transformers' classes
HUB_SAMS = {"sam": "Sam", "sam_hq": "SamHQ", "sam2": "Sam2", "sam2_video": "Sam2"}
HUB_SAMS |= dict.fromkeys(["sam3_tracker", "sam3_tracker_video", "sam3_video"], "Sam3Tracker")


class HubPredictor:
    """What Segmenter needs of SamPredictor, for transformers' SAM, SAM-HQ, SAM 2 and SAM 3."""

    def __init__(self, path, device):
        import transformers

        # SAM 2 and 3 are published as video models, and transformers warns of each
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        with error_border(f"--sam_ckpt {path} cannot be loaded", f"expected one of {[*HUB_SAMS]}"):
            config = transformers.AutoConfig.from_pretrained(path, trust_remote_code=False)
            kind = HUB_SAMS[config.model_type]
            self.processor = getattr(transformers, f"{kind}Processor").from_pretrained(path)
            model = load_weights(getattr(transformers, f"{kind}Model"), path, dtype=torch.float32)
        self.model, self.device = model.to(device).eval().requires_grad_(False), device
        self.transform = self

    def set_image(self, image):
        """Embed an RGB array (H, W, 3)."""
        options = {"return_tensors": "pt", "input_data_format": "channels_last"}
        inputs = self.processor(images=image.copy(), **options)
        pixels = inputs["pixel_values"].to(self.device)
        self.original_size = image.shape[:2]
        resized = inputs.get("reshaped_input_sizes", torch.tensor([pixels.shape[-2:]]))
        self.input_size = tuple(resized[0].tolist())  # (H, W), less what SAM and SAM-HQ pad
        found = self.model.get_image_embeddings(pixels)
        names = ("image_embeddings", "intermediate_embeddings")  # SAM-HQ has both
        self.features = dict(zip(names, found if isinstance(found, tuple) else (found,)))

    def apply_coords_torch(self, coords, size):
        """Coordinates (…, 2) in an image of `size` (H, W) -> in the resized one."""
        scale = [new / old for new, old in zip(self.input_size, size)]
        return coords * torch.tensor(scale[::-1], dtype=coords.dtype, device=coords.device)

    def predict_torch(self, point_coords, point_labels, boxes, multimask_output):
        prompts = {"input_points": point_coords, "input_boxes": boxes}
        prompts["input_labels"] = None if point_labels is None else point_labels.long()
        prompts = {name: value[None] for name, value in prompts.items() if value is not None}
        out = self.model(**self.features, **prompts, multimask_output=multimask_output)
        sizes = {"original_sizes": [self.original_size], "reshaped_input_sizes": [self.input_size]}
        (masks,) = self.processor.post_process_masks(out.pred_masks, **sizes)
        return masks, out.iou_scores[0], out.pred_masks[0]


def is_hub_model(path):
    """Whether a path is a Hugging Face folder or hub name, not a file."""
    return Path(path).is_dir() or (not Path(path).exists() and bool(HUB_NAME.fullmatch(str(path))))


def weight_files(path):
    """The files of weights of a model or SAM; none for a hub name."""
    return [Path(path)] if Path(path).is_file() else sorted(Path(path).glob("**/*.safetensors"))


class Segmenter:
    """SAM: boxes and points -> masks. Call `set_image` once, then `segment` as often as wanted."""

    def __init__(self, checkpoint=TINY_SAM, device="cpu", multimask=False):
        from segment_anything import SamPredictor

        check_device(device)
        if is_hub_model(checkpoint):
            self.predictor = HubPredictor(checkpoint, device)
        else:
            self.predictor = SamPredictor(load_sam(checkpoint).to(device))
        self.multimask, self.key = multimask, None

    @torch.inference_mode()
    def set_image(self, image, key=None):
        """Embed a PIL image, unless `key` says that it is the one that was embedded last."""
        if key is None or key != self.key:
            precision = torch.backends.cuda.matmul.fp32_precision
            torch.backends.cuda.matmul.fp32_precision = "tf32"  # three times as fast
            self.predictor.set_image(np.asarray(image.convert("RGB")))
            torch.backends.cuda.matmul.fp32_precision = precision
            self.key = key

    @torch.inference_mode()
    def segment(self, prompts):
        """[(box (4,), points (N, 2), labels (N,))] in pixels -> [(mask bool (H, W), score)]. score:
        the IoU that SAM predicts for its own mask.

        Prompts with the same number of points are decoded in one call. (SAM can pad points with
        label -1, but it attends to the padding: a mask would depend on its batch.)
        """
        results, (height, width) = [None] * len(prompts), self.predictor.original_size
        size = max(1, min(64, 2**28 // (height * width)))  # 1 GB of float32 masks at most
        for count in sorted({len(points) for _, points, _ in prompts}):
            same = [i for i, (_, points, _) in enumerate(prompts) if len(points) == count]
            for start in range(0, len(same), size):
                chosen = same[start : start + size]
                for i, result in zip(chosen, self._decode([prompts[i] for i in chosen], count)):
                    results[i] = result
        return results

    def _decode(self, prompts, count):
        """`segment` for prompts of `count` points each. InputError if SAM answers nan."""
        predictor = self.predictor
        to_tensor = partial(torch.as_tensor, dtype=torch.float32, device=predictor.device)
        boxes, points, labels = zip(*prompts)
        points = to_tensor(np.stack([np.reshape(p, (count, 2)) for p in points]))  # (K, N, 2)
        size, resize = predictor.original_size, predictor.transform.apply_coords_torch
        corners = to_tensor(np.stack(boxes)).view(-1, 2, 2)
        masks, scores, logits = predictor.predict_torch(
            point_coords=resize(points, size) if count else None,
            point_labels=to_tensor(np.stack(labels)) if count else None,  # (K, N)
            boxes=resize(corners, size).view(-1, 4),
            multimask_output=self.multimask,
        )  # (K, 1 or 3, H, W), (K, 1 or 3), (K, 1 or 3, 256, 256)
        # NOTE: a mask made of nan looks like an empty one
        if not (scores.isfinite().all() and logits.isfinite().all()):
            raise InputError("SAM answers nan: its weights are damaged, fetch --sam_ckpt again")
        best = scores.argmax(1).tolist()
        return [(m[k].cpu().numpy(), s[k].item()) for m, s, k in zip(masks, scores, best)]

    def segment_all(self, groups):
        """Lists of prompts -> [(union of a list's masks, mean score)]. All prompts are decoded
        together. A list without prompts gives an empty mask and score 0."""
        results = iter(self.segment([prompt for group in groups for prompt in group]))
        unions = []
        for group in groups:
            mask, scores = np.zeros(self.predictor.original_size, dtype=bool), []
            for _, (part, score) in zip(group, results):
                mask |= part
                scores.append(score)
            unions.append((mask, float(np.mean(scores)) if scores else 0.0))
        return unions


# ------------------------------------------------------------------------- errors and processes


class InputError(ValueError):
    """Bad input. The message is one line: what was found, what was expected and what mends it."""


def one_line(error):
    """What an error says, on one line: of much text the first sentence."""
    text = " ".join("".join(c if c.isprintable() else " " for c in str(error)).split())
    text = text if len(text) <= 300 else text.split(". ")[0]
    return text[:300] or type(error).__name__


@contextmanager
def error_border(found, remedy):
    """The border to a kind of thing from outside: what it raises becomes an InputError, `found
    (error): remedy`. Inside a border there are no checks of what raises anyway."""
    try:
        yield
    except (InputError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever a damaged file makes a parser raise
        raise InputError(f"{found} ({one_line(error)}): {remedy}") from None


def join_processes(device, backend=None):
    """Join the processes that torchrun started: this one's (rank, world size, local rank, device).
    backend: of their communication, by default nccl on CUDA and gloo elsewhere."""
    found = {name: os.environ.get(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    remedy = "start it with torchrun, or unset WORLD_SIZE and RANK for a single process"
    with error_border(f"the processes cannot join ({found})", remedy):
        world, rank, local_rank = int(found["WORLD_SIZE"] or 1), 0, 0
        if world > 1:
            rank, local_rank = int(found["RANK"]), int(found["LOCAL_RANK"])
            store, *_ = next(dist.rendezvous("env://", rank, world, timeout=timedelta(minutes=5)))
            # process 0 may be saving or drawing for long, while the others wait
            options = {"rank": rank, "world_size": world, "timeout": timedelta(hours=3)}
            if device == "cuda" and not backend:
                options["device_id"] = torch.device(f"cuda:{local_rank}")
            backend = backend or ("nccl" if device == "cuda" else "gloo")
            dist.init_process_group(backend, store=store, **options)
    device = f"cuda:{local_rank}" if device == "cuda" else device
    return rank, max(world, 1), local_rank, device


def rank_and_world():
    """This process's number and how many there are: (0, 1) without torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


@contextmanager
def in_turns(needed):
    """With torchrun and where `needed`, let the processes of a machine pass a block one by one:
    each loads the model to the CPU's memory before its GPU, which may not have room for eight."""
    if not (needed and dist.is_initialized()):
        yield
        return
    for turn in range(dist.get_world_size()):
        if turn == int(os.environ["LOCAL_RANK"]):
            yield
        dist.barrier()


def lock_folder(folder):
    """A file, open and locked; InputError if another process has locked it to write to `folder`.
    The lock ends with the process."""
    with error_border(f"cannot write to {folder}", "set --log_dir"):
        folder.parent.mkdir(parents=True, exist_ok=True)
        file = open(f"{folder}.lock", "w")
    try:
        import fcntl  # not on Windows

        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        message = f"another run is writing to {folder}: wait, or give a --version_name"
        raise InputError(message) from None
    except (ImportError, OSError):
        pass  # a file system without locks
    return file


def number(kind, low, high=math.inf):
    """A type for argparse: an int or float from `low` to `high`."""

    def parse(text):
        value = kind(text)
        if not low <= value <= high or value == math.inf:  # nan is not, either
            raise argparse.ArgumentTypeError(f"{text} is not from {low:g} to {high:g}")
        return value

    parse.__name__ = kind.__name__  # argparse names it: invalid int value
    return parse


def flag_adder(parser):
    """parser.add_argument, with the default of a flag in its help."""

    def add(name, **options):
        if options.get("default"):
            options["help"] += " (default %(default)s)"
        parser.add_argument(name, **options)

    return add


class Console:
    """A stream that never raises. Nobody may be there to read: `| head` has ended, or the terminal
    is closed. A character that the terminal cannot show is printed as a question mark."""

    def __init__(self, stream):
        if hasattr(stream, "reconfigure"):  # not in a notebook
            stream.reconfigure(errors="replace")
        self.stream = stream

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        try:
            self.stream.write(text)
            self.stream.flush()
        except OSError:  # from now on, write to nowhere
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())
        return len(text)


def run_script(main, get_args):
    """Run main(get_args()). An error ends it with one line. The traceback of an error that nobody
    foresaw goes to a file, and the line names the file."""
    streams = sys.stdout, sys.stderr  # None where a shell has closed it
    sys.stdout, sys.stderr = (Console(s or open(os.devnull, "w")) for s in streams)
    try:
        main(get_args())
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        os._exit(128 + signal.SIGINT)  # at once: a thread may be waiting for a server
    except Exception as error:
        # an error in a data worker arrives as its whole traceback, the message last
        line = str(error).strip().rpartition("\n")[-1].removeprefix("sampler.InputError: ")
        if isinstance(error, torch.OutOfMemoryError):
            line = "a lower --batch_size or --accumulate, or --gradient_checkpointing, needs less"
            line = f"not enough memory on the GPU ({one_line(error)[:99]}): {line}"
        elif line.startswith("DataLoader worker"):
            line += " (if memory is short, fewer --workers help)"
        elif not isinstance(error, (InputError, OSError)):
            path = Path(tempfile.gettempdir()) / f"traceback_{os.getpid()}.txt"
            path.write_text(traceback.format_exc())
            line = f"{type(error).__name__}: {line} (traceback: {path})"
        raise SystemExit(f"error: {line}") from None
    finally:
        for worker in multiprocessing.active_children():  # data workers ignore SIGTERM
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would raise
            worker.kill()
