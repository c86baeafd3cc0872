"""Which loss, when, at what cost: the table that ``histill losses`` prints."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["GUIDE", "Advice"]


@dataclass(frozen=True)
class Advice:
    """One loss. ``weight`` is its published weight beside a cross-entropy of weight 1, where it has one."""

    name: str
    family: str
    use: str
    cost: str
    needs: str
    source: str
    weight: str


GUIDE: tuple[Advice, ...] = (
    Advice(
        "cross_entropy",
        "supervised",
        "the baseline of every comparison",
        "none",
        "labels",
        "Szegedy et al. 2016 (smoothing)",
        "1",
    ),
    Advice(
        "focal",
        "supervised",
        "classes of very different size, many easy images",
        "none",
        "labels",
        "Lin et al. 2017",
        "1 (gamma 2, alpha 0.25)",
    ),
    Advice(
        "kd",
        "response",
        "the first thing to try; standardize=True where the teacher's logits are far larger",
        "none",
        "the same classes",
        "Hinton et al. 2015; Sun et al. 2024",
        "0.9 beside 0.1 cross-entropy (T 4)",
    ),
    Advice(
        "soft_cross_entropy",
        "response",
        "DSNet's equation; as kd without T squared",
        "none",
        "the same classes",
        "Khan et al. 2022",
        "0.9 beside 0.1 cross-entropy (T 10)",
    ),
    Advice(
        "dkd",
        "response",
        "three classes and more, a teacher that is nearly always sure",
        "none",
        "the same classes, labels",
        "Zhao et al. 2022",
        "1 (alpha 1, beta 8, T 4; beta by teacher)",
    ),
    Advice(
        "dist",
        "response",
        "a teacher much stronger than the student; batches of 32 and more",
        "none",
        "the same classes",
        "Huang et al. 2022",
        "1 (beta 2, gamma 2, T 4)",
    ),
    Advice(
        "nkd",
        "response",
        "as dkd, with less to tune",
        "none",
        "the same classes, labels",
        "Yang et al. 2023",
        "1 (gamma 1.5, T 1)",
    ),
    Advice(
        "hint",
        "feature",
        "teacher of another task or without a head; maps of the same size",
        "1x1 convolutions",
        "the same shape, after a projection",
        "Romero et al. 2015",
        "100",
    ),
    Advice(
        "attention_transfer",
        "feature",
        "convolutional pairs of any width; findings that are small and local",
        "none",
        "feature maps",
        "Zagoruyko and Komodakis 2017",
        "1000",
    ),
    Advice(
        "VID",
        "feature",
        "as hint, where some of the teacher's channels cannot be matched",
        "three 1x1 convolutions",
        "feature maps",
        "Ahn et al. 2019",
        "1",
    ),
    Advice(
        "AB",
        "feature",
        "to initialise a student before it sees labels",
        "a 1x1 convolution; its own first phase",
        "features before the ReLU, of one size",
        "Heo et al. 2019",
        "alone, in the first phase",
    ),
    Advice(
        "ReviewKD",
        "feature",
        "the strongest feature loss here; networks with clear stages",
        "3x3 convolutions at every stage, about half a small student again",
        "features of all stages",
        "Chen et al. 2021",
        "5, risen over 20 epochs",
    ),
    Advice(
        "rkd_distance",
        "relation",
        "embeddings for retrieval; widths that differ",
        "B^2",
        "one vector per image",
        "Park et al. 2019",
        "25",
    ),
    Advice(
        "rkd_angle",
        "relation",
        "beside rkd_distance",
        "B^3, and B^2 vectors",
        "one vector per image",
        "Park et al. 2019",
        "50",
    ),
    Advice(
        "pkt",
        "relation",
        "a foundation model's embeddings without a head",
        "B^2",
        "one vector per image",
        "Passalis and Tefas 2018",
        "30000",
    ),
    Advice(
        "similarity",
        "relation",
        "teacher of another task; widths that differ",
        "B^2",
        "features of any shape",
        "Tung and Mori 2019",
        "3000",
    ),
    Advice(
        "correlation",
        "relation",
        "beside kd; widths that differ",
        "B^2",
        "one vector per image",
        "Peng et al. 2019",
        "0.003 (gamma 0.4, order 2)",
    ),
    Advice(
        "crd",
        "contrastive",
        "a foundation model's embeddings; large batches",
        "a projection, B^2",
        "one vector per image, of one width",
        "Tian et al. 2020 (in-batch form)",
        "0.8",
    ),
    Advice(
        "CRDMemory",
        "contrastive",
        "as crd, with small batches",
        "two projections, two banks of M x 128",
        "one vector per image, row numbers",
        "Tian et al. 2020",
        "0.8",
    ),
    Advice(
        "SSKD",
        "contrastive",
        "few labels; tissue that has no up or down",
        "four views of every image, two heads",
        "one vector per view",
        "Xu et al. 2020",
        "10, with 0.1 cross-entropy, 0.9 and 2.7 kd",
    ),
    Advice(
        "self_distillation",
        "exits",
        "a student that may stop early; with or without a teacher",
        "exits",
        "a network with exits",
        "cervical cells, equations 4 to 6",
        "lambda 0.03, T 3",
    ),
    Advice(
        "be_your_own_teacher",
        "exits",
        "no teacher at all",
        "exits",
        "a network with exits",
        "Zhang et al. 2019",
        "alpha 0.3, lambda 0.03, T 3",
    ),
    Advice(
        "dice",
        "dense",
        "masks of small structures, beside focal or cross-entropy",
        "none",
        "masks",
        "Milletari et al. 2016",
        "1",
    ),
)
"""One row for each loss of `histill.losses`."""
