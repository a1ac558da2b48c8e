"""A run's folder: the lock of the driver that owns it, its checkpoints, resuming from one, exporting one."""
