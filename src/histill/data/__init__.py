"""Images -> table -> split -> packed pixels -> views."""

from histill.data.images import Images, read_images, read_unlabelled
from histill.data.masks import read_masks
from histill.data.packed import Packed, pack
from histill.data.splits import split
from histill.data.unpack import unpack
from histill.data.views import Augment

__all__ = ["Augment", "Images", "Packed", "pack", "read_images", "read_masks", "read_unlabelled", "split", "unpack"]
