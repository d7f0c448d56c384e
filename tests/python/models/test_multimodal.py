"""A multimodal model: its text decoder is served, its vision tower keeps its own attention."""

from __future__ import annotations

import torch
from icecache import IceRuntime
from tiny import build, dense_and_ours, prompt
from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration

IMAGE = 96


def tiny_llava():
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = CLIPVisionConfig(**sizes, image_size=16, patch_size=8, projection_dim=16)
    text = build("llama").config
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, image_token_id=IMAGE))
    model.generation_config.eos_token_id = None
    return model.eval()


def test_a_text_decoder_with_a_vision_tower_gives_the_tokens_of_dense_attention():
    model, ids = tiny_llava(), prompt(1, 90).clamp(max=IMAGE - 1)
    ids[0, 10:14] = IMAGE  # (16 / 8)**2 patches
    pixels = torch.randn(1, 3, 16, 16)

    def use(model):
        inputs = {"attention_mask": torch.ones_like(ids), "pixel_values": pixels}
        return model.generate(ids, **inputs, max_new_tokens=20, do_sample=False)

    expected, got, stats = dense_and_ours(model, use)
    assert stats.pages_read > 0
    assert torch.equal(expected, got)


def test_wrapping_sets_the_attention_of_the_text_decoder_alone_and_unwrapping_gives_it_back():
    model = tiny_llava()

    def implementations():
        config = model.config
        return [c._attn_implementation for c in (config, config.vision_config, config.text_config)]

    before = implementations()
    with IceRuntime.wrap(model, dense_below=0):
        assert implementations() == [*before[:2], "icecache"]
    assert implementations() == before
