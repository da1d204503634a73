"""A node of a cluster: where Ray's own start-up is changed, and by whom."""
