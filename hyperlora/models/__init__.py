"""Networks that predict LoRAs from ``ImageFeatures``: plain modules, without diffusers or timm."""
