"""Pipeline parallelism: stages and schedules, the runtime, deferred weight gradients."""
