"""From a resolved configuration to a finished run: what it needs is opened, its workers start, it is watched, everything ends with it."""
