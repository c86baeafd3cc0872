"""Which loss, when, at what cost: the table that ``histill losses`` prints."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

__all__ = ["GUIDE", "Advice", "table"]


@dataclass(frozen=True)
class Advice:
    """One loss.

    ``weight`` is its published weight beside a cross-entropy of weight 1, unless it says otherwise; for the feature,
    relation and contrastive losses that of the CIFAR-100 benchmark of Tian et al. 2020, where they are in it.
    """

    name: str
    family: str
    use: str
    cost: str
    needs: str
    source: str
    weight: str


GUIDE: tuple[Advice, ...] = (
    Advice(
        name="cross_entropy",
        family="supervised",
        use="the baseline of every comparison",
        cost="none",
        needs="labels",
        source="Szegedy et al. 2016 (smoothing)",
        weight="1",
    ),
    Advice(
        name="focal",
        family="supervised",
        use="classes of very different size, many easy images",
        cost="none",
        needs="labels",
        source="Lin et al. 2017",
        weight="1 (gamma 2, alpha 0.25)",
    ),
    Advice(
        name="kd",
        family="response",
        use="the first thing to try; standardize=True (not of two classes) where the teacher's logits are far larger",
        cost="none",
        needs="the same classes",
        source="Hinton et al. 2015; Sun et al. 2024",
        weight="0.9 beside 0.1 cross-entropy (T 4)",
    ),
    Advice(
        name="soft_cross_entropy",
        family="response",
        use="DSNet's equation; as kd without T squared",
        cost="none",
        needs="the same classes",
        source="Khan et al. 2022",
        weight="0.9 beside 0.1 cross-entropy (T 10)",
    ),
    Advice(
        name="dkd",
        family="response",
        use="three classes and more, a teacher that is nearly always sure",
        cost="none",
        needs="the same classes, labels",
        source="Zhao et al. 2022",
        weight="1 (alpha 1, beta 8, T 4; beta by teacher)",
    ),
    Advice(
        name="dist",
        family="response",
        use="a teacher much stronger than the student; batches of 32 and more",
        cost="none",
        needs="the same classes",
        source="Huang et al. 2022",
        weight="1 (beta 2, gamma 2, T 4)",
    ),
    Advice(
        name="nkd",
        family="response",
        use="as dkd, with less to tune",
        cost="none",
        needs="the same classes, labels",
        source="Yang et al. 2023",
        weight="1 (gamma 1.5, T 1)",
    ),
    Advice(
        name="hint",
        family="feature",
        use="teacher of another task or without a head; maps of the same size",
        cost="1x1 convolutions",
        needs="the same shape, after a projection",
        source="Romero et al. 2015",
        weight="100",
    ),
    Advice(
        name="attention_transfer",
        family="feature",
        use="convolutional pairs of any width; findings that are small and local",
        cost="none",
        needs="feature maps",
        source="Zagoruyko and Komodakis 2017",
        weight="1000",
    ),
    Advice(
        name="VID",
        family="feature",
        use="as hint, where some of the teacher's channels cannot be matched",
        cost="three 1x1 convolutions",
        needs="feature maps",
        source="Ahn et al. 2019",
        weight="1",
    ),
    Advice(
        name="AB",
        family="feature",
        use="to initialise a student before it sees labels",
        cost="a 1x1 convolution and a training phase of its own",
        needs="features before the ReLU, of one size",
        source="Heo et al. 2019",
        weight="alone, in the first phase",
    ),
    Advice(
        name="ReviewKD",
        family="feature",
        use="networks with clear stages, all of which should learn",
        cost="a 1x1 and a 3x3 convolution at every stage",
        needs="features of all stages",
        source="Chen et al. 2021",
        weight="5, risen over 20 epochs",
    ),
    Advice(
        name="rkd_distance",
        family="relation",
        use="embeddings for retrieval; widths that differ",
        cost="B^2",
        needs="one vector per image",
        source="Park et al. 2019",
        weight="25",
    ),
    Advice(
        name="rkd_angle",
        family="relation",
        use="beside rkd_distance",
        cost="B^3, and B^2 vectors",
        needs="one vector per image",
        source="Park et al. 2019",
        weight="50",
    ),
    Advice(
        name="pkt",
        family="relation",
        use="a foundation model's embeddings without a head",
        cost="B^2",
        needs="one vector per image",
        source="Passalis and Tefas 2018",
        weight="30000",
    ),
    Advice(
        name="similarity",
        family="relation",
        use="teacher of another task; widths that differ",
        cost="B^2",
        needs="features of any shape",
        source="Tung and Mori 2019",
        weight="3000",
    ),
    Advice(
        name="correlation",
        family="relation",
        use="beside kd; widths that differ",
        cost="B^2",
        needs="one vector per image",
        source="Peng et al. 2019",
        weight="none settled (gamma 0.4, order 2)",
    ),
    Advice(
        name="cosine",
        family="embedding",
        use="a foundation model's embeddings, the first thing to try",
        cost="a linear map",
        needs="the same width, after a projection",
        source="Ranzinger et al. 2024 (AM-RADIO)",
        weight="1",
    ),
    Advice(
        name="smooth_l1",
        family="embedding",
        use="a vision transformer's tokens, some of which are outliers",
        cost="a 1x1 convolution",
        needs="the same shape, after a projection; a standardised teacher",
        source="Girshick 2015; Ranzinger et al. 2024",
        weight="1 beside cosine",
    ),
    Advice(
        name="Projection",
        family="embedding",
        use="several teachers, or an embedding whose first numbers are one by themselves",
        cost="a linear map for each teacher and width",
        needs="one vector per image",
        source="Kusupati et al. 2022, equation 1",
        weight="1",
    ),
    Advice(
        name="crd",
        family="contrastive",
        use="a foundation model's embeddings; large batches",
        cost="a projection, B^2",
        needs="one vector per image, of one width",
        source="after Tian et al. 2020",
        weight="none published",
    ),
    Advice(
        name="CRDMemory",
        family="contrastive",
        use="as crd, with small batches",
        cost="two projections, two banks of M x 128",
        needs="one vector per image, row numbers",
        source="Tian et al. 2020",
        weight="0.8",
    ),
    Advice(
        name="SSKD",
        family="contrastive",
        use="few labels; tissue that has no up or down",
        cost="four views of every image, two heads",
        needs="one vector per view",
        source="Xu et al. 2020",
        weight="10, with 0.1 cross-entropy, 0.9 and 2.7 kd",
    ),
    Advice(
        name="self_distillation",
        family="exits",
        use="a student that may stop early; with or without a teacher",
        cost="the exits",
        needs="a network with exits",
        source="cervical cells, equations 4 to 6",
        weight="lambda 0.03, T 3",
    ),
    Advice(
        name="be_your_own_teacher",
        family="exits",
        use="no teacher at all",
        cost="the exits",
        needs="a network with exits",
        source="Zhang et al. 2019",
        weight="alpha 0.3, lambda 0.03, T 3",
    ),
    Advice(
        name="dice",
        family="dense",
        use="masks of small structures, beside focal or cross-entropy",
        cost="none",
        needs="masks",
        source="Milletari et al. 2016",
        weight="1",
    ),
    Advice(
        name="star_loss",
        family="dense",
        use="a segmenter of nuclei that touch, to be a teacher",
        cost="the targets of star_distances",
        needs="masks with a number per nucleus",
        source="Schmidt et al. 2018",
        weight="1, the distances in it 0.2",
    ),
)
"""One row for each loss of `histill.losses`."""


def table() -> str:
    """The guide as text: under each family its losses, with use on one line and the small print on the next."""
    width = max(len(row.name) for row in GUIDE) + 4
    lines: list[str] = []
    for family, rows in itertools.groupby(GUIDE, key=lambda row: row.family):
        lines.append(f"\n{family}" if lines else family)
        for row in rows:
            lines.append(f"{'  ' + row.name:<{width}}{row.use}")
            lines.append(" " * width + f"needs {row.needs}; costs {row.cost}; weight {row.weight}; {row.source}")
    return "\n".join(lines)
