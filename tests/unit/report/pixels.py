"""Looking at pictures."""

from __future__ import annotations

from pathlib import Path

import matplotlib.image
import numpy as np
from matplotlib.colors import to_rgb


def pixels_of(path: Path, colour: str) -> int:
    """How many pixels of the PNG have exactly ``colour``."""
    image = matplotlib.image.imread(path)[..., :3]
    return int((np.abs(image - np.array(to_rgb(colour))) < 0.004).all(-1).sum())
