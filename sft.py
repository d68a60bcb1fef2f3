"""Stage one of training: supervised fine-tuning (SFT) on boxes and point labels.

1. Every micro-batch has one task: the box of a phrase, or the labels of a grid of points in a box
   (`--point_ratio`). The box of that grid is jittered, or belongs to another object
   (`--miss_ratio`), as a predicted box may be off. Answers show no reasoning, unless
   `--think_ratio` asks for some. With `--prompts sam` one task takes the place of both: all
   instances as a list, after a line of reasoning.
2. The loss is the cross-entropy of the answer's tokens:

       loss = - sum_t log p(answer_t | image, prompt, answer_<t) / number of answer tokens

   Sum and count run over all micro-batches *and* processes of an update, so N processes take the
   same step as one process with N times the batch.
3. AdamW trains LoRA on the language model and the whole vision merger; everything else is frozen.
   `--lora_rank 0` trains all parameters. Cosine schedule with warm-up, clipped gradients.
4. The result is a Hugging Face folder, <log_dir>/<version_name>, with the adapter in adapter/ in
   PEFT's layout, and train.jsonl, one line per update: `loss` per answer token; `grad_norm` before
   clipping; `skipped`, updates so far that were left out because a number was not finite.
5. `--resume` continues a run that was cut off as if nothing had happened, on a CPU bit for bit.
   Ctrl-C and SIGTERM finish the update, save and exit. The class `Run` does this, for GRPO too. On
   a first reading, skip it, and go from `answer_loss` to `main`.

    python sft.py                                   # the demo: minutes on two CPU cores
    python sft.py --resume                          # continue a run that was cut off
    python sft.py --option demo_reason --prompts sam --version_name sft_reason
    torchrun --nproc_per_node 4 sft.py --model_path Qwen/Qwen3-VL-8B-Instruct \\
        --data_root /path/to/RRSIS-D --option RRSISD
"""

import argparse
import json
import math
import os
import shutil
import signal
import time
import zipfile
import zlib
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils._pytree import tree_map
from torch.utils.data import DataLoader
from tqdm import tqdm

import data
import sampler
from eval import validate
from sampler import InputError, error_border, number

# (the recipe for an 8 B model, the demo): a small model wants a larger learning rate and no
# dropout, and takes a batch of 16 in hardly more time than one of 1.
DEFAULTS = dict(
    lr=(5e-5, 5e-3),
    lora_dropout=(0.05, 0.0),
    batch_size=(1, 16),
    accumulate=(8, 2),
    max_step=(0, 370),
    save_step=(500, 50),
    point_ratio=(0.5, 0.4),
    val_batch_size=(32, 64),
    workers=(min(4, os.cpu_count() or 1), 0),
)


def get_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = add_common_flags(parser, DEFAULTS)
    add("--model_path", default=str(sampler.TINY_VLM), help="Hugging Face folder or hub name")
    add("--version_name", default="sft", help="name of this run")
    add("--point_ratio", type=number(float, 0, 1), help="share of batches on the point task")
    add("--think_ratio", type=number(float, 0, 1), default=0.0, help="share of reasoned answers")
    add("--lora_dropout", type=number(float, 0, 1), help="dropout on LoRA's input")
    add(
        "--epochs",
        type=number(float, 1e-9),
        default=2,
        help="passes over the split, if --max_step is 0",
    )
    add("--workers", type=number(int, 0), help="processes that load data")
    add("--val_limit", type=number(int, 0), default=200, help="validation samples; 0: none")
    return fill_defaults(parser.parse_args(argv), DEFAULTS)


# ------------------------------------------------------------------------- loss and schedule


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


# ------------------------------------------------------------------------- flags of both stages


def add_common_flags(parser, defaults):
    """The flags of both stages. Returns the function that adds further ones. Flags in `defaults`
    have two defaults: one for real data sets, one for the demo."""
    add_flag = sampler.flag_adder(parser)

    def add(name, **options):
        if name.strip("-") in defaults:  # fill_defaults chooses, once the data set is known
            recipe, demo = defaults[name.strip("-")]
            options["help"] += f" (default {recipe}; demo {demo})"
            options["default"] = None
        add_flag(name, **options)

    on_off, share = argparse.BooleanOptionalAction, number(float, 0, 1)
    count, natural, positive = number(int, 1), number(int, 0), number(float, 0)
    # data and tasks
    add("--option", default="demo", help="set: demo, RRSISD, refsegrs ...; several: a,b or a:2,b")
    add("--data_root", default="demo_data", help="folder that holds the data set")
    add("--split", default="train", help="split to train on")
    add("--skip_bad", action=on_off, default=False, help="leave bad records out, and list them")
    add("--prompts", choices=["points", "sam"], default="points", help=data.PROMPTS_HELP)
    add("--miss_ratio", type=share, default=0.15, help="share of grids in any object's box")
    add("--jitter", type=positive, default=0.1, help="box jitter of the point task, in box sides")
    # optimisation
    add("--lora_rank", type=natural, default=64, help="rank of LoRA; 0 trains all parameters")
    add("--lora_alpha", type=count, default=128, help="LoRA's update is scaled by alpha / rank")
    add("--lr", type=positive, help="peak learning rate")
    add("--weight_decay", type=positive, default=0.01, help="AdamW's weight decay")
    add("--batch_size", type=count, help="samples per process and micro-batch")
    add("--accumulate", type=count, help="micro-batches per update")
    add("--max_step", type=natural, help="stop after so many updates; 0: --epochs decides")
    add("--warmup", type=share, default=0.03, help="share of the updates in which the rate rises")
    add("--clip", type=number(float, 1e-9), default=1.0, help="largest gradient norm")
    add("--max_skips", type=count, default=5, help="end after so many nan or inf updates in a row")
    # system and output
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda or cpu")
    add("--gradient_checkpointing", action=on_off, default=False, help="less memory, more time")
    add(
        "--seed",
        type=number(int, 0, 2**32),
        default=0,
        help="of data order, tasks, jitter and sampling",
    )
    add("--log_dir", default="runs", help="results go to <log_dir>/<version_name>")
    add("--merge", action=on_off, default=True, help="write merged weights, too, at the end")
    add("--save_step", type=count, help="save every so many updates, and at the end")
    add("--save_minutes", type=positive, default=15, help="and after so many minutes")
    add("--keep", type=count, default=2, help="checkpoints that stay")
    add("--resume", action=on_off, default=False, help="continue from the last checkpoint")
    add("--val_batch_size", type=count, help="validation samples per process and batch")
    return add


def fill_defaults(args, defaults):
    """Set what was not given; --option says which of the two defaults applies."""
    for key, (recipe, demo) in defaults.items():
        if getattr(args, key) is None:
            setattr(args, key, demo if data.is_demo(args.option) else recipe)
    return args


# ------------------------------------------------------------------------- how a run is kept
# <run>/checkpoints/<update>/rank<r>of<n>.pt holds what process r needs to continue as if it had
# never stopped. Process 0 also holds what all have in common.

# When a run is resumed, all settings but these must be as they were. Of --model_path, --data_root
# and --sam_ckpt the content is compared, not the path.
MAY_DIFFER_ON_RESUME = """model_path data_root sam_ckpt log_dir version_name resume keep save_step
save_minutes max_skips merge workers skip_bad device gradient_checkpointing val_batch_size ref_url
ref_device ref_patience reference""".split()


# A terminal that is closed sends SIGHUP, which Windows does not have.
STOPPING = {signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)}


class Run:
    """A training run: its processes, folder, log, checkpoints, and the signals that stop it."""

    def __init__(self, args):
        """Join the processes that torchrun started, if any, and lock the folder."""
        self.args, self.folder = args, Path(args.log_dir) / args.version_name
        if Path(args.model_path).resolve().is_relative_to(self.folder.resolve()):
            raise InputError(
                f"--model_path {args.model_path} would be moved: give a --version_name"
            )
        joined = sampler.join_processes(args.device)
        self.rank, self.world, self.local_rank, self.device = joined
        sampler.check_device(self.device)
        self.is_cuda = self.device.startswith("cuda")
        # full fine-tuning needs float32 weights: updates of 1e-5 vanish in bfloat16
        self.dtype = torch.bfloat16 if self.is_cuda and args.lora_rank else torch.float32
        # those of several processes are gathered in bfloat16 (sampler.shard_parameters)
        self.reference_dtype = torch.bfloat16 if self.is_cuda and self.world > 1 else self.dtype
        self.done, self.skipped, self.skipped_in_a_row = 0, 0, 0  # updates
        self.signal = 0  # the number of the signal that came, if any
        self.saved_at = time.time()
        if self.rank == 0:
            self.lock = sampler.lock_folder(self.folder)

    def catch_signals(self):
        """From now on, let the loop finish its update. A Ctrl-C after that ends it at once."""

        def note_signal(number, frame):
            self.signal = number
            signal.signal(signal.SIGINT, signal.default_int_handler)

        for ending in STOPPING:
            if signal.getsignal(ending) != signal.SIG_IGN:  # as nohup has it for SIGHUP
                signal.signal(ending, note_signal)

    def print0(self, text):
        if self.rank == 0:
            print(text, flush=True)

    def barrier(self):
        if self.world > 1:
            dist.barrier()

    def sum(self, values):
        """Numbers, each summed over all processes."""
        values = torch.tensor(values, dtype=torch.float64, device=self.device)
        if self.world > 1:
            dist.all_reduce(values)
        return values.tolist()

    def make_optimizer(self, parameters):
        options = {"lr": self.args.lr, "weight_decay": self.args.weight_decay}
        return torch.optim.AdamW(parameters, fused=self.is_cuda, **options)

    def update(self, optimizer, parameters, loss, divide_by=1):
        """Take one optimizer step with the sum of the gradients of all processes, divided by
        `divide_by`; return its norm. NOTE: a step whose gradient, or loss (of all processes), is
        nan or infinite is skipped and counted, as it would spoil all weights."""
        if not is_sharded(parameters):  # else FSDP2 has done it
            sum_gradients(parameters, self.world)
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad /= divide_by
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.args.clip)
        norm = (norm.full_tensor() if is_sharded([norm]) else norm).item()
        if math.isfinite(loss + norm):
            optimizer.step()
            self.skipped_in_a_row = 0
        else:
            self.skipped, self.skipped_in_a_row = self.skipped + 1, self.skipped_in_a_row + 1
        optimizer.zero_grad()
        return norm

    def resume(self, model, processor, samples):
        """With --resume the newest whole checkpoint, else None; opens the log. InputError if the
        checkpoint is of another run."""
        ignored = lambda key: key in MAY_DIFFER_ON_RESUME
        settings = {key: value for key, value in vars(self.args).items() if not ignored(key)}
        settings["model"] = f"{model.dtype}, fingerprint {sampler.fingerprint(model, processor)}"
        self.base_fingerprint = sampler.fingerprint(model, processor, torch.bfloat16)
        settings["checksum of the data"] = data.checksum(samples)
        if "mask" in getattr(self.args, "reward", ()):
            weights = b"".join(p.read_bytes() for p in sampler.weight_files(self.args.sam_ckpt))
            settings["checksum of --sam_ckpt"] = zlib.crc32(weights or self.args.sam_ckpt.encode())
        self.settings = settings
        saved = self.read_newest_checkpoint() if self.args.resume else None
        if saved:
            old = saved["settings"]
            changed = [
                f"{key} was {old.get(key)} and is {value}"
                for key, value in settings.items()
                if old.get(key) != value
            ]
            if changed:
                remedy = "repeat the settings of the run (args.json), or give a --version_name"
                raise InputError(f"--resume: {', '.join(changed)}: {remedy}")
            self.done, (self.skipped, self.skipped_in_a_row) = saved["step"], saved["skipped"]
            self.print0(f"continuing after update {self.done}")
        elif self.args.resume:
            self.print0(f"no whole checkpoint in {self.folder}: the run starts from the beginning")
        if self.rank == 0:
            self.open_log()
        return saved

    def checkpoints(self):
        """Their paths, the oldest first."""
        return sorted(p for p in self.folder.glob("checkpoints/*") if p.name.isdigit())

    def read_newest_checkpoint(self):
        """The dict of process 0 with this process's own entries in it; None if none is whole."""
        step, paths = 0, self.checkpoints() if self.rank == 0 else []
        for path in reversed(paths):
            problem = checkpoint_error(path)
            if problem is None:
                step = int(path.name)
                break
            print(f"NOTE: checkpoint {path} is damaged ({problem}) and left out")
        (step,) = self.sum([step])  # process 0 has looked for all
        if not step:
            return None
        path, saved = self.folder / "checkpoints" / f"{int(step):08}", {}
        remedy = f"it must be ours, and of {self.world} processes"
        with error_border(f"--resume: {path} cannot be read", remedy):
            for rank in (0, self.rank):  # NOTE: weights_only, so that a file cannot run code
                file = path / f"rank{rank}of{self.world}.pt"
                saved |= torch.load(file, "cpu", weights_only=True, mmap=True)
            return {**saved, "settings": dict(saved["settings"])}  # raises for another program's

    def open_log(self):
        """train.jsonl, without the lines of updates that will be repeated. An earlier run of the
        same name is moved, not overwritten."""
        folder, path = self.folder, self.folder / "train.jsonl"
        names = ("checkpoints", "config.json", "adapter")
        is_used = any((folder / name).exists() for name in names)
        if not self.done and (is_used or (path.exists() and not self.args.resume)):
            aside = next(p for i in range(1, 10**6) if not (p := Path(f"{folder}.{i}")).exists())
            os.replace(folder, aside)
            print(
                f"NOTE: the run that was in {folder} is now in {aside}: move it back to --resume it"
            )
        with self.writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "args.json").write_text(json.dumps(vars(self.args)))
            kept = [row for row in data.read_jsonl(path) if row["step"] <= self.done]
            path.with_suffix(".new").write_text("".join(json.dumps(row) + "\n" for row in kept))
            os.replace(path.with_suffix(".new"), path)
        self.file = open(path, "a")

    def writing(self, path):
        """The border around writing to disk."""
        remedy = "earlier checkpoints are whole, make room and continue with --resume"
        return error_border(f"cannot write {path}", remedy)

    def log(self, line):
        """Write one JSON object. What is not finite is null, as JSON has no nan. InputError after
        --max_skips skipped updates in a row."""
        finite = lambda v: None if isinstance(v, float) and not math.isfinite(v) else v
        if self.rank == 0:
            with self.writing(self.file.name):
                self.file.write(json.dumps({k: finite(v) for k, v in line.items()}) + "\n")
                self.file.flush()
        if self.skipped_in_a_row >= self.args.max_skips:
            reason = "as loss or gradient was nan or infinite: start again with a lower --lr"
            raise InputError(f"{self.skipped_in_a_row} updates in a row were skipped, {reason}")

    def validate(self, model, processor, val):
        """eval.validate with the settings of this run."""
        args = self.args
        options = args.prompts, args.val_batch_size, args.val_limit
        with sampler.merged_inference(model):
            return validate(model, processor, val, *options)

    def is_due(self):
        """Whether the last checkpoint is --save_minutes old. Only process 0's clock counts."""
        return self.rank == 0 and time.time() - self.saved_at > 60 * self.args.save_minutes

    def save(self, step, model, processor, optimizer, before, is_last):
        """Write the adapter, after the last update also the whole model, then the checkpoint. All
        processes call it.

        The checkpoint is written beside and renamed, so it is there as a whole or not at all.
        """
        own = {"torch": torch.get_rng_state()}
        if self.is_cuda:
            own["cuda"] = torch.cuda.get_rng_state(self.device)
        parameters = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        shards = is_sharded([p for _, p in parameters])
        if self.rank == 0 or shards:  # else all processes have the same
            own["optimizer"] = tree_map(local_part, optimizer.state_dict())
            own["trained"] = {name: local_part(p.detach()) for name, p in parameters}
        if self.rank == 0:
            own |= {"step": step, "before": before, "settings": self.settings}
            own["skipped"] = self.skipped, self.skipped_in_a_row
        whole = whole_state(model) if shards and is_last else None
        new = self.folder / "checkpoints" / "new"
        if self.rank == 0:
            with self.writing(self.folder):
                if self.args.lora_rank:
                    names = self.folder / "adapter", self.args.model_path, self.base_fingerprint
                    sampler.save_adapter(model, *names)
                if is_last and (self.args.merge or not self.args.lora_rank):
                    sampler.save_policy(model, processor, self.folder, whole)
                else:  # an older model in this folder would be loaded instead of the adapter
                    (self.folder / "config.json").unlink(missing_ok=True)
                shutil.rmtree(new, ignore_errors=True)  # of a run that was killed while saving
                new.mkdir(parents=True)
        self.barrier()
        with self.writing(new):
            torch.save(own, new / f"rank{self.rank}of{self.world}.pt")
        self.barrier()
        if self.rank == 0:
            shutil.rmtree(new.with_name(f"{step:08}"), ignore_errors=True)  # a damaged one
            os.replace(new, new.with_name(f"{step:08}"))
            for old in self.checkpoints()[: -self.args.keep]:
                shutil.rmtree(old)
        self.saved_at = time.time()
        self.barrier()  # nobody goes on, or ends, before it is there

    def restore(self, saved, model, optimizer):
        """Put everything where it was when `saved` was written."""
        parameters = dict(model.named_parameters())
        for name, value in saved["trained"].items():
            local_part(parameters[name].data).copy_(value)
        optimizer.load_state_dict(saved["optimizer"])
        for parameter, state in optimizer.state.items() if is_sharded(parameters.values()) else ():
            for name, value in state.items():
                if name != "step":  # a number, not a tensor like the parameter
                    state[name] = as_part_of(parameter, value)
        torch.set_rng_state(saved["torch"])
        if self.is_cuda:
            torch.cuda.set_rng_state(saved["cuda"], self.device)

    def exit_if_stopped(self, step, steps):
        """If a signal came to any process, end with the status that shells give for it."""
        if not any(self.sum([self.signal])):
            return
        number = self.signal or signal.SIGTERM
        name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
        done = f"after update {step} of {steps}, saved: --resume continues there"
        self.print0(f"\nstopped by {name} {done}")
        if self.world > 1:
            dist.destroy_process_group()
        raise SystemExit(128 + number)

    def finish(self, model, processor, val, before, flags=""):
        """Validate again, print the change and what to do next, and leave the process group."""
        for ending in STOPPING:
            signal.signal(ending, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        after = self.validate(model, processor, val)
        for name, old in before.items():
            new = after[name]
            self.print0(
                f"val, {name:<8}: box IoU {old['box_iou']:.3f} -> {new['box_iou']:.3f}, "
                f"point accuracy {old['point_acc']:.3f} -> {new['point_acc']:.3f}"
            )
        if not data.is_demo(self.args.option) or self.args.prompts == "sam":
            names = ",".join(data.parse_option(self.args.option))
            flags += f" --option {names} --data_root {self.args.data_root}"
            flags += f" --prompts {self.args.prompts}"
        command = f"python eval.py{flags} --eval_model_path {self.folder}"
        self.print0(f"written: {self.folder}. Next: {command}")
        self.barrier()
        if self.world > 1:
            dist.destroy_process_group()


# FSDP2 (see sampler.shard_parameters): a process has a part of each parameter, as a DTensor. What
# torch has for that is imported where it is needed, as the import takes a second.


def is_sharded(tensors):
    return any(hasattr(tensor, "to_local") for tensor in tensors)


def local_part(tensor):
    """This process's part of a tensor; one that is not sharded as it is."""
    return tensor.to_local() if is_sharded([tensor]) else tensor


def whole_state(model):
    """All weights of a sharded model, for process 0; {} for the others. All processes call it."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_model_state_dict(model, options=options)
    if model.lm_head.weight is model.get_input_embeddings().weight:
        state.pop("lm_head.weight", None)  # the same tensor
    return state


def as_part_of(parameter, local):
    """A DTensor like a sharded parameter, of which this process has the part `local`."""
    from torch.distributed.tensor import DTensor

    options = {"shape": parameter.shape, "stride": parameter.stride()}
    return DTensor.from_local(local, parameter.device_mesh, parameter.placements, **options)


def sum_gradients(parameters, world):
    """Sum gradients over all processes, also over one that had nothing to train on."""
    if world > 1:
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            dist.all_reduce(parameter.grad)


def checkpoint_error(checkpoint):
    """What is wrong with a checkpoint's files, or None."""
    names = sorted(path.name for path in checkpoint.glob("rank*.pt"))
    world = int(names[0].removesuffix(".pt").partition("of")[2]) if names else 1
    for path in (checkpoint / f"rank{rank}of{world}.pt" for rank in range(world)):
        try:  # NOTE: torch.load compares no checksums
            with zipfile.ZipFile(path) as archive:
                if bad := archive.testzip():
                    return f"{path.name}: {bad} is not what was written"
        except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
            return f"{path.name}: {error}"
    return None


def ignore_signals(*_):
    """For data workers: a Ctrl-C reaches them too, and the loop still needs them."""
    for ending in STOPPING:
        signal.signal(ending, signal.SIG_IGN)


# ------------------------------------------------------------------------- main


def main(args):
    # 1. Processes, data, model; with --resume, the last checkpoint.
    run = Run(args)
    train, val = data.load_for_training(args)
    model, processor = sampler.load_policy(args.model_path, run.device, run.dtype)
    run.print0(f"model: {args.model_path}, {len(train)} refs of {args.option}/{args.split}")
    saved = run.resume(model, processor, train + val)

    # 2. What is trained.
    torch.manual_seed(args.seed + run.rank)
    trained = sampler.make_trainable(model, args, args.lora_dropout)
    before = saved["before"] if saved else run.validate(model, processor, val)
    optimizer = run.make_optimizer(trained)
    per_update = args.batch_size * run.world * args.accumulate
    steps = args.max_step or math.ceil(args.epochs * len(train) / per_update)
    run.print0(f"{sum(p.numel() for p in trained):,} trained parameters, {steps} updates")

    # 3. Batches, in an order that follows from the seed and the number of updates done.
    frame_of = lambda width, height: sampler.answer_frame(model, processor, width, height)
    order = data.PromptSampler(data.mixture_counts(args.option, train), args, run.rank, run.world)
    order.skip(run.done * args.accumulate)

    def collate(prompts):
        columns = zip(*((p.image, p.text, p.answer) for p in prompts))
        batch = data.collate(processor, *map(list, columns))
        # NOTE: workers send arrays through a pipe, but tensors through /dev/shm: where it is small
        # (64 MB in Docker), they would wait for ever
        return {key: value.numpy() for key, value in batch.items()}

    loader = DataLoader(
        data.PromptDataset(train, frame_of, args),
        batch_sampler=order,
        collate_fn=collate,
        num_workers=args.workers,
        multiprocessing_context="fork" if args.workers else None,  # closures cannot be pickled
        worker_init_fn=ignore_signals,
    )
    batches = iter(loader)
    if saved:
        run.restore(saved, model, optimizer)
        del saved

    # 4. The loop.
    run.catch_signals()
    bar = tqdm(
        range(run.done + 1, steps + 1), "SFT", initial=run.done, total=steps, disable=run.rank > 0
    )
    for step in bar:
        start = time.time()
        lr = args.lr * cosine(step - 1, steps, args.warmup)
        for group in optimizer.param_groups:
            group["lr"] = lr
        sums = [0.0, 0, 0]  # loss, answer tokens, all tokens
        for _ in range(args.accumulate):
            arrays = next(batches)
            batch = {key: torch.from_numpy(a).to(run.device) for key, a in arrays.items()}
            tokens = int(arrays["attention_mask"].sum())
            with sampler.mixed_precision(model):
                loss, answer_tokens = sampler.call(answer_loss, model, batch)
            loss.backward()
            sums = [a + b for a, b in zip(sums, (loss.item(), answer_tokens, tokens))]
        loss, answer_tokens, tokens, stopping, is_due = run.sum([*sums, run.signal, run.is_due()])
        norm = run.update(optimizer, trained, loss, divide_by=answer_tokens)
        seconds = time.time() - start
        line = {
            "step": step,
            "loss": loss / answer_tokens,
            "grad_norm": norm,
            "lr": lr,
            "skipped": run.skipped,
            "tokens_per_s": tokens / seconds,
            "seconds": seconds,
        }
        bar.set_postfix(loss=f"{line['loss']:.3f}", lr=f"{lr:.1e}")
        run.log(line)
        is_last = step == steps or stopping
        if step % args.save_step == 0 or is_due or is_last:
            run.save(step, model, processor, optimizer, before, is_last)
        if is_last:
            run.exit_if_stopped(step, steps)

    # 5. Validate again.
    run.finish(model, processor, val, before)


if __name__ == "__main__":
    sampler.run_script(main, get_args)
