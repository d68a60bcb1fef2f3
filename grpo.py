"""Stage two of training: Pixel-Aware GRPO, reinforcement learning on boxes and points.

SFT shows the model answers; here it finds its own. One update:

1. **Ask.** Draw prompts: the box of a phrase, or (`--point_ratio`) the labels of a grid of points;
   a share (`--think_ratio`) asks for reasoning first. With `--prompts sam` one prompt asks for box
   and two points of every instance, which may be several or none.
2. **Sample** G completions of each prompt at temperature tau.
3. **Reward** each: IoU of its boxes with the truth, or the share of points labelled right; or
   (`--reward mask`) IoU of the mask that SAM, frozen, makes of the answer. And 1 for keeping the
   format, and 1 for valid JSON: one that had to be repaired is read, but does not earn it.
4. **Advantage**: how much better than its own group, adv = (r - mean) / (std + 1e-4). A group whose
   rewards are all alike says nothing and is dropped.
5. **Reference**: a server (ref_server.py) gives log p_ref of the same tokens, meanwhile.
6. **Loss**, per token, with d = ref_logp - logp and ratio = exp(logp - old_logp):

       loss = - min(ratio * adv, clip(ratio, 1 - eps_low, 1 + eps_high) * adv)
              + beta * (exp(d) - d - 1)

7. **Update**, `--mu` times: AdamW on LoRA and the vision merger; the ratio leaves 1 at the second.
   The learning rate rises, then falls in a line to nothing.

`--loss` says what one token weighs: `grpo` 1 / (its completion's length * completions), `dapo` 1 /
(all tokens), `dr_grpo` 1 / (longest allowed * completions), with the advantage not divided by std.
Sums run over all micro-batches and processes, so N processes take the step of one with N times the
batch.

    python grpo.py                                  # the demo: from runs/sft, minutes on two cores
    python grpo.py --resume                         # go on with a run that was cut off
    python grpo.py --option demo_reason --prompts sam --reward mask  # after sft.py --prompts sam
    torchrun --nproc_per_node 4 grpo.py --model_path runs/sft \\
        --data_root /path/to/RRSIS-D --option RRSISD --gradient_checkpointing

`--prompts sam` and the mask reward are those of Think2Seg-RS, `--reward box,point,mask` mixes them.
Departures from the paper (ReSaP): an answer with several boxes is matched box by box, points are
judged in jittered and wrong boxes too (see sft.py), and truncated completions can be left out
(`--mask_truncated`).
"""

import argparse
import math
import re
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

import data
import ref_server
import sampler
import sft
from eval import next_command, note_prompts, print_gain, validate_both
from sampler import InputError

# (the recipe for an 8 B model, the demo)
DEFAULTS = dict(
    lr=(1e-5, 1e-3),
    batch_size=(2, 16),
    accumulate=(4, 1),
    max_step=(0, 110),
    think_ratio=(0.5, 0.7),
    max_new_tokens=(256, 112),
    save_step=(100, 10),
    val_limit=(200, 100),
    val_batch_size=(8, 64),
)
_URL = re.compile(r"http://[\w.-]+:[0-9]{1,5}/?")


def get_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])

    def add(name, **options):
        if name.strip("-") in DEFAULTS:  # resolved below, where the data set is known
            recipe, demo = DEFAULTS[name.strip("-")]
            options["help"] += f" (default {recipe:g}; demo {demo:g})"
        parser.add_argument(name, **options)

    on_off = argparse.BooleanOptionalAction
    # model and data
    add("--model_path", help="folder or hub name to start from (default <log_dir>/sft)")
    add("--option", default="demo", help="set: demo, RRSISD, refsegrs ...; several: a,b or a:2,b")
    add("--data_root", default="demo_data", help="folder that holds the data set")
    add("--split", default="train", help="split to train on")
    # prompts and rollouts
    add("--prompts", choices=["points", "sam"], default="points", help=data.PROMPTS_HELP)
    add("--point_ratio", type=float, help="share of batches on points (0.2; see --reward)")
    add("--miss_ratio", type=float, default=0.15, help="share of grids in any object's box")
    add("--think_ratio", type=float, help="share of prompts that ask for reasoning")
    add("--jitter", type=float, default=0.1, help="box jitter of the point task, in box sides")
    add("--group", type=int, default=8, help="G, completions of each prompt")
    add("--temperature", type=float, default=0.9, help="tau, of sampling and of all log-probs")
    add("--max_new_tokens", type=int, help="limit of one completion; real lists 1024")
    # rewards
    add("--reward", default="box,point", help="what is rewarded beside the format: box,point,mask")
    add("--box_weight", type=float, default=1.0, help="of the boxes' IoU (default 1)")
    add("--point_weight", type=float, default=1.0, help="of the points' accuracy (default 1)")
    add("--mask_weight", type=float, default=2.0, help="of the IoU of SAM's mask (default 2)")
    add("--json_weight", type=float, default=1.0, help="of valid JSON, --prompts sam (default 1)")
    add("--format_weight", type=float, default=1.0, help="of the format (default 1)")
    add("--sam_ckpt", default=str(sampler.TINY_SAM), help="weights of the SAM in --reward mask")
    # loss
    add("--loss", choices=["grpo", "dr_grpo", "dapo"], default="grpo", help="weight of a token")
    add("--beta", type=float, default=0.04, help="weight of the KL penalty; 0: no reference")
    add("--eps_low", type=float, default=0.1, help="the ratio is clipped at 1 - this")
    add("--eps_high", type=float, default=0.1, help="and at 1 + this")
    add("--mu", type=int, default=1, help="updates per rollout")
    add("--mask_truncated", action=on_off, default=False, help="leave cut-off completions out")
    # the reference
    add("--ref_url", help="server(s), comma-separated; default: start one on every machine")
    add("--ref_patience", type=float, default=300, help="seconds to wait for it, at any time")
    add("--ref_device", help="device of a server of one's own (default: that of local rank 0)")
    # optimisation
    add("--lora_rank", type=int, default=64, help="rank of LoRA; 0 trains all parameters")
    add("--lora_alpha", type=int, default=128, help="LoRA's update is scaled by alpha / rank")
    add("--lr", type=float, help="peak learning rate; with --lora_rank 0 the default is a tenth")
    add("--weight_decay", type=float, default=0.01, help="AdamW's weight decay")
    add("--batch_size", type=int, help="prompts per process and micro-batch")
    add("--accumulate", type=int, help="micro-batches per update")
    add("--epochs", type=float, default=1, help="passes over the split, where --max_step is 0")
    add("--max_step", type=int, help="stop after so many rollouts; 0: --epochs decides")
    add("--warmup", type=float, default=0.03, help="share of the run in which the rate rises")
    add("--clip", type=float, default=1.0, help="largest gradient norm")
    # system and output
    sft.add_run_flags(add)
    add("--seed", type=int, default=0, help="of data order, tasks, jitter and sampling")
    add("--version_name", default="grpo", help="name of this run")
    add("--save_step", type=int, help="save every so many rollouts, and at the end")
    add("--val_limit", type=int, help="validation samples before and after; 0: none")
    args = parser.parse_args(argv)
    args.reward = sorted({name.strip() for name in args.reward.split(",")})
    fill_defaults(args)
    check_args(parser, args)
    return args


def fill_defaults(args):
    """What was not given follows from the data set, the prompts and the rewards."""
    for key, (recipe, demo) in DEFAULTS.items():
        if getattr(args, key) is None:
            setattr(args, key, demo if data.is_demo(args.option) else recipe)
            if key == "lr" and not args.lora_rank:
                args.lr /= 10
            if key == "max_new_tokens" and args.prompts == "sam" and not data.is_demo(args.option):
                args.max_new_tokens = 1024  # an instance is some 40 tokens to Qwen's tokenizer
    args.model_path = args.model_path or str(Path(args.log_dir) / "sft")
    if args.point_ratio is None:
        # a task without a reward of its own would teach its format and nothing else
        args.point_ratio = {("box",): 0.0, ("point",): 1.0}.get(tuple(args.reward), 0.2)


def check_args(parser, args):
    """End with a line for settings out of range."""
    counts = "batch_size accumulate save_step keep max_skips mu max_new_tokens val_batch_size"
    sft.check_range(parser, args, counts, 1)
    sft.check_range(parser, args, "group", 2)  # one alone has nothing to be compared with
    names = "val_limit max_step lora_rank seed beta lr weight_decay jitter eps_high"
    sft.check_range(parser, args, names, 0)
    names = " ".join(f"{name}_weight" for name in REWARDS)
    sft.check_range(parser, args, names, 0, 1e6)
    ratios = "point_ratio miss_ratio think_ratio warmup eps_low"
    sft.check_range(parser, args, ratios, 0, 1)
    sft.check_range(parser, args, "clip temperature ref_patience", 1e-9)
    if not set(args.reward) <= {"box", "point", "mask"}:
        parser.error(f"--reward {','.join(args.reward)}: expected some of box,point,mask")
    if not any(getattr(args, f"{name}_weight") for name in args.reward):
        parser.error(f"--reward {','.join(args.reward)}: all of its weights are 0")
    if args.ref_url and not all(map(_URL.fullmatch, args.ref_url.split(","))):
        parser.error(
            f"--ref_url {args.ref_url}: expected http://host:port, or several, comma-separated"
        )
    if not args.max_step and args.epochs <= 0:
        parser.error("nothing to do: set --epochs or --max_step")


# ------------------------------------------------------------------------- rewards
# Each takes a completion's text and gives a number from 0 to 1; SAM takes a whole group. `answer`
# is what SFT would have taught for the same prompt: it holds the truth, in the model's own frame.

_BODY = "(?:(?!</?think>|</?answer>).)+"
_THINK = re.compile(rf"\s*<think>{_BODY}</think>\s*<answer>{_BODY}</answer>\s*", re.DOTALL)
_NO_THINK = re.compile(rf"\s*<answer>{_BODY}</answer>\s*", re.DOTALL)


def box_reward(text, answer):
    """IoU of the boxes with the true ones under the best matching, divided by the larger count."""
    return data.matched_iou(data.parse_boxes(text) or [], data.parse_boxes(answer))


def point_reward(text, answer):
    """Share of labels that are right; 0 unless there are as many as points."""
    labels, truth = data.parse_labels(text), data.parse_labels(answer)
    if labels is None or len(labels) != len(truth):
        return 0.0
    return sum(a == b for a, b in zip(labels, truth)) / len(truth)


def format_reward(text, answer):
    """1 for <think>…</think><answer>…</answer>, or for <answer>…</answer> where no reasoning was
    asked for, with nothing else around."""
    wanted = _THINK if answer.startswith("<think>") else _NO_THINK
    return float(wanted.fullmatch(text) is not None)


def json_reward(text):
    """1 for an answer to --prompts sam that can be read as it stands, without repair."""
    return float(data.parse_instances(text) is not None)


def instance_reward(text, question):
    """box_reward for --prompts sam, which counts what is said twice once. Where there is nothing to
    find, 1 for an empty list."""
    found, truth = data.find_instances(text)[0], data.parse_instances(question.answer)
    if not question.mask.any():
        return float(found == [])
    once = lambda instances: [box for box, _ in data.merge_duplicates(instances)]
    return data.matched_iou(once(found or []), once(truth))


def on_target_reward(text, question):
    """point_reward for --prompts sam: share of points that lie on the target, out of those given or
    of two for each instance, whichever are more: what is left out costs, what is said twice is
    nothing more. Where there is nothing to find, 1 for an empty list."""
    found, truth = data.find_instances(text)[0], data.parse_instances(question.answer)
    if not question.mask.any():
        return float(found == [])
    points = [point for _, some in data.merge_duplicates(found or []) for point in some]
    points = np.reshape(data.rescale(points, question.frame, question.image.size), (-1, 2))
    wanted = max(len(points), 2 * len(data.merge_duplicates(truth)))
    return float(sampler.label_points(points, question.mask).sum() / wanted)


def sam_prompts(text, question):
    """What an answer asks of SAM, [(box, points, labels)] in pixels: nothing where nothing can be
    read."""
    size = question.image.size
    if question.task == "point":  # the box is given, and the answer says what its points are
        labels = data.parse_labels(text)
        if labels is None or len(labels) != len(question.points_px):
            return []
        return [(question.box_px, question.points_px, np.array(labels))]
    if question.task == "box":
        boxes, inside = data.boxes_px(data.parse_boxes(text) or [], question.frame, size)
        return [(box, np.zeros((0, 2)), np.zeros(0)) for box in boxes[inside]]
    found, _ = data.instances_px(text, question.frame, size)
    return [(box, points, np.ones(len(points))) for box, points in found or []]


def mask_reward(texts, question, segmenter):
    """IoU of the truth with what SAM makes of each answer. The image is embedded once, and all
    instances of all answers with as many points are decoded together. Where there is nothing to
    find, 1 for an empty list. What SAM cannot do is an error, not a 0. Source: Think2Seg-RS."""
    if not question.mask.any():
        # NOTE: not the IoU: SAM may make an empty mask of a box, and boxes would pay
        return [float(data.find_instances(text)[0] == []) for text in texts]
    segmenter.set_image(question.image)
    masks = segmenter.segment_unions([sam_prompts(text, question) for text in texts])
    return [data.mask_iou(mask, question.mask)[2] for mask, _ in masks]


REWARDS = ("box", "point", "mask", "json", "format")


def reward_group(texts, question, args, segmenter):
    """{name: rewards (G,)} of the completions of one question, as --reward and its task have it."""
    if question.task == "sam":
        judges, truth = {"box": instance_reward, "point": on_target_reward}, question
    else:
        judge = box_reward if question.task == "box" else point_reward
        judges, truth = {question.task: judge}, question.answer
    asked = [name for name in judges if name in args.reward]
    each = {name: [judges[name](text, truth) for text in texts] for name in asked}
    if "mask" in args.reward:
        each["mask"] = mask_reward(texts, question, segmenter)
    if question.task == "sam":
        each["json"] = [json_reward(text) for text in texts]
    each["format"] = [format_reward(text, question.answer) for text in texts]
    return {name: torch.tensor(rewards) for name, rewards in each.items()}


# ------------------------------------------------------------------------- advantages and loss


def advantages(rewards, scale=True):
    """(r - mean) / (std + 1e-4) within each group, (B, G); without `scale`, r - mean."""
    centred = rewards - rewards.mean(1, keepdim=True)
    return centred / (rewards.std(1, correction=0, keepdim=True) + 1e-4) if scale else centred


def token_weights(mask, loss, completions, tokens, longest):
    """What each token (R, C) of the batch weighs in the loss; see the head of this file.

    completions, tokens: how many count in the whole update, over all micro-batches and processes.
    Those of dropped groups do not: a group that says nothing does not thin out the others.
    """
    mask = mask.float()
    if loss == "grpo":
        return mask / mask.sum(1, keepdim=True).clamp(min=1) / completions
    return mask / (tokens if loss == "dapo" else completions * longest)


def policy_loss(logp, old_logp, ref_logp, adv, weight, args):
    """The loss of a batch and what is logged of it: policy loss, KL and clipped, each (R, C).

    logp, old_logp, ref_logp, weight: (R, C); adv: (R, 1). Only logp carries a gradient.
    """
    ratio = torch.exp(logp - old_logp)
    clipped = ratio.clamp(1 - args.eps_low, 1 + args.eps_high) * adv
    # NOTE: min(ratio * adv, clipped) and not `clipped` alone: for adv < 0 a ratio that has grown
    # must be pushed back however far it is, and clipping alone would let go of it
    gain = torch.minimum(ratio * adv, clipped)
    d = ref_logp - logp
    kl = torch.exp(d) - d - 1  # k3: never negative, and on average log p / p_ref
    loss = (weight * (args.beta * kl - gain)).sum()
    return loss, -gain.detach(), kl.detach(), (clipped < ratio * adv).detach()


# ------------------------------------------------------------------------- one update

CLOCKS = ("rollout", "reference", "scoring", "update")  # seconds
# what a process sums up during an update; the log holds means of these over all processes
SUMS = (
    *("completions", "reward", "length", "truncated", "gap", "groups", "std", "dropped"),
    *REWARDS,
    *(f"{name}_completions" for name in REWARDS),
    *("repaired", "prompt_tokens"),
    *("trained", "trained_tokens", "policy_loss", "kl", "clipped", "loss_tokens"),
    *CLOCKS,
    "stopping",
)


def roll_out(model, processor, segmenter, questions, args, sums):
    """Steps 2 to 4 for B questions of one task: (prompt, completions, mask, adv), less the groups
    that say nothing; None if none is left."""
    images, prompts = [q.image for q in questions], [q.prompt for q in questions]
    prompt = data.collate(processor, images, prompts)
    ids, mask, behaviour = sampler.sample_group(
        model, processor, prompt, args.group, args.max_new_tokens, args.temperature
    )  # (B*G, C) each
    tokenizer = processor.tokenizer
    rows = [row[kept].tolist() for row, kept in zip(ids, mask)]
    cut = torch.tensor([row[-1] != tokenizer.eos_token_id for row in rows])  # (B*G,)
    texts = [tokenizer.decode(row if c else row[:-1]) for row, c in zip(rows, cut)]
    rewards = torch.zeros(len(questions), args.group)
    for b, question in enumerate(questions):
        group = texts[b * args.group : (b + 1) * args.group]
        for name, each in reward_group(group, question, args, segmenter).items():
            rewards[b] += getattr(args, f"{name}_weight") * each
            sums[name] += each.sum().item()
            sums[f"{name}_completions"] += len(each)
        if question.task == "sam":
            sums["repaired"] += sum(data.find_instances(text)[1] for text in group)
    adv = advantages(rewards, scale=args.loss != "dr_grpo")  # (B, G)
    telling = rewards.amax(1) - rewards.amin(1) > 1e-6  # (B,)

    sums["completions"] += len(rows)
    sums["reward"] += rewards.sum().item()
    sums["groups"] += len(rewards)
    sums["std"] += rewards.std(1, correction=0).sum().item()
    sums["dropped"] += (~telling).sum().item()
    sums["length"] += mask.sum().item()
    sums["truncated"] += cut.sum().item()
    sums["prompt_tokens"] += prompt["attention_mask"].sum().item()
    if not telling.any():
        return None
    if args.mask_truncated:
        mask = mask & ~cut.to(mask.device)[:, None]
    kept = telling.repeat_interleave(args.group)
    sums["trained"] += mask[kept].any(1).sum().item()
    sums["trained_tokens"] += mask[kept].sum().item()
    prompt = sampler.take_prompts(prompt, telling.nonzero()[:, 0].tolist())
    adv = adv[telling].view(-1, 1).to(mask.device)
    return prompt, ids[kept], mask[kept], adv, behaviour[kept]


def reference_urls(args, child, rank, local_rank, world):
    """Where this process asks: --ref_url, or the server that its machine's first process started,
    whose port the others learn here; nowhere if there is no penalty."""
    if args.ref_url or not args.beta:
        return args.ref_url.split(",") if args.beta else []
    ports = [0.0] * world
    ports[rank] = ref_server.child_port(child) if child else 0
    ports = sft.sum_over_processes(ports, args.device)
    return [f"http://127.0.0.1:{ports[rank - local_rank]:.0f}"]


def build_optimizer(trained, args, world):
    """AdamW; where several processes train all parameters, each has a share of its two moments."""
    options = {"lr": args.lr, "weight_decay": args.weight_decay}
    if world == 1 or args.lora_rank:
        return torch.optim.AdamW(trained, **options)
    from torch.distributed.optim import ZeroRedundancyOptimizer

    return ZeroRedundancyOptimizer(trained, torch.optim.AdamW, **options)


def open_board(folder, done):
    """A TensorBoard writer that goes on after update `done`; None without `pip install
    tensorboard`."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(folder / "tensorboard", purge_step=done + 1)


def log_line(step, order, sums, world, norm, lr, skipped, seconds, has_reference):
    """One line of train.jsonl. The README explains each key; None where there was nothing."""
    share = lambda part, whole: sums[part] / sums[whole] if sums[whole] else None
    return {
        "step": step,
        "epoch": order.epoch,
        "reward": share("reward", "completions"),
        **{f"reward_{name}": share(name, f"{name}_completions") for name in REWARDS},
        "reward_std": share("std", "groups"),
        "dropped": share("dropped", "groups"),
        "policy_loss": sums["policy_loss"],
        "kl": share("kl", "loss_tokens") if has_reference else None,
        "clipped": share("clipped", "loss_tokens"),
        "length": share("length", "completions"),
        "truncated": share("truncated", "completions"),
        "repaired": share("repaired", "json_completions"),
        "rollout_gap": share("gap", "trained_tokens"),
        "grad_norm": norm,
        "lr": lr,
        "skipped": skipped,
        "tokens_per_s": (sums["prompt_tokens"] + sums["length"]) / seconds,
        **{f"seconds_{name}": sums[name] / world for name in CLOCKS},
        "seconds": seconds,
    }


# ------------------------------------------------------------------------- main


def main(args):
    # 1. Processes, folder, data.
    start, files = Path(args.model_path), ("config.json", "adapter", sampler.ADAPTER_CONFIG)
    if start == Path(args.log_dir) / "sft" or start.is_dir():  # else a hub name
        if not any((start / name).exists() for name in files):
            raise InputError(f"no model in {start}: run python sft.py first, or set --model_path")
    rank, world, local_rank, folder = sft.start_run(args)
    on_gpu = args.device.startswith("cuda")
    say = print if rank == 0 else lambda *_: None
    trainable, val = data.load_for_training(args, rank)

    # 2. The reference starts while the policy loads. One on every machine, for its own ranks.
    # full fine-tuning keeps float32 weights, as updates of 1e-6 vanish in bfloat16
    dtype = "bfloat16" if on_gpu and args.lora_rank else "float32"
    child, threads = None, torch.get_num_threads()
    ref_device = args.ref_device or args.device
    # two that share a CPU get half of its cores each: with all, they would wait for one another
    half = max(1, threads // 2) if ref_device == args.device == "cpu" else threads
    if args.beta and not args.ref_url and local_rank == 0:
        child = ref_server.start_child(args.model_path, ref_device, dtype, half)
    model, processor = sampler.load_policy(args.model_path, args.device, getattr(torch, dtype))
    say(f"model: {args.model_path}, {len(trainable)} refs of {args.option}/{args.split}")
    if rank == 0:
        note_prompts(args.model_path, args.prompts)
    segmenter = sampler.Segmenter(args.sam_ckpt, args.device) if "mask" in args.reward else None
    urls = reference_urls(args, child, rank, local_rank, world)
    expected = ref_server.describe(model, processor, args.model_path)
    reference = ref_server.Reference(urls, expected, rank, args.ref_patience, child)
    for url, name in zip(urls, reference.models):
        say(f"reference: {name} at {url}")
    settings = sft.settings_of(args, model, processor, trainable + val)
    saved = sft.load_checkpoint(folder, settings, rank, world, args.device) if args.resume else None
    before = saved["before"] if saved else validate_both(model, processor, val, args)

    # 3. What is trained.
    torch.manual_seed(args.seed + rank)
    # NOTE: no dropout: it would move the ratio off 1 by chance
    trained = sampler.make_trainable(model, args, dropout=0.0)
    optimizer = build_optimizer(trained, args, world)
    steps = args.max_step or math.ceil(
        args.epochs * len(trainable) / (args.batch_size * world * args.accumulate)
    )
    rise = max(1, round(args.warmup * steps))
    say(f"{sum(p.numel() for p in trained):,} trained parameters, {steps} rollouts")

    # 4. Where the walk through the data, and all else, stands.
    done = saved["step"] if saved else 0
    skipped, in_a_row = saved["skipped"] if saved else (0, 0)
    frame_of = lambda width, height: sampler.answer_frame(model, processor, width, height)
    questions = data.Questions(trainable, frame_of, args)
    shares = data.share_draws(args.option, trainable)
    order = data.Order(len(trainable), args, rank, world, shares)
    order.set_epoch(*divmod(done * args.accumulate, len(order.batches)))
    log = sft.open_log(folder, args, done) if rank == 0 else None
    board = open_board(folder, done) if rank == 0 else None
    if saved:
        sft.restore(saved, model, optimizer, args.device)
        say(f"going on after update {done}")
        del saved

    # 5. The loop.
    asking, stop = ThreadPoolExecutor(1), sft.Stop()
    bar = tqdm(range(done + 1, steps + 1), "GRPO", initial=done, total=steps, disable=rank > 0)
    for step in bar:
        start = time.time()
        sums, norm = dict.fromkeys(SUMS, 0.0), 0.0
        lr = args.lr * min(step / rise, 1 - (step - rise) / (steps - rise + 1))
        for group in optimizer.param_groups:
            group["lr"] = lr

        # 5a. Ask, sample, reward. The reference scores a batch while the next is sampled.
        batches = []
        for _ in range(args.accumulate):
            keys = next(order)
            asked = [questions[key] for key in keys]
            batch = roll_out(model, processor, segmenter, asked, args, sums)
            if batch is not None:
                prompt, ids, mask, *_ = batch
                job = (prompt, ids, mask, args.temperature)
                batches.append((batch, asking.submit(reference.logps, *job) if urls else None))
        sums["rollout"] += time.time() - start
        totals = sft.sum_over_processes([sums["trained"], sums["trained_tokens"]], args.device)

        # 5b. Score, compare, update. All processes agree on `totals`, and so on going on.
        old = {}
        for inner in range(args.mu if totals[0] else 0):
            finite = True
            for i, ((prompt, ids, mask, adv, behaviour), job) in enumerate(batches):
                clock = time.time()
                torch.set_num_threads(half if child and inner == 0 else threads)
                logp = sampler.completion_logps(model, prompt, ids, mask, args.temperature)
                torch.set_num_threads(threads)
                sums["scoring"] += time.time() - clock
                if inner == 0:
                    clock = time.time()
                    ref_logp = job.result().to(logp.device) if job else logp.detach()
                    sums["reference"] += time.time() - clock
                    # the weights have not changed since sampling: old and new are one number
                    old[i] = logp.detach(), ref_logp
                    sums["gap"] += ((logp.detach() - behaviour).abs() * mask).sum().item()
                clock = time.time()
                weight = token_weights(mask, args.loss, *totals, args.max_new_tokens)
                loss, *parts = policy_loss(logp, *old[i], adv, weight, args)
                loss.backward()
                finite = finite and math.isfinite(loss.item())
                sums["policy_loss"] += (weight * parts[0]).sum().item() / args.mu
                sums["kl"] += (mask * parts[1]).sum().item()
                sums["clipped"] += (mask * parts[2]).sum().item()
                sums["loss_tokens"] += mask.sum().item()
                sums["update"] += time.time() - clock
            clock = time.time()
            sft.sum_gradients(trained)
            norm = torch.nn.utils.clip_grad_norm_(trained, args.clip).item()
            # NOTE: one nan in the weights and all is nan from then on
            if math.isfinite(norm) and not any(sft.sum_over_processes([not finite], args.device)):
                optimizer.step()
                in_a_row = 0
            else:
                skipped, in_a_row = skipped + 1, in_a_row + 1
            optimizer.zero_grad()
            sums["update"] += time.time() - clock

        # 5c. Log and save.
        sums["stopping"] = stop.signal
        sums = dict(zip(SUMS, sft.sum_over_processes(list(sums.values()), args.device)))
        if rank == 0:
            seconds = time.time() - start
            line = log_line(step, order, sums, world, norm, lr, skipped, seconds, bool(urls))
            sft.write_line(log, line)
            for key, value in line.items():
                if board and value is not None:
                    board.add_scalar(key, value, step)
            bar.set_postfix(reward=f"{line['reward']:.3f}", kl=f"{line['kl'] or 0:.1e}")
        sft.check_skips(in_a_row, args.max_skips)
        if step % args.save_step == 0 or step == steps or sums["stopping"]:
            if board:
                board.flush()
            rest = {"settings": settings, "before": before, "skipped": (skipped, in_a_row)}
            sft.save_run(folder, step, args, model, processor, optimizer, rest)
        if sums["stopping"]:
            bar.close()
            sft.leave(stop, step, steps, say)
    if any(sft.sum_over_processes([stop.signal], args.device)):  # it came while the last was saved
        sft.leave(stop, steps, steps, say)
    stop.forget()

    # 6. What it brought.
    after = validate_both(model, processor, val, args)
    if rank == 0:
        print_gain(before, after)
    say(f"written: {folder}. Next: {next_command(folder, args, '--use_think')}")
    if board:
        board.close()
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()
    if child:
        ref_server.stop_child(child)


if __name__ == "__main__":
    sampler.run_script(main, get_args)
