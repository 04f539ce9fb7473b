"""How the frozen UNet is held and run, so that it takes less memory or time."""

import torch
from torch import nn


def hold_unet(unet: nn.Module, cfg) -> None:
    """Hold and run the frozen UNet as --frozen-dtype nf4, --checkpointing, --channels-last and --compile ask.

    After the audio K and V were copied from it and before LoRA comes on top (QLoRA, Dettmers et al. 2023).
    """
    if cfg.frozen_dtype == "nf4":
        _to_nf4(unet)
    if cfg.checkpointing != "none":
        unet.enable_gradient_checkpointing()  # never the reentrant kind
        for block in [unet.mid_block, *unet.up_blocks] if cfg.checkpointing == "down" else ():
            for module in block.modules():
                module.gradient_checkpointing = False
    if cfg.channels_last:
        unet.to(memory_format=torch.channels_last)
    if cfg.compile:
        unet.compile()


def _to_nf4(unet: nn.Module) -> None:
    """Replace the linear layers of the attention blocks by bitsandbytes' Linear4bit with the same weights."""
    import bitsandbytes
    linears = {name: module for name, module in unet.named_modules()
               if isinstance(module, nn.Linear) and "attentions." in name}
    for name, linear in linears.items():
        # Linear4bit draws weights that nobody needs. LoRA's draw must be that of a run without NF4.
        with torch.random.fork_rng(devices=[]):
            held = bitsandbytes.nn.Linear4bit(
                linear.in_features, linear.out_features, linear.bias is not None,
                compute_dtype=torch.bfloat16, quant_type="nf4")
        held.load_state_dict(linear.state_dict())
        held.requires_grad_(False)
        # On a CPU with AVX512-BF16 a pass in eval mode would pack the weight for a kernel without gradients.
        held.support_avx512bf16_for_cpu = False
        unet.set_submodule(name, held.to(linear.weight.device))  # which packs the weight
    unet.is_loaded_in_4bit = True  # what peft asks before it puts LoRA on a Linear4bit
