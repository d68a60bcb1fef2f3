"""How fast it is, side by side: every row times ours and the usual way in turn, in one run.

    python tests/bench.py                       # all rows, about 7 minutes on two cores
    python tests/bench.py rollout evaluation    # some, by name
    python tests/bench.py --quick               # do all rows run, and do both sides agree?
    python tests/bench.py gpu --size 8b         # phases of an update on a GPU: see bench_gpu.py
    pip install trl peft pycocotools            # for the rows `grpo` and `rle`: left out without

What counts is the ratio: the median over repetitions of theirs / ours, taken right after one
another. Before the clock starts both sides are checked to give the same, where they should. A row
whose check fails is reported, the others go on, and the command ends with status 1. (`grpo` takes
blocks of steps in turn, unchecked, and the ratio of their medians; `memory` one run of each, in a
process of its own.) The model is assets/tiny_vlm with LoRA as grpo.py trains it; images are made
larger where a row wants a longer prompt. `bar` is what a ratio should reach.
"""

import argparse
import importlib.util
import json
import multiprocessing
import os
import re
import statistics
import sys
import tempfile
import time
import traceback
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from PIL import Image
from torch.nn.utils.rnn import pad_sequence

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import data
import eval as evaluation
import grpo
import sampler
import sft

GROUP, TAU = 8, 0.9
SIDES = {93: 128, 318: 272, 1053: 512}  # P: image side in pixels, 16 to a vision token


class LeftOut(Exception):
    """A row needs what is not there."""


def check_close(ours, theirs, tolerance, what):
    """AssertionError unless two numbers or arrays agree."""
    ours, theirs = (np.asarray(side, dtype=np.float64) for side in (ours, theirs))
    difference = np.abs(ours - theirs).max()
    if not difference <= tolerance:  # nan is not, either
        raise AssertionError(f"{what}: the two sides differ by {difference:.3g}")


def race(args, ours, theirs, times=1):
    """Median seconds of both and the median ratio of neighbouring runs."""
    seconds = []
    for _ in range(1 if args.quick else 1 + round(times * args.repeats)):
        start = time.perf_counter()
        ours()
        middle = time.perf_counter()
        theirs()
        seconds.append((middle - start, time.perf_counter() - middle))
    seconds = seconds[1:] or seconds  # the first warms up
    ratio = statistics.median(b / a for a, b in seconds)
    mine, other = map(statistics.median, zip(*seconds))
    return {"ours": mine, "theirs": other, "ratio": ratio}


def policy(lora=True):
    """(model, processor) as grpo.py trains it."""
    model, processor = sampler.load_policy()
    if lora:
        sampler.add_lora(model, rank=64, alpha=128, dropout=0.0).train()
    return model, processor


def differentiate(model, forward):
    """forward() and, as in training, its gradients."""
    model.zero_grad()
    value = forward()
    value.sum().backward()
    return value.detach()


def generation_options(model, processor, max_new_tokens):
    """For model.generate: what sampler.sample_group does by itself."""
    tokenizer = processor.tokenizer
    options = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    options["suppress_tokens"] = sampler.vision_token_ids(model, processor)
    return {**options, "max_new_tokens": max_new_tokens}


def draw_prompts(samples, task, think=0.0, miss=0.0, jitter=0.0):
    """The data.Prompt of every sample."""
    args = argparse.Namespace(prompts="points", seed=0, jitter=jitter)
    args.think_ratio, args.miss_ratio = think, miss
    dataset = data.PromptDataset(samples, lambda *_: (1000, 1000), args)
    return [dataset[0, i, task] for i in range(len(samples))]


def long_prompt(processor, length):
    """Inputs of one prompt of `length` tokens, by the size of its image."""
    side, rng = SIDES[length], np.random.default_rng(0)
    processor.image_processor.size = {"shortest_edge": side**2, "longest_edge": side**2}
    image = Image.fromarray(rng.integers(0, 255, (side, side, 3), np.uint8))
    prompt = data.box_prompt("the large red ship on the left", think=True)
    prompt = data.collate(processor, [image], [prompt])
    assert prompt["input_ids"].shape[1] == length
    return prompt


def append(prompt, completions):
    """Inputs of prompts (R, P) with completions (R, C) behind them."""
    seen, text = torch.ones_like(completions), torch.zeros_like(completions)
    more = {"input_ids": completions, "attention_mask": seen, "mm_token_type_ids": text}
    return prompt | {key: torch.cat([prompt[key], value], 1) for key, value in more.items()}


# ------------------------------------------------------------------------- rows: one group

LENGTHS = ((318, 60), (1053, 150))  # P, C


def padded_logps(model, prompt, completions):
    """What published GRPO code does: G full rows for each of B prompts, an image for each row,
    logits everywhere: (B*G, C)."""
    batch, start = prompt["input_ids"].shape
    rows = [b for b in range(batch) for _ in range(len(completions) // batch)]
    wide = append(sampler.select_prompts(prompt, rows), completions)
    logits = model(**wide, use_cache=False).logits[:, :-1].float() / TAU
    return logits.log_softmax(-1).gather(2, wide["input_ids"][:, 1:, None])[:, start - 1 :, 0]


def scoring(length, completion):
    """(ours, theirs): log-probs and gradients of a group, behind a prompt of `length` tokens."""
    model, processor = policy()
    prompt = long_prompt(processor, length)
    torch.manual_seed(0)
    completions = torch.randint(0, 380, (GROUP, completion))
    mask = torch.ones_like(completions, dtype=torch.bool)
    ours = lambda: sampler.completion_logps(model, prompt, completions, mask, TAU)
    theirs = lambda: padded_logps(model, prompt, completions)
    return lambda: differentiate(model, ours), lambda: differentiate(model, theirs)


def score(args):
    for length, completion in LENGTHS[:1] if args.quick else LENGTHS:
        ours, theirs = scoring(length, completion)
        check_close(ours(), theirs(), 1e-3, "log-probs")
        found = race(args, ours, theirs, 3)
        ideal = GROUP * (length + completion) / (length + GROUP * completion)
        note = f"{found['ratio'] / ideal:.2f} of the ratio of tokens, {ideal:.2f}"
        yield f"P={length} C={completion}", "padded batch of G rows", 4, found, note


def peak(side, length, completion):
    """MB that one scoring with gradients adds to this process, which does nothing else: VmHWM, the
    most that it ever held, less VmRSS, what it held before."""
    kb = lambda name: int(re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())[1])
    step = scoring(length, completion)[side]
    before = kb("VmRSS")
    step()
    return (kb("VmHWM") - before) / 1024


def memory(args):
    if sys.platform != "linux":
        raise LeftOut("it reads /proc")
    sizes, sides, spawn = LENGTHS[not args.quick], [], multiprocessing.get_context("spawn")
    for side in (0, 1):
        with ProcessPoolExecutor(1, spawn) as child:
            sides.append(child.submit(peak, side, *sizes).result())
    found = {"ours": sides[0], "theirs": sides[1], "ratio": sides[1] / sides[0], "unit": "MB"}
    note = "peak, less what was there before"
    yield "P={} C={}".format(*sizes), "padded batch of G rows", 2, found, note


SAMPLING = {"num_return_sequences": GROUP, "do_sample": True, "temperature": TAU}
SAMPLING |= {"top_k": 0, "top_p": 1.0}
ROLLOUTS = ((True, 318, 60, 4, 1.5), (False, 318, 60, 4, 1))  # LoRA, P, C, key heads, bar
ROLLOUTS += ((True, 93, 16, 4, 1), (True, 93, 60, 4, 1), (True, 93, 256, 4, 1))
ROLLOUTS += ((False, 93, 256, 4, None), (False, 93, 256, 1, None))


def rollout_cases(quick):
    """(what, bar, model, processor, prompt, C, whether answers may end)"""
    for lora, length, completion, heads, bar in () if quick else ROLLOUTS:
        model, processor = policy(lora)
        name = f"P={length} C={completion}" + ("" if lora else ", no LoRA")
        if heads == 1:
            model.config.text_config.num_key_value_heads = 1
            torch.manual_seed(0)
            model, name = type(model)(model.config), f"{name}, 4 heads a key"
        yield name, bar, model, processor, long_prompt(processor, length), completion, False
    model, processor = policy()
    images = [Image.new("RGB", (128, 128), (20 * i, 90, 40)) for i in range(8)]
    phrases = ["a ship", "The red aircraft on the left", "the silo", "A large white house"] * 2
    prompts = [data.box_prompt(p, think=i % 2 == 0) for i, p in enumerate(phrases)]
    prompt = data.collate(processor, images, prompts)
    yield "8 prompts, answers end", 1, model, processor, prompt, 16 if quick else 112, True


def check_up_to_ties(model, prompt, ours, theirs, pad):
    """AssertionError unless greedy completions (R, C) are the same or, where a row first differs,
    the model gives both tokens the same log-prob. From there on they may differ."""
    both = pad_sequence([ours.T, theirs.T], padding_value=pad).permute(1, 2, 0)  # (2, R, C)
    first = (both[0] != both[1]).int().argmax(1, keepdim=True)  # (R, 1)
    with torch.inference_mode():
        logps = [padded_logps(model, prompt, ids).gather(1, first) for ids in both]
    check_close(*logps, 1e-2, "greedy completions: log-probs where they part")


def rollout(args):
    for what, bar, model, processor, prompt, completion, ends in rollout_cases(args.quick):
        start, eos = prompt["input_ids"].shape[1], processor.tokenizer.eos_token_id
        never = lambda module, inputs, logits: logits.index_fill(-1, torch.tensor([eos]), -1e4)
        if not ends:
            model.lm_head.register_forward_hook(never)
        model.eval()
        ours = partial(sampler.sample_group, model, processor, prompt, GROUP, completion)

        @torch.inference_mode()
        def theirs(**options):
            options = (options or SAMPLING) | generation_options(model, processor, completion)
            return model.generate(**prompt, **options)[:, start:]

        greedy = ours(0)[0], theirs(do_sample=False).repeat_interleave(GROUP, 0)
        check_up_to_ties(model, prompt, *greedy, processor.tokenizer.pad_token_id)
        found = race(args, partial(ours, TAU), theirs)
        yield what, "model.generate(num_return_sequences=G)", bar, found, ""


# ------------------------------------------------------------------------- row: a GRPO step


def our_steps(folder, samples, steps, prompts, length):
    """Seconds of each GRPO step, and the mean length of its completions."""
    options = f"--model_path {sampler.TINY_VLM} --log_dir {folder}"
    options += f" --max_step {steps} --batch_size {prompts} --accumulate 1 --group {GROUP}"
    options += f" --max_new_tokens {length} --point_ratio 0 --think_ratio 0.5 --lr 1e-9"
    with mock.patch.object(data, "load_for_training", return_value=(samples, [])):
        grpo.main(grpo.get_args([*options.split(), "--val_limit", "0", "--no-merge"]))
    lines = [json.loads(line) for line in (folder / "grpo" / "train.jsonl").open()]
    return [line["seconds"] for line in lines], [line["length"] for line in lines]


def trl_steps(folder, model, processor, asked, steps, length, **options):
    """The same of TRL's GRPOTrainer: model, prompts, G, lengths, rewards, beta, LoRA."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    processor.tokenizer.padding_side = "left"  # what it expects of a processor
    rows = [
        {"prompt": [{"role": "user", "content": prompt.text}], "image": prompt.image, "index": i}
        for i, prompt in enumerate(asked)
    ]
    read = lambda text: data.read_answer(text, "box")
    texts = lambda completions: [completion[0]["content"] for completion in completions]

    def boxes(completions, index, **_):
        pairs = zip(texts(completions), index)
        return [grpo.box_reward(read(text), read(asked[i].answer)) for text, i in pairs]

    def forms(completions, index, **_):
        pairs = zip(texts(completions), index)
        return [grpo.format_reward(text, asked[i].answer) for text, i in pairs]

    seconds = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_, **__):
            self.start = time.perf_counter()

        def on_step_end(self, *_, **__):
            seconds.append(time.perf_counter() - self.start)

    sampling = {"num_generations": GROUP, "max_completion_length": length, "temperature": TAU}
    loss = {"beta": 0.04, "loss_type": "grpo", "learning_rate": 1e-9, "max_steps": steps}
    output = {"logging_steps": 1, "save_strategy": "no", "report_to": "none", "disable_tqdm": True}
    targets = rf".*language_model.*\.({'|'.join(sampler.TARGETS)})"
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=[boxes, forms],
        args=GRPOConfig(output_dir=folder, **sampling, **loss, **output, **options),
        train_dataset=Dataset.from_list(rows),
        processing_class=processor,
        peft_config=LoraConfig(r=64, lora_alpha=128, target_modules=targets),
        callbacks=[Clock()],
    )
    trainer.train()
    lengths = [line.get("completions/mean_length") for line in trainer.state.log_history]
    return seconds, [length for length in lengths if length is not None]


def trl_steps_here(folder, samples, steps, prompts, length):
    """trl_steps of the tiny model on the CPU, with the prompts of our_steps."""
    asked = draw_prompts(samples, "box", think=0.5)
    options = {"use_cpu": True, "bf16": False, "gradient_checkpointing": False}
    options |= {"per_device_train_batch_size": prompts * GROUP, "gradient_accumulation_steps": 1}
    return trl_steps(folder, *sampler.load_policy(), asked, steps, length, **options)


def grpo_step(args):
    if not (importlib.util.find_spec("trl") and importlib.util.find_spec("peft")):
        raise LeftOut("TRL is not installed (pip install trl peft)")
    steps, prompts, length = size = (2, 2, 16) if args.quick else (8, 16, 64)
    samples = data.load_samples("demo", args.data_root, "train")[: steps * prompts]  # each once
    seconds, lengths = ([], []), ([], [])
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(1 if args.quick else max(1, args.repeats // 2)):
            for side, run in enumerate((our_steps, trl_steps_here)):
                with open(os.devnull, "w") as quiet, redirect_stdout(quiet), redirect_stderr(quiet):
                    took, tokens = run(Path(folder), samples, *size)
                seconds[side].extend(took[1:])  # the first step warms up
                lengths[side].extend(tokens)
    mine, other = map(statistics.median, seconds)
    found = {"ours": mine, "theirs": other, "ratio": other / mine}
    note = "{:.1f} and {:.1f} tokens per completion".format(*map(statistics.mean, lengths))
    yield f"{prompts} x {GROUP}, LoRA", "TRL's GRPOTrainer", 3, found, note


# ------------------------------------------------------------------------- rows: all others


@torch.inference_mode()
def published(model, processor, segmenter, todo, args):
    """The published flow, one phrase at a time: two generations, one more forward pass for the
    labels' confidence, SAM's image encoder for every phrase. Lines as evaluation.evaluate's."""
    tokenizer, lines = processor.tokenizer, []
    options = generation_options(model, processor, args.max_new_tokens)

    def generate(image, prompt):
        """(inputs, tokens (C,) of the answer, its text)"""
        batch = data.collate(processor, [image], [prompt])
        ids = model.generate(**batch, do_sample=False, **options)[0, batch["input_ids"].shape[1] :]
        end = -int(ids[-1] == tokenizer.eos_token_id) or None
        return batch, ids, tokenizer.decode(ids[:end])

    for sample, i in todo:
        image, truth, phrase = sample.image(), sample.mask, sample.phrases[i]
        frame = sampler.answer_frame(model, processor, *image.size)
        *_, text = generate(image, data.box_prompt(phrase, frame, args.use_think))
        boxes = np.reshape(data.parse_boxes(text) or [], (-1, 4))[:1]
        boxes = data.rescale(boxes, frame, image.size).clip(0, [*image.size, *image.size])
        found = evaluation.Prediction(text, boxes, [], is_readable=bool(len(boxes)))
        mask, sam_score = np.zeros(truth.shape, bool), 0.0
        if len(boxes):
            points = sampler.grid_points(boxes[0], *image.size)
            shown = data.rescale(points, image.size, frame)
            prompt = data.point_prompt(phrase, shown, frame, args.use_think)
            batch, ids, text = generate(image, prompt)
            found.points, found.labels = [points], data.parse_labels(text)
            logits = model(**append(batch, ids[None])).logits[0, -len(ids) - 1 : -1]
            probs = logits.softmax(-1).gather(1, ids[:, None])[:, 0]
            written = [tokenizer.decode(token) for token in ids]
            where = written.index("<answer>") if "<answer>" in written else 0
            sure = [p for p, w in zip(probs[where:], written[where:]) if w in ("0", "1")]
            kept = None, None  # SAM gets the box alone
            if found.labels and len(found.labels) == len(points) == len(sure):
                keep = sampler.is_confident(sure, args.theta)
                kept = (points[keep], np.array(found.labels)[keep]) if keep.any() else kept
            segmenter.predictor.set_image(np.asarray(image))
            answer = segmenter.predictor.predict(*kept, boxes[0], multimask_output=False)
            (mask,), (sam_score,), _ = answer
        lines.append(evaluation.score(found, sample, i, truth, mask, float(sam_score), args))
    return lines


def evaluate(args):
    model, processor = sampler.load_policy()
    segmenter = sampler.Segmenter()
    samples = data.load_samples("demo", args.data_root, "test")
    todo = evaluation.share_out(samples, {}, 0, 1)[: 4 if args.quick else 100]
    for name in ("no think",) if args.quick else ("no think", "think"):
        options = evaluation.get_args(["--use_think", str(name == "think")])
        starts = range(0, len(todo), options.batch_size)
        batches = [todo[i : i + options.batch_size] for i in starts]

        def ours():
            segmenter.key = None  # as if it had no embedding
            parts = (evaluation.evaluate(model, processor, segmenter, b, options) for b in batches)
            return [line for part in parts for line in part]

        theirs = partial(published, model, processor, segmenter, todo, options)
        mine, other = evaluation.summarize(ours()), evaluation.summarize(theirs())
        for key in mine:
            if mine[key] is not None or other[key] is not None:  # None: there is no such phrase
                check_close(mine[key], other[key], 1e-6, key)
        found = race(args, ours, theirs, 2 / 3)
        note = f"mIoU {mine['miou']:.3f} in both"
        yield f"{len(todo)} refs, {name}", "published flow, batch 1", 6, found, note


def sam(args):
    segmenter, rng, k = sampler.Segmenter(), np.random.default_rng(0), 8
    image = Image.fromarray(rng.integers(0, 255, (128, 128, 3), np.uint8))
    corners = rng.uniform(0, 60, (k, 2))
    boxes = np.concatenate([corners, corners + rng.uniform(20, 60, (k, 2))], 1)
    grids = [sampler.grid_points(box, 128, 128, k_min=3, k_max=3) for box in boxes]
    labels = rng.integers(0, 2, (k, 9))

    def ours():
        segmenter.set_image(image)
        return [mask for mask, _ in segmenter.segment(list(zip(boxes, grids, labels)))]

    def segment_one(box, points, label):
        segmenter.predictor.set_image(np.asarray(image))
        return segmenter.predictor.predict(points, label, box, multimask_output=False)[0][0]

    theirs = lambda: list(map(segment_one, boxes, grids, labels))
    check_close([(a == b).mean() for a, b in zip(ours(), theirs())], np.ones(k), 1e-3, "masks")
    found = race(args, ours, theirs, 4)
    yield f"k={k} prompts, one image", "set_image and predict for each", 5, found, ""


def rle(args):
    if not importlib.util.find_spec("pycocotools"):
        raise LeftOut("pycocotools is not installed")
    from pycocotools import mask as coco

    y, x = np.mgrid[:800, :800]
    one = (x - 400) ** 2 + (y - 300) ** 2 < 150**2
    many = (x % 126 - 60) ** 2 + (y % 160 - 80) ** 2 < 45**2
    for name, mask in (("disc", one), ("40 discs", many)):
        encoded = data.encode_rle(mask)
        binary = {"size": encoded["size"], "counts": encoded["counts"].encode()}
        check_close(data.decode_rle(encoded), coco.decode(binary), 0, "decoded masks")
        twenty = lambda decode, rle: [decode(rle) for _ in range(20)]
        ours, theirs = lambda: twenty(data.decode_rle, encoded), lambda: twenty(coco.decode, binary)
        found = race(args, ours, theirs, 4)
        found["ours"], found["theirs"] = found["ours"] / 20, found["theirs"] / 20
        yield f"decode, 800 x 800, {name}", "pycocotools", 0.5, found, ""


def sft_step(args, each=3):
    """What packing the phrases of an image behind it would give SFT (sft.py does not)."""
    model, processor = policy()
    in_image, count = {}, 2 if args.quick else 12
    for sample in data.load_samples("demo", args.data_root, "train"):
        in_image.setdefault(sample.image_path, []).append(sample)
    groups = [group[:each] for group in in_image.values() if len(group) >= each][:count]
    samples = [sample for group in groups for sample in group]
    for task in ("box",) if args.quick else ("box", "point"):
        images, prompts, answers, *_ = zip(*draw_prompts(samples, task, miss=0.15, jitter=0.1))
        whole = data.collate(processor, images, prompts, answers)
        first = data.collate_images(processor, images[::each])
        texts = data.collate_text(processor, prompts)
        pieces, wanted = [], []  # a text and its answer; what of it counts
        for ids, seen, answer in zip(texts["input_ids"], texts["attention_mask"].bool(), answers):
            target = processor.tokenizer(answer)["input_ids"] + [processor.tokenizer.eos_token_id]
            pieces.append(torch.cat([ids[seen], torch.tensor(target)]))
            wanted.append(torch.arange(len(pieces[-1])) >= seen.sum())
        ids, mask = (pad_sequence(rows, batch_first=True) for rows in (pieces, wanted))
        shared = lambda: -sampler.completion_logps(model, first, ids, mask).sum()
        plain = lambda: sft.answer_loss(model, dict(whole))[0]
        ours, theirs = lambda: differentiate(model, shared), lambda: differentiate(model, plain)
        check_close(ours() / mask.sum(), theirs() / mask.sum(), 1e-4, "losses")
        found = race(args, ours, theirs)
        note = f"{each} phrases to an image, {len(groups)} images"
        yield f"{task}: image shared by its phrases", "a row for each phrase", None, found, note


# ------------------------------------------------------------------------- main

ROWS = {"score": score, "memory": memory, "rollout": rollout, "grpo": grpo_step}
ROWS |= {"evaluation": evaluate, "sam": sam, "rle": rle, "sft": sft_step}
TABLE = "{:<11} {:<36} {:<38} {:>9} {:>9} {:>6} {:>4}  {}"


def get_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add, on_off = parser.add_argument, argparse.BooleanOptionalAction
    add(
        "rows",
        nargs="*",
        default=[],
        help=f"of {', '.join(ROWS)}, or gpu alone; all but gpu if none",
    )
    add("--repeats", type=sampler.number(int, 1), default=3, help="pairs of runs, at least")
    add("--quick", action=on_off, default=False, help="every row in a short form, as a test")
    add("--data_root", default="demo_data", help="folder that holds the demo set")
    add("--json", default="runs/bench.json", help="where the figures go")
    add("--size", choices=["tiny", "2b", "4b", "8b"], default="8b", help="of the model of gpu")
    add("--device", default="cuda", help="of gpu: cuda or cpu")
    add("--trl", action=on_off, default=False, help="gpu: an update of TRL's instead of ours")
    args = parser.parse_args(argv)
    if args.rows != ["gpu"] and (unknown := set(args.rows) - set(ROWS)):
        parser.error(f"no row {', '.join(sorted(unknown))}: expected some of {', '.join(ROWS)}")
    return args


def measure(row, args):
    """Run a row and print it: one dict per line, or one that says why there is none."""
    try:
        for what, against, bar, found, note in ROWS[row](args):
            unit, shown = found.get("unit", "s"), "" if bar is None else f"{bar:g}"
            times = [f"{found[side]:.3g} {unit}" for side in ("ours", "theirs")]
            print(TABLE.format(row, what, against, *times, f"{found['ratio']:.2f}", shown, note))
            yield {"row": row, "what": what, "against": against, "bar": bar, **found, "note": note}
    except LeftOut as reason:
        print(f"{row:<11} left out: {reason}")
        yield {"row": row, "left_out": str(reason)}
    except Exception as error:  # whatever it is, the other rows go on
        traceback.print_exc()
        print(f"{row:<11} failed: {type(error).__name__}: {error}")
        yield {"row": row, "failed": f"{type(error).__name__}: {error}"}


def measure_gpu(args):
    if args.device == "cuda" and not torch.cuda.is_available():
        print("gpu left out: no GPU is here (--size tiny --device cpu shows what it would print)")
        return 0
    import bench_gpu

    measure = bench_gpu.measure_trl if args.trl else bench_gpu.measure
    lines = measure(args.size, args.device, args.quick)
    Path(args.json).parent.mkdir(parents=True, exist_ok=True)
    Path(args.json).write_text(json.dumps(lines, indent=2))
    return 0


def main(args):
    """The exit status: 1 if a row has failed."""
    if args.rows == ["gpu"]:
        return measure_gpu(args)
    print(TABLE.format("row", "what", "against", "ours", "theirs", "ratio", "bar", ""))
    lines, path = [], Path(args.json)
    path.parent.mkdir(parents=True, exist_ok=True)
    for row in args.rows or ROWS:
        lines += measure(row, args)
        path.write_text(json.dumps(lines, indent=2))
    threads = f"{torch.get_num_threads()} threads, torch {torch.__version__}"
    print(f"{os.cpu_count()} cores, {threads}; written: {path}")
    return int(any("failed" in line for line in lines))


if __name__ == "__main__":
    sys.exit(main(get_args()))
