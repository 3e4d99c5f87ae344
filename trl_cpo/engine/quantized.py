"""4-bit models that stay trainable through an evaluation."""

import torch


def keep_trainable(model: torch.nn.Module) -> None:
    """Keeps bitsandbytes from repacking 4-bit layers, for good, the first time they run in evaluation on some CPUs.

    On a CPU with AVX512-BF16 it then uses a kernel without a backward, and gradients no longer pass through the layer:
    after any evaluation a QLoRA run would go on with a gradient norm of zero (bitsandbytes 0.50.2). Elsewhere, and for
    models without such layers, this changes nothing.
    """
    for module in model.modules():
        if getattr(module, "support_avx512bf16_for_cpu", False):
            module.support_avx512bf16_for_cpu = False
