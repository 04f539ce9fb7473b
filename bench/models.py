"""Models of real size with random weights, for what needs their shapes and not their knowledge."""

from __future__ import annotations

import torch


def make_sd15(folder) -> None:
    """Stable Diffusion 1.5 and larger_clap's shapes from their published configs, with random weights."""
    from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import (
        ClapConfig,
        ClapFeatureExtractor,
        ClapModel,
        CLIPTextConfig,
        CLIPTextModel,
        CLIPTokenizer,
    )
    torch.manual_seed(0)
    unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
    vae = AutoencoderKL(block_out_channels=(128, 256, 512, 512), down_block_types=("DownEncoderBlock2D",) * 4,
                        up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=2, sample_size=512)
    tokenizer = CLIPTokenizer(model_max_length=77).train_new_from_iterator(["a photo of a dog barking"], 400)
    text_encoder = CLIPTextModel(CLIPTextConfig(
        vocab_size=49408, hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
        projection_dim=768, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id))
    scheduler = PNDMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True,
                              set_alpha_to_one=False, steps_offset=1)
    StableDiffusionPipeline(vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet, scheduler=scheduler,
                            safety_checker=None, feature_extractor=None, requires_safety_checker=False
                            ).save_pretrained(folder / "base")
    audio = dict(spec_size=256, num_mel_bins=64, patch_embeds_hidden_size=128, hidden_size=1024, depths=[2, 2, 12, 2],
                 num_attention_heads=[4, 8, 16, 32], enable_fusion=False)
    ClapModel(ClapConfig(text_config=dict(num_hidden_layers=1), audio_config=audio, projection_dim=512)).save_pretrained(
        folder / "clap")
    ClapFeatureExtractor(feature_size=64, sampling_rate=48000, hop_length=480, max_length_s=10, fft_window_size=1024,
                         truncation="rand_trunc", padding="repeatpad", frequency_min=50, frequency_max=14000
                         ).save_pretrained(folder / "clap")
    assert sum(p.numel() for p in unet.parameters()) == 859_520_964
