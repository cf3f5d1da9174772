"""Questions about images with answers and evidence boxes: reading them and batching them."""
