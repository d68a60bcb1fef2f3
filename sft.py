"""Stage one of training: supervised fine-tuning (SFT) on boxes and point labels.

1. Every micro-batch asks one task: the box of a phrase, or the labels of a grid of points in a box
   (`--point_ratio`): the true one, jittered, or that of another object in the image, as a predicted
   box can be (`--miss_ratio`). Reasoning is left to GRPO (but for `--think_ratio`).
2. Cross-entropy falls on the answer's tokens only:

       loss = - sum_t log p(answer_t | image, prompt, answer_<t) / number of answer tokens

   Sum and count run over all micro-batches *and* processes of an update, so N processes take the
   very step of one process with N times the batch.
3. AdamW on LoRA (language model) and the vision merger, in full; everything else is frozen.
   `--lora_rank 0` trains all parameters. Cosine schedule with warm-up, clipped gradients.
4. The result is a Hugging Face folder, <log_dir>/<version_name>, and in its adapter/ the adapter in
   PEFT's layout.

    python sft.py                                   # the demo: minutes on two CPU cores
    torchrun --nproc_per_node 4 sft.py --model_path Qwen/Qwen3-VL-8B-Instruct \\
        --data_root /path/to/RRSIS-D --option RRSISD --gradient_checkpointing

The demo is this same recipe with numbers of its own, in DEFAULTS below.
"""

import argparse
import json
import math
import time

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils.data import DataLoader
from tqdm import tqdm

import data
import sampler
from eval import print_gain, validate_both
from sampler import InputError

# (the recipe for an 8 B model, the demo): a small model wants a larger learning rate, has no use
# for dropout, and takes a batch of 16 in hardly more time than one of 1.
DEFAULTS = dict(
    lr=(5e-5, 5e-3),
    lora_dropout=(0.05, 0.0),
    batch_size=(1, 16),
    accumulate=(8, 2),
    max_step=(0, 370),
    point_ratio=(0.5, 0.4),
    val_batch_size=(8, 64),
)


def get_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])

    def add(name, **options):
        if name.strip("-") in DEFAULTS:  # resolved below, where the data set is known
            recipe, demo = DEFAULTS[name.strip("-")]
            options["help"] += f" (default {recipe:g}; demo {demo:g})"
        parser.add_argument(name, **options)

    # model and data
    add("--model_path", default=str(sampler.TINY_VLM), help="Hugging Face folder or hub name")
    add("--option", default="demo", help="demo, RRSISD, ris_lad or any REFER set in --data_root")
    add("--data_root", default="demo_data", help="folder that holds the data set")
    add("--split", default="train", help="split to train on")
    # tasks
    add("--point_ratio", type=float, help="share of batches on the point task")
    add("--miss_ratio", type=float, default=0.15, help="share of grids in any object's box")
    add("--think_ratio", type=float, default=0.0, help="share of answers that reason first")
    add("--jitter", type=float, default=0.1, help="box jitter of the point task, in box sides")
    # what is trained
    add("--lora_rank", type=int, default=64, help="rank of LoRA; 0 trains all parameters")
    add("--lora_alpha", type=int, default=128, help="LoRA's update is scaled by alpha / rank")
    add("--lora_dropout", type=float, help="dropout on LoRA's input")
    # optimisation
    add("--lr", type=float, help="peak learning rate")
    add("--weight_decay", type=float, default=0.01, help="AdamW's weight decay")
    add("--batch_size", type=int, help="samples per process and micro-batch")
    add("--accumulate", type=int, help="micro-batches per update")
    add("--epochs", type=float, default=2, help="passes over the split, where --max_step is 0")
    add("--max_step", type=int, help="stop after so many updates; 0: --epochs decides")
    add("--warmup", type=float, default=0.03, help="share of the updates in which the rate rises")
    add("--clip", type=float, default=1.0, help="largest gradient norm")
    # system and output
    on_off = argparse.BooleanOptionalAction
    add("--gradient_checkpointing", action=on_off, default=False, help="less memory, more time")
    add("--workers", type=int, default=0, help="processes that load data")
    add("--seed", type=int, default=0, help="of data order, tasks, jitter and dropout")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda or cpu")
    add("--log_dir", default="runs", help="results go to <log_dir>/<version_name>")
    add("--version_name", default="sft", help="name of this run")
    add("--merge", action=on_off, default=True, help="write merged weights beside the adapter")
    add("--save_step", type=int, default=500, help="save every so many updates, and at the end")
    add("--val_limit", type=int, default=200, help="validation samples before and after; 0: none")
    add("--val_batch_size", type=int, help="validation samples per process and batch")
    args = parser.parse_args(argv)
    for key, (recipe, demo) in DEFAULTS.items():
        if getattr(args, key) is None:
            setattr(args, key, demo if args.option == "demo" else recipe)
    if min(args.batch_size, args.accumulate, args.save_step) < 1:
        parser.error("--batch_size, --accumulate and --save_step start at 1")
    if min(args.val_limit, args.max_step, args.lora_rank, args.seed, args.workers) < 0:
        parser.error("--val_limit, --max_step, --lora_rank, --seed and --workers start at 0")
    if not args.max_step and args.epochs <= 0:
        parser.error("nothing to do: set --epochs or --max_step")
    return args


# ------------------------------------------------------------------------- loss and update


def answer_loss(model, batch):
    """(summed cross-entropy of the answer tokens, their number) of a collated batch."""
    labels = batch.pop("labels")[:, 1:]  # (B, T - 1): position t predicts token t + 1
    hidden = model.model(**batch).last_hidden_state[:, :-1]  # (B, T - 1, D)
    predicts = labels != -100
    # NOTE: logits only where an answer token is predicted; (B, T, V) in float32 would be gigabytes
    logits = model.lm_head(hidden[predicts]).float()  # (answer tokens, V)
    return F.cross_entropy(logits, labels[predicts], reduction="sum"), int(predicts.sum())


def reduce_gradients(parameters, totals):
    """Sum gradients and totals (3,) over all processes, then divide by the answer tokens."""
    if dist.is_initialized():
        dist.all_reduce(totals)
    sampler.sum_gradients(parameters)
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.grad /= totals[1]


def cosine(step, steps, warmup):
    """Factor of the learning rate: a linear rise, then half a cosine to 0."""
    rise = max(1, round(warmup * steps))
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))


# ------------------------------------------------------------------------- main


def main(args):
    # 1. Processes, folder, model.
    rank, world, _, folder = sampler.start_run(args)
    on_gpu = args.device.startswith("cuda")
    say = print if rank == 0 else lambda *_: None
    trainable, val = data.load_for_training(args, rank)
    # full fine-tuning keeps float32 weights, as updates of 1e-5 vanish in bfloat16
    dtype = torch.bfloat16 if on_gpu and args.lora_rank else torch.float32
    model, processor = sampler.load_policy(args.model_path, args.device, dtype)
    say(f"model: {args.model_path}, {len(trainable)} refs of {args.option}/{args.split}")
    before = validate_both(model, processor, val, args)

    # 2. What is trained.
    torch.manual_seed(args.seed + rank)
    trained = sampler.make_trainable(model, args, args.lora_dropout)
    steps = args.max_step or math.ceil(
        args.epochs * len(trainable) / (args.batch_size * world * args.accumulate)
    )
    optimizer = torch.optim.AdamW(trained, lr=args.lr, weight_decay=args.weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: cosine(step, steps, args.warmup)
    )
    share = sum(p.numel() for p in trained) / sum(p.numel() for p in model.parameters())
    say(f"{sum(p.numel() for p in trained):,} trained parameters ({share:.1%}), {steps} updates")

    # 3. The loop.
    frame_of = lambda width, height: sampler.answer_frame(model, processor, width, height)
    loader = DataLoader(
        data.Questions(trainable, frame_of, args),
        batch_sampler=data.Order(len(trainable), args, rank, world),
        collate_fn=lambda rows: data.collate(processor, *zip(*rows)),
        num_workers=args.workers,
        multiprocessing_context="fork" if args.workers else None,  # the lambdas cannot be pickled
    )
    batches = iter(loader)
    log = open(folder / "train.jsonl", "w") if rank == 0 else None
    bar = tqdm(range(1, steps + 1), desc="SFT", disable=rank > 0)
    for step in bar:
        start = time.time()
        totals = torch.zeros(3, device=args.device)  # summed loss, answer tokens, all tokens
        for _ in range(args.accumulate):
            batch = {key: value.to(args.device) for key, value in next(batches).items()}
            tokens = int(batch["attention_mask"].sum())
            with sampler.mixed_precision(model):
                loss, answer_tokens = answer_loss(model, batch)
            loss.backward()
            totals += torch.tensor([loss.item(), answer_tokens, tokens], device=args.device)
        reduce_gradients(trained, totals)
        norm = torch.nn.utils.clip_grad_norm_(trained, args.clip)
        optimizer.step()
        optimizer.zero_grad()
        lr = schedule.get_last_lr()[0]
        schedule.step()
        if rank == 0:
            seconds = time.time() - start
            line = {
                "step": step,
                "loss": totals[0].item() / totals[1].item(),
                "grad_norm": norm.item(),
                "lr": lr,
                "tokens_per_s": totals[2].item() / seconds,
                "seconds": seconds,
            }
            log.write(json.dumps(line) + "\n")
            log.flush()
            bar.set_postfix(loss=f"{line['loss']:.3f}", lr=f"{lr:.1e}")
            if step % args.save_step == 0 or step == steps:
                sampler.save_trained(model, processor, args, folder)

    # 4. What it brought.
    after = validate_both(model, processor, val, args)
    if rank == 0:
        print_gain(before, after)
    say(f"written: {folder}. Next: python eval.py --eval_model_path {folder}")
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    try:
        main(get_args())
    except InputError as error:
        # a data worker's error comes with its traceback: the last line is ours
        line = str(error).strip().splitlines()[-1].removeprefix("sampler.InputError: ")
        raise SystemExit(f"error: {line}") from None
