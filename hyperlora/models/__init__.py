"""Networks that predict LoRAs: ``ImageFeatures`` in, ``LoraWeights`` out. They know neither diffusers nor timm."""
