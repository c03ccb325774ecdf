"""Files in and out. LPS, suffixes and headers end here; above, all is RAS mm on a :class:`medinr.space.Domain`."""

from medinr.io.channels import as_channels, read_channels, stack_channels
from medinr.io.dicom import is_dicom, series_under
from medinr.io.exports import FORMATS, check_formats, write_transforms
from medinr.io.files import atomic_path, existing_file, existing_source, staged_folder, write_text
from medinr.io.images import ImageLike, as_image, read_domain, read_image, read_labels, read_mask, write_image
from medinr.io.itk_transforms import ItkTransform, is_itk_transform, write_composite
from medinr.io.learn2reg import check_learn2reg_grids, is_learn2reg, read_learn2reg, write_learn2reg
from medinr.io.listing import replace_listing
from medinr.io.matrices import read_matrix, write_itk_affine
from medinr.io.points import PointsSpace, check_points_inside, from_ras, read_points, to_ras, write_points
from medinr.io.starts import linear_only, read_start, residual_displacement
from medinr.io.transforms import read_displacement, sidecar_path, write_displacement

__all__ = [
    "FORMATS",
    "ImageLike",
    "ItkTransform",
    "PointsSpace",
    "as_channels",
    "as_image",
    "atomic_path",
    "check_formats",
    "check_learn2reg_grids",
    "check_points_inside",
    "existing_file",
    "existing_source",
    "from_ras",
    "is_dicom",
    "is_itk_transform",
    "is_learn2reg",
    "linear_only",
    "read_channels",
    "read_displacement",
    "read_domain",
    "read_image",
    "read_labels",
    "read_learn2reg",
    "read_mask",
    "read_matrix",
    "read_points",
    "read_start",
    "replace_listing",
    "residual_displacement",
    "series_under",
    "sidecar_path",
    "stack_channels",
    "staged_folder",
    "to_ras",
    "write_composite",
    "write_displacement",
    "write_image",
    "write_itk_affine",
    "write_learn2reg",
    "write_points",
    "write_text",
    "write_transforms",
]
