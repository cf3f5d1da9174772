"""Many questions about many images, answered by one process or a cluster, and resumed where cut."""
