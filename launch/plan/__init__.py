"""The planner: memory and step time of a training job on a cluster, without a GPU."""
