"""Train the two tiny models from nothing: assets/tiny_vlm (a Qwen3-VL) and assets/tiny_sam (a SAM).

    python assets/make_tiny.py vlm     # some two and a half hours on two CPU cores
    python assets/make_tiny.py sam     # about 10 minutes

They exist so that every script of this repository runs on a laptop, offline, through the very code
that trains and tests the real models. The VLM is a *base* model: it is only ever asked about plain
scenes (flat ground, no clutter), for boxes and points, and in a short third phase for lists of
instances. The demo sets are a harder domain with words of their own, which sft.py has to learn.
Pictures of that kind are seen from the second phase on, with the vision encoder's auxiliary loss
alone: SFT leaves the encoder frozen. Of the SAM's scenes 3 % are of the harder kind: like the real
one over aerial images it does well there, but profits from points.

What made grounding learnable at this size:
1. A dense auxiliary loss (`Heads`): every vision token behind the merger says which object it lies
   on, where it and that object are, and which of its parts are covered. The heads are thrown away.
2. Told where to look (`LOOKS`): in three layers one head's attention is supervised. A number of the
   box looks at the target's vision tokens, the last token of a point at the vision token under it,
   a label at its point. From the answers alone, labels stay a pattern per class, learnt by heart:
   no point is ever looked up.
3. Numbers up to 1000 are single tokens, and their embeddings start as sines and cosines, like the
   position embeddings of rows and columns (`waves`): a point and its place begin alike.
4. Points that are scattered, not only laid out in a grid, whose pattern could be guessed.
5. Muon on the matrices, and all questions about an image packed behind one image prefix: each sees
   the prefix and itself, its positions restart behind the prefix. Three times the answers a second.
"""

import argparse
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import trange
from transformers import (
    AttentionInterface,
    PreTrainedTokenizerFast,
    Qwen2VLImageProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

ASSETS = Path(__file__).resolve().parent
sys.path.insert(0, str(ASSETS.parent))

import data  # noqa: E402
import sampler  # noqa: E402
from assets import make_demo  # noqa: E402
from assets.build_tiny_sam import build_tiny_sam  # noqa: E402

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}{% else %}"
    "{% for part in message.content %}{% if part.type == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}{% endfor %}"
    "{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# of the third form of answer, one token each
LIST_TOKENS = ['{"bbox_2d":[', '],"positive_points":[[', "]]}"]
TURN = "<|im_end|>\n<|im_start|>assistant\n"  # between a question and its answer


def get_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", choices=["vlm", "sam"])
    parser.add_argument("--steps", type=int, help="updates (default: 4000 vlm, 800 sam)")
    parser.add_argument("--batch", type=int, default=16, help="scenes per update")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="folder (default: assets/tiny_<model>)")
    return parser.parse_args(argv)


def build_processor():
    """Byte-level BPE with the demo's words; numbers to 1000 and instruction lines as one token."""
    rng = np.random.default_rng(0)
    corpus = []
    for _ in range(400):
        _, objects = make_demo.draw_scene(rng, 4, plain=True)
        corpus += [f"Phrase: {make_demo.describe(rng, objects, o)}\n" for o in objects]
    for name in make_demo.OUTLINES:
        for row, col in np.ndindex(3, 3):
            corpus += [
                f"The {size} {name} {data.place_words(row, col)}."
                for size in ("small", "medium", "large")
            ]
    corpus += ["Phrase: points: user assistant\n", "[[1,2],[3,4]]", "[1,0]", "],["] * 50
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        corpus,
        trainers.BpeTrainer(
            vocab_size=600, min_frequency=10, initial_alphabet=alphabet, show_progress=False
        ),
    )
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"]
    tokenizer.add_special_tokens([*special, "<|image_pad|>", "<|video_pad|>"])
    lines = [data.BOX_TASK, data.POINT_TASK, data.RELATIVE, data.THINK, data.NO_THINK]
    tags = ["<think>", "</think>", "<answer>", "</answer>"]
    numbers = [str(n) for n in range(1001)]  # one token per coordinate
    texts = [*lines, *tags, *numbers, *make_demo.OTHER_NAMES.values()]
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in texts])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    pixels = make_demo.SIZE**2
    patches = {
        "patch_size": 8,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
    }
    patches["size"] = {"shortest_edge": pixels, "longest_edge": pixels}
    return Qwen3VLProcessor(
        Qwen2VLImageProcessor(**patches),
        fast,
        Qwen3VLVideoProcessor(**patches),
        chat_template=CHAT_TEMPLATE,
    )


def waves(at, width, octaves):
    """Sines and cosines (N, width) of places `at` (N,) in 0-1, from a quarter period upwards."""
    count = width // 2
    phase = at[:, None] * math.pi / 2 * 2 ** (torch.arange(count) / count * octaves)
    return torch.cat([phase.sin(), phase.cos()], 1)


def build_vlm(processor):
    """Qwen3-VL, unchanged but for its widths: about 2 M parameters."""
    ids = processor.tokenizer.convert_tokens_to_ids
    config = Qwen3VLConfig(
        text_config={
            "vocab_size": len(processor.tokenizer),
            "hidden_size": 128,
            "intermediate_size": 384,
            "num_hidden_layers": 5,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "head_dim": 32,
            "max_position_embeddings": 4096,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [6, 5, 5],
                "mrope_interleaved": True,
            },
            "pad_token_id": processor.tokenizer.pad_token_id,
        },
        vision_config={
            "depth": 4,
            "hidden_size": 96,
            "intermediate_size": 256,
            "num_heads": 3,
            "patch_size": 8,
            "out_hidden_size": 128,
            "num_position_embeddings": (make_demo.SIZE // 8) ** 2,
            "deepstack_visual_indexes": [1],
        },
        image_token_id=ids("<|image_pad|>"),
        video_token_id=ids("<|video_pad|>"),
        vision_start_token_id=ids("<|vision_start|>"),
        vision_end_token_id=ids("<|vision_end|>"),
        tie_word_embeddings=True,
    )
    model = Qwen3VLForConditionalGeneration(config)
    with torch.no_grad():
        table = model.model.visual.pos_embed.weight  # (rows * columns, D)
        side = make_demo.SIZE // 8
        axis = waves((torch.arange(side) + 0.5) / side, table.shape[1] // 2, octaves=4)
        rows, cols = axis[:, None].expand(-1, side, -1), axis[None].expand(side, -1, -1)
        table.copy_(0.2 * torch.cat([rows, cols], -1).flatten(0, 1))
        words = model.get_input_embeddings().weight  # (V, D), also the output layer
        numbers = waves(torch.arange(2, 1001) / 1000, words.shape[1] // 2, octaves=6)
        words[ids([str(n) for n in range(2, 1001)]), : numbers.shape[1]] += 0.03 * numbers
    # the library loops over images; ours are all of one size and can attend in one call
    AttentionInterface.register("flash_uniform", uniform_attention)
    model.model.visual.config._attn_implementation = "flash_uniform"
    AttentionInterface.register("recording", recording_attention)
    model.model.language_model.config._attn_implementation = "recording"
    model.generation_config.eos_token_id = processor.tokenizer.eos_token_id
    model.generation_config.pad_token_id = processor.tokenizer.pad_token_id
    return model


def uniform_attention(
    module, query, key, value, attention_mask, scaling=None, cu_seq_lens_q=None, **_
):
    """Vision attention for images of one size: (1, heads, patches, D) -> output, None."""
    images = len(cu_seq_lens_q) - 1
    apart = lambda x: x[0].unflatten(1, (images, -1)).transpose(0, 1)  # (images, heads, patches, D)
    seen = F.scaled_dot_product_attention(apart(query), apart(key), apart(value), scale=scaling)
    return seen.transpose(1, 2).flatten(0, 1)[None], None


CELL = 16  # pixels: the side of what one vision token covers behind the merger
SIDE = make_demo.SIZE // CELL  # vision tokens in a row
CLASSES, COLORS = list(make_demo.OUTLINES), list(make_demo.COLORS)


def token_shares(mask):
    """Share of every vision token's cell that a mask (H, W) covers, (SIDE, SIDE)."""
    return mask.reshape(SIDE, CELL, SIDE, CELL).mean((1, 3))


class Muon(torch.optim.Optimizer):
    """Muon (Jordan 2024) with Nesterov momentum: five Newton-Schulz iterations bring all singular
    values of a matrix's momentum near 1, and the matrix moves by the result. torch.optim.Muon
    iterates in bfloat16, which on many CPUs takes longer than the model's forward and backward."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                momentum.lerp_(p.grad, 0.05)
                update = p.grad.lerp(momentum, 0.95)
                tall = len(update) > update.shape[1]
                x = update.T if tall else update
                x = x / x.norm().clamp(min=1e-7)
                for _ in range(5):
                    gram = x @ x.T
                    x = 3.4445 * x + (-4.775 * gram + 2.0315 * gram @ gram) @ x
                scale = max(1, len(p) / p.shape[1]) ** 0.5
                p.add_(x.T if tall else x, alpha=-group["lr"] * scale)


class Heads(torch.nn.Module):
    """Auxiliary losses, thrown away after training: what every vision token and the last token of
    every point should know."""

    DENSE = [len(CLASSES) + 1, len(COLORS), 64, 128, 4, 16]
    UNDER = [len(CLASSES) + 1, len(COLORS), 2]

    def __init__(self, width=128):
        super().__init__()
        self.norm, self.dense = torch.nn.LayerNorm(width), torch.nn.Linear(width, sum(self.DENSE))
        self.under = torch.nn.Linear(width, sum(self.UNDER))

    @staticmethod
    def targets(objects):
        """(tokens, 28): class (the last: ground), colour, the token's centre and the object's box
        in 0-1, the box's edges as seen from the token, in cells, -100 where there is no object; and
        which of its 4 x 4 parts lie on any object."""
        target = np.full((SIDE, SIDE, 12), -100.0)
        y, x = (np.mgrid[:SIDE, :SIDE] + 0.5) * CELL
        target[..., 0], most = len(CLASSES), np.full((SIDE, SIDE), 0.08)
        target[..., 2:4] = np.stack([x, y], -1) / make_demo.SIZE
        for o in objects:
            share = token_shares(o.mask)
            box, on = data.mask_to_box(o.mask), share > most
            target[on, :2] = CLASSES.index(o.class_name), COLORS.index(o.color)
            target[on, 4:8] = box / make_demo.SIZE
            target[on, 8:] = ((box - np.stack([x, y, x, y], -1)) / CELL)[on]
            most = np.maximum(most, share)
        covered = np.any([o.mask for o in objects], axis=0)
        parts = covered.reshape(SIDE, 4, CELL // 4, SIDE, 4, CELL // 4).mean((2, 5)) > 0.5
        parts = parts.transpose(0, 2, 1, 3).reshape(-1, 16)
        return torch.tensor(np.concatenate([target.reshape(-1, 12), parts], 1)).float()

    def dense_loss(self, features, target):
        """Vision tokens (tokens, 128) and their targets -> their losses, summed."""
        kind, color, place, box, edges, parts = self.dense(self.norm(features.float())).split(
            self.DENSE, -1
        )
        on = target[:, 1] >= 0
        as_waves = lambda at, width: waves(at.flatten(), width, octaves=5).reshape(len(at), -1)
        return (
            F.cross_entropy(kind, target[:, 0].long())
            + F.cross_entropy(color[on], target[on, 1].long())
            + 2 * F.mse_loss(place, as_waves(target[:, 2:4], 32))
            + 2 * F.mse_loss(box[on], as_waves(target[on, 4:8], 32))
            + F.smooth_l1_loss(edges[on], target[on, 8:12], beta=0.1)
            + 4 * F.binary_cross_entropy_with_logits(parts, target[:, 12:])
        )

    def point_loss(self, hidden, under):
        """Hidden states (B, T, D) of the text -> loss of what lies under each point."""
        ends = under[..., 0] >= 0
        if not ends.any():
            return hidden.new_zeros(())
        guesses = self.under(hidden[ends].float()).split(self.UNDER, -1)
        return sum(
            F.cross_entropy(guess, under[ends][:, i], ignore_index=-100)
            for i, guess in enumerate(guesses)
            if (under[ends][:, i] >= 0).any()
        )


@dataclass
class Question:
    prompt: str
    answer: str
    # the vision tokens to look at: the target's, or the one under each point, or each instance's
    tokens: np.ndarray | list
    under: np.ndarray = None  # (N, 3): class and colour of what lies under a point, and its label


def questions(rng, objects, ask_points, elsewhere=False):
    """Questions about one scene: the box of every object and, where `ask_points` is set, scattered
    points of two objects and the grid of one. With `elsewhere`, some of those points lie over other
    objects, as in a wrong box: only the phrase tells what to make of them."""
    size, asked = make_demo.SIZE, []

    def box_of(i, chance):
        """Of object i or, by chance, of any."""
        other = rng.choice(len(objects)) if elsewhere and rng.random() < chance else i
        return data.mask_to_box(objects[other].mask)

    for i in rng.permutation(len(objects)):
        target, phrase = objects[i], make_demo.describe(rng, objects, objects[i])
        if phrase is None:
            continue
        box, first = data.mask_to_box(target.mask), len(asked)
        think = bool(rng.random() < 0.4)
        why = data.rationale(target.class_name, box, size, size) if think else None
        relative = data.rescale(box, (size, size), (1000, 1000))
        prompt = data.box_prompt(phrase, think=think)
        asked.append(Question(prompt, data.box_answer(relative, why), tokens_on(target.mask)))
        points = []
        if ask_points and first < 4:  # in and around the box
            wide = sampler.jitter_box(box, size, size, rng, rng.choice([0.1, 0.5, 1.0]))
            both = np.stack([wide, box, box_of(i, 0.5)])
            wide = [*both[:, :2].min(0), *both[:, 2:].max(0)]
            points.append(sampler.random_points(wide, int(rng.integers(1, 13)), rng))
        if ask_points and first == 0:
            jittered = sampler.jitter_box(box_of(i, 0.25), size, size, rng)
            points.append(sampler.grid_points(jittered, size, size))
        for p in points:
            relative = data.rescale(p, (size, size), (1000, 1000))
            prompt = data.point_prompt(phrase, relative, think=think)
            answer = data.point_answer(sampler.label_points(p, target.mask), why)
            column, row = np.floor(p / CELL).astype(int).clip(0, SIDE - 1).T
            under = what_lies_under(p, objects, target)
            asked.append(Question(prompt, answer, row * SIDE + column, under))
    return asked


def tokens_on(mask):
    """The vision tokens that a mask covers well, or best."""
    share = token_shares(mask)
    return np.flatnonzero(share.ravel() >= min(0.2, share.max()))


def list_questions(rng, objects, count=2):
    """Questions about one scene that are answered with a list, as --prompts sam has it: for an
    object that a phrase singles out, or all of a class and perhaps a colour, which may be none."""
    size, asked = make_demo.SIZE, []
    for _ in range(count):
        one = objects[rng.integers(len(objects))]
        targets, phrase = [one], make_demo.describe(rng, objects, one)
        why = data.rationale(one.class_name, data.mask_to_box(one.mask), size, size)
        if phrase is None or rng.random() < 0.7:
            what, targets = one.class_name, [o for o in objects if o.class_name == one.class_name]
            if rng.random() < 0.25:
                what = str(rng.choice(CLASSES))
                targets = [o for o in objects if o.class_name == what]
            if rng.random() < 0.35:
                color = str(rng.choice([o.color for o in targets] or COLORS))
                what, targets = f"{color} {what}", [o for o in targets if o.color == color]
            phrase, why = f"All {what}s", f"{what}: {len(targets)}."
        mask = np.any([np.zeros((size, size), bool), *(o.mask for o in targets)], axis=0)
        relative = lambda coords: data.rescale(coords, (size, size), (1000, 1000))
        found = [(relative(box), relative(points)) for box, points in data.true_instances(mask)]
        tokens = [tokens_on(part) for part in data.connected_components(mask)]
        asked.append(Question(data.sam_prompt(phrase), data.sam_answer(found, why), tokens))
    return asked


def what_lies_under(points, objects, target):
    """Class (the last: ground), colour (-100: none) and label of points (N, 2): (N, 3)."""
    under = np.array([[len(CLASSES), -100, 0]] * len(points))
    for o in objects:
        hit = sampler.label_points(points, o.mask) == 1
        under[hit] = CLASSES.index(o.class_name), COLORS.index(o.color), o is target
    return under


# Which layer's first head learns to look where: from a point's last token to the vision token under
# it, from a number of the box to the target's vision tokens, from a label to its point.
LOOKS = {"point": 1, "box": 2, "label": 3}


def recording_attention(module, query, key, value, attention_mask, scaling=None, **_):
    """The text's attention, with queries and keys (B, heads, T, D) left behind for look_loss."""
    module.seen = query, key
    out = F.scaled_dot_product_attention(query, key, value, attention_mask, scale=scaling)
    return out.transpose(1, 2), None


def look_loss(attention, mask, looks):
    """- log of the attention (B, T, T) of one layer's first head that goes where it should."""
    rows, queries, keys = looks  # (n,), (n,), bool (n, T)
    query, key = (states[:, 0].float() for states in attention.seen)
    if not len(rows):
        return query.new_zeros(())
    scores = query @ key.transpose(1, 2) * attention.scaling + mask[:, 0]  # (B, T, T)
    logp = scores[rows, queries].log_softmax(-1)
    return -logp.masked_fill(~keys, -1e9).logsumexp(-1).mean()


class Packer:
    """Scenes -> rows [image, question, answer, question, answer, …] with block attention."""

    def __init__(self, processor, model):
        self.processor, self.tokenizer = processor, processor.tokenizer
        self.eos = self.tokenizer.eos_token_id
        blank = np.zeros((make_demo.SIZE, make_demo.SIZE, 3), np.uint8)
        prefix = "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>"
        one = processor(images=[blank], text=[prefix], return_tensors="pt")
        self.prefix, self.grid = one["input_ids"][0].tolist(), one["image_grid_thw"]
        self.image = self.prefix.index(processor.image_token_id)  # where the vision tokens start
        kinds = one["mm_token_type_ids"]
        places, _ = model.model.get_rope_index(one["input_ids"], kinds, image_grid_thw=self.grid)
        self.places = places[:, 0]  # (3, P)

    def row(self, asked):
        """A scene's questions -> ids, labels (-100 off the answers), segments (0: the image),
        positions (3, T), [(name in LOOKS, query, keys)], {token: what lies under its point}."""
        encode = lambda text: self.tokenizer(text, add_special_tokens=False)["input_ids"]
        ids, labels, segment = list(self.prefix), [-100] * len(self.prefix), [0] * len(self.prefix)
        places, start, looks, unders = [self.places], int(self.places.max()) + 1, [], {}
        for i, q in enumerate(asked):
            question, target, at = encode(q.prompt + TURN), encode(q.answer), len(ids)
            pieces = self.tokenizer.convert_ids_to_tokens(question + target)
            ids += question + [*target, self.eos]
            labels += [-100] * len(question) + [*target, self.eos]
            segment += [i + 1] * (len(ids) - at)
            places.append((start + torch.arange(len(ids) - at)).expand(3, -1))
            first = len(question) + pieces[len(question) :].index("<answer>")
            numbers = [at + t for t in range(first, len(pieces)) if pieces[t].isdigit()]
            if isinstance(q.tokens, list):  # 8 numbers of each instance: its box and two points
                each = [self.image + tokens for tokens in q.tokens for _ in range(8)]
                looks += [("box", n - 1, seen) for n, seen in zip(numbers, each, strict=True)]
                continue
            seen = self.image + q.tokens
            if q.under is None:
                looks += [("box", number - 1, seen) for number in numbers]
                continue
            ends = [at + t for t, piece in enumerate(pieces[1 : len(question)]) if piece[0] == "]"]
            looks += [("point", end, token) for end, token in zip(ends, seen)]
            looks += [("label", n - 1, end) for n, end in zip(numbers, ends, strict=True)]
            unders |= dict(zip(ends, q.under.tolist()))
        return ids, labels, segment, torch.cat(places, 1), looks, unders

    def pixels(self, scenes):
        """[(image, …)] -> pixel_values and image_grid_thw."""
        images = [image for image, *_ in scenes]
        return self.processor.image_processor(images=images, return_tensors="pt")

    def batch(self, scenes):
        """[(image, row, dense)] -> model inputs, labels, dense targets, what lies under the points
        (B, T, 3), and for each layer that looks (rows, queries, keys); padded on the right."""
        rows = [row for _, row, _ in scenes]
        longest = max(len(row[0]) for row in rows)
        stack = lambda k, value: torch.tensor(
            [row[k] + [value] * (longest - len(row[k])) for row in rows]
        )
        ids, labels, segment = stack(0, self.eos), stack(1, -100), stack(2, -1)
        places = [F.pad(row[3], (0, longest - row[3].shape[1])) for row in rows]
        mine, theirs = segment[:, :, None], segment[:, None, :]
        sees = ((mine == theirs) | (theirs == 0)).tril() | torch.eye(longest, dtype=torch.bool)
        inputs = {
            "input_ids": ids,
            "position_ids": torch.stack(places, 1),  # (3, B, T)
            # NOTE: additive, with a finite floor: a row that sees nothing would come out as NaN
            "attention_mask": torch.where(sees, 0.0, -1e9)[:, None],  # (B, 1, T, T)
            **self.pixels(scenes),
        }
        under, looks = torch.full((len(rows), longest, 3), -100), {}
        for b, row in enumerate(rows):
            for token, what in row[5].items():
                under[b, token] = torch.tensor(what)
        for name in LOOKS:
            wanted = [
                (b, *look[1:]) for b, row in enumerate(rows) for look in row[4] if look[0] == name
            ]
            keys = torch.zeros(len(wanted), longest, dtype=torch.bool)
            for n, (_, _, k) in enumerate(wanted):
                keys[n, k] = True
            looks[name] = [b for b, _, _ in wanted], [q for _, q, _ in wanted], keys
        return inputs, labels, torch.cat([dense for _, _, dense in scenes]), under, looks


def stream(packer, args, steps, demo, lists):
    """Endless batches, each with the pictures and dense targets of `demo` demo scenes. In the first
    phase (`demo` 0), scenes grow from one object to four over the first tenth of its steps, and
    points are asked for after the first sixth. With `lists`, three of the questions about a scene
    remain, and two are answered with lists."""
    rng = np.random.default_rng(args.seed + demo + lists)
    step = 0

    def draw(most):
        image, objects = make_demo.draw_scene(rng, int(rng.integers(1, most + 1)), plain=True)
        asked = questions(rng, objects, demo > 0 or step > steps / 6, demo > 0)
        if lists:
            some = rng.permutation(len(asked))[:3]
            asked = [asked[i] for i in some] + list_questions(rng, objects)
        return (image, packer.row(asked), Heads.targets(objects)) if asked else None

    def draw_unasked():
        image, objects = make_demo.draw_scene(rng, int(rng.integers(1, 5)))
        return image, Heads.targets(objects)

    while True:
        most = 4 if demo else 1 + min(3, int(4 * step / (0.1 * steps)))
        pool = [scene for _ in range(16 * args.batch) if (scene := draw(most))]
        pool.sort(key=lambda scene: len(scene[1][0]))  # rows of like length share a batch
        for i in rng.permutation(len(pool) // args.batch):
            unasked = [draw_unasked() for _ in range(demo)]
            yield packer.batch(pool[i * args.batch : (i + 1) * args.batch]), unasked
            step += 1


def train_vlm(args):
    torch.manual_seed(args.seed)
    processor = build_processor()
    model = build_vlm(processor)
    print(
        f"tiny VLM: {sum(p.numel() for p in model.parameters()):,} parameters, "
        f"vocabulary {len(processor.tokenizer)}"
    )
    first = model.get_input_embeddings().weight.detach().clone()
    heard = torch.zeros(len(first), dtype=torch.bool)
    train_phase(model, processor, args, args.steps, 0, 1.0, heard)
    train_phase(model, processor, args, args.steps * 3 // 8, 16, 0.7, heard)
    teach_lists(model, processor, args, first, heard)
    print_reached(*sampler.load_policy(args.out))


def teach_lists(model, processor, args, first, heard):
    """The third phase: a list of instances is a form of answer, too.

    NOTE: until here the softmax has pushed all words that never occurred the same way, until they
    were one and the same word to the model. Those start again from `first` (V, D), and what still
    does not occur stays there, so that SFT can tell new words apart.
    """
    torch.manual_seed(args.seed + 1)
    with torch.no_grad():
        model.get_input_embeddings().weight[~heard] = first[~heard]
    tokens = [AddedToken(text, normalized=False) for text in (data.SAM_TASK, *LIST_TOKENS)]
    processor.tokenizer.add_tokens(tokens)
    model.resize_token_embeddings(len(processor.tokenizer), mean_resizing=False)
    heard = torch.cat([heard, heard.new_zeros(len(tokens))])
    train_phase(model, processor, args, args.steps // 4, 16, 0.5, heard, lists=True)


def train_phase(model, processor, args, steps, demo, peak, heard, lists=False):
    """`steps` updates, `demo` demo pictures in each for the dense loss alone; `peak`: factor of the
    learning rates; `heard`, bool (V,): the tokens that have occurred, kept up to date; `lists`: see
    stream."""
    packer, heads, seen = Packer(processor, model), Heads(), []
    hook = model.model.visual.merger.register_forward_hook(lambda *call: seen.append(call[-1]))
    named = list(model.named_parameters())
    is_matrix = lambda n, p: p.ndim == 2 and "embed" not in n and "lm_head" not in n
    muon = Muon([p for n, p in named if is_matrix(n, p)], lr=0.02)
    rest = [p for n, p in named if not is_matrix(n, p)] + list(heads.parameters())
    adamw = torch.optim.AdamW(rest, lr=2e-3, weight_decay=0.0)
    ramp = lambda step: peak * min(1, (step + 1) / 200, (steps - step) / (0.4 * steps))
    schedules = [torch.optim.lr_scheduler.LambdaLR(o, ramp) for o in (muon, adamw)]
    words = model.get_input_embeddings().weight
    others = processor.tokenizer.convert_tokens_to_ids(list(make_demo.OTHER_NAMES.values()))
    bar, batches = trange(steps), stream(packer, args, steps, demo, lists)
    for step in bar:
        (inputs, labels, dense, under, looks), unasked = next(batches)
        hidden = model.model(**inputs).last_hidden_state  # (B, T, D)
        if unasked:  # through the vision encoder alone
            pixels = packer.pixels(unasked)
            model.model.visual(pixels["pixel_values"], pixels["image_grid_thw"])
            dense = torch.cat([dense, *(target for _, target in unasked)])
        target = labels[:, 1:]  # logits only where an answer token is predicted
        logits = model.lm_head(hidden[:, :-1][target != -100])  # (answer tokens, V)
        losses = {
            "answers": F.cross_entropy(logits, target[target != -100]),
            "dense": heads.dense_loss(torch.cat(seen), dense),
            "points": heads.point_loss(hidden, under),
        }
        for name, layer in LOOKS.items():
            attention = model.model.language_model.layers[layer].self_attn
            losses[f"look {name}"] = look_loss(attention, inputs["attention_mask"], looks[name])
        seen.clear()
        sum(losses.values()).backward()
        heard[inputs["input_ids"].unique()] = True
        # the softmax would push all words that never occur the same way, and SFT could hardly tell
        # them apart: the demo's stay where they start
        words.grad[~heard if lists else others] = 0
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip((muon, adamw), schedules):
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        if step % 50 == 0:
            bar.write(
                f"step {step}: " + ", ".join(f"{k} {v.item():.3f}" for k, v in losses.items())
            )
        if (step + 1) % 500 == 0 or step + 1 == steps:
            model.save_pretrained(args.out)
            processor.save_pretrained(args.out)
    hook.remove()


class Drawn:
    """A drawn object with what eval.validate needs of a data.Sample."""

    def __init__(self, image, target, phrase):
        self.image, self.mask, self.phrases = lambda: image, target.mask, [phrase]
        self.image_path, self.size = id(self), image.size  # every sample has a picture of its own


def print_reached(model, processor, count=400):
    """Box IoU and point accuracy on unseen scenes of both kinds."""
    from eval import validate

    for plain in (True, False):
        rng, samples = np.random.default_rng(12345), []
        while len(samples) < count:
            image, objects = make_demo.draw_scene(rng, int(rng.integers(1, 5)), plain)
            target = objects[rng.integers(len(objects))]
            phrase = make_demo.describe(rng, objects, target)
            samples += [Drawn(image, target, phrase)] if phrase else []
        for name, scores in validate(model, processor, samples, limit=count).items():
            print(f"{'plain' if plain else 'demo'} scenes, {name}: {scores}")


def sam_prompts(rng, objects, size):
    """Boxes (K, 4), points (K, N, 2), labels (K, N) and masks (K, H, W) of a scene's objects.

    Boxes are jittered, as a model's would be; the grid is k x k, k drawn per scene, 0 for box only;
    a share of the points is dropped (label -1), as the confidence filter does.
    """
    masks = np.stack([o.mask for o in objects])
    amount = rng.choice([0.0, 0.05, 0.15])
    boxes = [sampler.jitter_box(data.mask_to_box(mask), size, size, rng, amount) for mask in masks]
    k = int(rng.choice([0, 3, 3, 4, 5, 6]))
    points = (
        np.stack([sampler.grid_points(box, size, size, k_min=k, k_max=k) for box in boxes])
        if k
        else None
    )
    labels = None
    if k:
        labels = np.stack([sampler.label_points(p, mask) for p, mask in zip(points, masks)])
        labels[rng.random(labels.shape) < rng.choice([0.0, 0.2, 0.5])] = -1
    tensor = lambda value: (
        None if value is None else torch.tensor(np.stack(value), dtype=torch.float32)
    )
    return tensor(boxes), tensor(points), tensor(labels), tensor(masks)


def sam_loss(logits, scores, target):
    """logits (K, 4, H, W), scores (K, 4), target (K, H, W): BCE + dice on the single mask and
    on the best of the other three, and each predicted IoU against the true one."""
    target = target[:, None].expand_as(logits)
    bce = F.binary_cross_entropy_with_logits(logits, target, reduction="none").mean(
        (2, 3)
    )  # (K, 4)
    prob = logits.sigmoid()
    dice = 1 - (2 * (prob * target).sum((2, 3)) + 1) / ((prob + target).sum((2, 3)) + 1)
    each = 20 * bce + dice
    with torch.no_grad():
        hard, truth = logits > 0, target > 0
        iou = (hard & truth).sum((2, 3)) / (hard | truth).sum((2, 3)).clamp(min=1)
    return (
        each[:, 0] + each[:, 1:].min(1).values + F.mse_loss(scores, iou, reduction="none").mean(1)
    ).mean(), iou[:, 0]


def train_sam(args):
    from safetensors.torch import save_file

    torch.manual_seed(args.seed)
    rng, size = np.random.default_rng(args.seed), make_demo.SIZE
    sam = build_tiny_sam().train()
    named = [(n, p) for n, p in sam.named_parameters() if p.requires_grad]
    is_matrix = lambda n, p: p.ndim == 2 and "embed" not in n and "token" not in n
    muon = Muon([p for n, p in named if is_matrix(n, p)], lr=0.01)
    adamw = torch.optim.AdamW(
        [p for n, p in named if not is_matrix(n, p)], lr=1e-3, weight_decay=0.0
    )
    ramp = lambda step: min(1, (step + 1) / 100, (args.steps - step) / (0.5 * args.steps))
    schedules = [torch.optim.lr_scheduler.LambdaLR(o, ramp) for o in (muon, adamw)]
    print(f"tiny SAM: {sum(p.numel() for p in sam.parameters()):,} parameters")
    bar, ious = trange(args.steps), []
    for step in bar:
        scenes = [
            make_demo.draw_scene(rng, int(rng.integers(1, 5)), plain=rng.random() < 0.97)
            for _ in range(args.batch)
        ]
        pixels = torch.stack(
            [torch.tensor(np.asarray(image)).permute(2, 0, 1) for image, _ in scenes]
        )
        features = sam.image_encoder(sam.preprocess(pixels.float()))  # (B, C, h, w)
        loss = 0
        for feature, (_, objects) in zip(features, scenes):
            boxes, points, labels, masks = sam_prompts(rng, objects, size)
            sparse, dense = sam.prompt_encoder(
                None if points is None else (points, labels), boxes, None
            )
            low_res, scores = sam.mask_decoder.predict_masks(
                feature[None], sam.prompt_encoder.get_dense_pe(), sparse, dense
            )  # (K, 4, 64, 64), (K, 4)
            logits = F.interpolate(low_res, (size, size), mode="bilinear", align_corners=False)
            part, iou = sam_loss(logits, scores, masks)
            loss = loss + part / len(scenes)
            ious += iou.tolist()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(sam.parameters(), 1.0)
        for optimizer, schedule in zip((muon, adamw), schedules):
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        if (step + 1) % 100 == 0:
            bar.write(
                f"step {step + 1}: loss {loss.item():.3f}, "
                f"mask IoU {np.mean(ious):.3f} over the last 100"
            )
            ious = []
        if (step + 1) % 500 == 0 or step + 1 == args.steps:
            args.out.mkdir(parents=True, exist_ok=True)
            save_file(
                {k: v.half().contiguous() for k, v in sam.state_dict().items()},
                args.out / "model.safetensors",
            )


if __name__ == "__main__":
    args = get_args()
    args.steps = args.steps or {"vlm": 4000, "sam": 800}[args.model]
    args.out = args.out or ASSETS / f"tiny_{args.model}"
    {"vlm": train_vlm, "sam": train_sam}[args.model](args)
