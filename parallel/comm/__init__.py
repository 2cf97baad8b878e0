"""Communication: the processes of a run, collectives that gradients flow through, and a watchdog for hangs."""
