"""Stage two of training: Pixel-Aware GRPO, reinforcement learning on boxes and points.

SFT shows the model answers. Here it finds its own, and learns from how much better or worse each is
than its siblings. One update:

1. **Prompt.** Draw prompts: the box of a phrase, or (`--point_ratio`) the labels of a grid of
   points. A share (`--think_ratio`) asks for reasoning first. With `--prompts sam` one prompt asks
   for box and two points of every instance; there may be several or none.
2. **Sample** G completions of each prompt at temperature tau.
3. **Reward** each: IoU of its boxes with the truth, or the share of points labelled right; or
   (`--reward mask`) IoU of the mask that the frozen SAM makes of the answer. Keeping the format is
   worth 1, and so is valid JSON with `--prompts sam`.
4. **Advantage**: how much better a completion is than its group, adv = (r - mean) / (std + 1e-4). A
   group whose rewards are all alike has no signal and is dropped, which saves the time to score it.
5. **Reference**: log p_ref of the same tokens, from a server meanwhile (ref_server.py), or from the
   policy without its updates (`--reference policy`).
6. **Loss** per token, with d = ref_logp - logp and ratio = exp(logp - old_logp):

       loss = - min(ratio * adv, clip(ratio, 1 - eps_low, 1 + eps_high) * adv)
              + beta * (exp(d) - d - 1)

7. **Update**, `--mu` times: AdamW on LoRA and the vision merger. The ratio leaves 1 at the second.
   The learning rate rises, then falls linearly to 0.

`--loss` sets the weight of a token: `grpo` 1 / (length of its completion * completions), `dapo` 1 /
(all tokens), `dr_grpo` 1 / (longest allowed * completions), with the advantage not divided by std.
Sums run over all micro-batches and processes, so N processes take the step of one with N times the
batch.

    python grpo.py                                  # the demo: from runs/sft, minutes on two cores
    python grpo.py --resume                         # continue a run that was cut off
    python grpo.py --option demo_reason --prompts sam --reward mask  # after sft.py --prompts sam
    torchrun --nproc_per_node 4 grpo.py --model_path runs/sft \\
        --data_root /path/to/RRSIS-D --option RRSISD --reference policy

train.jsonl, over all processes: `reward`, the weighted sum, and each `reward_*` (null where it does
not apply); `reward_std` within a group; `dropped`, share of groups without signal; `policy_loss`,
near 0 at mu = 1 (its gradient is not), so watch the rewards; `kl` per token; `clipped`, share of
tokens where the clip acts; `length` in tokens; `truncated` and `repaired`, shares of completions;
`rollout_gap`, rounding between a token's log-prob in sampling and scoring; `grad_norm` before
clipping; `skipped`, updates so far with a number that was not finite; seconds of the four phases.

`--prompts sam` and the mask reward are those of Think2Seg-RS. Departures from the paper (ReSaP):
boxes are matched one to one, points are judged in jittered and wrong boxes too (see sft.py), and
`--mask_truncated` can leave out completions that were cut off.
"""

import argparse
import math
import re
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

import data
import ref_server
import sampler
from sampler import InputError, number
from sft import Run, add_common_flags, fill_defaults, is_sharded

# (the recipe for an 8 B model, the demo)
DEFAULTS = dict(
    lr=(1e-5, 1e-3),
    batch_size=(4, 16),
    accumulate=(2, 1),
    max_step=(0, 110),
    think_ratio=(0.5, 0.7),
    max_new_tokens=(256, 112),
    save_step=(100, 10),
    val_limit=(200, 100),
    val_batch_size=(32, 64),
    gradient_checkpointing=(True, False),
)
REWARDS = ("box", "point", "mask", "json", "format")
REFERENCE_HELP = (
    "who scores for the penalty: a server, or (faster on GPUs, for LoRA only) the policy itself "
    "without its updates, to the same bits"
)
URL = re.compile(r"http://([\w.-]+|\[[\da-fA-F:.]+\]):[0-9]{1,5}/?")


def get_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = add_common_flags(parser, DEFAULTS)
    on_off, share, count = argparse.BooleanOptionalAction, number(float, 0, 1), number(int, 1)
    positive, above, weight = number(float, 0), number(float, 1e-9), number(float, 0, 1e6)
    add("--model_path", help="folder or hub name to start from (default <log_dir>/sft)")
    add("--version_name", default="grpo", help="name of this run")
    # prompts and completions
    add("--point_ratio", type=share, help="share of batches on points (0.2; see --reward)")
    add("--think_ratio", type=share, help="share of prompts that ask for reasoning")
    add("--group", type=number(int, 2), default=8, help="G, completions of each prompt")
    add("--temperature", type=above, default=0.9, help="tau, of sampling and of all log-probs")
    add("--max_new_tokens", type=count, help="limit of one completion; real lists 1024")
    # rewards
    add("--reward", default="box,point", help="what is rewarded beside the format: box,point,mask")
    add("--box_weight", type=weight, default=1.0, help="of the boxes' IoU")
    add("--point_weight", type=weight, default=1.0, help="of the points' accuracy")
    add("--mask_weight", type=weight, default=2.0, help="of the IoU of SAM's mask")
    add("--json_weight", type=weight, default=1.0, help="of valid JSON, --prompts sam")
    add("--format_weight", type=weight, default=1.0, help="of the format")
    add("--sam_ckpt", default=str(sampler.TINY_SAM), help="SAM of --reward mask, as in eval.py")
    # loss
    add("--loss", choices=["grpo", "dr_grpo", "dapo"], default="grpo", help="weight of a token")
    add("--beta", type=positive, default=0.04, help="weight of the KL penalty; 0: no reference")
    add("--eps_low", type=share, default=0.1, help="the ratio is clipped at 1 - this")
    add("--eps_high", type=positive, default=0.1, help="and at 1 + this")
    add("--mu", type=count, default=1, help="updates per rollout")
    add("--mask_truncated", action=on_off, default=False, help="leave cut-off completions out")
    add("--epochs", type=above, default=1, help="passes over the split, where --max_step is 0")
    add("--val_limit", type=number(int, 0), help="validation samples; 0: none")
    # the reference
    add("--reference", choices=["server", "policy"], default="server", help=REFERENCE_HELP)
    add("--ref_url", help="server(s), comma-separated; default: start one on every machine")
    add("--ref_patience", type=above, default=300, help="seconds to wait for it, at any time")
    add("--ref_device", help="device of the server that is started (default: that of local rank 0)")
    args = parser.parse_args(argv)
    args.reward = sorted({name.strip() for name in args.reward.split(",")})
    if not set(args.reward) <= {"box", "point", "mask"}:
        parser.error(f"--reward {','.join(args.reward)}: expected some of box,point,mask")
    if not any(getattr(args, f"{name}_weight") for name in args.reward):
        parser.error(f"--reward {','.join(args.reward)}: all of its weights are 0")
    args = fill_own_defaults(args)
    drawn = {"box": args.point_ratio < 1, "point": args.point_ratio > 0, "mask": True}
    if args.prompts == "points" and not any(drawn[name] for name in args.reward):
        parser.error("--point_ratio draws no prompt that --reward would judge")
    if args.reference == "policy" and (args.ref_url or not args.lora_rank):
        parser.error("--reference policy: with LoRA and without --ref_url")
    if args.ref_url and not all(map(URL.fullmatch, args.ref_url.split(","))):
        parser.error(f"--ref_url {args.ref_url}: expected http://host:port, or several with commas")
    return args


def fill_own_defaults(args):
    """Defaults that follow from the data set, the prompts and the rewards."""
    given = dict(vars(args))
    fill_defaults(args, DEFAULTS)
    if given["lr"] is None and not args.lora_rank:
        args.lr /= 10
    if given["max_new_tokens"] is None and args.prompts == "sam" and not data.is_demo(args.option):
        args.max_new_tokens = 1024  # an instance is some 40 tokens to Qwen's tokenizer
    args.model_path = args.model_path or str(Path(args.log_dir) / "sft")
    if args.point_ratio is None:  # do not ask for what only the format reward would judge
        args.point_ratio = {"box": 0.0, "point": 1.0}.get("".join(args.reward), 0.2)
    return args


# ------------------------------------------------------------------------- rewards
# A completion's text is read once, into a data.Answer. `truth` is the Answer that SFT would have
# taught for the same prompt. Each reward is a number from 0 to 1.

BODY = "(?:(?!</?think>|</?answer>).)+"
ANSWER = rf"\s*<answer>{BODY}</answer>\s*"
NO_THINK_FORMAT = re.compile(rf"((<think>)?\s*</think>)?{ANSWER}", re.DOTALL)
THINK_FORMAT = re.compile(rf"\s*(<think>)?{BODY}</think>{ANSWER}", re.DOTALL)


def says_nothing(answer):
    """1 for an answer that says that there is nothing to find."""
    return float(answer.is_readable and not len(answer.boxes))


def box_reward(answer, truth):
    """IoU of the boxes with the true ones under the best matching, divided by the larger count.
    Where there is nothing to find, 1 for an empty list."""
    return data.matched_iou(answer.boxes, truth.boxes) if len(truth.boxes) else says_nothing(answer)


def point_reward(answer, truth, prompt):
    """Share of labels that are right; 0 unless there are as many as points.

    With --prompts sam, the share of points on the target, out of those given or of two for each
    instance, whichever are more. Where there is nothing to find, 1 for an empty list.
    """
    if prompt.task == "point":
        if answer.labels is None or len(answer.labels) != len(truth.labels):
            return 0.0
        return sum(a == b for a, b in zip(answer.labels, truth.labels)) / len(truth.labels)
    if not len(truth.boxes):
        return says_nothing(answer)
    points = np.concatenate([np.zeros((0, 2)), *answer.points])
    points = data.rescale(points, prompt.frame, prompt.image.size)
    wanted = max(len(points), 2 * len(truth.boxes))
    return float(sampler.label_points(points, prompt.mask).sum() / wanted)


def format_reward(text, answer):
    """1 for <think>…</think><answer>…</answer>, or for <answer>…</answer> where the true `answer`
    has no reasoning, with nothing else around. Some chat templates write <think>: it may lack."""
    wanted = THINK_FORMAT if answer.startswith("<think>") else NO_THINK_FORMAT
    return float(wanted.fullmatch(text) is not None)


def sam_prompts(answer, prompt):
    """What SAM gets of an answer, [(box, points, labels)] in pixels."""
    if prompt.task == "point":  # the box is given, and the answer labels the points
        if answer.labels is None or len(answer.labels) != len(prompt.points_px):
            return []
        return [(prompt.box_px, prompt.points_px, np.array(answer.labels))]
    answer = answer.to_pixels(prompt.frame, prompt.image.size)
    return [(box, points, np.ones(len(points))) for box, points in zip(answer.boxes, answer.points)]


def mask_reward(answers, prompt, segmenter):
    """IoU of the truth with SAM's mask of each answer. The image is embedded once, and answers with
    equally many points are decoded together. Where there is nothing to find, 1 for an empty list.
    Source: Think2Seg-RS."""
    if not prompt.mask.any():  # NOTE: not the IoU: SAM may make an empty mask of a wrong box
        return [says_nothing(answer) for answer in answers]
    segmenter.set_image(prompt.image)
    masks = segmenter.segment_all([sam_prompts(answer, prompt) for answer in answers])
    return [data.mask_iou(mask, prompt.mask)[2] for mask, _ in masks]


def reward_group(texts, prompt, args, segmenter):
    """{name: rewards (G,)} of the completions of one prompt, as --reward and its task say."""
    answers = [data.read_answer(text, prompt.task) for text in texts]
    truth, rewards = data.read_answer(prompt.answer, prompt.task), {}
    if "box" in args.reward and prompt.task != "point":
        rewards["box"] = [box_reward(answer, truth) for answer in answers]
    if "point" in args.reward and prompt.task != "box":
        rewards["point"] = [point_reward(answer, truth, prompt) for answer in answers]
    if "mask" in args.reward:
        rewards["mask"] = mask_reward(answers, prompt, segmenter)
    if prompt.task == "sam":  # valid JSON: readable without repair
        rewards["json"] = [float(a.is_readable and not a.is_repaired) for a in answers]
    rewards["format"] = [format_reward(text, prompt.answer) for text in texts]
    return {name: torch.tensor(values) for name, values in rewards.items()}


# ------------------------------------------------------------------------- advantages and loss


def advantages(rewards, scale=True):
    """(r - mean) / (std + 1e-4) within each group, (B, G); without `scale`, r - mean."""
    centred = rewards - rewards.mean(1, keepdim=True)
    return centred / (rewards.std(1, correction=0, keepdim=True) + 1e-4) if scale else centred


def token_weights(mask, loss, completions, tokens, longest):
    """The weight of each token (R, C) of a batch in the loss; see the head of this file.

    completions, tokens: how many count in the whole update, over all micro-batches and processes.
    Dropped groups do not count, so they do not thin out the others.
    """
    mask = mask.float()
    if loss == "grpo":
        return mask / mask.sum(1, keepdim=True).clamp(min=1) / completions
    return mask / (tokens if loss == "dapo" else completions * longest)


def policy_loss(logp, old_logp, ref_logp, adv, weight, args):
    """The loss of a batch, and for the log its parts, each (R, C): policy loss of a token, KL,
    whether it is clipped.

    logp, old_logp, ref_logp, weight: (R, C); adv: (R, 1). Only logp carries a gradient.
    """
    ratio = torch.exp(logp - old_logp)
    clipped = ratio.clamp(1 - args.eps_low, 1 + args.eps_high) * adv
    # NOTE: min(ratio * adv, clipped), not `clipped` alone: for adv < 0, a ratio that has grown must
    # be pushed back however far it is, and the gradient of `clipped` would be 0
    gain = torch.minimum(ratio * adv, clipped)
    d = ref_logp - logp
    kl = torch.exp(d) - d - 1  # k3: never negative, and on average log p / p_ref
    loss = (weight * (args.beta * kl - gain)).sum()
    return loss, -gain.detach(), kl.detach(), (clipped < ratio * adv).detach()


# ------------------------------------------------------------------------- one update

CLOCKS = ("seconds_rollout", "seconds_reference", "seconds_scoring", "seconds_update")
MEANS = ("reward", *(f"reward_{name}" for name in REWARDS), "reward_std", "dropped", "policy_loss")
MEANS += ("kl", "clipped", "length", "truncated", "repaired", "rollout_gap")


class Averages:
    """Totals and counts of what is logged of an update, for means over all processes."""

    def __init__(self):
        self.totals = dict.fromkeys((*MEANS, *CLOCKS, "prompt_tokens"), 0.0)
        self.counts = dict(self.totals)

    def add(self, name, total, count=0):
        self.totals[name] += float(total)
        self.counts[name] += float(count)

    @contextmanager
    def clock(self, name):
        """Add the seconds that the block takes."""
        start = time.time()
        yield
        self.totals[name] += time.time() - start

    def sum_over_processes(self, run):
        sums = run.sum([*self.totals.values(), *self.counts.values()])
        self.totals = dict(zip(self.totals, sums))
        self.counts = dict(zip(self.counts, sums[len(self.totals) :]))

    def mean(self, name):
        return self.totals[name] / self.counts[name] if self.counts[name] else None


@dataclass
class Rollout:
    """B prompts of one task, and G completions of each: R = B*G rows."""

    prompt: dict  # inputs of the prompts, see data.collate
    completions: torch.Tensor  # (R, C)
    mask: torch.Tensor  # bool (R, C), the tokens that count
    rollout_logp: torch.Tensor  # (R, C), when they were sampled
    texts: list  # R
    truncated: torch.Tensor  # bool (R,), cut off at max_new_tokens
    adv: torch.Tensor = None  # (R, 1)
    get_ref_logp: object = None  # a function that waits for the reference
    old_logp: torch.Tensor = None  # (R, C), before the first update on this rollout
    ref_logp: torch.Tensor = None  # (R, C)


def draw_prompts(dataset, order, processor, accumulate):
    """Step 1: the prompts of an update (B), their inputs, and the epoch that they are from."""
    prompts = [dataset[key] for _ in range(accumulate) for key in next(order)]
    inputs = data.collate(processor, [p.image for p in prompts], [p.text for p in prompts])
    return prompts, inputs, order.epoch


def sample(model, processor, inputs, args, averages):
    """Step 2: a Rollout of B prompts."""
    ids, mask, logp = sampler.sample_group(
        model, processor, inputs, args.group, args.max_new_tokens, args.temperature
    )
    tokenizer, ends = processor.tokenizer, sampler.end_ids(model, processor)
    rows = [row[kept].tolist() for row, kept in zip(ids, mask)]
    truncated = torch.tensor([row[-1] not in ends for row in rows])
    rows = [row if cut else row[:-1] for row, cut in zip(rows, truncated)]
    opening = data.think_opening(processor)
    texts = [opening + tokenizer.decode(row) for row in rows]
    averages.add("length", mask.sum(), len(rows))
    averages.add("truncated", truncated.sum(), len(rows))
    averages.add("prompt_tokens", inputs["attention_mask"].sum())
    return Rollout(inputs, ids, mask, logp, texts, truncated)


def reward_all(rollout, prompts, args, segmenter, averages):
    """Step 3: the weighted sum of the rewards of each completion, (B, G)."""
    rewards = torch.zeros(len(prompts), args.group)
    for b, prompt in enumerate(prompts):
        texts = rollout.texts[b * args.group : (b + 1) * args.group]
        for name, values in reward_group(texts, prompt, args, segmenter).items():
            rewards[b] += getattr(args, f"{name}_weight") * values
            averages.add(f"reward_{name}", values.sum(), len(values))
        if prompt.task == "sam":
            repaired = sum(data.read_answer(text, "sam").is_repaired for text in texts)
            averages.add("repaired", repaired, len(texts))
    averages.add("reward", rewards.sum(), rewards.numel())
    averages.add("reward_std", rewards.std(1, correction=0).sum(), len(rewards))
    return rewards


def drop_groups(rollout, rewards, adv, args, averages, keep_all=False):
    """Leave out groups whose rewards are all alike: a Rollout with advantages, or None. keep_all:
    they stay, but no token of them counts. (Sharded weights must be gathered equally often on all
    processes, so all need as many micro-batches.)"""
    has_signal = rewards.amax(1) - rewards.amin(1) > 1e-6  # (B,)
    averages.add("dropped", (~has_signal).sum(), len(has_signal))
    if not has_signal.any() and not keep_all:
        return None
    mask = rollout.mask & has_signal.repeat_interleave(args.group)[:, None].to(rollout.mask.device)
    if args.mask_truncated:
        mask = mask & ~rollout.truncated.to(mask.device)[:, None]
    has_signal |= keep_all  # from here on: what stays
    kept = has_signal.repeat_interleave(args.group)  # (R,)
    return replace(
        rollout,
        prompt=sampler.select_prompts(rollout.prompt, has_signal.nonzero()[:, 0].tolist()),
        completions=rollout.completions[kept],
        mask=mask[kept],
        rollout_logp=rollout.rollout_logp[kept],
        adv=adv[has_signal].view(-1, 1).to(mask.device),
    )


def split(r, group, size):
    """A Rollout in micro-batches of `size` prompts, for scoring. Those of like length are together,
    less the padding that a micro-batch does not need."""
    prompt_lengths = r.prompt["attention_mask"].sum(1)  # (B,)
    if len(prompt_lengths) <= size:
        return [r]
    lengths = r.mask.sum(1).view(-1, group).amax(1).clamp(min=1).cpu()  # (B,)
    parts = []
    for rows in (prompt_lengths + group * lengths).argsort().split(size):
        prompt, longest = sampler.select_prompts(r.prompt, rows.tolist()), lengths[rows].max()
        shape, start = prompt["input_ids"].shape, prompt_lengths[rows].max()
        own = (rows[:, None] * group + torch.arange(group)).flatten()  # (size * G,)
        parts.append(
            replace(
                r,
                prompt={k: x[:, -start:] if x.shape == shape else x for k, x in prompt.items()},
                completions=r.completions[own, :longest],
                mask=r.mask[own, :longest],
                rollout_logp=r.rollout_logp[own, :longest],
                adv=r.adv[own],
            )
        )
    return parts


def score(model, r, args, averages, threads):
    """log p of a Rollout's completions under the policy as it is now, (R, C), with gradients.
    threads: fewer while a reference on this CPU scores, too."""
    usual = torch.get_num_threads()
    with averages.clock("seconds_scoring"):
        torch.set_num_threads(threads)
        question = r.prompt, r.completions, r.mask, args.temperature
        logp = sampler.call(sampler.completion_logps, model, *question)
        torch.set_num_threads(usual)
    return logp


def start_reference(args, run):
    """(reference server of this machine or None, threads for scoring). A policy and a reference
    that share a CPU get half of its cores each."""
    threads, device = torch.get_num_threads(), args.ref_device or run.device
    if not args.beta or args.ref_url or args.reference == "policy":
        return None, threads
    if device == run.device == "cpu":
        threads = max(1, threads // 2)
    if run.local_rank > 0:
        return None, threads
    dtype = str(run.reference_dtype).removeprefix("torch.")
    return ref_server.start_child(args.model_path, device, dtype, threads), threads


def connect_reference(args, run, child, model, processor):
    """The client of --ref_url, or of the server that this machine's first process started; None
    without a penalty or with --reference policy."""
    if not args.beta or args.reference == "policy":
        return None
    urls = (args.ref_url or "").split(",")
    if not args.ref_url:
        ports = [ref_server.child_port(child) if child else None]
        if run.world > 1:
            own, ports = ports[0], [None] * run.world
            dist.all_gather_object(ports, own)
        urls = [f"http://127.0.0.1:{ports[run.rank - run.local_rank]}"]
    dtype = run.reference_dtype
    identity = ref_server.model_identity(model, processor, args.model_path, dtype)
    run.print0(f"reference: {', '.join(urls)}")
    return ref_server.Reference(urls, identity, run.rank, args.ref_patience, child)


class PolicyReference:
    """For --reference policy: stands in for ref_server.Reference."""

    def __init__(self, model):
        trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        self.mergers = {n: p.detach().clone() for n, p in trained if ".lora_" not in n}
        self.model = model

    def start(self, *tensors):
        """A function that gives log p_ref; see sampler.completion_logps."""

        def logps():
            with sampler.without_updates(self.model, self.mergers):
                return sampler.completion_logps(self.model, *tensors)

        return logps


def log_line(step, epoch, averages, norm, lr, run, seconds, has_reference):
    """One line of train.jsonl; see the head of this file."""
    totals = averages.totals
    line = {"step": step, "epoch": epoch, **{name: averages.mean(name) for name in MEANS}}
    line["policy_loss"] = totals["policy_loss"]  # a sum over all tokens, by their weights
    line["kl"] = line["kl"] if has_reference else None
    line |= {"grad_norm": norm, "lr": lr, "skipped": run.skipped}
    line["tokens_per_s"] = (totals["prompt_tokens"] + totals["length"]) / seconds
    line |= {name: totals[name] / run.world for name in CLOCKS}
    return {**line, "seconds": seconds}


# ------------------------------------------------------------------------- main


def main(args):
    # Processes, data, model, reference; with --resume, the last checkpoint.
    source = Path(args.model_path)
    files = ("config.json", "adapter", sampler.ADAPTER_CONFIG)
    if source == Path(args.log_dir) / "sft" and not any((source / n).exists() for n in files):
        raise InputError(f"no model in {source}: run python sft.py first, or set --model_path")
    run = Run(args)
    train, val = data.load_for_training(args)
    child, scoring_threads = start_reference(args, run)  # it loads while the policy does
    threads = torch.get_num_threads()
    model, processor = sampler.load_policy(args.model_path, run.device, run.dtype)
    run.print0(f"model: {args.model_path}, {len(train)} refs of {args.option}/{args.split}")
    if run.rank == 0:
        data.warn_about_prompts(args.model_path, args.prompts)
    segmenter = sampler.Segmenter(args.sam_ckpt, run.device) if "mask" in args.reward else None
    reference = connect_reference(args, run, child, model, processor)
    saved = run.resume(model, processor, train + val)

    # What is trained. NOTE: no dropout, which would move the ratio off 1 by chance.
    torch.manual_seed(args.seed + run.rank)
    trained = sampler.make_trainable(model, args, dropout=0.0)
    before = saved["before"] if saved else run.validate(model, processor, val)
    if args.beta and args.reference == "policy":
        reference = PolicyReference(model)
    optimizer = run.make_optimizer(trained)
    per_update = args.batch_size * run.world * args.accumulate
    steps = args.max_step or math.ceil(args.epochs * len(train) / per_update)
    rise = max(1, round(args.warmup * steps))
    run.print0(f"{sum(p.numel() for p in trained):,} trained parameters, {steps} rollouts")

    # Prompts, in an order that follows from the seed and the number of updates done.
    frame_of = lambda width, height: sampler.answer_frame(model, processor, width, height)
    dataset = data.PromptDataset(train, frame_of, args)
    order = data.PromptSampler(data.mixture_counts(args.option, train), args, run.rank, run.world)
    order.skip(run.done * args.accumulate)
    if saved:
        run.restore(saved, model, optimizer)
        del saved

    draw = draw_prompts, dataset, order, processor, args.accumulate
    executor, todo = ThreadPoolExecutor(1), range(run.done + 1, steps + 1)
    drawn = executor.submit(*draw)

    run.catch_signals()
    bar = tqdm(todo, "GRPO", initial=run.done, total=steps, disable=run.rank > 0)
    for step in bar:
        averages, start, norm = Averages(), time.time(), 0.0
        # a linear rise, then a linear fall to 0
        lr = args.lr * min(step / rise, 1 - (step - rise) / (steps - rise + 1))
        for group in optimizer.param_groups:
            group["lr"] = lr

        with averages.clock("seconds_rollout"):
            # 1. Prompt
            prompts, inputs, epoch = drawn.result()
            # 2. Sample
            rollout = sample(model, processor, inputs, args, averages)
            # 3. Reward
            rewards = reward_all(rollout, prompts, args, segmenter, averages)  # (B, G)
            # 4. Advantage
            adv = advantages(rewards, scale=args.loss != "dr_grpo")  # (B, G)
            keep_all = is_sharded(trained)
            rollout = drop_groups(rollout, rewards, adv, args, averages, keep_all)
            rollouts = split(rollout, args.group, args.batch_size) if rollout else []
        drawn = executor.submit(*draw)  # beside this update, those of the next
        # 5. Reference: a server scores a rollout while the policy scores the one before
        for r in rollouts if reference else []:
            r.get_ref_logp = reference.start(r.prompt, r.completions, r.mask, args.temperature)

        # all processes have the same two numbers: either all take the update, or none
        completions = sum(r.mask.any(1).sum().item() for r in rollouts)
        tokens = sum(r.mask.sum().item() for r in rollouts)
        completions, tokens = run.sum([completions, tokens])
        for inner in range(args.mu if completions else 0):
            losses = 0.0
            for r in rollouts:
                logp = score(model, r, args, averages, scoring_threads if inner == 0 else threads)
                if inner == 0:  # the weights have not changed since sampling
                    r.old_logp = r.ref_logp = logp.detach()  # no reference: d = 0
                    gap = (r.old_logp - r.rollout_logp).abs() * r.mask
                    averages.add("rollout_gap", gap.sum(), r.mask.sum())
                if inner == 0 and reference:
                    with averages.clock("seconds_reference"):
                        r.ref_logp = r.get_ref_logp().to(logp.device)
                with averages.clock("seconds_update"):
                    # 6. Loss
                    counts = completions, tokens, args.max_new_tokens
                    weight = token_weights(r.mask, args.loss, *counts)  # (R, C)
                    loss, token_loss, kl, clipped = policy_loss(
                        logp, r.old_logp, r.ref_logp, r.adv, weight, args
                    )
                    loss.backward()
                    losses += loss.item()
                averages.add("policy_loss", (weight * token_loss).sum().item() / args.mu)
                averages.add("kl", (r.mask * kl).sum(), r.mask.sum())
                averages.add("clipped", (r.mask * clipped).sum(), r.mask.sum())
            with averages.clock("seconds_update"):
                # 7. Update
                (loss,) = run.sum([losses])
                norm = run.update(optimizer, trained, loss)

        # Log and save.
        stopping, is_due = run.sum([run.signal, run.is_due()])
        averages.sum_over_processes(run)
        seconds = time.time() - start
        line = log_line(step, epoch, averages, norm, lr, run, seconds, bool(reference))
        bar.set_postfix(reward=f"{line['reward']:.3f}", kl=f"{line['kl'] or 0:.1e}")
        run.log(line)
        is_last = step == steps or stopping
        if is_last:
            executor.shutdown()  # saving and validating use the tokenizer, too
        if step % args.save_step == 0 or is_due or is_last:
            run.save(step, model, processor, optimizer, before, is_last)
        if is_last:
            run.exit_if_stopped(step, steps)

    run.finish(model, processor, val, before, flags=" --use_think --version_name eval_think")
    if child:
        ref_server.stop_child(child)


if __name__ == "__main__":
    sampler.run_script(main, get_args)
