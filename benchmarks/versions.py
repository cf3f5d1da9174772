"""What a benchmark's figures were made with."""

import platform

import torch
import transformers


def versions() -> dict[str, object]:
    """Releases of the libraries and of Python, and the threads that PyTorch computes with."""
    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
    }
