"""Losses: pure functions of tensors, student first and teacher second, and modules where a loss has weights."""

from histill.losses.contrastive import SSKD, CRDMemory, crd
from histill.losses.dense import dice
from histill.losses.embedding import Projection, cosine, smooth_l1
from histill.losses.exits import be_your_own_teacher, self_distillation
from histill.losses.feature import AB, VID, ReviewKD, attention_transfer, hint
from histill.losses.guide import GUIDE
from histill.losses.relation import correlation, pkt, rkd_angle, rkd_distance, similarity
from histill.losses.response import dist, dkd, kd, nkd, soft_cross_entropy
from histill.losses.star import star_loss
from histill.losses.supervised import cross_entropy, focal

__all__ = [
    "AB",
    "GUIDE",
    "SSKD",
    "VID",
    "CRDMemory",
    "Projection",
    "ReviewKD",
    "attention_transfer",
    "be_your_own_teacher",
    "correlation",
    "cosine",
    "crd",
    "cross_entropy",
    "dice",
    "dist",
    "dkd",
    "focal",
    "hint",
    "kd",
    "nkd",
    "pkt",
    "rkd_angle",
    "rkd_distance",
    "self_distillation",
    "similarity",
    "smooth_l1",
    "soft_cross_entropy",
    "star_loss",
]
