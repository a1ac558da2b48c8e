"""Pure logic: placement plan, dispatch, step plan. No processes, no clocks."""
