"""Stage one of training: supervised fine-tuning (SFT) on boxes and point labels.

1. Every micro-batch asks one task: the box of a phrase, or the labels of a grid of points in a box
   (`--point_ratio`): the true one, jittered, or that of another object in the image, as a predicted
   box can be (`--miss_ratio`). Reasoning is left to GRPO (but for `--think_ratio`). With `--prompts
   sam` one question takes the place of both: all instances, as a list, after a line of reasoning.
2. Cross-entropy falls on the answer's tokens only:

       loss = - sum_t log p(answer_t | image, prompt, answer_<t) / number of answer tokens

   Sum and count run over all micro-batches *and* processes of an update, so N processes take the
   very step of one process with N times the batch.
3. AdamW on LoRA (language model) and the vision merger, in full; everything else is frozen.
   `--lora_rank 0` trains all parameters. Cosine schedule with warm-up, clipped gradients.
4. The result is a Hugging Face folder, <log_dir>/<version_name>, and in its adapter/ the adapter in
   PEFT's layout.
5. Nothing is lost: every `--save_step` updates all that the next update depends on goes into a
   checkpoint, and `--resume` goes on from it as if nothing had happened, on a CPU bit for bit.
   Ctrl-C and SIGTERM finish the update, save and leave. GRPO's runs are kept by the same functions.

    python sft.py                                   # the demo: minutes on two CPU cores
    python sft.py --resume                          # go on with a run that was cut off
    python sft.py --option demo_reason --prompts sam --version_name sft_reason
    torchrun --nproc_per_node 4 sft.py --model_path Qwen/Qwen3-VL-8B-Instruct \\
        --data_root /path/to/RRSIS-D --option RRSISD --gradient_checkpointing

The demo is this same recipe with numbers of its own, in DEFAULTS below.
"""

import argparse
import hashlib
import json
import math
import os
import random
import shutil
import signal
import time
from contextlib import contextmanager
from itertools import count
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils.data import DataLoader
from tqdm import tqdm

import data
import sampler
from eval import digest, next_command, print_gain, read_rows, validate_both
from sampler import InputError

# (the recipe for an 8 B model, the demo): a small model wants a larger learning rate, has no use
# for dropout, and takes a batch of 16 in hardly more time than one of 1.
DEFAULTS = dict(
    lr=(5e-5, 5e-3),
    lora_dropout=(0.05, 0.0),
    batch_size=(1, 16),
    accumulate=(8, 2),
    max_step=(0, 370),
    save_step=(500, 50),
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
    add("--option", default="demo", help="set: demo, RRSISD, refsegrs ...; several: a,b or a:2,b")
    add("--data_root", default="demo_data", help="folder that holds the data set")
    add("--split", default="train", help="split to train on")
    # tasks
    add("--prompts", choices=["points", "sam"], default="points", help=data.PROMPTS_HELP)
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
    add_run_flags(add)
    add("--workers", type=int, default=0, help="processes that load data")
    add("--seed", type=int, default=0, help="of data order, tasks, jitter and dropout")
    add("--version_name", default="sft", help="name of this run")
    add("--save_step", type=int, help="save every so many updates, and at the end")
    add("--val_limit", type=int, default=200, help="validation samples before and after; 0: none")
    args = parser.parse_args(argv)
    for key, (recipe, demo) in DEFAULTS.items():
        if getattr(args, key) is None:
            setattr(args, key, demo if data.is_demo(args.option) else recipe)
    check_range(parser, args, "batch_size accumulate save_step keep max_skips val_batch_size", 1)
    check_range(parser, args, "val_limit max_step lora_rank seed workers lr weight_decay jitter", 0)
    check_range(parser, args, "point_ratio miss_ratio think_ratio lora_dropout warmup", 0, 1)
    check_range(parser, args, "clip", 1e-9)
    if not args.max_step and args.epochs <= 0:
        parser.error("nothing to do: set --epochs or --max_step")
    return args


def add_run_flags(add):
    """What both stages have alike: on what a run runs, and how it is kept."""
    on_off = argparse.BooleanOptionalAction
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda or cpu")
    add("--gradient_checkpointing", action=on_off, default=False, help="less memory, more time")
    add("--skip_bad", action=on_off, default=False, help="leave bad records out, and list them")
    add("--log_dir", default="runs", help="results go to <log_dir>/<version_name>")
    add("--merge", action=on_off, default=True, help="write merged weights beside the adapter")
    add("--keep", type=int, default=2, help="checkpoints that stay")
    add("--resume", action=on_off, default=False, help="go on from the last checkpoint")
    add("--max_skips", type=int, default=5, help="end after so many nan or inf updates in a row")
    add("--val_batch_size", type=int, help="validation samples per process and batch")


def check_range(parser, args, names, least, most=math.inf):
    """End with a line unless each of these settings lies from `least` to `most`."""
    for name in names.split():
        if not least <= getattr(args, name) <= most:  # nan is not, either
            upper = "" if most == math.inf else f" to {most:g}"
            parser.error(f"--{name} {getattr(args, name)}: expected {least:g}{upper or ' or more'}")


# ------------------------------------------------------------------------- loss and update


def answer_loss(model, batch):
    """(summed cross-entropy of the answer tokens, their number) of a collated batch."""
    labels = batch.pop("labels")[:, 1:]  # (B, T - 1): position t predicts token t + 1
    hidden = model.model(**batch).last_hidden_state[:, :-1]  # (B, T - 1, D)
    predicts = labels != -100
    # NOTE: logits only where an answer token is predicted; (B, T, V) in float32 would be gigabytes
    logits = model.lm_head(hidden[predicts]).float()  # (answer tokens, V)
    return F.cross_entropy(logits, labels[predicts], reduction="sum"), int(predicts.sum())


def cosine(step, steps, warmup):
    """Factor of the learning rate: a linear rise, then half a cosine to 0."""
    rise = max(1, round(warmup * steps))
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))


# ------------------------------------------------------------------------- processes


def start_run(args):
    """Begin a stage of training: (rank, world, local_rank, folder).

    Joins the group of processes that torchrun started, if any (else 0, 1, 0; nccl on CUDA, gloo on
    CPU), gives args.device its number, and names the folder, <log_dir>/<version_name>.
    """
    folder = Path(args.log_dir) / args.version_name
    if Path(args.model_path).resolve() == folder.resolve():  # its own base, or its own reference
        raise InputError(f"--model_path {folder} would be overwritten: give a new --version_name")
    rank, world, local_rank = (
        int(os.environ.get(name, default))
        for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
    )
    if args.device == "cuda":  # before it is tried: every process would open the first one
        args.device = f"cuda:{local_rank}"
    sampler.check_device(args.device)
    if args.device.startswith("cuda"):
        torch.cuda.set_device(args.device)
    if world > 1:
        dist.init_process_group("nccl" if args.device.startswith("cuda") else "gloo")
    if rank == 0:
        lock(folder)
    return rank, world, local_rank, folder


def lock(folder):
    """InputError if another process trains into this folder, or it cannot be written."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        # never closed: the system lets go of the lock when the process ends, however it ends
        file = os.open(f"{folder}.lock", os.O_CREAT | os.O_RDWR)
    except OSError as error:
        raise InputError(f"cannot write to {folder} ({error}): set --log_dir") from None
    try:
        import fcntl

        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:
        pass  # Windows
    except OSError:
        raise InputError(
            f"another run is writing to {folder}: wait for its end, or give a --version_name"
        ) from None


def sum_over_processes(values, device):
    """Numbers, each summed over all processes."""
    values = torch.tensor(values, dtype=torch.float64, device=device)
    if dist.is_initialized():
        dist.all_reduce(values)
    return values.tolist()


def sum_gradients(parameters):
    """Sum gradients over all processes, also over one that had nothing to train on."""
    for parameter in parameters if dist.is_initialized() else ():
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        dist.all_reduce(parameter.grad)


class Stop:
    """SIGTERM and Ctrl-C as a wish that the loop grants when its update is whole. `signal` is the
    number of the one that came, else 0."""

    def __init__(self):
        self.signal = 0
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.note)

    def note(self, number, frame):
        self.signal = number
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a second Ctrl-C does not wait

    def forget(self):
        """From here on both end the process as they usually do."""
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)


def leave(stop, step, steps, say):
    """End a run that was asked to stop, with the status that shells give for the signal."""
    number = stop.signal or signal.SIGTERM  # the signal may have reached another process only
    name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
    say(f"stopped by {name} after update {step} of {steps}, saved: --resume goes on from there")
    if dist.is_initialized():
        dist.destroy_process_group()
    raise SystemExit(128 + number)


def ignore_signals(*_):
    """For workers: a Ctrl-C reaches them too, and the loop still needs them."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


# ------------------------------------------------------------------------- the log


def write_line(log, line):
    """One JSON object a line; what is not finite is null, as JSON has no nan."""
    finite = lambda v: None if isinstance(v, float) and not math.isfinite(v) else v
    with writing(log.name):
        log.write(json.dumps({key: finite(value) for key, value in line.items()}) + "\n")
        log.flush()


def check_skips(in_a_row, most):
    """InputError after `most` updates in a row that had to be skipped."""
    if in_a_row >= most:
        raise InputError(
            f"{in_a_row} updates in a row had a loss or gradient that is nan or infinite, and were "
            "skipped: start again with a lower --lr (the weights saved so far are finite)"
        )


# ------------------------------------------------------------------------- checkpoints
# <run>/checkpoints/<update>/rank<r>of<n>.pt: what process r needs to go on as if it had never
# stopped, and beside it its sha256. Process 0 also holds what all have in common.

# settings that may differ when a run goes on; all others must be those of the run. What
# --model_path, --data_root and --sam_ckpt lead to is compared, not the paths.
FREE = """model_path data_root sam_ckpt log_dir version_name resume keep save_step max_skips
merge workers skip_bad device gradient_checkpointing val_batch_size ref_url ref_device
ref_patience""".split()


def settings_of(args, model, processor, samples):
    """What makes a run this run, as it was begun: a checkpoint of another one is refused."""
    settings = {key: value for key, value in vars(args).items() if key not in FREE}
    settings["dtype of the model"] = str(model.dtype)
    settings["fingerprint of the model"] = sampler.fingerprint(model, processor)
    if "mask" in getattr(args, "reward", ()):
        settings["checksum of --sam_ckpt"] = sha256(args.sam_ckpt)
    return {**settings, "checksum of the data": digest(samples)}


def random_state(device):
    """Of all generators, in types that torch.load takes without running code."""
    name, keys, *rest = np.random.get_state()
    state = {"python": random.getstate(), "numpy": (name, keys.tolist(), *rest)}
    state["torch"] = torch.get_rng_state()
    if device.startswith("cuda"):
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state, device):
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if "cuda" in state and device.startswith("cuda"):
        torch.cuda.set_rng_state(state["cuda"], device)


def sha256(path):
    state = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(2**24):
            state.update(chunk)
    return state.hexdigest()


@contextmanager
def writing(path):
    """A write that fails (a full disk) is one line; what was written before is still there."""
    from safetensors import SafetensorError

    try:
        yield
    except torch.OutOfMemoryError:
        raise  # while merging: no matter of the disk
    except (OSError, RuntimeError, SafetensorError) as error:
        why = (str(error).strip() or repr(error)).splitlines()[0][:150]
        raise InputError(
            f"cannot write {path} ({why}): is the disk full? Earlier checkpoints are whole: make "
            "room and go on with --resume"
        ) from None


def save_run(folder, step, args, model, processor, optimizer, rest):
    """The model folder, and then the checkpoint that says so. All processes call it. `rest`: what
    else to go on with, numbers and text. args: device, keep, and see sampler.save_trained.

    Written beside and renamed, so that a checkpoint is there as a whole or not at all; the last
    `keep` stay.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    wait = dist.barrier if world > 1 else lambda: None
    own = {"random": random_state(args.device)}
    # ZeroRedundancyOptimizer: every process has a share of the state; else all have the same
    share = getattr(optimizer, "optim", optimizer)
    if rank == 0 or share is not optimizer:
        own["optimizer"] = share.state_dict()
    if rank == 0:
        trained = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
        own |= {"step": step, "trained": trained, **rest}
    new = folder / "checkpoints" / "new"
    path = new / f"rank{rank}of{world}.pt"
    with writing(folder):
        if rank == 0:
            sampler.save_trained(model, processor, args, folder)
            shutil.rmtree(new, ignore_errors=True)  # of a run that was killed while saving
            new.mkdir(parents=True)
    wait()
    with writing(path):
        torch.save(own, path)
        path.with_suffix(".sha256").write_text(f"{sha256(path)}  {path.name}\n")
    wait()
    if rank == 0:
        os.replace(new, folder / "checkpoints" / f"{step:08}")
        for old in checkpoints_in(folder)[: -args.keep]:
            shutil.rmtree(old)
    wait()  # nobody goes on, or ends, before it is there


def checkpoints_in(folder):
    """The oldest first."""
    return sorted(path for path in folder.glob("checkpoints/*") if path.name.isdigit())


def damage(checkpoint):
    """What is wrong with a checkpoint, or None."""
    names = sorted(path.name for path in checkpoint.glob("rank*.pt"))
    world = int(names[0].removesuffix(".pt").partition("of")[2]) if names else 1
    for path in (checkpoint / f"rank{rank}of{world}.pt" for rank in range(world)):
        try:
            written = path.with_suffix(".sha256").read_text().split()[:1]
            if written != [sha256(path)]:
                return f"{path.name} is not what was written"
        except (OSError, ValueError) as error:
            return f"{path.name} cannot be checked: {error}"
    return None


def load_checkpoint(folder, settings, rank, world, device):
    """The newest checkpoint that is whole, as save_run's dict of process 0 with this
    process's own entries in it; None if there is none. InputError if it is another run's."""
    step = 0
    for path in reversed(checkpoints_in(folder)) if rank == 0 else ():
        problem = damage(path)
        if problem is None:
            step = int(path.name)
            break
        aside = path.with_name(f"{path.name}.damaged")
        shutil.rmtree(aside, ignore_errors=True)
        os.replace(path, aside)
        print(f"NOTE: checkpoint {path} is damaged ({problem}) and left out")
    (step,) = sum_over_processes([step], device)  # process 0 has looked for all
    if not step:
        if rank == 0:
            print(f"no whole checkpoint in {folder}: the run starts from the beginning")
        return None
    path = folder / "checkpoints" / f"{int(step):08}"
    # NOTE: weights_only, so that a checkpoint from elsewhere cannot run code
    read = lambda rank: torch.load(
        path / f"rank{rank}of{world}.pt", "cpu", weights_only=True, mmap=True
    )
    count = len(list(path.glob("rank*.pt")))
    if count != world:
        raise InputError(f"--resume: {path} is of {count} processes, not of {world}: start as many")
    try:
        saved = {**read(0), **read(rank)}
        begun = saved["settings"]
    except (RuntimeError, *sampler.UNPICKLING_ERRORS) as error:
        raise InputError(
            f"--resume: {path} is no checkpoint of ours ({type(error).__name__}): remove it"
        ) from None
    changed = [
        f"{key} was {begun.get(key)} and is {value}"
        for key, value in settings.items()
        if begun.get(key) != value
    ]
    if changed:
        raise InputError(
            f"--resume: {', '.join(changed)}: repeat the settings of the run ({folder}/args.json), "
            "or begin another with --version_name"
        )
    return saved


def restore(saved, model, optimizer, device):
    """Put everything where it was when `saved` was written."""
    parameters = dict(model.named_parameters())
    for name, value in saved["trained"].items():
        parameters[name].data.copy_(value)
    getattr(optimizer, "optim", optimizer).load_state_dict(saved["optimizer"])
    set_random_state(saved["random"], device)


def open_log(folder, args, step):
    """train.jsonl, to go on after update `step`: what an interrupted run wrote behind its last
    checkpoint is cut off, as it comes again. An earlier run of this name is moved, not lost."""
    path = folder / "train.jsonl"
    saved = any((folder / name).exists() for name in ("checkpoints", "config.json", "adapter"))
    if not step and (saved or (path.exists() and not args.resume)):
        aside = next(f"{folder}.{i}" for i in count(1) if not Path(f"{folder}.{i}").exists())
        os.replace(folder, aside)
        print(f"NOTE: the run that was in {folder} is in {aside} now (--resume goes on with a run)")
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "args.json").write_text(json.dumps(vars(args), indent=2))
        kept = [json.dumps(row) + "\n" for row in read_rows(path) if row["step"] <= step]
        path.with_suffix(".new").write_text("".join(kept))
        os.replace(path.with_suffix(".new"), path)
    return open(path, "a")


# ------------------------------------------------------------------------- main


def main(args):
    # 1. Processes, model, data; with --resume, the last checkpoint.
    rank, world, _, folder = start_run(args)
    on_gpu = args.device.startswith("cuda")
    say = print if rank == 0 else lambda *_: None
    trainable, val = data.load_for_training(args, rank)
    # full fine-tuning keeps float32 weights, as updates of 1e-5 vanish in bfloat16
    dtype = torch.bfloat16 if on_gpu and args.lora_rank else torch.float32
    model, processor = sampler.load_policy(args.model_path, args.device, dtype)
    say(f"model: {args.model_path}, {len(trainable)} refs of {args.option}/{args.split}")
    settings = settings_of(args, model, processor, trainable + val)
    saved = load_checkpoint(folder, settings, rank, world, args.device) if args.resume else None
    before = saved["before"] if saved else validate_both(model, processor, val, args)

    # 2. What is trained.
    torch.manual_seed(args.seed + rank)
    trained = sampler.make_trainable(model, args, args.lora_dropout)
    steps = args.max_step or math.ceil(
        args.epochs * len(trainable) / (args.batch_size * world * args.accumulate)
    )
    optimizer = torch.optim.AdamW(trained, lr=args.lr, weight_decay=args.weight_decay)
    share = sum(p.numel() for p in trained) / sum(p.numel() for p in model.parameters())
    say(f"{sum(p.numel() for p in trained):,} trained parameters ({share:.1%}), {steps} updates")

    # 3. Where the walk through the data, and all else, stands.
    done = saved["step"] if saved else 0
    skipped, in_a_row = saved["skipped"] if saved else (0, 0)
    frame_of = lambda width, height: sampler.answer_frame(model, processor, width, height)
    shares = data.share_draws(args.option, trainable)
    order = data.Order(len(trainable), args, rank, world, shares)
    order.set_epoch(*divmod(done * args.accumulate, len(order.batches)))
    loader = DataLoader(
        data.Questions(trainable, frame_of, args),
        batch_sampler=order,
        collate_fn=lambda asked: data.collate(processor, *list(zip(*asked))[:3]),
        num_workers=args.workers,
        multiprocessing_context="fork" if args.workers else None,  # the lambdas cannot be pickled
        worker_init_fn=ignore_signals,
    )
    batches = iter(loader)
    log = open_log(folder, args, done) if rank == 0 else None
    if saved:
        restore(saved, model, optimizer, args.device)
        say(f"going on after update {done}")
        del saved

    # 4. The loop.
    stop = Stop()
    bar = tqdm(range(done + 1, steps + 1), "SFT", initial=done, total=steps, disable=rank > 0)
    for step in bar:
        start = time.time()
        lr = args.lr * cosine(step - 1, steps, args.warmup)
        for group in optimizer.param_groups:
            group["lr"] = lr
        sums = np.zeros(3)  # loss, answer tokens, all tokens
        for _ in range(args.accumulate):
            batch = {key: value.to(args.device) for key, value in next(batches).items()}
            tokens = int(batch["attention_mask"].sum())
            with sampler.mixed_precision(model):
                loss, answer_tokens = answer_loss(model, batch)
            loss.backward()
            sums += [loss.item(), answer_tokens, tokens]
        loss, answer_tokens, tokens, stopping = sum_over_processes(
            [*sums, stop.signal], args.device
        )
        sum_gradients(trained)
        for parameter in trained:
            if parameter.grad is not None:
                parameter.grad /= answer_tokens
        norm = torch.nn.utils.clip_grad_norm_(trained, args.clip).item()
        if math.isfinite(loss + norm):  # NOTE: one nan in the weights and all is nan from then on
            optimizer.step()
            in_a_row = 0
        else:
            skipped, in_a_row = skipped + 1, in_a_row + 1
        optimizer.zero_grad()
        if rank == 0:
            seconds = time.time() - start
            line = {
                "step": step,
                "loss": loss / answer_tokens,
                "grad_norm": norm,
                "lr": lr,
                "skipped": skipped,
                "tokens_per_s": tokens / seconds,
                "seconds": seconds,
            }
            write_line(log, line)
            bar.set_postfix(loss=f"{line['loss']:.3f}", lr=f"{lr:.1e}")
        check_skips(in_a_row, args.max_skips)
        if step % args.save_step == 0 or step == steps or stopping:
            rest = {"settings": settings, "before": before, "skipped": (skipped, in_a_row)}
            save_run(folder, step, args, model, processor, optimizer, rest)
        if stopping:
            bar.close()
            leave(stop, step, steps, say)
    if any(sum_over_processes([stop.signal], args.device)):  # it came while the last was saved
        leave(stop, steps, steps, say)
    stop.forget()

    # 5. What it brought.
    after = validate_both(model, processor, val, args)
    if rank == 0:
        print_gain(before, after)
    say(f"written: {folder}. Next: {next_command(folder, args)}")
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    sampler.run_script(main, get_args)
