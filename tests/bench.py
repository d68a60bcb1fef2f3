"""How fast it is, side by side: every row times ours and the usual way in turn, in one run.

    python tests/bench.py                       # all rows, about 15 minutes on two cores
    python tests/bench.py rollout evaluation    # some, by name
    pip install trl peft pycocotools            # for the rows `grpo` and `rle`: left out without

Absolute times depend on the machine and its mood, so what counts is the ratio: the median over
repetitions of (theirs / ours), each pair taken right after one another. Before the clock starts
both sides are checked to give the same, where they should. (`grpo` takes blocks of steps in turn,
unchecked, and the ratio of their medians; `memory` one run of each, in a process of its own.) The
model is assets/tiny_vlm with LoRA as grpo.py trains it; images are made larger where a row wants a
longer prompt. `bar` is what a ratio should reach.
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
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from PIL import Image
from torch.nn.utils.rnn import pad_sequence

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import data  # noqa: E402
import eval as evaluation  # noqa: E402
import grpo  # noqa: E402
import sampler  # noqa: E402
import sft  # noqa: E402

GROUP, TAU = 8, 0.9
SIDES = {93: 128, 318: 272, 1053: 512}  # P: image side in pixels, 16 to a vision token


def race(ours, theirs, repeats):
    """Median seconds of both and the median ratio of neighbouring runs; one each to warm up."""
    ours(), theirs()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        ours()
        middle = time.perf_counter()
        theirs()
        times.append((middle - start, time.perf_counter() - middle))
    ratio = statistics.median(b / a for a, b in times)
    mine, other = (statistics.median(column) for column in zip(*times))
    return {"ours": mine, "theirs": other, "ratio": ratio}


def policy(lora=True):
    """(model, processor) as grpo.py trains it."""
    model, processor = sampler.load_policy()
    if lora:
        args = argparse.Namespace(lora_rank=64, lora_alpha=128, gradient_checkpointing=False)
        sampler.make_trainable(model, args, dropout=0.0)
    return model, processor


def long_prompt(processor, length):
    """Inputs of one prompt of `length` tokens, by the size of its image."""
    side, rng = SIDES[length], np.random.default_rng(0)
    processor.image_processor.size = {"shortest_edge": side**2, "longest_edge": side**2}
    image = Image.fromarray(rng.integers(0, 255, (side, side, 3), np.uint8))
    prompt = data.box_prompt("the large red ship on the left", think=True)
    prompt = data.collate(processor, [image], [prompt])
    assert prompt["input_ids"].shape[1] == length
    return prompt


def check_close(a, b, tolerance, what):
    difference = (a - b).abs().max().item()
    if not difference <= tolerance:
        raise SystemExit(f"{what}: the two sides differ by {difference}")


# ------------------------------------------------------------------------- rows: one group


def padded_logps(model, prompt, completions):
    """What published GRPO code does: G full rows, an image for each, logits everywhere."""
    group, start = len(completions), prompt["input_ids"].shape[1]
    wide = {key: value.repeat(group, *[1] * (value.dim() - 1)) for key, value in prompt.items()}
    for key, behind in (
        ("input_ids", completions),
        ("attention_mask", torch.ones_like(completions)),
        ("mm_token_type_ids", torch.zeros_like(completions)),
    ):
        wide[key] = torch.cat([wide[key], behind], 1)
    logits = model(**wide, use_cache=False).logits[:, :-1].float() / TAU
    return logits.log_softmax(-1).gather(2, wide["input_ids"][:, 1:, None])[:, start - 1 :, 0]


def scoring(length, completion):
    """(ours, theirs): log-probs and gradients of a group, behind a prompt of `length` tokens."""
    model, processor = policy()
    prompt = long_prompt(processor, length)
    torch.manual_seed(0)
    completions = torch.randint(0, 380, (GROUP, completion))
    mask = torch.ones_like(completions, dtype=torch.bool)

    def step(score):
        model.zero_grad()
        logps = score()
        logps.sum().backward()
        return logps.detach()

    packed = lambda: sampler.completion_logps(model, prompt, completions, mask, TAU)
    return lambda: step(packed), lambda: step(lambda: padded_logps(model, prompt, completions))


def score(repeats):
    for length, completion in ((318, 60), (1053, 150)):
        ours, theirs = scoring(length, completion)
        check_close(ours(), theirs(), 1e-3, "log-probs")
        found = race(ours, theirs, 3 * repeats)
        ideal = GROUP * (length + completion) / (length + GROUP * completion)
        note = f"{found['ratio'] / ideal:.2f} of the ratio of tokens, {ideal:.2f}"
        yield f"P={length} C={completion}", "padded batch of G rows", 4, found, note


def memory_of(name):
    """MB of this process: VmRSS, what it holds, or VmHWM, the most it ever held."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"{name}:\s+(\d+) kB", status)[1]) / 1024


def peak(side, length, completion, pipe):
    """MB that one scoring with gradients adds to this process, which does nothing else."""
    step = scoring(length, completion)[side]
    before = memory_of("VmRSS")
    step()
    pipe.send(memory_of("VmHWM") - before)


def memory(repeats):
    if sys.platform != "linux":
        return print("memory: left out, as it reads /proc")
    spawn, found = multiprocessing.get_context("spawn"), []
    for side in (0, 1):
        mine, other = spawn.Pipe()
        child = spawn.Process(target=peak, args=(side, 1053, 150, other))
        child.start()
        child.join()
        if child.exitcode:
            raise SystemExit(f"memory: a side ended with code {child.exitcode}")
        found.append(mine.recv())
    ratio = {"ours": found[0], "theirs": found[1], "ratio": found[1] / found[0], "unit": "MB"}
    yield "P=1053 C=150", "padded batch of G rows", 2, ratio, "peak, less what was there before"


def rollout_cases():
    """(what, bar, model, processor, prompt, C, whether answers may end)"""
    for lora, length, completion, bar in (
        (True, 318, 60, 1.5),
        (False, 318, 60, 1),
        (True, 93, 16, 1),
        (True, 93, 60, 1),
        (True, 93, 256, 1),
        (False, 93, 256, None),
    ):
        model, processor = policy(lora)
        name = f"P={length} C={completion}" + ("" if lora else ", no LoRA")
        yield name, bar, model, processor, long_prompt(processor, length), completion, False
    config = policy(lora=False)[0].config
    config.text_config.num_key_value_heads = 1
    torch.manual_seed(0)
    model = type(policy(lora=False)[0])(config)
    name = "P=93 C=256, no LoRA, 4 heads a key"
    yield name, None, model, processor, long_prompt(processor, 93), 256, False
    model, processor = policy()
    images = [Image.new("RGB", (128, 128), (20 * i, 90, 40)) for i in range(8)]
    phrases = ["a ship", "The red aircraft on the left", "the silo", "A large white house"] * 2
    prompts = [data.box_prompt(p, think=i % 2 == 0) for i, p in enumerate(phrases)]
    prompt = data.collate(processor, images, prompts)
    yield "8 prompts, answers end", 1, model, processor, prompt, 112, True


def rollout(repeats):
    for what, bar, model, processor, prompt, completion, ends in rollout_cases():
        eos, start = processor.tokenizer.eos_token_id, prompt["input_ids"].shape[1]
        never = lambda module, inputs, logits: logits.index_fill(-1, torch.tensor([eos]), -1e4)
        if not ends:
            model.lm_head.register_forward_hook(never)
        model.eval()

        def ours(temperature=TAU):
            return sampler.sample_group(model, processor, prompt, GROUP, completion, temperature)

        def theirs(temperature=TAU):
            with torch.inference_mode():
                return model.generate(
                    **prompt,
                    num_return_sequences=GROUP,
                    do_sample=True,
                    temperature=temperature,
                    top_k=0,
                    top_p=1.0,
                    max_new_tokens=completion,
                    suppress_tokens=sampler.vision_tokens(model, processor),
                    pad_token_id=processor.tokenizer.pad_token_id,
                    eos_token_id=eos,
                )[:, start:]

        same = (ours(1e-5)[0] == theirs(1e-5)).float().mean()  # as good as greedy
        check_close(same, torch.tensor(1.0), 0.02, "greedy completions")  # but for near ties
        yield what, "model.generate(num_return_sequences=G)", bar, race(ours, theirs, repeats), ""


# ------------------------------------------------------------------------- row: a GRPO step

STEPS, PROMPTS, LENGTH = 8, 16, 64


def our_steps(folder, samples):
    """Seconds of each GRPO step, and the mean length of its completions."""
    options = f"--model_path {sampler.TINY_VLM} --log_dir {folder}"
    options += f" --max_step {STEPS} --batch_size {PROMPTS} --accumulate 1 --group {GROUP}"
    options += f" --max_new_tokens {LENGTH} --point_ratio 0 --think_ratio 0.5 --lr 1e-9"
    with mock.patch.object(data, "load_for_training", return_value=(samples, [])):
        grpo.main(grpo.get_args([*options.split(), "--val_limit", "0", "--no-merge"]))
    lines = [json.loads(line) for line in (folder / "grpo" / "train.jsonl").open()]
    return [line["seconds"] for line in lines], [line["length"] for line in lines]


def trl_steps(folder, samples):
    """The same of TRL's GRPOTrainer: model, prompts, G, lengths, rewards, beta, LoRA."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    model, processor = sampler.load_policy()
    processor.tokenizer.padding_side = "left"  # what it expects of a processor
    args = argparse.Namespace(prompts="points", seed=0, think_ratio=0.5, miss_ratio=0.0, jitter=0.0)
    questions = data.Questions(samples, lambda *_: (1000, 1000), args)
    asked = [questions[0, index, "box"] for index in range(len(samples))]
    rows = [
        {"prompt": [{"role": "user", "content": prompt}], "image": image, "answer": answer}
        for image, prompt, answer, *_ in asked
    ]
    texts = lambda completions: [completion[0]["content"] for completion in completions]

    def boxes(completions, answer, **_):
        return [grpo.box_reward(*pair) for pair in zip(texts(completions), answer)]

    def forms(completions, answer, **_):
        return [grpo.format_reward(*pair) for pair in zip(texts(completions), answer)]

    times, lengths = [], []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_, **__):
            self.start = time.perf_counter()

        def on_step_end(self, *_, **__):
            times.append(time.perf_counter() - self.start)

        def on_log(self, args, state, control, logs=None, **_):
            if "completions/mean_length" in logs:
                lengths.append(logs["completions/mean_length"])

    config = GRPOConfig(
        output_dir=f"{folder}/trl",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        per_device_train_batch_size=PROMPTS * GROUP,
        gradient_accumulation_steps=1,
        num_generations=GROUP,
        max_completion_length=LENGTH,
        temperature=TAU,
        beta=0.04,
        loss_type="grpo",
        learning_rate=1e-9,
        max_steps=STEPS,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    targets = rf".*language_model.*\.({'|'.join(sampler.TARGETS)})"
    lora = LoraConfig(r=64, lora_alpha=128, target_modules=targets)
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=[boxes, forms],
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=processor,
        peft_config=lora,
        callbacks=[Clock()],
    )
    trainer.train()
    return times, lengths


def grpo_step(repeats):
    if not (importlib.util.find_spec("trl") and importlib.util.find_spec("peft")):
        return print("grpo: left out, as TRL is not installed (pip install trl peft)")
    ours, theirs = ([], []), ([], [])
    with tempfile.TemporaryDirectory() as folder:
        samples = data.load_samples("demo", folder, "train")[: STEPS * PROMPTS]  # each once
        for _ in range(max(1, repeats // 2)):
            for into, run in ((ours, our_steps), (theirs, trl_steps)):
                with open(os.devnull, "w") as quiet, redirect_stdout(quiet), redirect_stderr(quiet):
                    seconds, lengths = run(Path(folder), samples)
                into[0].extend(seconds[1:])  # the first step warms up
                into[1].extend(lengths)
    mine, other = statistics.median(ours[0]), statistics.median(theirs[0])
    found = {"ours": mine, "theirs": other, "ratio": other / mine}
    lengths = [statistics.mean(side[1]) for side in (ours, theirs)]
    note = "{:.1f} and {:.1f} tokens per completion".format(*lengths)
    yield f"{PROMPTS} x {GROUP}, LoRA", "TRL's GRPOTrainer", 3, found, note


# ------------------------------------------------------------------------- row: evaluation


def published(model, processor, segmenter, todo, args):
    """The published flow, one phrase at a time: two generations, one more forward pass for the
    labels' confidence, SAM's image encoder for every phrase. Rows as eval.summarize wants them."""
    tokenizer, rows = processor.tokenizer, []
    options = {"do_sample": False, "max_new_tokens": args.max_new_tokens}
    options |= {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    options["suppress_tokens"] = sampler.vision_tokens(model, processor)
    answer = lambda ids: tokenizer.decode(ids[: -int(ids[-1] == tokenizer.eos_token_id) or None])
    for sample, i in todo:
        image, truth, phrase = sample.image(), sample.mask, sample.phrases[i]
        frame = sampler.answer_frame(model, processor, *image.size)
        prompt = data.box_prompt(phrase, frame, args.use_think)
        batch = data.collate(processor, [image], [prompt])
        ids = model.generate(**batch, **options)[0, batch["input_ids"].shape[1] :]
        boxes = np.reshape(data.parse_boxes(answer(ids)) or [], (-1, 4))[:1]
        boxes = data.rescale(boxes, frame, image.size).clip(0, [*image.size, *image.size])
        mask, labels, points = np.zeros(truth.shape, bool), None, np.zeros((0, 2))
        if len(boxes):
            points = sampler.grid_points(boxes[0], *image.size)
            shown = data.rescale(points, image.size, frame)
            prompt = data.point_prompt(phrase, shown, frame, args.use_think)
            batch = data.collate(processor, [image], [prompt])
            start = batch["input_ids"].shape[1]
            ids = model.generate(**batch, **options)
            text = answer(ids[0, start:])
            labels = data.parse_labels(text)
            more = torch.zeros_like(ids[:, start:])
            logits = model(
                input_ids=ids,
                attention_mask=torch.cat([batch["attention_mask"], more + 1], 1),
                mm_token_type_ids=torch.cat([batch["mm_token_type_ids"], more], 1),
                pixel_values=batch["pixel_values"],
                image_grid_thw=batch["image_grid_thw"],
            ).logits[0, start - 1 : -1]
            probs = logits.softmax(-1).gather(1, ids[0, start:, None])[:, 0]
            written = [tokenizer.decode(token) for token in ids[0, start:]]
            where = written.index("<answer>") if "<answer>" in written else 0
            sure = [p for p, w in zip(probs[where:], written[where:]) if w in ("0", "1")]
            keep = np.zeros(len(points), bool)
            if labels and len(labels) == len(points) == len(sure):
                keep = sampler.confident(sure, args.theta)
            segmenter.predictor.set_image(np.asarray(image))
            masks, _, _ = segmenter.predictor.predict(
                points[keep] if keep.any() else None,
                np.array(labels)[keep] if keep.any() else None,
                boxes[0],
                multimask_output=False,
            )
            mask = masks[0]
        inter, union, iou = data.mask_iou(mask, truth)
        row = {"inter": inter, "union": union, "iou": iou, "failed": not len(boxes)}
        row["box_iou"] = evaluation.box_score(boxes, data.mask_to_box(truth))
        row["point_acc"] = evaluation.point_score(labels, points, truth)
        rows.append(row)
    return rows


def evaluate(repeats):
    model, processor = sampler.load_policy()
    segmenter = sampler.Segmenter()
    with tempfile.TemporaryDirectory() as folder:
        samples = data.load_samples("demo", folder, "test")
        todo = evaluation.share_out(samples, {}, 0, 1)[:100]
        for think in (False, True):
            args = evaluation.get_args(["--use_think", str(think)])
            batches = [todo[i : i + args.batch_size] for i in range(0, 100, args.batch_size)]

            def ours():
                segmenter.cache.clear()
                parts = (evaluation.evaluate(model, processor, segmenter, b, args) for b in batches)
                return [row for part in parts for row in part]

            @torch.inference_mode()
            def theirs():
                return published(model, processor, segmenter, todo, args)

            mine, other = evaluation.summarize(ours()), evaluation.summarize(theirs())
            for key in mine:
                check_close(torch.tensor(mine[key]), torch.tensor(other[key]), 1e-6, key)
            found = race(ours, theirs, max(2, repeats // 2))
            name = f"100 refs, {'think' if think else 'no think'}"
            yield name, "published flow, batch 1", 6, found, f"mIoU {mine['miou']:.3f} in both"


# ------------------------------------------------------------------------- rows: SAM, RLE, SFT


def sam(repeats):
    segmenter, rng, k = sampler.Segmenter(), np.random.default_rng(0), 8
    image = Image.fromarray(rng.integers(0, 255, (128, 128, 3), np.uint8))
    corners = rng.uniform(0, 60, (k, 2))
    boxes = np.concatenate([corners, corners + rng.uniform(20, 60, (k, 2))], 1)
    grids = [sampler.grid_points(box, 128, 128, k_min=3, k_max=3) for box in boxes]
    labels = rng.integers(0, 2, (k, 9))

    def ours():
        segmenter.set_image(image)
        return [mask for mask, _ in segmenter.segment(list(zip(boxes, grids, labels)))]

    def theirs():
        masks = []
        for box, points, label in zip(boxes, grids, labels):
            segmenter.predictor.set_image(np.asarray(image))
            found = segmenter.predictor.predict(points, label, box, multimask_output=False)
            masks.append(found[0][0])
        return masks

    agree = torch.tensor([(a == b).mean() for a, b in zip(ours(), theirs())])
    check_close(agree, torch.ones(k, dtype=agree.dtype), 1e-3, "masks")
    found = race(ours, theirs, 4 * repeats)
    yield f"k={k} prompts, one image", "set_image and predict for each", 5, found, ""


def rle(repeats):
    if not importlib.util.find_spec("pycocotools"):
        return print("rle: left out, as pycocotools is not installed")
    from pycocotools import mask as coco

    y, x = np.mgrid[:800, :800]
    shapes = {
        "disc": (x - 400) ** 2 + (y - 300) ** 2 < 150**2,
        "40 discs": ((x % 126 - 60) ** 2 + (y % 160 - 80) ** 2) < 45**2,
    }
    for name, mask in shapes.items():
        encoded = data.encode_rle(mask)
        binary = {"size": encoded["size"], "counts": encoded["counts"].encode()}
        if not (data.decode_rle(encoded) == coco.decode(binary).astype(bool)).all():
            raise SystemExit("decoded masks differ")
        twenty = lambda decode, rle: [decode(rle) for _ in range(20)]
        ours, theirs = lambda: twenty(data.decode_rle, encoded), lambda: twenty(coco.decode, binary)
        found = race(ours, theirs, 4 * repeats)
        found["ours"], found["theirs"] = found["ours"] / 20, found["theirs"] / 20
        yield f"decode, 800 x 800, {name}", "pycocotools", 0.5, found, ""


def sft_step(repeats, count=12, each=3):
    """What packing the phrases of an image behind it would give SFT (sft.py does not)."""
    model, processor = policy()
    in_image = {}
    with tempfile.TemporaryDirectory() as folder:
        for sample in data.load_samples("demo", folder, "train"):
            in_image.setdefault(sample.image_path, []).append(sample)
        groups = [group[:each] for group in in_image.values() if len(group) >= each][:count]
        args = argparse.Namespace(
            prompts="points", seed=0, think_ratio=0.0, miss_ratio=0.15, jitter=0.1
        )
        samples = [sample for group in groups for sample in group]
        questions = data.Questions(samples, lambda *_: (1000, 1000), args)
        asked = {
            task: [questions[0, i, task] for i in range(count * each)] for task in ("box", "point")
        }
    for task, some in asked.items():
        images, prompts, answers, *_ = zip(*some)
        whole = data.collate(processor, images, prompts, answers)
        first = data.collate_images(processor, images[::each])
        texts = data.collate_text(processor, prompts)
        pieces, wanted = [], []  # a text and its answer; what of it counts
        for ids, seen, answer in zip(texts["input_ids"], texts["attention_mask"].bool(), answers):
            target = processor.tokenizer(answer)["input_ids"] + [processor.tokenizer.eos_token_id]
            pieces.append(torch.cat([ids[seen], torch.tensor(target)]))
            wanted.append(torch.arange(len(pieces[-1])) >= seen.sum())
        ids, mask = (pad_sequence(rows, batch_first=True) for rows in (pieces, wanted))

        def step(loss):
            model.zero_grad()
            value = loss()
            value.backward()
            return value.detach()

        shared = lambda: step(lambda: -sampler.completion_logps(model, first, ids, mask).sum())
        plain = lambda: step(lambda: sft.answer_loss(model, dict(whole))[0])
        check_close(shared() / mask.sum(), plain() / mask.sum(), 1e-4, "losses")
        found = race(shared, plain, repeats)
        note = f"{each} phrases to an image, {count} images"
        yield f"{task}: image shared by its phrases", "a row for each phrase", None, found, note


# ------------------------------------------------------------------------- main

ROWS = {
    "score": score,
    "memory": memory,
    "rollout": rollout,
    "grpo": grpo_step,
    "evaluation": evaluate,
    "sam": sam,
    "rle": rle,
    "sft": sft_step,
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("rows", nargs="*", default=[], help=f"of {', '.join(ROWS)}; all if none")
    parser.add_argument("--repeats", type=int, default=3, help="pairs of runs in a row, at least")
    parser.add_argument("--json", default="runs/bench.json", help="where the figures go")
    args = parser.parse_args()
    unknown = set(args.rows) - set(ROWS)
    if unknown or args.repeats < 1:
        parser.error(f"no row {sorted(unknown)}, or --repeats below 1")
    lines = []
    table = "{:<11} {:<36} {:<38} {:>9} {:>9} {:>6} {:>4}  {}"
    print(table.format("row", "what", "against", "ours", "theirs", "ratio", "bar", ""))
    for row in args.rows or ROWS:
        for what, against, bar, found, note in ROWS[row](args.repeats) or ():
            lines.append({"row": row, "what": what, "against": against, "bar": bar})
            lines[-1] |= {**found, "note": note}
            unit = found.get("unit", "s")
            times = [f"{found[side]:.3g} {unit}" for side in ("ours", "theirs")]
            bar = "" if bar is None else f"{bar:g}"
            print(table.format(row, what, against, *times, f"{found['ratio']:.2f}", bar, note))
    path = Path(args.json)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(lines, indent=2))
    threads = f"{torch.get_num_threads()} threads, torch {torch.__version__}"
    print(f"{os.cpu_count()} cores, {threads}; written: {path}")


if __name__ == "__main__":
    main()
