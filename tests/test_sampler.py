"""Points, policy, generation, LoRA, SAM."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import SHARED
from families import QWEN, TILED, saved_policy, small_policy
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

import data
import sampler
from sampler import InputError

BOX = (10, 20, 58, 30)  # in an image of 100 x 200 pixels


# ------------------------------------------------------------------------- points


def test_the_grid_has_the_cells_that_the_formula_says():
    # Kw = floor(16 * 48 / 100) = 7 -> 6; Kh = floor(16 * 10 / 200) = 0 -> 3
    points = sampler.grid_points(BOX, 100, 200)
    assert points.shape == (18, 2)
    assert np.allclose(points[0], [10 + 48 / 12, 20 + 10 / 6])  # centre of the first cell
    assert np.allclose(points[1] - points[0], [8, 0])  # row by row
    assert np.allclose(points.mean(0), [34, 25])
    assert len(sampler.grid_points(BOX, 100, 200, k_min=1)) == 6 * 1  # the paper's
    assert len(sampler.grid_points(BOX, 100, 200, k_min=4, k_max=4)) == 16  # a fixed one


def test_random_points_and_jittered_boxes_keep_to_their_bounds():
    rng = np.random.default_rng(0)
    points = sampler.random_points(BOX, 500, rng)
    assert points.shape == (500, 2) and points.std(0).min() > 2
    assert (points >= BOX[:2]).all() and (points <= BOX[2:]).all()
    boxes = np.array([sampler.jitter_box((0, 10, 50, 30), 60, 35, rng, 0.2) for _ in range(300)])
    assert (boxes >= 0).all() and (boxes <= [60, 35, 60, 35]).all()
    assert (np.abs(boxes - [0, 10, 50, 30]).max(0) <= np.array([10, 4, 10, 4]) + 1e-9).all()
    assert np.unique(boxes[:, 2]).size > 100


def test_points_are_looked_up_at_y_x_and_outside_counts_as_off():
    mask = np.zeros((10, 30), bool)
    mask[2, 25] = True
    points = np.array([[25.9, 2.0], [2, 25], [25, 3], [-1, 2], [25, 2.5], [30, 2]])
    assert sampler.label_points(points, mask).tolist() == [1, 0, 0, 0, 1, 0]


def test_labels_in_doubt_are_dropped():
    assert sampler.is_confident([0.9, 0.89, 0.99]).tolist() == [True, False, True]


# ------------------------------------------------------------------------- generation


def fresh(kind):
    """(model, processor): assets/tiny_vlm, a small one of a family, one with a real tokenizer."""
    if kind != "real tokenizer":
        return sampler.load_policy() if kind == "tiny" else small_policy(kind)
    folder = SHARED / "tokenizers" / "qwen3"
    if not folder.exists():
        pytest.skip("needs the real Qwen3 tokenizer")
    return small_policy("Qwen3VL", AutoTokenizer.from_pretrained(folder))


@pytest.fixture(scope="module", params=["tiny", *QWEN, *TILED, "real tokenizer"])
def policy(request):
    """One of all kinds. Not to be changed by a test."""
    return fresh(request.param)


def random_images(*sizes):
    rng = np.random.default_rng(1)
    return [Image.fromarray(rng.integers(0, 255, (*size, 3), np.uint8)) for size in sizes]


def ask(think=False):
    """Three images and a prompt for each."""
    images = [Image.new("RGB", (128, 128), c) for c in ("gray", "darkgreen", "navy")]
    points = sampler.grid_points((100, 100, 700, 500), 1000, 1000)
    prompts = [data.box_prompt("a ship", think=think), data.point_prompt("the ship", points)]
    return images, [*prompts, data.box_prompt("The large white storage tank on the left")]


def answer(model, processor, images, prompts, length):
    """What eval.py does: images first, then every prompt behind its image."""
    prefix = sampler.prefill(model, data.collate_images(processor, images))
    text = data.collate_text(processor, prompts)
    prefix = sampler.extend(model, prefix, range(len(prompts)), text)
    return sampler.generate(model, processor, prefix, length)


def test_a_batch_answers_like_each_prompt_alone(tiny):
    images, prompts = ask()
    together = answer(*tiny, images, prompts, 96)
    for i in range(3):
        ((text, probs),) = answer(*tiny, images[i : i + 1], prompts[i : i + 1], 96)
        assert text == together[i][0]
        assert np.allclose(probs, together[i][1], atol=1e-4)


def test_label_probabilities_equal_a_second_forward_pass(tiny, monkeypatch):
    """On the very tokens that were generated: the text, tokenised again, may give others."""
    (model, processor), (images, prompts), decoded = tiny, ask(think=True), []
    decode, stop = sampler.decode, processor.tokenizer.eos_token_id
    monkeypatch.setattr(sampler, "decode", lambda *a: decoded.append(decode(*a)) or decoded[0])
    answers = answer(model, processor, images, prompts, 40)
    ids, mask = (tensor.clone() for tensor in decoded[0][:2])
    with torch.no_grad():
        again = padded_logps(model, data.collate(processor, images, prompts), ids, mask, 1.0).exp()
    for (text, probs), row, expected in zip(answers, ids.tolist(), again):
        assert len(text) == len(probs) > 0
        row = row[: (row + [stop]).index(stop)]
        lengths = [len(processor.tokenizer.decode([token])) for token in row]
        spread = np.repeat(expected[: len(row)].numpy(), lengths)
        assert np.abs(spread - probs).max() < 1e-4


def test_a_prompt_prefilled_in_two_parts_is_the_prompt(policy):
    """Two prompts behind one image, another behind an image of another size, in another order;
    markup in a phrase is none."""
    model, processor = policy
    images, rows = random_images((128, 128), (160, 64)), [1, 0, 1]
    phrases = "a ship", f"the one left of {processor.image_token}", "a house"
    prompts = [data.box_prompt(phrase) for phrase in phrases]
    whole = data.collate(processor, [images[row] for row in rows], prompts)
    apart = together = sampler.prefill(model, whole)
    if sampler.shares_prefix(model):
        prefix = sampler.prefill(model, data.collate_images(processor, images))
        apart = sampler.extend(model, prefix, rows, data.collate_text(processor, prompts))
        assert torch.allclose(apart.last_hidden, together.last_hidden, atol=1e-4)
        assert (apart.next_position == together.next_position).all()
        # the images can be extended again
        assert prefix.attention_mask.shape[1] == prefix.cache.get_seq_length()
    ids, *_ = sampler.decode(model, processor, apart, 1, 12, 0.0)
    if not hasattr(model.model, "get_rope_index"):  # generate takes what a signature names
        whole.pop("mm_token_type_ids")
    names = ("eos_token_id", "pad_token_id")
    options = {name: getattr(processor.tokenizer, name) for name in names}
    options["suppress_tokens"] = sampler.vision_token_ids(model, processor)
    expected = model.generate(**whole, do_sample=False, max_new_tokens=12, **options)
    assert ids.tolist() == expected[:, whole["input_ids"].shape[1] :].tolist()


# ------------------------------------------------------------------------- groups


def unlike_prompts(processor, count=3):
    """Inputs of `count` prompts of unlike lengths, with and without reasoning, on unlike images."""
    images = random_images((128, 128), (96, 160), (160, 64))
    points = data.point_prompt("a white house", np.arange(18).reshape(9, 2) * 50)
    prompts = [data.box_prompt("a ship", think=True), points, data.box_prompt("the one left of it")]
    return data.collate(processor, images[:count], prompts[:count])


def sample(model, processor, group, length, temperature, count=3):
    """Unlike prompts, and the ids, mask and log-probs of completions sampled behind them."""
    prompt = unlike_prompts(processor, count)
    torch.manual_seed(0)
    return prompt, *sampler.sample_group(model, processor, prompt, group, length, temperature)


score = torch.no_grad()(sampler.completion_logps)


def padded_logps(model, prompt, completions, mask, temperature):
    """The plain way: G rows [prompt, completion] for each prompt, with an image each."""
    group = len(completions) // len(prompt["input_ids"])
    rows = [row for row in range(len(prompt["input_ids"])) for _ in range(group)]
    wide = sampler.select_prompts(prompt, rows)
    start = wide["input_ids"].shape[1]
    ids = torch.cat([wide["input_ids"], completions], 1)
    wide |= {"input_ids": ids, "mm_token_type_ids": (ids == model.config.image_token_id).int()}
    wide["attention_mask"] = torch.cat([wide["attention_mask"], mask.long()], 1)
    logits = model(**wide).logits[:, start - 1 : -1]
    logp = (logits / temperature).log_softmax(-1).gather(2, completions[..., None])[..., 0]
    return torch.where(mask, logp, 0.0)


@pytest.mark.parametrize("kind", ["tiny", *QWEN, *TILED])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_shared_prefix_gives_what_the_padded_batch_gives(kind, checkpointing):
    """Log-probs and gradients, for completions of unlike lengths behind unlike prompts."""
    model, processor = fresh(kind)
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
        model.train()
    prompt, completions, mask, _ = sample(model, processor, 4, 13, 1.5)
    mask = mask & (torch.arange(13) < torch.tensor([13, 1, 5, 9] * 3)[:, None])
    adv = torch.randn(12, 1)
    assert model.training == checkpointing
    results = []
    for logps in (sampler.completion_logps, padded_logps):
        model.zero_grad()
        logp = logps(model, prompt, completions, mask, 0.9)
        (logp * adv).sum().backward()
        grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        results.append((logp.detach(), grads))
    (packed, packed_grads), (padded, padded_grads) = results
    assert torch.allclose(packed, padded, rtol=1e-5, atol=1e-5)
    assert packed_grads.keys() == padded_grads.keys() and len(packed_grads) > 20
    difference = sum(((packed_grads[n] - g) ** 2).sum() for n, g in padded_grads.items()) ** 0.5
    norm = sum((g**2).sum() for g in padded_grads.values()) ** 0.5
    assert norm > 0.1 and difference / norm < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [*QWEN, *TILED])
def test_models_that_cannot_share_a_row_are_found_out(kind, dtype):
    model, processor = small_policy(kind)
    sampler.check_sharing(model.to(dtype), processor)
    assert model.can_share == (kind != "Qwen3_5")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_leak_is_found_without_the_names_of_layers(dtype, monkeypatch):
    model, processor = small_policy("Qwen3_5")
    config = SimpleNamespace(sliding_window=None)
    monkeypatch.setattr(type(model.config), "get_text_config", lambda *_: config)
    sampler.check_sharing(model.to(dtype), processor)
    assert not model.can_share


def test_a_model_that_changes_its_logits_is_refused():
    model, processor = small_policy("Llava")
    forward = model.forward
    model.forward = lambda **inputs: SimpleNamespace(logits=forward(**inputs).logits / 8)
    with pytest.raises(LookupError, match="log-probs depend on how they"):
        sampler.check_sharing(model, processor)


def add_mean(module, args, output):
    """A layer that nobody has heard of: each token also sees the mean of those before it."""
    counts = torch.arange(1, output.shape[1] + 1)[:, None]
    return output + 0.1 * output.cumsum(1) / counts


def forget_positions(module, args, kwargs):
    return args, {**kwargs, "position_ids": None}


def differ_in_decoding(module, args, output):
    return output + (output.shape[1] <= 2)  # one token in each of two completions


@pytest.mark.parametrize("flaw", ["mean", "decoding", "positions", "window"])
def test_a_model_of_an_unknown_kind_is_refused_or_computed_the_plain_way(flaw):
    model, processor = small_policy("LlavaNext")
    language = model.model.language_model
    hooks = {"mean": add_mean, "decoding": differ_in_decoding}
    if flaw in hooks:
        language.layers[0].register_forward_hook(hooks[flaw])
    elif flaw == "positions":
        language.register_forward_pre_hook(forget_positions, with_kwargs=True)
    else:
        language.config.sliding_window = 4096  # longer than the prompt that is tried
    if flaw in hooks:  # the mean sees padding, too: wrong in any batch
        with pytest.raises(LookupError, match="log-probs depend on how they"):
            sampler.check_sharing(model, processor)
        return
    sampler.check_sharing(model, processor)
    assert not model.can_share
    prompt, completions, mask, logp = sample(model, processor, 4, 9, 1.0)
    with torch.no_grad():
        expected = padded_logps(model, prompt, completions, mask, 1.0)
    assert torch.allclose(score(model, prompt, completions, mask), expected, atol=1e-5)
    assert torch.allclose(logp, expected, atol=1e-5)


def test_sampling_gives_the_log_probs_that_scoring_gives(policy):
    prompt, ids, mask, logp = sample(*policy, 5, 24, 1.7)
    assert ids.shape == mask.shape == logp.shape == (15, ids.shape[1])
    assert len({tuple(row) for row in ids.tolist()}) > 10  # they differ
    scored = score(policy[0], prompt, ids, mask, 1.7)
    assert (logp - scored).abs().max() < 1e-4 and (logp[mask] < 0).any()


def test_finished_completions_leave_the_batch(tiny, monkeypatch):
    """What is left is what it would have been: the log-probs are those of scoring."""
    model, fed, forward = tiny[0], [], type(tiny[0].model).forward

    def count(self, *args, **inputs):
        fed.append(inputs["input_ids"].numel())
        return forward(self, *args, **inputs)

    monkeypatch.setattr(type(model.model), "forward", count)
    prompt, ids, mask, logp = sample(*tiny, 6, 60, 1.2)
    expected = [18]
    for alive in mask.view(3, 6, -1).unbind(2)[1:]:  # (B, G) at every step but the first
        needed = int(alive.any(1).sum() * alive.sum(1).max())
        expected.append(needed if needed <= 0.75 * expected[-1] else expected[-1])
    assert fed[1:] == expected[1:] and fed[-1] < 18
    assert (logp - score(model, prompt, ids, mask, 1.2)).abs().max() < 1e-4


def test_the_end_of_sequence_counts_and_what_follows_does_not(tiny):
    end = tiny[1].tokenizer.eos_token_id
    _, ids, mask, logp = sample(*tiny, 4, 40, 0.9)
    for row, kept, row_logp in zip(ids.tolist(), mask.tolist(), logp.tolist()):
        length = row.index(end) + 1  # after SFT-like pretraining every answer ends
        assert kept == [True] * length + [False] * (len(row) - length)
        assert not any(row_logp[length:])
    assert len({sum(kept) for kept in mask.tolist()}) > 1
    _, cut, mask, _ = sample(*tiny, 4, 3, 0.9)
    assert cut.shape == (12, 3) and mask.all() and not (cut == end).any()


def test_a_group_is_sampled_from_the_models_distribution(tiny):
    prompt, ids, _, logp = sample(*tiny, 4000, 1, 3.0, count=1)
    with torch.no_grad():
        expected = (tiny[0](**prompt).logits[0, -1] / 3).softmax(-1)
    found = torch.bincount(ids[:, 0], minlength=len(expected)) / 4000
    assert (found - expected).abs().max() < 4 * (0.25 / 4000) ** 0.5
    assert torch.allclose(logp[:, 0].exp(), expected[ids[:, 0]], rtol=1e-3)


VISION_TOKENS = {
    "Qwen3VL": "<|image_pad|> <|video_pad|> <|vision_start|> <|vision_end|>",
    "InternVL": "<img> </img> <IMG_CONTEXT> <video>",
    "Llava": "<image>",
    "LlavaOnevision": "<image> <video>",
}


@pytest.mark.parametrize("kind", VISION_TOKENS)
def test_vision_tokens_are_never_sampled(kind):
    """NOTE: a completion that holds <|image_pad|> cannot be scored."""
    model, processor = small_policy(kind)
    vision = sampler.vision_token_ids(model, processor)
    names = processor.tokenizer.convert_ids_to_tokens(vision)
    assert sorted(names) == sorted(VISION_TOKENS[kind].split())
    with torch.no_grad():  # a policy that likes nothing better
        model.lm_head.weight[vision] = 10 * model.lm_head.weight[vision].abs()
    _, ids, *_ = sample(model, processor, 8, 12, 5.0)
    assert not torch.isin(ids, torch.tensor(vision)).any()


def test_log_probs_taken_in_slices_are_the_same(monkeypatch):
    """And no more logits than a slice are ever there at once, also for the gradients."""
    torch.manual_seed(0)
    head, tokens = torch.nn.Linear(8, 50), torch.randint(0, 50, (23,))
    hidden, rows = torch.randn(23, 8, requires_grad=True), []
    head.register_forward_hook(lambda module, inputs, logits: rows.append(len(logits)))
    results = []
    for size in (2**27, 50 * 5 + 20):
        monkeypatch.setattr(sampler, "LOGITS_IN_MEMORY", size)
        head.zero_grad(), setattr(hidden, "grad", None)
        logp = sampler.token_logps(head, hidden, tokens, 0.7)
        (logp * torch.arange(23)).sum().backward()
        results.append((logp, head.weight.grad.clone(), hidden.grad.clone()))
    assert rows == [23] + [5, 5, 5, 5, 3] + [3, 5, 5, 5, 5]
    for whole, sliced in zip(*results):
        assert torch.allclose(whole, sliced, rtol=1e-4, atol=1e-5)
    expected = (head(hidden) / 0.7).log_softmax(-1)[torch.arange(23), tokens]
    assert torch.allclose(results[1][0], expected, atol=1e-6)


def test_in_bfloat16_a_fresh_policy_is_its_reference_to_the_bit():
    """The policy's LoRA and mergers are float32, the reference is bfloat16 throughout. The padding
    of unlike prompts sees nothing, and must not become nan."""
    reference, processor = sampler.load_policy(dtype=torch.bfloat16)
    policy, _ = sampler.load_policy(dtype=torch.bfloat16)
    sampler.add_lora(policy, rank=4, alpha=8, dropout=0.0)
    prompt, ids, mask, logp = sample(policy, processor, 4, 16, 0.9)
    assert (prompt["attention_mask"] == 0).any()
    scored = sampler.completion_logps(policy, prompt, ids, mask, 0.9)
    scored.sum().backward()
    assert (score(reference, prompt, ids, mask, 0.9) == scored).all()
    assert scored.isfinite().all() and (scored - logp).abs().mean() < 0.05
    grads = [p.grad for p in policy.parameters() if p.grad is not None]
    assert len(grads) > 20 and all(grad.isfinite().all() for grad in grads)
    texts = [text for text, _ in answer(policy, processor, *ask(), 8)]  # in evaluation, too
    assert texts == [text for text, _ in answer(reference, processor, *ask(), 8)] != [""] * 3


def test_the_inputs_of_some_prompts_are_those_of_their_images(policy):
    """Three images, cut into unlike numbers of tiles, each alone and from a batch."""
    images, processor = random_images((100, 100), (40, 100), (100, 60)), policy[1]
    prompt = data.collate(processor, images, ["a ship"] * 3)
    for row, image in enumerate(images):
        alone = data.collate(processor, [image], ["a ship"])
        selected = sampler.select_prompts(sampler.select_prompts(prompt, [2, 1, 0]), [2 - row])
        assert selected.keys() == alone.keys()
        real = selected["attention_mask"][0].bool()
        for name, expected in alone.items():
            found = selected[name]
            if name == "pixel_values" and expected.dim() == 5:  # padded to the most tiles
                assert not found[:, expected.shape[1] :].any()
                found = found[:, : expected.shape[1]]
            elif found.shape[1:] == real.shape:
                found = found[:, real]
            assert torch.equal(found, expected)


# ------------------------------------------------------------------------- LoRA


@pytest.fixture(scope="module", params=["tiny", *TILED])
def base(request, tmp_path_factory):
    """A folder with a model."""
    if request.param == "tiny":
        return str(sampler.TINY_VLM)
    return saved_policy(request.param, tmp_path_factory.mktemp("base"))


def adapt(model, rank=8, alpha=16):
    """The model with LoRA that is no longer zero, and mergers that have moved."""
    torch.manual_seed(0)
    sampler.add_lora(model, rank, alpha, dropout=0.0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "merger" in name or "projector" in name:
            parameter.data += 0.02 * torch.randn_like(parameter)
    return model


@pytest.fixture
def adapted(base):
    """A policy with LoRA, its processor, a batch, and where its base is."""
    model, processor = sampler.load_policy(base)
    return adapt(model), processor, data.collate(processor, *ask()), base


def logits_of(model, batch):
    with torch.no_grad():
        return model(**batch).logits


@pytest.mark.parametrize("kind", ["tiny", *TILED])
def test_lora_starts_as_the_model_itself_and_trains_what_it_should(kind):
    """Vision towers have layers of the same names (q_proj), which stay as they are."""
    model, processor = fresh(kind)
    batch, merger = data.collate(processor, *ask()), "merger" if kind == "tiny" else "projector"
    expected = {name for name, _ in model.named_parameters() if merger in name}
    before = logits_of(model, batch)
    sampler.add_lora(model, rank=8, alpha=16)
    assert torch.equal(logits_of(model, batch), before)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    lora = {name for name in trained if ".lora_" in name}
    assert trained - lora == expected != set()
    assert len(lora) == 2 * 7 * model.config.text_config.num_hidden_layers
    assert all("model.language_model.layers." in name for name in lora)


def test_lora_is_merged_while_sampling_and_only_then(tiny):
    model, processor = sampler.load_policy()
    sampler.add_lora(model, rank=4, alpha=8, dropout=0.5)
    layers = [module for module in model.modules() if isinstance(module, sampler.LoRALinear)]
    for layer in layers:
        torch.nn.init.normal_(layer.lora_B.weight, std=0.05)
    prompt, ids, mask, logp = sample(model.train(), processor, 4, 16, 0.9)
    assert model.training and all(layer.merged is None for layer in layers)
    scored, base = (score(m, prompt, ids, mask, 0.9) for m in (model.eval(), tiny[0]))
    assert (scored - logp).abs().max() < 1e-4 < 0.1 < (scored - base).abs().max()


def test_the_merged_folder_gives_the_logits_of_the_adapted_model(adapted, tmp_path):
    model, processor, batch, _ = adapted
    expected = logits_of(model, batch)
    sampler.use_shared_prefix_attention(model)  # NOTE: other programs do not have it
    sampler.save_policy(model, processor, tmp_path)
    assert "attn" not in (tmp_path / "config.json").read_text()
    assert torch.allclose(logits_of(model, batch), expected)  # saving changed nothing
    again = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert (logits_of(again, batch) - expected).abs().max() < 1e-4
    assert AutoProcessor.from_pretrained(tmp_path).tokenizer.eos_token == "<|im_end|>"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_adapter_alone_gives_the_weights_of_the_merged_folder(base, dtype, tmp_path):
    """To the bit: load_policy merges by merge_adapter, and save_policy what LoRALinear holds."""
    model, processor = sampler.load_policy(base, dtype=dtype)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    adapt(model)
    sampler.save_adapter(model, tmp_path / "sft" / "adapter", base)
    sampler.save_policy(model, processor, tmp_path / "merged")
    both = (sampler.load_policy(tmp_path / name, dtype=dtype)[0] for name in ("sft", "merged"))
    alone, merged = (loaded.state_dict() for loaded in both)
    assert alone.keys() == merged.keys() == before.keys()
    assert all(value.dtype == dtype and value.equal(merged[n]) for n, value in alone.items())
    assert sum(not value.equal(before[name]) for name, value in alone.items()) > 14


def test_an_adapter_on_an_adapter_alone_is_loaded_too(tmp_path):
    """As after sft.py --no-merge and grpo.py --no-merge."""
    first, processor = sampler.load_policy()
    sampler.save_adapter(adapt(first), tmp_path / "sft" / "adapter", sampler.TINY_VLM)
    second = adapt(sampler.load_policy(tmp_path / "sft")[0], rank=4, alpha=8)
    sampler.save_adapter(second, tmp_path / "grpo" / "adapter", tmp_path / "sft")
    loaded, batch = sampler.load_policy(tmp_path / "grpo")[0], data.collate(processor, *ask())
    assert torch.allclose(logits_of(loaded, batch), logits_of(second, batch), atol=1e-3)
    assert not torch.allclose(logits_of(loaded, batch), logits_of(first, batch), atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_adapter_is_not_merged_into_another_model_than_its_own(dtype, tmp_path):
    """Though it lies in the same folder, as after `sft.py` with another seed."""
    base, processor = sampler.load_policy(dtype=dtype)
    sampler.save_policy(base, processor, tmp_path / "base")
    known = sampler.fingerprint(base, processor, torch.bfloat16)
    sampler.save_adapter(adapt(base), tmp_path / "adapter", tmp_path / "base", known)
    for other in (torch.float32, torch.bfloat16):
        sampler.load_policy(tmp_path / "adapter", dtype=other)
    another = sampler.load_policy(dtype=dtype)[0]
    another.lm_head.weight.data *= 1.1
    sampler.save_policy(another, processor, tmp_path / "base")
    with pytest.raises(InputError, match="is an adapter of another model than the one in"):
        sampler.load_policy(tmp_path / "adapter")
    sampler.save_adapter(adapt(another), tmp_path / "own", tmp_path / "own")
    with pytest.raises(InputError, match="names itself as its base model"):
        sampler.load_policy(tmp_path / "own")


def test_the_real_peft_reads_the_adapter(adapted, tmp_path):
    peft = pytest.importorskip("peft")
    model, _, batch, base = adapted
    sampler.save_adapter(model, tmp_path, base, "0123456789abcdef")
    theirs = peft.PeftModel.from_pretrained(sampler.load_policy(base)[0], tmp_path).eval()
    assert (logits_of(theirs, batch) - logits_of(model, batch)).abs().max() < 1e-4


def test_an_adapter_written_by_peft_is_read(tmp_path):
    peft = pytest.importorskip("peft")
    model, processor = sampler.load_policy()
    batch = data.collate(processor, *ask())
    targets = r".*language_model.*\.(q_proj|v_proj)"
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets)
    theirs = peft.get_peft_model(model, config).eval()
    for name, parameter in theirs.named_parameters():
        if "lora_B" in name:
            parameter.data += 0.05
    theirs.save_pretrained(tmp_path)
    ours, _ = sampler.load_policy()
    sampler.merge_adapter(ours, tmp_path)
    assert (logits_of(ours, batch) - logits_of(theirs, batch)).abs().max() < 1e-4


def test_an_adapter_that_would_be_misread_is_refused(tmp_path):
    sampler.save_adapter(adapt(sampler.load_policy()[0]), tmp_path, sampler.TINY_VLM)
    path = tmp_path / sampler.ADAPTER_CONFIG
    config = path.read_text()
    changes = {"use_rslora": True}, {"alpha_pattern": {"q_proj": 64}}, {"revision": "v2"}
    for change in changes:
        path.write_text(json.dumps({**json.loads(config), **change}))
        with pytest.raises(InputError, match=next(iter(change))):
            sampler.load_policy(tmp_path)
    path.write_text(config)
    with pytest.raises(InputError, match="does not fit its base model"):
        sampler.merge_adapter(small_policy("Llava")[0], tmp_path)
    path.write_text(json.dumps({**json.loads(config), "r": 5}))
    with pytest.raises(InputError, match="another rank than its config"):
        sampler.load_policy(tmp_path)
    path.write_text(config)
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    with pytest.raises(InputError, match="chat_template.jinja is not the one of"):
        sampler.load_policy(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    for state in ({}, {"base_model.model.lm_head.weight": torch.zeros(2, 2)}):
        save_file(state, tmp_path / "adapter_model.safetensors")
        with pytest.raises(InputError, match="it is empty, or has one of two layers"):
            sampler.load_policy(tmp_path)


# ------------------------------------------------------------------------- SAM


def prompts_of(objects):
    """Box, grid and true labels of every object; the second with half of its points."""
    prompts = []
    for i, o in enumerate(objects):
        box = data.mask_to_box(o.mask)
        points = sampler.grid_points(box, 128, 128)[:: 1 + (i == 1)]
        prompts.append((box, points, sampler.label_points(points, o.mask)))
    return prompts


def test_sam_finds_the_objects_together_as_alone(scene, segmenter):
    image, objects = scene
    segmenter.set_image(image)
    prompts = [*prompts_of(objects), (prompts_of(objects)[0][0], np.zeros((0, 2)), np.zeros(0))]
    for o, prompt, (mask, score) in zip(
        [*objects, objects[0]], prompts, segmenter.segment(prompts)
    ):
        assert mask.shape == (128, 128) and mask.dtype == bool
        assert data.mask_iou(mask, o.mask)[2] > 0.6 and 0.3 < score < 1.2
        ((alone, alone_score),) = segmenter.segment([prompt])
        assert (mask != alone).mean() < 1e-3 and math.isclose(score, alone_score, abs_tol=1e-4)


def test_the_embedding_of_the_last_image_is_kept(scene):
    segmenter, calls, (image, objects) = sampler.Segmenter(), [], scene
    segmenter.predictor.model.image_encoder.register_forward_hook(lambda *_: calls.append(1))
    blank, masks = Image.new("RGB", (128, 128)), []
    for picture, key, count in (
        *((image, "a", 1), (blank, "b", 2), (blank, "b", 2), (image, "a", 3), (image, "a", 3)),
        *((blank, None, 4), (image, None, 5)),  # None: always computed
    ):
        segmenter.set_image(picture, key)
        assert len(calls) == count
        masks.append(segmenter.segment(prompts_of(objects))[0][0])
    assert all((mask == masks[0]).all() for mask in (masks[3], masks[4], masks[6]))
    assert (masks[1] != masks[0]).any()
    assert (masks[2] == masks[1]).all() and (masks[5] == masks[1]).all()


def test_several_boxes_unite_at_the_size_of_the_image_and_none_give_nothing(scene, segmenter):
    segmenter.set_image(scene[0].resize((300, 170)))
    prompts = prompts_of(scene[1])[:2]
    (one, score), (two, other) = segmenter.segment(prompts)
    (union, mean), (none, zero) = segmenter.segment_all([prompts, []])
    assert (union == (one | two)).all() and math.isclose(mean, (score + other) / 2, abs_tol=1e-6)
    assert none.shape == union.shape == (170, 300) and not none.any() and zero == 0


def test_files_that_are_no_sam_are_refused_by_name(tmp_path):
    (tmp_path / "text.pth").write_text("hello")
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pth")
    torch.save(open, tmp_path / "code.pth")  # what would run code
    for name in ("none.pth", "text.pth", "other.pth", "code.pth"):
        with pytest.raises(InputError, match=f"{name} cannot be loaded .*: expected vit_b"):
            sampler.load_sam(tmp_path / name)


def test_the_published_sam_is_recognised_by_its_weights(tmp_path):
    from segment_anything import sam_model_registry

    with torch.device("meta"):
        shapes = {name: w.shape for name, w in sam_model_registry["vit_b"]().state_dict().items()}
    state = {name: torch.full((1,), 0.5).expand(shape) for name, shape in shapes.items()}
    torch.save(state, tmp_path / "any_name.pth")
    loaded = sampler.load_sam(tmp_path / "any_name.pth")
    assert len(loaded.image_encoder.blocks) == 12 and not loaded.training
    assert (loaded.state_dict()["mask_decoder.iou_token.weight"] == 0.5).all()


def test_mobile_sam_attends_with_its_own_biases():
    """NOTE in load_sam: entering eval mode before the weights are there caches wrong biases."""
    weights = SHARED / "weights" / "mobile_sam.pt"
    pytest.importorskip("mobile_sam")
    if not weights.exists():
        pytest.skip("needs the real MobileSAM weights")
    modules = sampler.load_sam(weights).image_encoder.modules()
    attention = [module for module in modules if hasattr(module, "attention_biases")]
    assert len(attention) > 5
    for module in attention:
        assert torch.equal(module.ab, module.attention_biases[:, module.attention_bias_idxs])
