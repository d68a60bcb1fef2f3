"""The phases of a GRPO update on a GPU: seconds, tokens per second and memory of each.

    python tests/bench.py gpu --size 8b            # on any CUDA machine, in less than eight minutes
    python tests/bench.py gpu --size tiny --device cpu

The model is a Qwen3-VL of the published sizes with random weights and LoRA, in bfloat16. An update
has 8 prompts with an image of 1000 x 1000, and 8 completions of 256 tokens for each.
"""

import statistics
import tempfile
import time
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image
from transformers import AutoProcessor, Qwen3VLConfig, Qwen3VLForConditionalGeneration

import data
import grpo
import sampler

# hidden size, MLP, layers, heads, key heads; the vision tower's depth, hidden size, MLP, deepstack
SIZES = {
    "tiny": (128, 256, 2, 4, 2, 3, 64, 128, [0, 1, 2]),
    "2b": (2048, 6144, 28, 16, 8, 24, 1024, 4096, [5, 11, 17]),
    "4b": (2560, 9728, 36, 32, 8, 24, 1024, 4096, [5, 11, 17]),
    "8b": (4096, 12288, 36, 32, 8, 27, 1152, 4304, [8, 16, 24]),
}
PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # bfloat16 FLOP/s by data sheet
GROUP, TAU = 8, 0.9


def build(size, device):
    """(model, processor) with random weights, as transformers makes them."""
    hidden, mlp, layers, heads, key_heads, depth, width, vision_mlp, deepstack = SIZES[size]
    processor = AutoProcessor.from_pretrained(sampler.TINY_VLM)
    processor.image_processor.patch_size = 16
    processor.image_processor.size = {"shortest_edge": 2**16, "longest_edge": 2**24}
    published = Qwen3VLConfig.from_pretrained(sampler.TINY_VLM).to_dict()
    ids = {name: value for name, value in published.items() if name.endswith("_token_id")}
    rope = {"rope_type": "default", "rope_theta": 5e6, "mrope_interleaved": True}
    text = {"hidden_size": hidden, "intermediate_size": mlp, "num_hidden_layers": layers}
    text |= {"num_attention_heads": heads, "num_key_value_heads": key_heads, "head_dim": 128}
    vocabulary = len(processor.tokenizer) if size == "tiny" else 151936
    text |= {"vocab_size": vocabulary, "rope_parameters": {**rope, "mrope_section": [24, 20, 20]}}
    vision = {"depth": depth, "hidden_size": width, "intermediate_size": vision_mlp}
    vision |= {"num_heads": 16, "out_hidden_size": hidden, "deepstack_visual_indexes": deepstack}
    config = Qwen3VLConfig(text_config=text, vision_config=vision, **ids)
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        model = Qwen3VLForConditionalGeneration(config).eval()
    torch.set_default_dtype(torch.float32)
    return model, processor


class Clock:
    """Prints and keeps the median seconds of calls, and how much memory they took."""

    def __init__(self, device):
        self.is_cuda, self.lines = device == "cuda", []

    def __call__(self, name, call, tokens=0, flops=0, repeats=3):
        """What the last call returned; None if it ran out of memory."""
        seconds, result, memory = [], None, 0.0
        for _ in range(1 + repeats):  # the first warms up
            result = None
            if self.is_cuda:
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
                memory = torch.cuda.memory_allocated()
            start = time.perf_counter()
            try:
                result = call()
            except torch.OutOfMemoryError:
                torch.cuda.empty_cache()
                print(f"{name:<44} out of memory")
                self.lines.append({"what": name, "seconds": None})
                return None
            if self.is_cuda:
                torch.cuda.synchronize()
                memory = torch.cuda.max_memory_allocated() - memory
            seconds.append(time.perf_counter() - start)
        median = statistics.median(seconds[1:])
        line = {"what": name, "seconds": median, "gigabytes": memory / 1e9}
        shown = f"{name:<44} {median:8.3f} s {memory / 1e9:+7.2f} GB"
        if tokens:
            line["tokens_per_s"] = tokens / median
            shown += f" {tokens / median:9.0f} tokens/s"
        if flops:
            card = torch.cuda.get_device_name() if self.is_cuda else ""
            peak = next((peak for key, peak in PEAK.items() if key in card), None)
            line["utilisation"] = peak and flops / median / peak
            shown += f" {line['utilisation'] or 0:6.1%} of the card's FLOP/s" if peak else ""
        print(shown, flush=True)
        self.lines.append(line)
        return result


def attention_kernel(device):
    """Which kernel torch takes for attention with a bias."""
    make = lambda length, heads: torch.randn(2, heads, length, 128, device=device).bfloat16()
    query, key = make(32, 8), make(2000, 8)
    bias = torch.zeros(2, 1, 32, 2000, device=device).bfloat16()
    attend = torch.nn.functional.scaled_dot_product_attention
    activity = torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[activity], acc_events=True) as profile:
        attend(query, key, key, attn_mask=bias)
    names = [event.key for event in profile.key_averages()]
    return [name for name in names if "attention" in name and name.startswith("aten::_")]


def draw(quick):
    """(images, texts, length) of an update's prompts, and of their completions."""
    batch, length, side = (2, 6, 64) if quick else (8, 256, 1000)
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (batch, side, side, 3), dtype=np.uint8)
    texts = [data.box_prompt("the large red aircraft at the top", think=True)] * batch
    return [Image.fromarray(image) for image in pixels], texts, length


def measure_trl(size, device, quick=False):
    """Seconds of an update by TRL's GRPOTrainer, with the same model, prompts and completions."""
    import bench

    (model, processor), (images, texts, length) = build(size, device), draw(quick)
    answer = data.box_answer([1, 2, 3, 4], "ship")
    asked = [SimpleNamespace(text=t, image=i, answer=answer) for t, i in zip(texts, images)]
    options = {"per_device_train_batch_size": GROUP, "gradient_accumulation_steps": len(texts)}
    options |= {"use_cpu": device == "cpu", "bf16": device == "cuda"}
    options |= {"generation_kwargs": {"min_new_tokens": length}}
    with tempfile.TemporaryDirectory() as folder:
        steps = bench.trl_steps(folder, model, processor, asked, 2, length, **options)
    print(f"an update of TRL's {steps[0][-1]:.2f} s, {steps[1][-1]:.0f} tokens a completion")
    return [{"what": "TRL's update", "seconds": steps[0][-1]}]


def measure(size, device, quick=False):
    """Print the phases, and return them as a list of dicts."""
    card = torch.cuda.get_device_name() if device == "cuda" else "no GPU"
    print(f"torch {torch.__version__}, {card}")
    clock, (model, processor) = Clock(device), build(size, device)
    torch.backends.cuda.enable_cudnn_sdp(False)  # from here on, what load_policy does
    if device == "cuda":
        sampler.use_fused_layers(model)
    sampler.check_sharing(model, processor)
    print(f"attention with a bias: {', '.join(attention_kernel(device))}")
    images, texts, length = draw(quick)
    batch, collate = len(texts), lambda: data.collate(processor, images, texts)
    prompt = clock(f"collate {batch} prompts, on the CPU", collate)
    start = prompt["input_ids"].shape[1]
    args = grpo.get_args(["--option", "RRSISD"])
    args.gradient_checkpointing = False
    trained = sampler.make_trainable(model, args, dropout=0.0)
    reference = grpo.PolicyReference(model)
    for module in model.modules():
        if isinstance(module, sampler.LoRALinear):  # as it is after some updates
            torch.nn.init.normal_(module.lora_B.weight, std=1e-3)
    optimizer = torch.optim.AdamW(trained, 1e-5, fused=device == "cuda")
    weights = sum(p.numel() * p.element_size() for p in model.parameters()) / 1e9
    print(f"{weights:.1f} GB of weights and LoRA; P = {start}, C = {length}, G = {GROUP}")

    # sampling, by steps of its own shape and by one graph; the end is never sampled
    processor.tokenizer.eos_token = processor.tokenizer.pad_token
    model.generation_config.eos_token_id = None
    tokens = batch * GROUP * length
    clock(f"prefill {batch} prompts", lambda: sampler.prefill(model, prompt))
    options = model, processor
    for name, record in (("steps", None), ("a graph", sampler.record_graph)):
        if record and device != "cuda":
            continue
        decode = lambda record=record: sampler.decode_in_steps(
            *options, sampler.prefill(model, prompt), GROUP, length, TAU, record
        )
        clock(f"prefill and decode by {name}", decode, tokens, repeats=1)
    sample = lambda: sampler.sample_group(*options, prompt, GROUP, length, TAU)
    sampled = clock("sample_group, the whole of it", sample, tokens, repeats=1)
    if sampled is None:  # out of memory
        return clock.lines

    # scoring: 2 N FLOPs of the N weights forward, 2 N backward, as LoRA's base has no gradients
    layers = sampler.language_model(model).layers
    counted = sum(p.numel() for n, p in layers.named_parameters() if ".lora_" not in n)
    whole = grpo.Rollout(prompt, *sampled, [], None, adv=torch.randn(batch * GROUP, 1).to(device))
    seconds = dict.fromkeys(["sampling", "reference", "scoring", "AdamW"], 0.0)

    def timed(phase, call):
        begin = time.perf_counter()
        result = call()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds[phase] += time.perf_counter() - begin
        return result

    def learn(r, logp, ref_logp):
        weight = grpo.token_weights(r.mask, args.loss, batch * GROUP, tokens, length)
        grpo.policy_loss(logp, logp.detach(), ref_logp, r.adv, weight, args)[0].backward()

    def score(size, penalty=False):
        """Steps 5 and 6 of grpo.py; the mean distance to the log-probs of sampling."""
        for r in grpo.split(whole, GROUP, size):
            question = r.prompt, r.completions, r.mask, TAU
            logp = timed("scoring", lambda q=question: sampler.completion_logps(model, *q))
            ref_logp = timed("reference", reference.start(*question)) if penalty else logp.detach()
            timed("scoring", lambda r=r, x=logp, ref=ref_logp: learn(r, x, ref))
        return ((logp - r.rollout_logp).abs() * r.mask).sum().item() / r.mask.sum().item()

    every = batch * (start + GROUP * length)
    for size, checkpointing in ((1, False), (2, False), (1, True), (4, True), (8, True)):
        model.activation_checkpointing_disable()
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        name = f"score and backward, {size} at once, {'recomputed' if checkpointing else 'kept'}"
        gap = clock(name, lambda size=size: score(size), every, 4 * counted * every, repeats=1)
    print(f"log-probs, sampled and scored: {gap:.4f} nats a token apart")
    clock.lines.append({"what": "rollout gap", "nats": gap})
    clock("the reference inside the policy", reference.start(prompt, *sampled[:2], TAU), every)
    clock("AdamW", optimizer.step)

    def update():
        seconds.update(dict.fromkeys(seconds, 0.0))
        timed("sampling", sample)
        score(args.batch_size, penalty=True)
        timed("AdamW", optimizer.step)
        optimizer.zero_grad()

    clock("a whole update", update, tokens, repeats=1)
    total = sum(seconds.values())
    print(", ".join(f"{name} {part / total:.0%}" for name, part in seconds.items()))
    return clock.lines
