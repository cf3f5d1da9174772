"""Page pixels as the patches that the vision encoder takes, without the image processor's cost.

Gives what the Qwen2-VL image processor gives for a page that needs no resizing.
"""

from __future__ import annotations

import numpy as np
import torch

MEAN = np.array([0.48145466, 0.4578275, 0.40821073], dtype=np.float32)
DEVIATION = np.array([0.26862954, 0.26130258, 0.27577711], dtype=np.float32)
PATCH, MERGE, FRAMES = 14, 2, 2


def page_patches(pixels: np.ndarray) -> torch.Tensor:
    """Patches `(patches, 1176)` of uint8 pixels `(height, width, 3)`, in the merged order."""
    scaled = (pixels.astype(np.float32) / 255.0 - MEAN) / DEVIATION
    rows, columns = pixels.shape[0] // (PATCH * MERGE), pixels.shape[1] // (PATCH * MERGE)
    split = scaled.reshape(rows, MERGE, PATCH, columns, MERGE, PATCH, 3)
    patches = split.transpose(0, 3, 1, 4, 6, 2, 5).reshape(-1, 3, 1, PATCH * PATCH)
    return torch.from_numpy(np.repeat(patches, FRAMES, axis=2).reshape(len(patches), -1))
