"""Files in and out. LPS, suffixes and headers end here; above, all is RAS mm on a :class:`medinr.space.Domain`."""

from medinr.io.channels import as_channels, read_channels, stack_channels
from medinr.io.files import atomic_path, existing_file, staged_folder, write_text
from medinr.io.images import ImageLike, as_image, read_image, read_labels, read_mask, write_image
from medinr.io.points import PointsSpace, check_points_inside, from_ras, read_points, to_ras, write_points
from medinr.io.transforms import read_displacement, sidecar_path, write_displacement

__all__ = [
    "ImageLike",
    "PointsSpace",
    "as_channels",
    "as_image",
    "atomic_path",
    "check_points_inside",
    "existing_file",
    "from_ras",
    "read_channels",
    "read_displacement",
    "read_image",
    "read_labels",
    "read_mask",
    "read_points",
    "sidecar_path",
    "stack_channels",
    "staged_folder",
    "to_ras",
    "write_displacement",
    "write_image",
    "write_points",
    "write_text",
]
