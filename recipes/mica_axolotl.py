"""The plugin of axolotl.yaml. It must be importable: PYTHONPATH=. axolotl train axolotl.yaml"""

import mica.fast  # axolotl loads its plugins before it builds the adapter
from axolotl.integrations.base import BasePlugin

KERNELS = ("lora_qkv_kernel", "lora_o_kernel", "lora_mlp_kernel", "lora_embedding_kernel")


class MicaPlugin(BasePlugin):
    """Refuses axolotl's own LoRA kernels, and prints which path each layer takes."""

    def pre_model_load(self, cfg):
        if on := [name for name in KERNELS if cfg.get(name)]:
            raise ValueError(f"{', '.join(on)} would bypass the adapted layers: set all four to false")

    def post_model_load(self, cfg, model):
        print(mica.fast.explain(model))  # path kernel, reference or operators (CPU): this backend

    def post_train(self, cfg, model):
        print(mica.fast.explain(model))  # "not called": something bypasses the layer
