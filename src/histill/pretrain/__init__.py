"""Self-supervised and supervised pretraining: what relational or cross-task distillation is compared with.

Losses, heads and masked transformers are lightly's (``pip install 'histill[pretrain]'``); here are the objectives
around them, the optimiser that their recipes ask for, and the mixing of images that supervised pretraining uses.
"""
