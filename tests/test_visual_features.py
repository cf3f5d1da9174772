"""Encoded visuals can be picked and repeated, image by image."""

import torch

from modeling_glimpseprune.visual_features import ImageView, VisualFeatures


def view_of(tokens: torch.Tensor, number: int) -> ImageView:
    """A view in one row, at an image's first placeholders."""
    length = len(tokens)
    geometry, grid = torch.full((length, 6), number), torch.tensor([1, 1, length])
    return ImageView([tokens], geometry, grid, torch.arange(length))


def features_of(*lengths: int) -> VisualFeatures:
    """Images filled with their number; the last placeholder of each is no visual token."""
    images = [torch.full((length, 4), float(i)) for i, length in enumerate(lengths)]
    views = [[view_of(image[:-1], number)] for number, image in enumerate(images)]
    return VisualFeatures(pooler_output=images, glimpse_views=views)


def numbers_of(features: VisualFeatures) -> list[int]:
    of_views = [int(views[0].geometry[0, 0]) for views in features.glimpse_views]
    assert of_views == [int(image[0, 0]) for image in features.pooler_output]
    return of_views


def test_sizes_count_placeholders_and_visual_tokens():
    assert features_of(3, 5).sizes == [(3, 2), (5, 4)]


def test_images_are_picked_as_often_as_they_are_named():
    assert numbers_of(features_of(3, 5, 4).select([2, 0, 2])) == [2, 0, 2]


def test_a_rows_images_are_repeated_together():
    """Two images, none, then one, for three beams."""
    repeated = features_of(3, 5, 4).repeat_rows([8, 0, 4], 3)
    assert numbers_of(repeated) == [0, 1, 0, 1, 0, 1, 2, 2, 2]
