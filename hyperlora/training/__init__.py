"""LightningModules, LightningDataModules and the ``train`` command.

What is released is a plain ``nn.Module``.
"""
