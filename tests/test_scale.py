"""What large models need: speed on GPUs, sharded parameters, several machines."""

import socket
import subprocess
import sys
from contextlib import contextmanager
from types import SimpleNamespace

import families
import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, TINY, timeless
from PIL import Image
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

import data
import grpo
import sampler

GROUP = 3
LORA = SimpleNamespace(lora_rank=4, lora_alpha=8, gradient_checkpointing=False)


def trainable(model):
    """The model with LoRA that is not at its start, and what trains."""
    trained = sampler.make_trainable(model, LORA, dropout=0.0)
    for module in model.modules():
        if isinstance(module, sampler.LoRALinear):
            torch.nn.init.normal_(module.lora_B.weight, std=0.05)
    return trained


def rollout(model, processor):
    """Five prompts of unlike lengths, with unlike images, and completions of unlike lengths."""
    sizes = [(40, 30), (90, 60), (56, 56), (30, 80), (64, 64)]
    images = [Image.effect_noise(size, 90).convert("RGB") for size in sizes]
    texts = [data.box_prompt("ship " * (1 + 3 * i), think=i % 2 == 0) for i in range(5)]
    prompt = data.collate(processor, images, texts)
    ids, mask, logp = sampler.sample_group(model, processor, prompt, GROUP, 12)
    lengths = torch.tensor([2, 12, 5, 1, 9]).repeat_interleave(GROUP)[:, None]
    mask = mask & (torch.arange(mask.shape[1]) < lengths)
    return grpo.Rollout(prompt, ids, mask, logp, [], None, adv=torch.randn(5 * GROUP, 1))


@pytest.mark.parametrize("kind", families.QWEN + families.TILED)
def test_scoring_in_micro_batches_of_like_length_changes_no_gradient(kind):
    model, processor = families.small_policy(kind)
    trained, found = trainable(model), []
    whole = rollout(model, processor)
    parts = grpo.split(whole, GROUP, 2)
    assert [len(part.adv) for part in parts] == [2 * GROUP, 2 * GROUP, GROUP]
    count = lambda r: r.prompt["input_ids"].numel() + r.completions.numel()
    assert sum(map(count, parts)) < count(whole)
    for batches in ([whole], parts):
        for r in batches:
            logp = sampler.completion_logps(model, r.prompt, r.completions, r.mask, 0.9)
            (logp * r.adv).sum().backward()
        found.append(torch.cat([p.grad.flatten() for p in trained if p.grad is not None]))
        model.zero_grad()
    assert (found[0] - found[1]).norm() < 1e-5 * found[0].norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_reference_inside_the_policy_has_the_bits_of_one_that_is_loaded(dtype):
    other, _ = sampler.load_policy(dtype=dtype)
    model, processor = sampler.load_policy(dtype=dtype)
    trained = sampler.make_trainable(model, LORA, dropout=0.0)
    reference, optimizer = grpo.PolicyReference(model), torch.optim.AdamW(trained, 1e-2)
    r = rollout(model, processor)
    question = r.prompt, r.completions, r.mask, 0.9
    for _ in range(2):
        sampler.completion_logps(model, *question).sum().backward()
        optimizer.step()
    with torch.no_grad():
        expected = sampler.completion_logps(other, *question)
        before = sampler.completion_logps(model, *question)
        assert torch.equal(reference.start(*question)(), expected)
        assert torch.equal(sampler.completion_logps(model, *question), before)
        assert sampler.sample_group(model, processor, r.prompt, GROUP, 2)[0].shape[1] <= 2
    assert (before - expected).abs().max() > 0.1


@pytest.mark.parametrize("kind", families.QWEN + families.TILED)
def test_layers_in_one_kernel_compute_what_those_of_transformers_compute(kind):
    model, processor = families.small_policy(kind)
    prompt = rollout(model, processor).prompt
    before = model(**prompt).logits
    sampler.use_fused_layers(model)
    norms = [m for m in model.modules() if type(m).__name__.endswith("RMSNorm")]
    fused = [m for m in model.modules() if "forward" in vars(m)]
    assert set(norms) <= set(fused) or kind == "Qwen3_5"  # its norms have another formula
    assert (model(**prompt).logits - before).abs().max() < 1e-4 * before.abs().max()


def test_float32_weights_that_compute_in_bfloat16_may_share_rows(monkeypatch):
    """As full fine-tuning has them on CUDA: its rounding is that of bfloat16."""
    monkeypatch.setattr(sampler, "is_half", lambda model: True)
    model, _ = sampler.load_policy()
    assert model.can_share and model.dtype == torch.float32


def test_processes_of_a_machine_load_one_after_another(monkeypatch):
    barriers = []
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 3)
    monkeypatch.setattr(torch.distributed, "barrier", lambda: barriers.append(1))
    for rank in range(3):
        barriers.clear()
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        with sampler.in_turns(True):
            assert len(barriers) == rank
        assert len(barriers) == 3


class Recordable(TorchDispatchMode):
    """Raises for what a CUDA graph cannot record: values on the CPU, shapes that depend on them."""

    FORBIDDEN = ("item", "_local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "equal")
    FORBIDDEN += ("lift_fresh",)  # a new tensor from a list or number is copied to the GPU

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name().partition("::")[2].partition(".")[0]
        has_mask = "index" in name and any(
            getattr(index, "dtype", None) == torch.bool
            for arg in args
            if isinstance(arg, (list, tuple))
            for index in arg
        )
        assert name not in self.FORBIDDEN and not has_mask, name
        return function(*args, **(kwargs or {}))


def run_under(mode, step):
    with mode:
        step()


KINDS = [("Qwen3VL", False)]
KINDS += [(kind, True) for kind in ["Qwen2VL", "Qwen2_5_VL", "Qwen3VL", *families.TILED]]


@pytest.mark.parametrize(("kind", "lora"), KINDS)
def test_steps_of_one_shape_sample_what_the_growing_cache_samples(kind, lora):
    model, processor = families.small_policy(kind)
    if lora:
        trainable(model)
    prompt = rollout(model, processor).prompt
    ends = sampler.end_ids(model, processor)
    model.lm_head.weight.data[ends] *= 3  # some completions end early
    found = []
    record = lambda step: lambda: run_under(Recordable(), step)
    for function, options in ((sampler.decode, ()), (sampler.decode_in_steps, (record,))):
        prefix = sampler.prefill(model, prompt)
        found.append(function(model, processor, prefix, GROUP, 20, 0, *options))
    for one, other in zip(*found):
        assert torch.allclose(one.float(), other.float(), atol=1e-5)


def test_sharded_parameters_score_with_the_bits_of_their_reference(monkeypatch):
    """On CUDA they are gathered in bfloat16, in which grpo.py loads their reference."""
    monkeypatch.setattr(sampler, "is_half", lambda model: True)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    reference, _ = sampler.load_policy(dtype=torch.bfloat16)
    monkeypatch.setenv("LOCAL_RANK", "0")
    model, processor = sampler.load_policy()
    sampler.make_trainable(model, SimpleNamespace(**{**vars(LORA), "lora_rank": 0}), dropout=0.0)
    r = rollout(model, processor)
    question = r.prompt, r.completions, r.mask, 0.9
    with torch.no_grad():
        expected = sampler.completion_logps(reference, *question)
    logp = sampler.call(sampler.completion_logps, model, *question)
    logp.sum().backward()
    dist.destroy_process_group()
    assert torch.equal(logp, expected)
    assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {torch.float32}


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_sharded_parameters_are_updated_as_those_of_one_process(
    run, small_set, tmp_path, processes
):
    common = f"--model_path {TINY} --data_root {small_set} --lora_rank 0 --lr 1e-4 --max_step 5"
    for count in (1, processes):
        size = f"--batch_size {4 // count} --accumulate 1 --val_limit 0 --version_name {count}"
        run(f"sft.py {common} {size}", count)
    paths = [tmp_path / "runs" / str(count) / "model.safetensors" for count in (1, processes)]
    one, other = map(load_file, paths)
    base = load_file(f"{TINY}/model.safetensors")
    norm = lambda tensors: sum((t.double() ** 2).sum() for t in tensors) ** 0.5
    moved = norm(one[k] - base[k] for k in base)
    assert norm(one[k] - other[k] for k in base) < 1e-3 * moved


def test_sampling_goes_on_where_a_step_cannot_be_recorded(monkeypatch):
    """And the random generator, the stream and the device are as they were."""
    calls = []

    class Generator:
        clone_state = lambda self: "as it was"
        graphsafe_set_state = lambda self, state: calls.append(state)

    @contextmanager
    def graph(*args, **options):
        yield
        raise RuntimeError("operation not permitted when stream is capturing")

    cuda = {"CUDAGraph": object, "graph": graph, "current_stream": lambda: "usual stream"}
    cuda |= {"current_device": lambda: 0, "default_generators": [Generator()]}
    for name, value in {**cuda, "set_stream": calls.append}.items():
        monkeypatch.setattr(torch.cuda, name, value)
    step = lambda: None
    with pytest.warns(match="sampling is slower.*not permitted"):
        assert sampler.record_graph(step) is step
    assert calls == ["usual stream", "as it was"]
    monkeypatch.setattr(torch.cuda, "set_device", calls.append)
    monkeypatch.setattr(torch, "empty", lambda *args, device: None)
    sampler.check_device("cuda:1")
    assert calls[2:] == ["cuda:1"]


SHORT = "--accumulate 1 --max_step 5 --batch_size 2 --val_limit 6 --save_step 2"
STAGES = [
    f"sft.py --model_path {TINY} {SHORT}",
    f"sft.py --model_path {TINY} {SHORT} --lora_rank 0 --lr 1e-4 --version_name full",
    f"grpo.py {SHORT} --max_new_tokens 40",
    f"grpo.py {SHORT} --max_new_tokens 40 --lora_rank 0 --lr 1e-5 --version_name all",
    "eval.py --use_think",
]


@pytest.mark.slow
def test_two_machines_are_one_with_as_many_processes(small_set, tmp_path):
    """Each has its own torchrun and reference server."""
    found = {}
    for nodes in (1, 2):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"--master_addr 127.0.0.1 --master_port {free.getsockname()[1]}"
        common = f"--data_root {small_set} --log_dir {tmp_path / str(nodes)}"
        torchrun = f"-m torch.distributed.run --nnodes {nodes} --nproc_per_node {2 // nodes}"
        for command in STAGES:
            command = f"{torchrun} {address} --node_rank NODE {ROOT}/{command} {common}"
            started = [
                subprocess.Popen([sys.executable, *command.replace("NODE", str(node)).split()])
                for node in range(nodes)
            ]
            assert [process.wait(300) for process in started] == [0] * nodes, command
        logs = sorted(tmp_path.glob(f"{nodes}/*/*.jsonl"))
        found[nodes] = [timeless(data.read_jsonl(path)) for path in logs]
    assert found[1] == found[2] and len(found[1]) == 5
