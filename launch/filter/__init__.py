"""The verb `filter`: its configuration, its processes, and the ablation of a filter."""
