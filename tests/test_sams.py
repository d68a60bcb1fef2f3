"""SAMs in Hugging Face's format give what transformers' own pipeline gives."""

import json

import numpy as np
import pytest
import torch
import transformers as hf
from PIL import Image
from safetensors.torch import save_file

import eval as evaluation
import sampler
from sampler import InputError

KINDS = ["Sam", "SamHQ", "Sam2", "Sam3Tracker"]


def small_sam(kind, folder):
    """`folder`, with a SAM of this kind in it: random weights, images of 64 x 64."""
    torch.manual_seed(0)
    heads = {"num_attention_heads": 2}
    prompt = {"hidden_size": 32, "image_size": 64, "patch_size": 16, "mask_input_channels": 4}
    decoder = {"hidden_size": 32, "mlp_dim": 32, "iou_head_hidden_dim": 16, **heads}
    layers = {"hidden_size": 32, "num_hidden_layers": 2, "image_size": 64, **heads}
    side, square = {"height": 64, "width": 64}, {"height": 16, "width": 16}
    if kind in ("Sam", "SamHQ"):
        vision = {**layers, "patch_size": 16, "output_channels": 32, "mlp_dim": 32}
        vision |= {"global_attn_indexes": [1], "window_size": 2, "num_pos_feats": 16}
        decoder |= {"vit_dim": 32} if kind == "SamHQ" else {}
        options = {"size": {"longest_edge": 64}, "pad_size": side}
        images = hf.SamImageProcessor(**options, mask_size={"longest_edge": 16})
    elif kind == "Sam2":
        backbone = {"hidden_size": 16, "num_attention_heads": 1, "image_size": [64, 64]}
        backbone |= {"blocks_per_stage": [1, 2, 1, 1], "embed_dim_per_stage": [16, 32, 64, 128]}
        backbone |= {"num_attention_heads_per_stage": [1, 1, 2, 2], "global_attention_blocks": [2]}
        vision = {"backbone_config": {"model_type": "sam2_hiera_det_model", **backbone}}
        vision["backbone_config"]["window_size_per_stage"] = [4, 4, 4, 2]
        vision |= {"backbone_channel_list": [128, 64, 32, 16], "fpn_hidden_size": 32}
        vision["backbone_feature_sizes"] = [[16, 16], [8, 8], [4, 4]]
        images = hf.Sam2ImageProcessor(size=side, mask_size=square)
    else:
        backbone = {**layers, "patch_size": 16, "intermediate_size": 32, "window_size": 2}
        backbone |= {"global_attn_indexes": [1], "pretrain_image_size": 64}
        vision = {"backbone_config": {"model_type": "sam3_vit_model", **backbone}}
        vision |= {"fpn_hidden_size": 32, "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]]}
        images = hf.Sam3ImageProcessor(size=side, mask_size=square)
    parts = {"prompt_encoder_config": prompt, "mask_decoder_config": decoder}
    config = getattr(hf, f"{kind}Config")(vision_config=vision, **parts)
    model = getattr(hf, f"{kind}Model")(config).eval()
    for parameter in model.parameters():  # masks with some of both
        parameter.data += 0.05 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    getattr(hf, f"{kind}Processor")(images).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module", params=KINDS)
def sam(request, tmp_path_factory):
    return request.param, small_sam(request.param, tmp_path_factory.mktemp(request.param))


RNG = np.random.default_rng(0)
SIZES = ((60, 90, 3), (120, 50, 3), (3, 64, 3))  # the last looks like channels first
IMAGES = [Image.fromarray(RNG.integers(0, 256, size, np.uint8)) for size in SIZES]
POINTS = np.array([[12.5, 20.0], [30, 33], [8, 41], [40, 11]])
PROMPTS = [
    (np.array([5.0, 8, 40, 50]), POINTS[:0], np.zeros(0)),
    (np.array([5.0, 8, 40, 50]), POINTS, np.array([1, 0, 1, 0])),
    (np.array([1.0, 2, 30, 30]), POINTS[:0], np.zeros(0)),
    (np.array([10.0, 2, 45, 55]), POINTS[::-1], np.array([0, 0, 1, 1])),
    (np.array([10.0, 2, 45, 55]), POINTS[:1], np.array([1])),
]


def pipeline(kind, folder, image, prompts, multimask):
    """Masks (K, M, H, W) and scores (K, M) as transformers' documentation has it."""
    processor = getattr(hf, f"{kind}Processor").from_pretrained(folder)
    model = getattr(hf, f"{kind}Model").from_pretrained(folder).eval()
    boxes, points, labels = (list(column) for column in zip(*prompts))
    options = {"input_boxes": [[box.tolist() for box in boxes]]}
    if len(points[0]):
        options["input_points"] = [[part.tolist() for part in points]]
        options["input_labels"] = [[part.tolist() for part in labels]]
    shape = {"return_tensors": "pt", "input_data_format": "channels_last"}
    inputs = processor(images=np.array(image), **shape, **options)
    sizes = {"original_sizes": inputs.pop("original_sizes")}
    if "reshaped_input_sizes" in inputs:
        sizes["reshaped_input_sizes"] = inputs.pop("reshaped_input_sizes")
    inputs = {k: v.float() if v.is_floating_point() else v for k, v in inputs.items()}
    with torch.no_grad():
        out = model(**inputs, multimask_output=multimask)
    return processor.post_process_masks(out.pred_masks, **sizes)[0], out.iou_scores[0]


@pytest.mark.parametrize("multimask", [False, True])
def test_masks_and_scores_are_those_of_transformers_own_pipeline(sam, multimask):
    kind, folder = sam
    segmenter = sampler.Segmenter(folder, multimask=multimask)
    for image in reversed(IMAGES):
        segmenter.set_image(image)
        found = segmenter.segment(PROMPTS)
        for count in (0, 1, 4):
            same = [i for i, (_, points, _) in enumerate(PROMPTS) if len(points) == count]
            masks, scores = pipeline(kind, folder, image, [PROMPTS[i] for i in same], multimask)
            for i, options, likely in zip(same, masks, scores):
                best = int(likely.argmax())
                mask, score = found[i]
                assert mask.shape == image.size[::-1] and mask.dtype == bool
                assert (mask == options[best].numpy()).all()
                assert score == pytest.approx(likely[best].item(), abs=1e-5)
    assert any(0 < mask.mean() < 1 for mask, _ in found)


def test_an_image_is_embedded_once(sam):
    segmenter, calls = sampler.Segmenter(sam[1]), []
    segmenter.predictor.model.vision_encoder.register_forward_hook(lambda *_: calls.append(1))
    for key in "aabbb":
        segmenter.set_image(IMAGES["ab".index(key)], key)
        first = segmenter.segment(PROMPTS[:2])
    assert len(calls) == 2 and first[0][0].shape == (120, 50)
    segmenter.set_image(IMAGES[0], "a")
    alone = sampler.Segmenter(sam[1])
    alone.set_image(IMAGES[0])
    for (mask, score), (expected, other) in zip(segmenter.segment(PROMPTS), alone.segment(PROMPTS)):
        assert (mask == expected).all() and score == other


def test_an_unknown_kind_and_missing_weights_are_one_line(tmp_path):
    folder = small_sam("Sam2", tmp_path / "sam")
    path = tmp_path / "sam/config.json"
    config = json.loads(path.read_text())
    deeper = {**config["mask_decoder_config"], "num_hidden_layers": 3}
    changes = [{"model_type": "clip"}, {"model_type": "its_own"}, {"mask_decoder_config": deeper}]
    for change in changes:
        path.write_text(json.dumps({**config, **change}))
        message = "--sam_ckpt .* cannot be loaded .*expected one of"
        with pytest.raises(InputError, match=message) as error:
            sampler.Segmenter(folder)
        assert "\n" not in str(error.value)


def sam3_video(folder):
    """`folder`, with the video model as which SAM 3 is published; its weights' names are those of
    the published file (what save_pretrained writes is not what from_pretrained reads)."""
    folder = small_sam("Sam3Tracker", folder)
    tracker = hf.Sam3TrackerConfig.from_pretrained(folder).to_dict()
    tracker |= {"memory_attention_hidden_size": 32, "memory_encoder_hidden_size": 32}
    tracker |= {"image_size": 64, "memory_attention_num_layers": 1}
    tracker = hf.Sam3TrackerVideoConfig(**tracker)
    text = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 99}
    text |= {"bos_token_id": 0, "eos_token_id": 1}
    detector = hf.Sam3Config(vision_config=tracker.vision_config, text_config=text)
    config = hf.Sam3VideoConfig(detector_config=detector, tracker_config=tracker)
    config.save_pretrained(folder)
    weights = hf.Sam3VideoModel(config).state_dict()
    save_file(weights, f"{folder}/model.safetensors", metadata={"format": "pt"})
    return folder, weights


def test_folders_of_video_models_are_read_too(tmp_path, capfd):
    folder = small_sam("Sam2", tmp_path / "sam2")
    path = tmp_path / "sam2/config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_type": "sam2_video"}))
    another, weights = sam3_video(tmp_path / "sam3")
    capfd.readouterr()
    for name in (folder, another):
        segmenter = sampler.Segmenter(name)
        segmenter.set_image(IMAGES[0])
        assert segmenter.segment(PROMPTS[:1])[0][0].shape == (60, 90)
    assert capfd.readouterr() == ("", "")  # neither bars nor warnings
    state = segmenter.predictor.model.state_dict()
    names = {"mask_decoder": "tracker_model.mask_decoder", "vision_encoder.neck": "tracker_neck"}
    names["vision_encoder.backbone"] = "detector_model.vision_encoder.backbone"
    for here, there in names.items():
        same = [key for key in state if key.startswith(here)]
        assert same and all(torch.equal(state[k], weights[k.replace(here, there)]) for k in same)


def test_evaluation_runs_with_such_a_sam_and_notices_new_weights(small_set, tmp_path, capsys):
    folder = small_sam("Sam2", tmp_path / "sam")
    options = ["--data_root", small_set, "--log_dir", tmp_path, "--oracle", "points"]
    args = [*map(str, options), "--sam_ckpt", folder]
    for said in ("written to", "answers are in", "answers of another run"):
        if said == "answers of another run":
            small_sam("Sam2", tmp_path / "sam")
        evaluation.main(evaluation.get_args(args))
        assert said in capsys.readouterr().out
    metrics = json.loads((tmp_path / "eval/metrics.json").read_text())
    assert metrics["protocol"]["sam"] == "sam" and metrics["n"] > 0


def test_a_missing_file_is_no_hub_name_and_a_hub_name_is_shown_whole(small_set, tmp_path):
    for missing in ("weights/sam_vit_h.pth", "runs/sam", "weights/sam.safetensors"):
        with pytest.raises(InputError, match="No such file"):
            sampler.Segmenter(missing)
    args = evaluation.get_args(["--sam_ckpt", "facebook/sam2.1-hiera-tiny"])
    assert evaluation.describe_run(args, "runs/grpo")["sam"] == "facebook/sam2.1-hiera-tiny"
