"""The 1x1 convolutions of KD_ConvNeXt (Zheng et al., Front. Genet. 2023, 14:1254435)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from histill.errors import BadInput

__all__ = ["Regressors"]


class Regressors(nn.ModuleList):
    """Bring each of the student's features to the width of the teacher's; used in training only.

    Args:
        student_channels, teacher_channels: Channels of each pair of features, in order.

    Raises:
        BadInput: Lists of different lengths.
    """

    def __init__(self, student_channels: Sequence[int], teacher_channels: Sequence[int]) -> None:
        if len(student_channels) != len(teacher_channels):
            raise BadInput(
                f"the student has {len(student_channels)} features and the teacher {len(teacher_channels)}: "
                "name as many of both"
            )
        super().__init__(nn.Conv2d(ci, co, 1) for ci, co in zip(student_channels, teacher_channels, strict=True))

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """``(B, C_student, H, W)`` each -> ``(B, C_teacher, H, W)`` each."""
        return [regressor(feature) for regressor, feature in zip(self, features, strict=True)]
