"""Points, policy, SAM: what turns a phrase and an image into a mask, in the order it is used.

1. **Points.** A box says where, not what. A scale-aware grid of points is laid over it and judged
   one by one by the model (1 = on the target, 0 = off). Cells per side grow with the box:

       K = clip(floor(alpha * side / image_side), K_min, K_max),  alpha = 16, K_max = 6

   Points whose label the model itself doubts (p < 0.9) are dropped.
2. **Policy.** A multimodal language model as transformers loads it: Qwen-VL, InternVL or LLaVA.
3. **Reading and answering.** An image is read once, however many phrases and questions follow; the
   probability of every character comes with the answer, so that doubt costs no second forward pass.
4. **Groups.** For GRPO: G completions of a prompt and their log-probs, all in the prompt's row, so
   that prompt and image are computed, and kept, once.
5. **LoRA**, and how it is saved.
6. **SAM.** Frozen. Box + positive points + negative points -> mask. Its image encoder is the slow
   part and runs once per image, however many prompts follow.

Departures from the paper (ReSaP): K_min is 3 where the paper has 1, because one point in a small
box tells SAM nothing that the box has not, and SAM returns its single-mask output rather than the
one of three that it scores best. `eval.py --paper` goes back; the README has the figures.
"""

import copy
import hashlib
import json
import math
import os
import re
import shutil
import signal
import sys
from collections import OrderedDict
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from pickle import UnpicklingError
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint

ASSETS = Path(__file__).resolve().parent / "assets"
HUB_NAME = re.compile(r"\w[\w.-]*/[\w.-]+")  # owner/name
ADAPTER_CONFIG = "adapter_config.json"  # PEFT's name
SLICE = 2**27  # logits that are in memory at a time, in float32
TINY_VLM, TINY_SAM = ASSETS / "tiny_vlm", ASSETS / "tiny_sam" / "model.safetensors"


class InputError(ValueError):
    """Bad input: one line that says what was found, what was expected and what mends it."""


def run_script(main, get_args):
    """main(get_args()); what a user can mend (bad input, a full disk, Ctrl-C) ends in one line."""
    try:
        main(get_args())
    except (InputError, OSError) as error:
        # a data worker's error comes with its traceback: the last line is ours
        line = (
            (str(error).strip() or repr(error))
            .splitlines()[-1]
            .removeprefix("sampler.InputError: ")
        )
        raise SystemExit(f"error: {line}") from None
    except KeyboardInterrupt:
        sys.stdout.flush()
        print("stopped", file=sys.stderr, flush=True)
        os._exit(128 + signal.SIGINT)  # at once: a thread may be waiting for a server


# What a damaged pickle makes an unpickler raise: it runs whatever bytes it finds as instructions.
UNPICKLING_ERRORS = (UnpicklingError, EOFError, LookupError, TypeError, ValueError, AttributeError)
UNPICKLING_ERRORS += (MemoryError, OverflowError)


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

    At test time the points lie in *predicted* boxes; training on true boxes only would never show
    the model a grid that is off.
    """
    box = np.asarray(box_px, dtype=np.float64)
    side = np.tile(box[2:] - box[:2], 2)
    return (box + rng.uniform(-amount, amount, 4) * side).clip(0, [width, height, width, height])


def confident(probs, threshold=0.9):
    """Which labels to keep, bool (N,): those with a probability of `threshold` or more."""
    return np.asarray(probs) >= threshold


# ------------------------------------------------------------------------- policy


def check_device(device):
    """InputError if torch cannot put a tensor on `device`."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        why = str(error).splitlines()[0]
        raise InputError(f"--device {device} cannot be used: {why} (--device cpu works)") from None


def load_policy(path=TINY_VLM, device="cpu", dtype=None):
    """(model, processor) from a Hugging Face folder or hub name; the model in eval mode.

    A folder that holds only an adapter (sft.py --no-merge, or PEFT's own) is loaded onto its base
    and merged. dtype: float32 on CPU and bfloat16 on CUDA unless told. Weights are read as
    safetensors only, and no code of the checkpoint is run. InputError if there is no such model, or
    one of a family that nothing here is written for.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForImageTextToText, AutoProcessor
    from transformers.utils import logging

    logging.disable_progress_bar()
    check_device(device)
    path = str(path)
    if not Path(path).is_dir() and not (HUB_NAME.fullmatch(path) and not path.startswith("runs/")):
        raise InputError(
            f"no model at {path}: that folder does not exist (python sft.py writes runs/sft; the "
            f"base model is {TINY_VLM})"
        )
    dtype = dtype or (torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32)
    adapters = [f for f in (Path(path), Path(path) / "adapter") if (f / ADAPTER_CONFIG).is_file()]
    if adapters and not (Path(path) / "config.json").is_file():
        base = read_adapter_config(adapters[0])["base_model_name_or_path"]
        if Path(base).resolve() in (Path(path).resolve(), adapters[0].resolve()):
            raise InputError(
                f"{adapters[0]} names itself as its base model: put the path of the real one into "
                f"{ADAPTER_CONFIG}"
            )
        model, processor = load_policy(base, "cpu", dtype)  # merged there, bits depend on no GPU
        load_adapter(model, adapters[0])
        merge_lora(model)
        # the adapter's weights came as float32, and what it does not touch was frozen
        return model.to(device, dtype).requires_grad_(True).eval(), processor
    try:
        processor = AutoProcessor.from_pretrained(path)
        model = AutoModelForImageTextToText.from_pretrained(path, dtype=dtype, use_safetensors=True)
    except (OSError, ValueError, TypeError, RuntimeError, SafetensorError) as error:
        why = (str(error).strip() or repr(error)).splitlines()[0]
        raise InputError(
            f"no model at {path}: expected a Hugging Face folder (config.json, *.safetensors) or "
            f"a hub name that can be reached ({why})"
        ) from None
    check_family(model, processor, path)
    if model.config.model_type == "llava":
        show_whole_images(model, processor)
    return model.to(device).eval(), processor


def image_inputs(config):
    """Names of the tensors that hold the images of a prompt batch; () for a family unknown here."""
    vision = getattr(config, "vision_config", None)
    if hasattr(vision, "spatial_merge_size"):  # Qwen-VL: all images' patches, and their grids
        return "pixel_values", "image_grid_thw"
    if hasattr(config, "image_grid_pinpoints"):  # LLaVA-NeXT, OneVision: a row of tiles for each
        return "pixel_values", "image_sizes"
    if config.model_type in ("internvl", "llava") and vision.model_type != "pixtral":
        return ("pixel_values",)  # all images' tiles, each behind as many tokens; LLaVA: one tile
    return ()


def check_family(model, processor, path):
    """InputError for a model that loads but whose images could not be told apart in a batch."""
    token = getattr(processor, "image_token", None)
    if token is None or getattr(model.config, "image_token_id", None) is None:
        why = "no image token"
    elif not image_inputs(model.config):
        why = "images in a form that is not known here"
    elif not processor.chat_template:
        why = "no chat template"
    else:
        return
    raise InputError(
        f"{path} is of type {model.config.model_type} and has {why}: expected a Qwen-VL, InternVL "
        "or LLaVA chat model (the README lists which)"
    )


def show_whole_images(model, processor):
    """Let LLaVA-1.5 see the whole image, resized to its square.

    NOTE: its processor, as published, cuts off what sticks out of the middle square (center crop):
    a target there would never be seen. The model was trained on images padded to a square, with
    boxes relative to that square (github.com/haotian-liu/LLaVA/issues/606). Resizing keeps every
    pixel and makes the boxes relative to the image itself, as those of its successors are. On a
    square image, as in RRSIS-D, all three are one; on others the published weights have to learn it
    """
    images, side = processor.image_processor, model.config.vision_config.image_size
    images.size = {"height": side, "width": side}
    images.do_center_crop = images.do_pad = False


# Relative frames by config.model_type. Decimals: LLaVA-1.5's instruction data, from which the later
# ones grew. Integers to 1000: the reports of Qwen2-VL and Qwen3-VL, InternVL's description of its
# grounding data, and all that is not listed.
FRAMES = dict.fromkeys(["llava", "llava_next", "llava_onevision"], (1, 1))


def check_sides(width, height):
    """InputError for an image so long and thin that Qwen's processors refuse it."""
    if max(width, height) >= 200 * min(width, height):
        raise InputError(
            f"an image of {width} x {height}, expected sides of 1 : 200 at most: crop it"
        )


def answer_frame(model, processor, width, height):
    """The (width, height) in which the model speaks of an image of that many pixels.

    Qwen2.5-VL answers in pixels of the image *after its processor resized it*; the others on a
    relative scale, 0 to 1000 or 0 to 1: see FRAMES. InputError for an image too thin for them.
    """
    check_sides(width, height)
    if model.config.model_type != "qwen2_5_vl":
        return FRAMES.get(model.config.model_type, (1000, 1000))
    from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

    images = processor.image_processor
    least, most = images.size["shortest_edge"], images.size["longest_edge"]
    rows, cols = smart_resize(height, width, images.patch_size * images.merge_size, least, most)
    return cols, rows


def mixed_precision(model):
    """bfloat16 arithmetic on CUDA, and wherever the weights are bfloat16 (LoRA and the merger train
    in float32 beside them). Policy and reference are always called under it."""
    half = model.device.type == "cuda" or model.dtype == torch.bfloat16
    return torch.autocast(model.device.type, torch.bfloat16, enabled=half)


def vision_tokens(model, processor):
    """Ids of the tokens that stand for vision: a model must not write them."""
    names = ("image", "video", "vision_start", "vision_end", "start_image", "end_image")
    known = (model.config, processor, processor.tokenizer)  # InternVL's config knows one of four
    ids = {getattr(place, f"{name}_token_id", None) for name in names for place in known}
    return sorted(ids - {None})


def fingerprint(model, processor):
    """16 hex digits that tell one policy from another: of the tokenizer's vocabulary and, of every
    parameter, its name, dtype, shape and about 256 of its numbers (all would take a while)."""
    digest = hashlib.sha256(json.dumps(sorted(processor.tokenizer.get_vocab().items())).encode())
    for name, parameter in model.named_parameters():
        flat = parameter.detach().flatten()
        some = flat[:: max(1, flat.numel() // 256)].float().cpu()  # as float32 nothing is lost
        digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}".encode())
        digest.update(some.numpy().tobytes())
    return digest.hexdigest()[:16]


def to_device(inputs, model):
    return {key: value.to(model.device) for key, value in inputs.items()}


# ------------------------------------------------------------------------- reading and answering


class Context(NamedTuple):
    """What a model has read of B prompts, padded on the left."""

    cache: object  # keys and values of every layer, (B, heads, P, head_dim)
    seen: torch.Tensor  # bool (B, P), False on padding
    following: torch.Tensor  # (B,), position of the next token
    hidden: torch.Tensor  # (B, D), hidden state of the last token


@contextmanager
def inference(model):
    """No gradients, no dropout, and LoRA merged for the while: a layer of one product, not of three
    and the steps between them, which take longer than they compute in a decoding step. Inside
    another one there is nothing left to do."""
    layers = [m for m in model.modules() if isinstance(m, LoRALinear) and m.merged is None]
    was_training = model.training
    model.eval()  # NOTE: under gradient checkpointing, a model in training keeps no cache
    try:
        with torch.inference_mode(), mixed_precision(model):
            for layer in layers:
                layer.merged = merged_weight(layer)
            yield
    finally:
        for layer in layers:
            layer.merged = None
        model.train(was_training)


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


def attention_bias(sees, model):
    """What is added to attention scores where bool `sees` lets one token see another, or not.

    NOTE: a finite number that float32 and bfloat16 can hold: padding sees nothing, and a softmax
    over -inf alone is nan
    """
    bias = torch.zeros(sees.shape, dtype=model.dtype, device=sees.device)
    return bias.masked_fill(~sees, -1e9)


def read(model, prompt):
    """Read B prompts, or what they start with (data.collate, data.collate_images): a Context."""
    prompt = to_device(prompt, model)
    with inference(model):
        positions, following = prompt_positions(model, prompt)
        out = model.model(**prompt, position_ids=positions, use_cache=True)
        seen, hidden = prompt["attention_mask"].bool(), out.last_hidden_state[:, -1]
    return Context(out.cache, seen, following, hidden)


def read_on(model, context, rows, text):
    """Read a text (data.collate_text, B rows) behind some rows (B,) of a context, which stays as it
    is: several phrases can follow one image, and two questions one phrase."""
    text = to_device(text, model)
    rows = torch.tensor(rows, device=model.device)
    cache = copy.copy(context.cache)
    cache.layers = [copy.copy(layer) for layer in cache.layers]
    with inference(model):
        cache.batch_select_indices(rows)
        places = text["attention_mask"].cumsum(1)  # (B, Q), from 1
        following = context.following[rows]
        seen = torch.cat([context.seen[rows], text["attention_mask"].bool()], 1)  # (B, P + Q)
        hidden = model.model(
            input_ids=text["input_ids"],
            attention_mask=seen.long(),
            position_ids=text_positions(model, following[:, None] + (places - 1).clamp(min=0)),
            cache=cache,
            use_cache=True,
        ).last_hidden_state[:, -1]
    return Context(cache, seen, following + places[:, -1], hidden)


def choose(logits, temperature, never):
    """A token (N, 1) each from logits (N, V), and its log-probability at the temperature.

    Ids in `never` are not chosen, though the log-probability is that of the model as it is.
    """
    logits = logits.float() / (temperature or 1)
    logp = logits.log_softmax(-1)
    logits[:, never] = -math.inf
    if temperature:
        # argmax(logits + Gumbel noise) draws from softmax(logits), in fewer passes
        logits -= torch.empty_like(logits).exponential_().log_()
    token = logits.argmax(1, keepdim=True)
    return token, logp.gather(1, token)


def decode(model, processor, context, group, max_new_tokens, temperature):
    """`group` completions of each of B prompts: (ids, mask, logp), each (B*G, C), as sample_group
    has it, but as inference tensors. Temperature 0 is greedy. The context is used up.

    A step feeds G tokens to each prompt's row: each sees the prompt and its own completion. So the
    keys and values of a prompt are kept and read once, not G times. Finished completions leave.
    """
    use_group_attention(model)
    cache, seen, following, hidden = context
    tokenizer, batch = processor.tokenizer, len(seen)
    vision = torch.tensor(vision_tokens(model, processor), dtype=torch.long, device=seen.device)
    with inference(model):
        hidden = hidden.repeat_interleave(group, 0)  # (B*G, D)
        places = torch.arange(batch * group, device=seen.device).view(batch, group)  # rows of ids
        ids = places.new_full((batch * group, max_new_tokens), tokenizer.pad_token_id)
        mask, logp = torch.zeros_like(ids, dtype=torch.bool), torch.zeros(ids.shape).to(ids.device)
        alive = torch.ones_like(places, dtype=torch.bool)  # (B, G)
        bias = attention_bias(seen, model)[:, None, None].repeat(1, 1, group, 1)  # (B, 1, G, P)
        for step in range(max_new_tokens):
            drawn = choose(model.lm_head(hidden), temperature, vision)
            token, token_logp = (x.view(alive.shape) for x in drawn)  # (B, G)
            ids[places, step] = token.masked_fill(~alive, tokenizer.pad_token_id)
            mask[places, step] = alive
            logp[places, step] = token_logp.masked_fill(~alive, 0.0)
            alive = alive & (token != tokenizer.eos_token_id)
            widest = int(alive.sum(1).max())
            if not widest or step + 1 == max_new_tokens:
                break
            rows = alive.any(1).nonzero()[:, 0]
            if len(rows) * widest <= 0.75 * alive.numel():  # worth the copy
                order = torch.argsort(alive[rows].int(), stable=True, descending=True, dim=1)
                order = order[:, :widest]  # those that go on first
                places, token, alive = (x[rows].gather(1, order) for x in (places, token, alive))
                order = order[:, None, :, None].expand(-1, -1, -1, bias.shape[-1])
                bias, following = bias[rows].gather(2, order), following[rows]
                cache.batch_select_indices(rows)
            oneself = torch.eye(token.shape[1], dtype=torch.bool, device=seen.device)
            own = attention_bias(oneself, model).expand(len(token), 1, -1, -1)
            bias = torch.cat([bias, own], -1)  # (B, 1, G, P + G * steps)
            position = (following + step)[:, None].expand_as(token)
            hidden = model.model(
                input_ids=token,
                attention_mask=bias,
                position_ids=text_positions(model, position),
                cache=cache,
                use_cache=True,
            ).last_hidden_state.flatten(0, 1)
    return ids[:, : step + 1], mask[:, : step + 1], logp[:, : step + 1]


def generate(model, processor, context, max_new_tokens, temperature=0.0):
    """Answers to B prompts that were read: list of (text, char_probs (len(text),)).

    char_probs: the probability of the token that each character came from, at the temperature (at
    1 for 0, which is greedy). So a label's confidence needs no second forward pass.
    """
    tokenizer, answers = processor.tokenizer, []
    ids, mask, logp = decode(model, processor, context, 1, max_new_tokens, temperature)
    for row, kept, row_logp in zip(ids.tolist(), mask.sum(1).tolist(), logp.cpu().numpy()):
        end = kept - (row[kept - 1] == tokenizer.eos_token_id)
        text = tokenizer.decode(row[:end])
        lengths = [len(piece) for piece in tokenizer.batch_decode([[token] for token in row[:end]])]
        if sum(lengths) != len(text):  # a character made of several tokens: count what each adds
            lengths = np.diff([len(tokenizer.decode(row[:i])) for i in range(end + 1)]).clip(0)
        answers.append((text, np.repeat(np.exp(row_logp[:end]), lengths)[: len(text)]))
    return answers


# ------------------------------------------------------------------------- groups
# B prompts, left-padded to P; G completions of each, right-padded to C; rows b*G … b*G + G - 1
# belong to prompt b. A group of one prompt is the case B = 1.


def take_prompts(prompt, rows):
    """The inputs of some of B prompts.

    The pixels of all images lie in one tensor, image by image: patches, as many as a grid says
    (Qwen-VL), or tiles, as many as image tokens say (InternVL), or one row for each (LLaVA).
    """
    taken = {key: value[rows] for key, value in prompt.items() if key != "pixel_values"}
    if "pixel_values" not in prompt:
        return taken
    pixels = prompt["pixel_values"]
    if "image_grid_thw" in prompt:
        counts = prompt["image_grid_thw"].prod(-1)
    elif len(pixels) == len(prompt["input_ids"]):
        counts = torch.ones(len(pixels), dtype=torch.long)
    else:
        tokens = prompt["mm_token_type_ids"].sum(1)  # a tile has as many as any other
        counts = tokens * len(pixels) // tokens.sum()
    parts = pixels.split(counts.tolist())
    return {**taken, "pixel_values": torch.cat([parts[row] for row in rows])}


def sample_group(model, processor, prompt, group, max_new_tokens, temperature=1.0):
    """Sample `group` completions of each prompt: (ids, mask, logp), each (B*G, C).

    prompt: inputs of B prompts (data.collate). mask is True up to the end-of-sequence token and on
    it; a row without one was cut off at max_new_tokens. logp: log-probability under the model at
    this temperature of what was chosen, 0 behind the end.

    Prompt and image are computed once. Vision tokens are never chosen (a completion that holds
    `<|image_pad|>` cannot be scored), but logp is that of the model as it is, as completion_logps
    has it.
    """
    with inference(model):  # once for both, as merging takes time
        context = read(model, prompt)
        sampled = decode(model, processor, context, group, max_new_tokens, temperature)
    return tuple(tensor.clone() for tensor in sampled)  # a loss cannot use inference tensors


def token_logps(head, hidden, tokens, temperature=1.0):
    """log p of tokens (N,) behind hidden states (N, D), by the output layer `head`: float32 (N,).

    A softmax over 150,000 words in float32 is 0.6 MB a token, and gradients keep it. So it is taken
    slice by slice, and again for the gradients: one slice is in memory at a time.
    """

    def of_slice(hidden, tokens):
        logits = head(hidden).float() / temperature  # (slice, V)
        return -torch.nn.functional.cross_entropy(logits, tokens, reduction="none")

    size = max(1, SLICE // head.out_features)
    if len(tokens) <= size:
        return of_slice(hidden, tokens)
    slices = zip(hidden.split(size), tokens.split(size))
    return torch.cat([checkpoint(of_slice, *part, use_reentrant=False) for part in slices])


def attend(module, query, key, value, bias, scaling, dropout=0.0):
    """softmax(query key' * scaling + bias) value, (B, L, heads, head_dim), for a bias (B, 1, L, S).

    Several query heads share a key head. They go into the call as more queries of that head; as
    heads of their own they would want keys and values repeated at every step.
    """
    share = getattr(module, "num_key_value_groups", 1)
    folded = query.unflatten(1, (-1, share)).flatten(2, 3)  # (B, key heads, share * L, head_dim)
    bias = bias.repeat(1, 1, share, 1)
    out = nn.functional.scaled_dot_product_attention(
        folded, key, value, attn_mask=bias, dropout_p=dropout, scale=scaling
    )
    return out.unflatten(2, (share, -1)).flatten(1, 2).transpose(1, 2)


def group_attention(module, query, key, value, attention_mask, group=None, **kwargs):
    """Attention in rows [prompt, c_1, …, c_G], in two calls: the prompt's tokens see the prompt,
    those of a completion the prompt and their own. One call would need a mask (T, T) and compute
    all its pairs, most of them between completions that must not see one another.

    query, key, value: (B, heads, T, head_dim), T = P + G*C; attention_mask: (B, 1, P + C, P + C),
    of one row [prompt, c]; group: (G, P). Without group, a mask of ours (decode) is taken as it is,
    and one of transformers' (bool) as transformers takes it.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if attention_mask is None or attention_mask.dtype == torch.bool:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    options = {"scaling": kwargs.get("scaling"), "dropout": kwargs.get("dropout", 0.0)}
    if group is None:
        return attend(module, query, key, value, attention_mask, **options), None
    size, start = group
    shared = lambda x: x[:, :, :start]  # (B, heads, P, head_dim)
    own = lambda x: x[:, :, start:].unflatten(2, (size, -1)).transpose(1, 2).flatten(0, 1)
    seen = lambda x: torch.cat([shared(x).repeat_interleave(size, 0), own(x)], 2)
    bias = shared(attention_mask)[..., :start]
    first = attend(module, shared(query), shared(key), shared(value), bias, **options)
    bias = attention_mask[:, :, start:].repeat_interleave(size, 0)  # (B*G, 1, C, P + C)
    rest = attend(module, own(query), seen(key), seen(value), bias, **options)
    rest = rest.unflatten(0, (-1, size)).flatten(1, 2)  # (B, G*C, heads, head_dim)
    return torch.cat([first, rest], 1), None


def use_group_attention(model):
    """Tell the language model's layers to call group_attention, whatever they called before. For
    good: with gradient checkpointing they run again long after completion_logps has returned."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    language = getattr(model.model, "language_model", model.model)
    if language.config._attn_implementation != "group":
        AttentionInterface.register("group", group_attention)
        AttentionMaskInterface.register("group", sdpa_mask)
        language.set_attn_implementation("group")


def completion_logps(model, prompt, completions, mask, temperature=1.0):
    """log p(completion token | prompt, tokens before it) at a temperature: float32 (B*G, C).

    prompt: inputs of B prompts (data.collate); completions (B*G, C) and mask (B*G, C), True where a
    token counts; 0 elsewhere. Differentiable. *The* log-prob function: policy, old policy and
    reference are all scored by it, so that they differ by their weights alone.

    One row per prompt, [prompt, c_1, …, c_G]: image and prompt are computed once, not G times. A
    completion sees the prompt and itself, and its positions start where the prompt's end, so that
    the numbers are those of G rows [prompt, c_g].
    """
    use_group_attention(model)
    prompt = to_device(prompt, model)
    completions, mask = completions.to(model.device), mask.to(model.device).bool()
    positions, following = prompt_positions(model, prompt)
    ids, attention = prompt.pop("input_ids"), prompt.pop("attention_mask")  # (B, P)
    (rows, length), (batch, start) = completions.shape, ids.shape
    group, packed = rows // batch, rows // batch * length  # G, G*C
    behind = (following[:, None] + torch.arange(length, device=ids.device)).repeat(1, group)
    positions = torch.cat([positions, text_positions(model, behind)], -1)  # (…, B, T)

    # whom a token of [prompt, c] sees, (B, 1, P + C, P + C): up to itself, and no padding
    exists = torch.nn.functional.pad(attention.bool(), (0, length), value=True)  # (B, P + C)
    sees = (
        exists[:, None, None] & exists.new_ones(2 * exists.shape[1:]).tril()
    )  # (B, 1, P + C, P + C)

    prompt = {  # mm_token_type_ids must cover the completions, as text
        key: torch.nn.functional.pad(value, (0, packed)) if value.shape == ids.shape else value
        for key, value in prompt.items()
    }
    with mixed_precision(model):
        hidden = model.model(
            input_ids=torch.cat([ids, completions.reshape(batch, packed)], 1),
            attention_mask=attention_bias(sees, model),
            position_ids=positions,
            use_cache=False,
            group=(group, start),
            **prompt,
        ).last_hidden_state  # (B, T, D)
        # a token is predicted one place before its own, each completion's first at the prompt's
        # end. NOTE: an index that names that place G times would let threads add up its gradients
        # in any order
        last = hidden[:, start - 1].repeat_interleave(group, 0)[:, None]  # (B*G, 1, D)
        own = hidden[:, start:].reshape(rows, length, -1)[:, :-1]  # (B*G, C - 1, D)
        hidden = torch.cat([last, own], 1)[mask]  # (tokens that count, D)
        counted = token_logps(model.lm_head, hidden, completions[mask], temperature)
    return torch.zeros(rows, length, device=ids.device).masked_scatter(mask, counted)


# ------------------------------------------------------------------------- LoRA
# h = W x + (alpha / r) * B A x, B zero at start. Files in PEFT's own layout, so that
# PeftModel.from_pretrained reads what is written here, and the other way round.

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class LoRALinear(nn.Module):
    """A frozen linear layer with a trainable low-rank update, whose weights are float32."""

    def __init__(self, base_layer, rank, alpha, dropout):
        super().__init__()
        self.base_layer, self.scale = base_layer, alpha / rank
        self.merged = None  # W + (alpha / r) B A, inside `inference`
        self.dropout = nn.Dropout(dropout)
        options = {"bias": False, "device": base_layer.weight.device, "dtype": torch.float32}
        self.lora_A = nn.Linear(base_layer.in_features, rank, **options)
        self.lora_B = nn.Linear(rank, base_layer.out_features, **options)
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x):
        if self.merged is not None:
            return nn.functional.linear(x, self.merged, self.base_layer.bias)
        update = self.lora_B(self.lora_A(self.dropout(x.to(self.lora_A.weight.dtype))))
        return self.base_layer(x) + (self.scale * update).to(x.dtype)


def add_lora(model, rank=64, alpha=128, dropout=0.05, names=None):
    """Freeze the model but for LoRA on the language model's projections (or on the linear layers
    `names`) and its vision merger."""
    model.requires_grad_(False)
    for name, module in list(model.named_modules()):
        parent, _, leaf = name.rpartition(".")
        wanted = leaf in TARGETS and "language_model" in name if names is None else name in names
        if wanted and isinstance(module, nn.Linear):
            setattr(model.get_submodule(parent), leaf, LoRALinear(module, rank, alpha, dropout))
    for name in merger_names(model):
        model.get_submodule(name).float().requires_grad_(True)
    return model


def make_trainable(model, args, dropout):
    """Put the model in training, with LoRA or (lora_rank 0) as a whole: the parameters that train,
    alike on all processes. args: lora_rank, lora_alpha, gradient_checkpointing."""
    if args.lora_rank:
        add_lora(model, args.lora_rank, args.lora_alpha, dropout)
    if args.gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    for parameter in trained if dist.is_initialized() else ():  # LoRA's A is random: take rank 0's
        dist.broadcast(parameter.data, 0)
    return trained


def merger_names(model):
    """What lies between vision encoder and language model: Qwen's merger and deepstack mergers,
    InternVL's and LLaVA's projector."""
    ends = ("visual.merger", "multi_modal_projector")
    names = [name for name, _ in model.named_modules()]
    return [
        n
        for n in names
        if n.endswith(ends) or n.rpartition(".")[0].endswith("deepstack_merger_list")
    ]


def save_adapter(model, folder, base):
    """Write adapter_model.safetensors and adapter_config.json; `base`: the base model's path."""
    from safetensors.torch import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    one = next(m for m in model.modules() if isinstance(m, LoRALinear))
    mergers = merger_names(model)
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": str(base),
        "r": one.lora_A.out_features,
        "lora_alpha": one.scale * one.lora_A.out_features,
        "lora_dropout": one.dropout.p,
        "target_modules": rf".*language_model.*\.({'|'.join(TARGETS)})",
        "modules_to_save": [name.removeprefix("model.") for name in mergers] or None,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    state = {
        f"base_model.model.{name}": parameter.detach().cpu().contiguous()
        for name, parameter in model.named_parameters()
        if ".lora_" in name or any(name.startswith(merger + ".") for merger in mergers)
    }
    save_file(state, folder / "adapter_model.safetensors.new")
    os.replace(folder / "adapter_model.safetensors.new", folder / "adapter_model.safetensors")
    (folder / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2))


def read_adapter_config(folder):
    """adapter_config.json as a dict; InputError if it is not a LoRA adapter's."""
    path = Path(folder) / ADAPTER_CONFIG
    try:
        config = json.loads(path.read_text())
        config["r"], config["lora_alpha"], config["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path} is not the config of a LoRA adapter ({error!r}): expected r, lora_alpha and "
            "base_model_name_or_path"
        ) from None
    for kind in ("use_rslora", "use_dora", "alpha_pattern", "rank_pattern"):
        if config.get(kind):
            raise InputError(f"{path}: {kind} is not read here; merge the adapter with PEFT first")
    return config


def load_adapter(model, folder):
    """Add LoRA to `model` and fill it, and the mergers, from an adapter folder."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    config = read_adapter_config(folder)
    try:
        state = load_file(Path(folder) / "adapter_model.safetensors")
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"{folder}/adapter_model.safetensors cannot be read ({error}): copy it again"
        ) from None
    state = {name.removeprefix("base_model.model."): value for name, value in state.items()}
    names = {
        name.removesuffix(".lora_A.weight") for name in state if name.endswith("lora_A.weight")
    }
    add_lora(model, config["r"], config["lora_alpha"], config.get("lora_dropout", 0.0), names)
    missing, unexpected = model.load_state_dict(state, strict=False)
    missing = [name for name in missing if ".lora_" in name]
    if missing or unexpected:
        raise InputError(
            f"{folder} does not fit its base: {(missing + unexpected)[0]} has no counterpart. Is "
            f"{config['base_model_name_or_path']} the model that it was trained on?"
        )
    return model


@torch.no_grad()
def merged_weight(module):
    """W + (alpha / r) B A of a LoRALinear, in W's type."""
    weight, update = module.base_layer.weight, module.lora_B.weight @ module.lora_A.weight
    return (weight.float() + module.scale * update).to(weight.dtype)


def merge_lora(model):
    """Fold every update into its layer and put the plain layer back, in place."""
    for name, module in list(model.named_modules()):
        if isinstance(module, LoRALinear):
            module.base_layer.weight.data = merged_weight(module)
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, module.base_layer)
    return model


def save_policy(model, processor, folder):
    """Write a plain Hugging Face folder, LoRA merged on the way out; the model stays as it is.

    Written beside and renamed, so that a run that dies while saving leaves the old files whole.
    """
    state = {
        n.replace(".base_layer", ""): p for n, p in model.state_dict().items() if ".lora_" not in n
    }
    for name, module in model.named_modules():
        if isinstance(module, LoRALinear):
            state[f"{name}.weight"] = merged_weight(module)
    state = {
        name: tensor.to(model.dtype) for name, tensor in state.items()
    }  # mergers train in float32
    folder = Path(folder)
    new = folder / ".new"
    model.save_pretrained(new, state_dict=state)
    processor.save_pretrained(new)
    for file in new.iterdir():
        os.replace(file, folder / file.name)
    new.rmdir()


def save_trained(model, processor, args, folder):
    """What a stage leaves behind: merged weights, and the adapter in adapter/.

    args: model_path, lora_rank (0: there is no adapter), merge (False: the adapter alone).
    """
    if args.lora_rank:
        save_adapter(model, folder / "adapter", args.model_path)
    else:  # an earlier run's would be taken for this one's
        shutil.rmtree(folder / "adapter", ignore_errors=True)
    if args.merge or not args.lora_rank:
        save_policy(model, processor, folder)
    else:
        (folder / "config.json").unlink(missing_ok=True)


# ------------------------------------------------------------------------- SAM


def build_tiny_sam(image_size=128, patch=8, width=96, depth=4, channels=64):
    """segment-anything's own modules at about 0.5 M parameters (the smallest published: 91 M)."""
    from segment_anything.modeling import (
        ImageEncoderViT,
        MaskDecoder,
        PromptEncoder,
        Sam,
        TwoWayTransformer,
    )

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
            image_embedding_size=(image_size // patch, image_size // patch),
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


def load_sam(checkpoint=TINY_SAM):
    """A SAM from its weights alone: vit_b, vit_l, vit_h (segment-anything), vit_t (MobileSAM) or
    the tiny one. The type is read off the weights. InputError for a file of another kind."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path, table = Path(checkpoint), "image_encoder.pos_embed"
    try:
        # NOTE: weights_only, so that a checkpoint from the web cannot run code
        safe = path.suffix == ".safetensors"
        state = load_file(path) if safe else torch.load(path, "cpu", weights_only=True)
        width = state[table].shape[-1] if table in state else None
    except FileNotFoundError:
        raise InputError(
            f"--sam_ckpt {path} does not exist (leave it out for the tiny SAM)"
        ) from None
    except (SafetensorError, OSError, RuntimeError, *UNPICKLING_ERRORS) as error:
        why = (str(error) or repr(error)).splitlines()[0][:80]
        raise InputError(
            f"--sam_ckpt {path} is not a file of SAM weights ({why}): fetch it again"
        ) from None
    from segment_anything import sam_model_registry

    names = {768: "vit_b", 1024: "vit_l", 1280: "vit_h"}
    if width in names:
        sam = sam_model_registry[names[width]]()
    elif "image_encoder.patch_embed.seq.0.c.weight" in state:
        try:
            from mobile_sam import sam_model_registry as mobile_registry
        except ImportError:
            raise InputError(f"{path} is MobileSAM: pip install mobilesam-mirror timm") from None
        sam = mobile_registry["vit_t"]()
    elif width is not None:
        sam = build_tiny_sam()
    else:
        raise InputError(
            f"--sam_ckpt {path} holds no SAM: expected vit_b, vit_l, vit_h or MobileSAM"
        )
    try:
        sam.load_state_dict(state)
    except RuntimeError as error:
        raise InputError(
            f"--sam_ckpt {path} does not fit ({str(error).splitlines()[1].strip()[:120]}): fetch "
            "it again from where SAM is published"
        ) from None
    # NOTE: MobileSAM's TinyViT caches its attention biases on entering eval mode, which the
    # registry did before the weights were there; without train() the embeddings are wrong.
    return sam.train().eval().requires_grad_(False)


class Segmenter:
    """Boxes and points to masks. `set_image` once, `segment` as often as wanted."""

    def __init__(self, checkpoint=TINY_SAM, device="cpu", multimask=False, cache_size=16):
        from segment_anything import SamPredictor

        check_device(device)
        self.predictor = SamPredictor(load_sam(checkpoint).to(device))
        self.multimask, self.cache, self.cache_size = multimask, OrderedDict(), cache_size

    @torch.inference_mode()
    def set_image(self, image, key=None):
        """Embed a PIL image, or take its embedding from the cache where `key` was seen before."""
        if key is None or key not in self.cache:
            self.predictor.set_image(np.asarray(image.convert("RGB")))
            state = (
                self.predictor.features,
                self.predictor.original_size,
                self.predictor.input_size,
            )
            self.cache[key] = state
        self.cache.move_to_end(key)
        while len(self.cache) > self.cache_size:
            self.cache.popitem(last=False)
        self.predictor.features, self.predictor.original_size, self.predictor.input_size = (
            self.cache[key]
        )

    @torch.inference_mode()
    def segment(self, prompts):
        """[(box (4,), points (N, 2), labels (N,))] in pixels -> [(mask bool (H, W), score)].

        Prompts with the same number of points are decoded in one call, as many as fit. (SAM
        can pad with label -1, but it attends to padding: a mask would depend on who shares the
        batch.) Score: the IoU that SAM predicts of its own mask. InputError if that is nan.
        """
        results, (height, width) = [None] * len(prompts), self.predictor.original_size
        at_once = max(1, min(64, 2**28 // (height * width)))  # masks, in float32: 1 GB at most
        for count in sorted({len(points) for _, points, _ in prompts}):
            same = [i for i, (_, points, _) in enumerate(prompts) if len(points) == count]
            for start in range(0, len(same), at_once):
                chosen = same[start : start + at_once]
                for i, result in zip(chosen, self._decode([prompts[i] for i in chosen], count)):
                    results[i] = result
        return results

    def _decode(self, prompts, count):
        """`segment` for prompts of `count` points each."""
        predictor = self.predictor
        to_tensor = partial(torch.as_tensor, dtype=torch.float32, device=predictor.device)
        boxes, points, labels = zip(*prompts)
        points = to_tensor(np.stack([np.reshape(p, (count, 2)) for p in points]))  # (K, N, 2)
        resize, size = predictor.transform, predictor.original_size
        masks, scores, logits = predictor.predict_torch(
            point_coords=resize.apply_coords_torch(points, size) if count else None,
            point_labels=to_tensor(np.stack(labels)) if count else None,  # (K, N)
            boxes=resize.apply_boxes_torch(to_tensor(np.stack(boxes)), size),  # (K, 4)
            multimask_output=self.multimask,
        )  # (K, 1 or 3, H, W), (K, 1 or 3), (K, 1 or 3, 256, 256)
        # the mask of a nan is empty, as if nothing had been found
        if not (scores.isfinite().all() and logits.isfinite().all()):
            raise InputError("SAM answers nan: its weights are damaged, fetch --sam_ckpt again")
        best = scores.argmax(1).tolist()
        return [(m[k].cpu().numpy(), s[k].item()) for m, s, k in zip(masks, scores, best)]

    def segment_unions(self, groups):
        """[(mask, mean score)], one for every list of prompts: the union of their masks. All are
        decoded together; a list without prompts is an empty mask, with score 0."""
        results, answers = iter(self.segment([p for group in groups for p in group])), []
        for group in groups:
            mask, scores = np.zeros(self.predictor.original_size, dtype=bool), []
            for _, (part, score) in zip(group, results):
                mask |= part
                scores.append(score)
            answers.append((mask, float(np.mean(scores)) if scores else 0.0))
        return answers

    def segment_union(self, prompts):
        """`segment_unions` for one list: (mask, mean score)."""
        return self.segment_unions([prompts])[0]
