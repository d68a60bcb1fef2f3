"""Runs killed, stopped, damaged or starved: --resume continues as if nothing had happened."""

import functools
import math
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, TINY, python, timeless
from safetensors.torch import load_file, save_file

import data
import grpo
import sampler
import sft

COMMON = "--lora_rank 4 --val_limit 0 --batch_size 2 --save_step 2 --lr 1e-3"
SFT = f"sft.py {COMMON} --accumulate 2 --lora_dropout 0.1"
GRPO = f"grpo.py --model_path {TINY} {COMMON} --max_new_tokens 24 --group 4 --mu 2"


class Runs:
    """Runs in a folder of their own."""

    def __init__(self, folder, data_root):
        self.folder, self.data_root = folder, data_root

    def start(self, command, name, processes=1):
        """Start processes that a test can look at and end."""
        output = open(self.folder / f"{name}.txt", "a+")
        process = subprocess.Popen(
            [*python(processes), str(ROOT / command.split()[0]), *self.options(command, name)],
            stdout=output,
            stderr=output,
            start_new_session=True,  # a process group of its own, as a terminal gives it
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )
        process.output = Path(output.name)
        return process

    def options(self, command, name):
        paths = f"--data_root {self.data_root} --log_dir {self.folder} --version_name {name}"
        return [*paths.split(), *command.split()[1:]]

    def finish(self, command, name, processes=1):
        """Run to the end; one process is this one."""
        if processes > 1:
            process = self.start(command, name, processes)
            assert process.wait(300) == 0, process.output.read_text()
        else:
            script = grpo if command.startswith("grpo") else sft
            script.main(script.get_args(self.options(command, name)))
        return self.folder / name

    def wait(self, process, condition):
        """Until a condition holds, or the process has ended."""
        end = time.time() + 120
        while process.poll() is None and not condition():
            assert time.time() < end, process.output.read_text()
            time.sleep(0.002)


@pytest.fixture
def runs(tmp_path, small_set):
    return Runs(tmp_path, small_set)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, small_set):
    """undisturbed(command, processes) -> the folder of a run that nobody disturbed."""
    runs = Runs(tmp_path_factory.mktemp("undisturbed"), small_set)
    return functools.cache(lambda *run: runs.finish(run[0], f"run{hash(run)}", *run[1:]))


def lines_of(run):
    return data.read_jsonl(run / "train.jsonl")


def assert_same(a, b):
    """The same weights to the bit, the same log, each update in it once."""
    files = [sorted(run.glob("**/*.safetensors")) for run in (a, b)]
    assert [file.name for file in files[0]] == [file.name for file in files[1]] != []
    for x, y in zip(*files):
        assert x.read_bytes() == y.read_bytes(), x
    steps = [lines_of(run) for run in (a, b)]
    assert [line["step"] for line in steps[0]] == list(range(1, len(steps[0]) + 1))
    assert timeless(steps[0]) == timeless(steps[1])


# ------------------------------------------------------------------------- killed or stopped


def tree(pid):
    """A process and all that it has started, also what has a session of its own."""
    children = Path(f"/proc/{pid}/task/{pid}/children")
    try:
        return [pid, *(p for child in children.read_text().split() for p in tree(child))]
    except OSError:  # it has ended meanwhile
        return []


slow = functools.partial(pytest.param, marks=pytest.mark.slow)
MANY = [slow(c, n, 20) for c in (SFT, GRPO, f"{GRPO} --lora_rank 0") for n in (1, 2)]


@pytest.mark.parametrize(("command", "processes", "kills"), [(f"{SFT} --workers 1", 1, 1), *MANY])
def test_a_killed_run_ends_with_the_weights_of_one_that_was_not(
    runs, undisturbed, capsys, command, processes, kills
):
    """Kills come at random moments, every second one while the run saves."""
    command += f" --max_step {7 * kills}"
    run, rng = runs.folder / "killed", random.Random(0)
    for i in range(kills):
        process = runs.start(f"{command} --resume", "killed", processes)
        target = len(lines_of(run)) + 3
        runs.wait(process, lambda: len(lines_of(run)) >= target)
        if i % 2:
            runs.wait(process, (run / "checkpoints/new").exists)
        time.sleep(rng.uniform(0, 0.02 if i % 2 else lines_of(run)[-1]["seconds"]))
        assert process.poll() is None, process.output.read_text()
        subprocess.run(["kill", "-KILL", *map(str, tree(process.pid))])  # at once, as a power cut
        process.wait()
    runs.finish(f"{command} --resume", "killed", processes)
    printed = (runs.folder / "killed.txt").read_text() + capsys.readouterr().out
    assert printed.count("continuing after update") == kills
    assert_same(run, undisturbed(command, processes))


STOPS = [(GRPO, 1, signal.SIGINT, 130, "Ctrl-C"), slow(SFT, 1, signal.SIGTERM, 143, "SIGTERM")]
STOPS += [slow(GRPO, 2, signal.SIGTERM, None, "SIGTERM")]


@pytest.mark.parametrize(("command", "processes", "number", "status", "said"), STOPS)
def test_a_run_that_is_asked_to_stop_saves_says_so_and_continues_later(
    runs, undisturbed, port, command, processes, number, status, said
):
    """The signal goes to the whole group: to data workers and to the reference server too."""
    here = f" --ref_url http://127.0.0.1:{port}" if command == GRPO else ""
    command += " --max_step 6"
    process = runs.start(command + ("" if here else " --workers 1"), "stopped", processes)
    runs.wait(process, lambda: len(lines_of(runs.folder / "stopped")) >= 2)
    os.killpg(process.pid, number)
    assert process.wait(60) == status or processes > 1  # torchrun has a status of its own
    printed = process.output.read_text()
    assert f"stopped by {said} after update" in printed
    assert "Traceback" not in printed or processes > 1  # torchrun's own
    run = runs.finish(f"{command} --resume{here}", "stopped", processes)
    assert_same(run, undisturbed(command + here, processes))


# ------------------------------------------------------------------------- checkpoints


@pytest.fixture(scope="module")
def trained(undisturbed):
    """The folder of a finished run with three checkpoints."""
    return undisturbed(f"{SFT} --max_step 6 --keep 3")


@pytest.fixture
def copy(trained, runs, capsys):
    """A copy of it, `folder`; resume("options") -> what was printed, the error's line included."""

    def resume(options=""):
        try:
            runs.finish(f"{SFT} --max_step 6 --keep 3 --resume {options}", "copy")
        except sampler.InputError as error:
            print(error)
        return capsys.readouterr().out

    return SimpleNamespace(folder=shutil.copytree(trained, runs.folder / "copy"), resume=resume)


def file_of(run, step):
    return run / "checkpoints" / f"{step:08}" / "rank0of1.pt"


def test_the_last_n_checkpoints_stay(copy):
    steps = lambda: sorted(int(path.name) for path in copy.folder.glob("checkpoints/*"))
    assert steps() == [2, 4, 6]
    file_of(copy.folder, 6).unlink()
    copy.resume("--keep 1")
    assert steps() == [6]


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(copy, trained):
    content = bytearray(file_of(copy.folder, 6).read_bytes())
    content[len(content) // 2] ^= 1  # a bit of a weight
    file_of(copy.folder, 6).write_bytes(content)
    file_of(copy.folder, 4).write_bytes(file_of(copy.folder, 4).read_bytes()[:100_000])
    printed = copy.resume()
    assert "00000006 is damaged" in printed and "00000004 is damaged" in printed
    assert "continuing after update 2" in printed
    assert_same(copy.folder, trained)


def test_a_run_without_a_whole_checkpoint_starts_from_the_beginning_and_says_so(copy, trained):
    for step, content in ((2, b""), (4, b"\xff\xfe"), (6, b"0" * 64)):
        file_of(copy.folder, step).write_bytes(content)
    printed = copy.resume()
    assert printed.count("is damaged") == 3 and "starts from the beginning" in printed
    assert_same(copy.folder, trained)
    assert (Path(f"{copy.folder}.1") / "model.safetensors").exists()  # it was not written over


def test_two_runs_do_not_write_to_one_folder(copy, runs):
    args, fork = sft.get_args(runs.options(SFT, "copy")), multiprocessing.get_context("fork")
    ready = fork.Event()
    other = fork.Process(target=lambda: (sft.Run(args), ready.set(), time.sleep(60)))
    other.start()
    assert ready.wait(20)
    assert f"another run is writing to {copy.folder}" in copy.resume()
    other.kill()
    other.join()
    assert "continuing after update 6" in copy.resume()


def test_no_code_of_a_checkpoint_is_run(copy, tmp_path):
    """Its checksums are right, but a plain unpickler would call what it holds."""
    path, trap = file_of(copy.folder, 6), tmp_path / "trap"
    call = type("Call", (), {"__reduce__": lambda self: (Path.touch, (trap,))})
    torch.save({"settings": {}, "step": call()}, path)
    assert "cannot be read" in copy.resume() and not trap.exists()
    torch.load(path, weights_only=False)
    assert trap.exists()


def test_other_settings_models_and_data_are_not_resumed(copy, trained, small_set, tmp_path):
    for options in ("--lr 2e-3", "--seed 1", "--max_step 7", "--split val"):
        printed = copy.resume(options)
        assert f"--resume: {options.split()[0][2:]} was" in printed and "--version_name" in printed
    assert "--resume: model was" in copy.resume(f"--model_path {trained}")
    other = shutil.copytree(small_set, tmp_path / "other")
    table = other / "demo/instances.json"
    table.write_text(table.read_text().replace('"name": "', '"name": "other ', 1))
    assert "--resume: checksum of the data was" in copy.resume(f"--data_root {other}")


def test_a_run_continues_with_the_same_sam_wherever_it_lies(runs, tmp_path, capsys):
    command = f"{GRPO} --max_step 1 --beta 0 --reward mask"
    runs.finish(command, "masks")
    weights, moved = load_file(sampler.TINY_SAM), tmp_path / "sam.safetensors"
    shutil.copy(sampler.TINY_SAM, moved)
    runs.finish(f"{command} --resume --sam_ckpt {moved}", "masks")
    assert "continuing after update 1" in capsys.readouterr().out
    next(iter(weights.values())).view(-1)[0] += 1
    save_file(weights, moved)
    with pytest.raises(sampler.InputError, match="--resume: checksum of --sam_ckpt was"):
        runs.finish(f"{command} --resume --sam_ckpt {moved}", "masks")


def test_an_earlier_run_of_the_same_name_is_set_aside(copy, trained):
    assert f"is now in {copy.folder}.1" in copy.resume("--no-resume --max_step 1")
    assert_same(Path(f"{copy.folder}.1"), trained)
    assert len(lines_of(copy.folder)) == 1


# the largest file in bytes: settings, adapter, checkpoint, or at the end merged weights do not fit
@pytest.mark.parametrize("most", [500, 100_000, 3_000_000, 7_000_000])
def test_a_write_that_fails_ends_the_run_in_one_line_and_loses_nothing(copy, trained, most):
    for step in (4, 6):
        shutil.rmtree(file_of(copy.folder, step).parent)
    usual = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, usual[1]))
    try:
        printed = copy.resume()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, usual)
    last = printed.splitlines()[-1]
    assert last.startswith("cannot write") and "--resume" in last
    assert ("checkpoints/new" in last) == (most == 3_000_000)
    assert f"continuing after update {4 if most == 7_000_000 else 2}" in copy.resume()
    assert_same(copy.folder, trained)


def test_an_update_that_is_not_finite_is_skipped_counted_and_in_the_end_an_error(
    copy, trained, monkeypatch
):
    whole, calls = sft.answer_loss, iter(range(100))

    def answer_loss(model, batch):
        loss, tokens = whole(model, batch)
        return loss * (math.inf if next(calls) in broken else 1), tokens

    monkeypatch.setattr(sft, "answer_loss", answer_loss)
    broken = range(1, 2)  # the second micro-batch of the first update
    copy.resume("--no-resume")
    lines = lines_of(copy.folder)
    assert [line["skipped"] for line in lines] == [1] * 6
    assert lines[0]["loss"] is None and lines[0]["grad_norm"] is None and lines[1]["loss"] > 0
    weights = load_file(copy.folder / "model.safetensors")
    assert all(weight.isfinite().all() for weight in weights.values())
    broken = range(1000)
    assert "3 updates in a row" in copy.resume("--no-resume --max_skips 3")


def test_a_gradient_that_is_not_finite_is_skipped_too(copy, monkeypatch):
    monkeypatch.setattr(sft, "sum_gradients", lambda trained, _: trained[0].grad.fill_(math.nan))
    assert "2 updates in a row" in copy.resume("--no-resume --max_skips 2")
    lines = lines_of(copy.folder)
    assert [line["grad_norm"] for line in lines] == [None, None] and lines[0]["loss"] > 0


def test_the_number_of_data_workers_changes_nothing(copy, trained):
    for workers in (1, 2):
        copy.resume(f"--no-resume --workers {workers}")
        assert_same(copy.folder, trained)
